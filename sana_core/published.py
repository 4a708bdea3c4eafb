"""The table of published files: nothing else is ever downloaded. Where each lies, and where it belongs."""

import difflib
from dataclasses import dataclass
from pathlib import PurePosixPath

from .config import AUTOENCODERS, TRANSFORMERS

HUB = "https://huggingface.co"
TEXT_ENCODER = "gemma_2_2b_it_elm_bf16"
AUTOENCODER = "dc-ae-f32c32-sana-1.1"  # the decoder that the authors improved after they had trained the models

_NVIDIA = "NVIDIA, stated in several ways, research use among them: read the LICENSE in its repository"
_GEMMA = "Gemma Terms of Use, https://ai.google.dev/gemma/terms"
_APACHE = "Apache-2.0, as the efficientvit repository says"
_BASE_SUFFIX = "_ControlNet_HED"


@dataclass(frozen=True)
class PublishedFile:
    """One file of a repository."""

    name: str  # what users ask for, and what it is saved as: some models are told apart by nothing else
    repository: str
    path: str  # in the repository
    size: int  # bytes, to 0.1 %: measured, or predicted from the shapes
    folder: str  # of ComfyUI's models
    licence: str
    needs: tuple[str, ...] = ()  # names of what it takes besides to draw a picture

    @property
    def filename(self) -> str:
        """Name of the file on the user's disk."""
        return self.name + PurePosixPath(self.path).suffix

    @property
    def page(self) -> str:
        """Where a person reads about it and accepts its licence."""
        return f"{HUB}/{self.repository}"

    @property
    def url(self) -> str:
        """The file itself."""
        return f"{self.page}/resolve/main/{self.path}"


# The diffusers twin is chosen where it has one file in the precision that the model was trained in: half the official
# file's bytes, and no pickle. The twin of the 4.8B model comes in shards, those of the teachers were not seen.
_TWINS = {
    "Sana_600M_512px": 1183558264,
    "Sana_600M_1024px": 1183558264,
    "Sana_1600M_512px": 3208971144,
    "Sana_1600M_512px_MultiLing": 3208971144,
    "Sana_1600M_1024px": 3208971144,
    "Sana_1600M_1024px_MultiLing": 3208971144,
    "Sana_1600M_1024px_BF16": 3208971544,
    "Sana_1600M_2Kpx_BF16": 3208971544,
    "Sana_1600M_4Kpx_BF16": 3208971544,
    "SANA1.5_1.6B_1024px": 3209339048,
    "Sana_Sprint_0.6B_1024px": 1187078584,
    "Sana_Sprint_1.6B_1024px": 3220530536,
}
_OFFICIAL = {
    "SANA1.5_4.8B_1024px": 18899718428,
    "Sana_Sprint_0.6B_1024px_teacher": 2375214166,
    "Sana_Sprint_1.6B_1024px_teacher": 6430670590,
}
_CONTROL_NETS = {  # each holds its base model too
    f"Sana_600M_1024px{_BASE_SUFFIX}": 2995300294,
    f"Sana_1600M_1024px_BF16{_BASE_SUFFIX}": 8772383638,
}
_AUTOENCODERS = {
    "dc-ae-f32c32-sana-1.1": 1249044836,
    "dc-ae-f32c32-sana-1.0": 1249044836,
    "dc-ae-lite-f32c32-sana-1.1": 1684758496,
    "dc-ae-f32c32-in-1.0": 1293517488,
    "dc-ae-f32c32-mix-1.0": 1293517488,
    "dc-ae-f64c128-in-1.0": 2707683144,
    "dc-ae-f64c128-mix-1.0": 2707683144,
    "dc-ae-f128c512-in-1.0": 4482834352,
    "dc-ae-f128c512-mix-1.0": 4482834352,
}


def _twin(name: str, size: int) -> PublishedFile:
    tag = ".fp16" if TRANSFORMERS[name].dtype == "float16" else ".bf16" if name.endswith("_BF16") else ""
    path = f"transformer/diffusion_pytorch_model{tag}.safetensors"
    return _transformer(name, f"Efficient-Large-Model/{name}_diffusers", path, size)


def _official(name: str, size: int) -> PublishedFile:
    return _transformer(name, f"Efficient-Large-Model/{name}", f"checkpoints/{name}.pth", size)


def _transformer(name: str, repository: str, path: str, size: int) -> PublishedFile:
    needs = (TEXT_ENCODER, AUTOENCODER)
    return PublishedFile(name, repository, path, size, "diffusion_models", _NVIDIA, needs)


def _control_net(name: str, size: int) -> PublishedFile:
    needs = (name.removesuffix(_BASE_SUFFIX), TEXT_ENCODER, AUTOENCODER)
    repository, path = f"Efficient-Large-Model/{name}", f"checkpoints/{name}.pth"
    return PublishedFile(name, repository, path, size, "controlnet", _NVIDIA, needs)


def _autoencoder(name: str, size: int) -> PublishedFile:
    path = "diffusion_pytorch_model.safetensors"
    return PublishedFile(name, f"mit-han-lab/{name}-diffusers", path, size, "vae", _APACHE)


_GEMMA_FILE = PublishedFile(  # the copy that asks for no account, with its tokenizer inside
    TEXT_ENCODER,
    "Comfy-Org/PixelDiT",
    f"text_encoders/{TEXT_ENCODER}.safetensors",
    5232958603,
    "text_encoders",
    _GEMMA,
)


def _table() -> dict[str, PublishedFile]:
    transformers = {name: _twin(name, size) for name, size in _TWINS.items()}
    transformers |= {name: _official(name, size) for name, size in _OFFICIAL.items()}
    ordered = [transformers[name] for name in TRANSFORMERS if name in transformers]
    control_nets = [_control_net(name, size) for name, size in _CONTROL_NETS.items()]
    autoencoders = [_autoencoder(name, size) for name, size in _AUTOENCODERS.items() if name in AUTOENCODERS]
    return {file.name: file for file in [*ordered, *control_nets, *autoencoders, _GEMMA_FILE]}


PUBLISHED = _table()


def find_published(name: str) -> PublishedFile:
    """The entry of a name, or of a repository, be it the official one or its diffusers twin.

    Raises ValueError, with names that are spelled alike, for anything else.
    """
    wanted = _fold(name)
    for file in PUBLISHED.values():
        if wanted in (_fold(file.name), _fold(file.repository)):
            return file
    known = {_fold(file): file for file in PUBLISHED}
    near = [known[match] for match in difflib.get_close_matches(wanted.rpartition("/")[2], known, n=3, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(near)}?" if near else "`download --list` shows what is in it."
    raise ValueError(f"{name!r} is not in the table of published files, and nothing else is downloaded. {hint}")


def _fold(name: str) -> str:
    """Without what the published spellings differ in: SANA and Sana, and the mark of a twin."""
    return name.lower().removesuffix("_diffusers").removesuffix("-diffusers")


def with_parts(file: PublishedFile) -> list[PublishedFile]:
    """The file, and what it takes besides to draw a picture."""
    return [file, *(PUBLISHED[name] for name in file.needs)]


def describe_size(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size:,} bytes"
