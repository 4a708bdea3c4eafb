"""Captioned pictures that sana-nano is trained and scored on: one emoji on a plain background.

A scene is (subject, background colour, place, size). The glyphs come from Debian's fonts-noto-color-emoji; captions
are English, Chinese, or nothing but emoji. `HELD_OUT` names 500 combinations that training never draws.
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the one size of the font's bitmaps
SIDE = 256  # pixels of a picture
SIZES = tuple(range(88, 125, 2))  # pixels of a subject's longer side; even, so that it centres on a whole pixel
LANGUAGES = ("en", "zh", "emoji")


@dataclass(frozen=True)
class Subject:
    """What a scene shows, and its names."""

    emoji: str
    name: str
    zh: str
    measure: str = "个"  # the Chinese measure word: 一只熊猫


@dataclass(frozen=True)
class Background:
    """A plain colour, its names, and the emoji that stand for it."""

    name: str
    zh: str
    square: str
    circle: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """Where the subject's centre is, in pixels; multiples of the autoencoder's 32, so that a glyph has few phases."""

    name: str
    phrases: tuple[str, ...]
    zh: tuple[str, ...]
    arrow: str
    x: int
    y: int


SUBJECTS = (
    Subject("🐼", "panda", "熊猫", "只"),
    Subject("🐱", "cat", "猫", "只"),
    Subject("🐶", "dog", "狗", "只"),
    Subject("🦊", "fox", "狐狸", "只"),
    Subject("🐸", "frog", "青蛙", "只"),
    Subject("🦁", "lion", "狮子", "只"),
    Subject("🐰", "rabbit", "兔子", "只"),
    Subject("🐧", "penguin", "企鹅", "只"),
    Subject("🐙", "octopus", "章鱼", "只"),
    Subject("🦋", "butterfly", "蝴蝶", "只"),
    Subject("🐠", "fish", "鱼", "条"),
    Subject("🐳", "whale", "鲸鱼", "头"),
    Subject("🐢", "turtle", "乌龟", "只"),
    Subject("🐞", "ladybug", "瓢虫", "只"),
    Subject("🐌", "snail", "蜗牛", "只"),
    Subject("🐷", "pig", "猪", "头"),
    Subject("🍎", "apple", "苹果"),
    Subject("🍌", "banana", "香蕉", "根"),
    Subject("🍓", "strawberry", "草莓", "颗"),
    Subject("🍉", "watermelon", "西瓜", "块"),
    Subject("🍕", "pizza", "披萨", "块"),
    Subject("🍔", "hamburger", "汉堡"),
    Subject("🍦", "ice cream", "冰淇淋"),
    Subject("🎂", "cake", "蛋糕"),
    Subject("🍩", "donut", "甜甜圈"),
    Subject("🥕", "carrot", "胡萝卜", "根"),
    Subject("🍄", "mushroom", "蘑菇"),
    Subject("🌵", "cactus", "仙人掌", "棵"),
    Subject("🌻", "sunflower", "向日葵", "朵"),
    Subject("🌷", "tulip", "郁金香", "朵"),
    Subject("🌲", "tree", "树", "棵"),
    Subject("⭐", "star", "星星", "颗"),
    Subject("🌙", "moon", "月亮"),
    Subject("🌞", "sun", "太阳"),
    Subject("⛄", "snowman", "雪人"),
    Subject("👻", "ghost", "幽灵"),
    Subject("🤖", "robot", "机器人"),
    Subject("🚗", "car", "汽车", "辆"),
    Subject("🚌", "bus", "公交车", "辆"),
    Subject("🚀", "rocket", "火箭", "枚"),
    Subject("⛵", "sailboat", "帆船", "艘"),
    Subject("🚜", "tractor", "拖拉机", "台"),
    Subject("🎈", "balloon", "气球"),
    Subject("☔", "umbrella", "雨伞", "把"),
    Subject("🔔", "bell", "铃铛"),
    Subject("⏰", "clock", "闹钟"),
    Subject("🎁", "gift", "礼物", "份"),
    Subject("🎸", "guitar", "吉他", "把"),
)

# Chosen so that no subject disappears: yellow is paler than the star, green darker than the tree.
BACKGROUNDS = (
    Background("red", "红色", "🟥", "🔴", (180, 20, 40)),
    Background("orange", "橙色", "🟧", "🟠", (245, 130, 30)),
    Background("yellow", "黄色", "🟨", "🟡", (255, 240, 120)),
    Background("green", "绿色", "🟩", "🟢", (20, 115, 65)),
    Background("blue", "蓝色", "🟦", "🔵", (45, 100, 220)),
    Background("purple", "紫色", "🟪", "🟣", (130, 60, 180)),
    Background("white", "白色", "⬜", "⚪", (250, 250, 250)),
    Background("black", "黑色", "⬛", "⚫", (25, 25, 25)),
)

PLACES = (
    Place("left", ("on the left", "on the left side"), ("左边", "左侧"), "⬅️", 64, 128),
    Place("right", ("on the right", "on the right side"), ("右边", "右侧"), "➡️", 192, 128),
    Place("top", ("at the top", "on the top side"), ("上方", "顶部"), "⬆️", 128, 64),
    Place("bottom", ("at the bottom", "on the bottom side"), ("下方", "底部"), "⬇️", 128, 192),
    Place("center", ("in the center", "in the middle"), ("中间", "中央"), "⏺️", 128, 128),
)


@dataclass(frozen=True)
class Scene:
    """One picture's contents. `size` is the longer side of the subject in pixels, one of SIZES."""

    subject: Subject
    background: Background
    place: Place
    size: int


def _held_out() -> tuple[Scene, ...]:
    """500 combinations: every subject occurs 10 or 11 times, every background 62 or 63 times, every place 100 times.

    In each round through the subjects these have moved on by one against the pairs of background and place, of which
    there are 8 x 5 and which repeat every 40: so no combination occurs twice. They are shuffled, so that any part of
    them is mixed. The sizes only matter where the pictures themselves are wanted.
    """
    order = random.Random(2024)
    subjects, backgrounds, places = (order.sample(table, len(table)) for table in (SUBJECTS, BACKGROUNDS, PLACES))
    combinations = []
    for number in range(500):
        round_number, seat = divmod(number, len(subjects))
        combinations.append(
            Scene(
                subjects[(seat + round_number) % len(subjects)],
                backgrounds[number % len(backgrounds)],
                places[number % len(places)],
                SIZES[number % len(SIZES)],
            )
        )
    order.shuffle(combinations)
    return tuple(combinations)


HELD_OUT = _held_out()
_HELD_OUT_COMBINATIONS = frozenset((scene.subject, scene.background, scene.place) for scene in HELD_OUT)


def train_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene uniformly from all that are not held out."""
    while True:
        subject = SUBJECTS[rng.integers(len(SUBJECTS))]
        background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        place = PLACES[rng.integers(len(PLACES))]
        if (subject, background, place) not in _HELD_OUT_COMBINATIONS:
            return Scene(subject, background, place, SIZES[rng.integers(len(SIZES))])


@cache
def _font() -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(FONT, FONT_SIZE)
    except OSError as error:
        raise FileNotFoundError(
            f"The emoji font {FONT} could not be read ({error}). sana-nano's scenes are drawn from the Debian package "
            "fonts-noto-color-emoji: install it with `apt-get install fonts-noto-color-emoji`."
        ) from error


@cache
def emoji_bitmap(emoji: str) -> Image.Image:
    """The font's bitmap as RGBA, cropped to what can be seen."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE // 4, FONT_SIZE // 4), emoji, font=_font(), embedded_color=True)
    return canvas.crop(canvas.getbbox())


@cache
def glyph(subject: Subject, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The subject alone, its longer side `size` pixels, both sides even.

    Returns (colour [h, w, 3] premultiplied by alpha, in 0..255; transparency [h, w, 1] in 0..256), both uint16: on
    a background b it looks like `colour + transparency * b / 256`. The arrays are shared and read-only.
    """
    bitmap = emoji_bitmap(subject.emoji)
    scale = size / max(bitmap.size)
    width, height = (2 * round(side * scale / 2) for side in bitmap.size)
    rgba = np.asarray(bitmap.resize((width, height), Image.Resampling.LANCZOS)).astype(np.uint32)
    alpha = rgba[..., 3:]
    colour = ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint16)
    transparency = (((255 - alpha) * 256 + 127) // 255).astype(np.uint16)
    colour.flags.writeable = transparency.flags.writeable = False
    return colour, transparency


def subject_box(scene: Scene) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of the subject in pixels, the ends exclusive."""
    height, width = glyph(scene.subject, scene.size)[0].shape[:2]
    x0, y0 = scene.place.x - width // 2, scene.place.y - height // 2
    return x0, y0, x0 + width, y0 + height


@cache
def _plain(background: Background) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), background.rgb, np.uint8)


def draw(scene: Scene) -> np.ndarray:
    """The scene's picture, uint8 [256, 256, 3] RGB. Raises FileNotFoundError where the font is missing."""
    colour, transparency = glyph(scene.subject, scene.size)
    x0, y0, x1, y1 = subject_box(scene)
    picture = _plain(scene.background).copy()
    shining_through = transparency * np.array(scene.background.rgb, np.uint16) + 128 >> 8
    picture[y0:y1, x0:x1] = colour + shining_through
    return picture


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _english(scene: Scene) -> list[str]:
    subject, colour, place = scene.subject, scene.background.name, scene.place
    background = f"{_article(colour)} background"
    captions = []
    for bare, noun in ((subject.name, _article(subject.name)), (subject.emoji, f"a {subject.emoji}")):
        for phrase in place.phrases:
            captions += [
                f"{noun} {phrase} of {background}",
                f"{background} with {noun} {phrase}",
                f"{noun} {phrase}, {colour} background",
            ]
        captions += [f"{bare}, {place.name}, {colour} background", f"{bare} {place.name} {colour}"]
    return captions


def _chinese(scene: Scene) -> list[str]:
    subject, colour = scene.subject, scene.background.zh
    captions = []
    for bare, noun in (
        (subject.zh, f"一{subject.measure}{subject.zh}"),
        (subject.emoji, f"一个{subject.emoji}"),
    ):
        for place in scene.place.zh:
            captions += [
                f"{colour}背景{place}的{bare}",
                f"{noun}在{colour}背景的{place}",
                f"{colour}背景，{place}有{noun}",
                f"{bare}，{place}，{colour}背景",
            ]
    return captions


def _emoji(scene: Scene) -> list[str]:
    subject, arrow = scene.subject.emoji, scene.place.arrow
    captions = []
    for colour in (scene.background.square, scene.background.circle):
        for sign in (arrow, arrow.removesuffix("\N{VARIATION SELECTOR-16}")):  # keyboards differ in sending it
            captions += [f"{subject}{sign}{colour}", f"{colour}{sign}{subject}", f"{subject} {sign} {colour}"]
    return captions


def all_captions(scene: Scene) -> dict[str, list[str]]:
    """Every caption of the scene by language."""
    return {"en": _english(scene), "zh": _chinese(scene), "emoji": _emoji(scene)}


def caption(scene: Scene, language: str, rng: np.random.Generator) -> str:
    """One of the scene's captions in a language ("en", "zh" or "emoji"), drawn uniformly."""
    if language not in LANGUAGES:
        raise ValueError(f"There are no captions in language {language!r}; choose one of {', '.join(LANGUAGES)}.")
    captions = all_captions(scene)[language]
    return captions[rng.integers(len(captions))]
