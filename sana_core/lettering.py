"""Text in pictures, in whichever fonts of the computer have its characters.

Pillow brings a font of its own, which knows Latin letters but no Chinese and no emoji. Those come from the fonts of the
system, character by character.
"""

import itertools
import logging
import unicodedata
from functools import cache

from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

SYSTEM_FONTS = (  # by file name, which Pillow looks up in the system's font folders; the first that is there counts
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "msyh.ttc",
    "simsun.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "NotoColorEmoji.ttf",
    "seguiemj.ttf",
    "Apple Color Emoji.ttc",
    "DejaVuSans.ttf",
)
BITMAP_SIZES = (109, 160)  # the only sizes of Noto's and Apple's emoji
NO_CHARACTER = "\U0010ffff"  # belongs to no script: every font shows its sign for what it lacks
INVISIBLE = "\N{VARIATION SELECTOR-16}\N{ZERO WIDTH JOINER}"

_missing_scripts: set[str] = set()  # those that were warned of


def wrap_text(text: str, size: int, width: int, lines: int) -> list[str]:
    """The text in at most that many lines of `width` pixels; what does not fit ends in an ellipsis.

    Breaks between words where there are any, and anywhere where they are too long, as in Chinese.
    """
    wrapped, line = [], ""
    for word in _words(text):
        if text_width(line + word.rstrip(), size) <= width:
            line += word
            continue
        wrapped, line = [*wrapped, line.rstrip()] if line.strip() else wrapped, word
        while text_width(line.rstrip(), size) > width and len(line) > 1 and len(wrapped) <= lines:
            fit = _fitting(line, size, width)
            wrapped, line = [*wrapped, line[:fit]], line[fit:]
    wrapped = [*wrapped, line.rstrip()] if line.strip() else wrapped
    if len(wrapped) <= lines:
        return wrapped
    last = wrapped[lines - 1]
    while last and text_width(last + "…", size) > width:
        last = last[:-1]
    return [*wrapped[: lines - 1], last + "…"]


def _fitting(text: str, size: int, width: int) -> int:
    """How many letters, at least one, `width` pixels hold."""
    ends = itertools.accumulate(text_width(character, size) for character in text)
    return max(1, sum(1 for _ in itertools.takewhile(lambda end: end <= width, ends)))


def text_width(text: str, size: int) -> int:
    """Width in pixels of one line."""
    return sum(_advance(character, size) for character in _visible(text))


def write_line(picture: Image.Image, text: str, x: int, y: int, size: int, colour: str = "black") -> None:
    """Write one line, its upper left corner at (x, y); `size` is that of the letters in pixels."""
    pen = ImageDraw.Draw(picture)
    for character in _visible(text):
        font = _font_of(character, size)
        if font.size == size:
            pen.text((x, y), character, colour, font, embedded_color=True)
        else:
            glyph = _bitmap(character, font, size)
            picture.paste(glyph, (x, y + (size - glyph.height) // 2 + size // 8), glyph)
        x += _advance(character, size)


def _words(text: str) -> list[str]:
    return [word + " " for word in text.split()]


def _visible(text: str) -> str:
    return "".join(character for character in text if character not in INVISIBLE)


@cache
def _advance(character: str, size: int) -> int:
    font = _font_of(character, size)
    return round(font.getlength(character) * size / font.size)


@cache
def _bitmap(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """The glyph of a font that has one size only, shrunk to the size of the text: RGBA."""
    canvas = Image.new("RGBA", (2 * font.size, 2 * font.size))
    ImageDraw.Draw(canvas).text((0, 0), character, font=font, embedded_color=True)
    glyph = canvas.crop(canvas.getbbox())
    scale = size / font.size
    return glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)


@cache
def _font_of(character: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has the character; Pillow's own where none has."""
    own = ImageFont.load_default(size)
    if character.isspace() or _has(own, character):
        return own
    for name in SYSTEM_FONTS:
        font = _system_font(name, size)
        if font is not None and _has(font, character):
            return font
    script = unicodedata.name(character, "").split(" ")[0]  # such as CJK, so that a sentence gives one warning
    if script not in _missing_scripts:
        _missing_scripts.add(script)
        logger.warning(
            "no font of this computer has %r: boxes stand for such letters. Noto fonts have nearly all; on Debian and "
            "Ubuntu: apt-get install fonts-noto-cjk fonts-noto-color-emoji",
            character,
        )
    return own


@cache
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    for possible in (size, *BITMAP_SIZES):
        try:
            return ImageFont.truetype(name, possible)
        except OSError:  # no such font, or none of that size
            continue
    return None


def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    # Pillow does not tell which characters a font has; a lacking one looks as that which no font has.
    mask, lacking = font.getmask(character), font.getmask(NO_CHARACTER)
    return (mask.size, bytes(mask)) != (lacking.size, bytes(lacking))
