"""The table's rows: which work at which size, and how often it is timed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks import works
from benchmarks.contest import Contest, Row
from benchmarks.networks import DC_AE, DC_AE_NANO, NANO, Place
from sana_core.config import TRANSFORMERS, SanaConfig

SMALL, LARGE = "Sana_600M_1024px", "Sana_1600M_1024px_BF16"
SPRINTS = {"Sprint 0.6B": "Sana_Sprint_0.6B_1024px", "Sprint 1.6B": "Sana_Sprint_1.6B_1024px"}
GEMMA = "Gemma-2-2b"


def gpu_rows(place: Place) -> list[Row]:
    """All rows: the bars' first, those that compile for minutes last."""
    small, large = TRANSFORMERS[SMALL], TRANSFORMERS[LARGE]
    rows = []
    for text, config in (("1.6B", large), ("0.6B", small)):
        rows += [forward(place, text, config, pixels, batch) for pixels in (1024, 512) for batch in (2, 1, 3)]
        rows += [sampling(place, text, config, 1024, pag) for pag in (False, True)]
        rows += [image(place, text, config, GEMMA, DC_AE, 1024, new) for new in (True, False)]
    rows += [text_features(place, GEMMA)]
    rows += [autoencoding(place, DC_AE, pixels, way) for pixels in (1024, 512, 2048) for way in ("decode", "encode")]
    rows += [sprint(place, name, TRANSFORMERS[preset], 1024) for name, preset in SPRINTS.items()]
    for pixels, preset in ((2048, "Sana_1600M_2Kpx_BF16"), (4096, "Sana_1600M_4Kpx_BF16")):
        for text, config in (("1.6B", TRANSFORMERS[preset]), ("0.6B", small)):
            rows += [forward(place, text, config, pixels, batch) for batch in (2, 1, 3)]
    rows += [autoencoding(place, DC_AE, 4096, way) for way in ("decode", "encode")]
    rows += [forward(place, "1.6B", large, 1024, 2, compiled=True), sampling(place, "1.6B", large, 1024, compiled=True)]
    rows += [autoencoding(place, DC_AE, 1024, "decode", compiled=True)]
    rows += [forward(place, "0.6B", small, 1024, 2, compiled=True), sampling(place, "0.6B", small, 1024, compiled=True)]
    return rows


def cpu_rows(place: Place) -> list[Row]:
    """What a CPU does in minutes."""
    small = TRANSFORMERS[SMALL]
    rows = [forward(place, "0.6B", small, pixels, batch) for pixels in (512, 1024) for batch in (1, 2)]
    rows += [autoencoding(place, DC_AE, 512, way) for way in ("decode", "encode")]
    return [replace(row, rounds=7) for row in rows] + [replace(row, rounds=10) for row in quick_rows(place)]


def quick_rows(place: Place) -> list[Row]:
    """One of each kind, with sana-nano."""
    nano = TRANSFORMERS[NANO]
    sprinter = replace(nano, guidance_embed=True, qk_norm=True)
    return [
        forward(place, "nano", nano, 256, 2),
        *(sampling(place, "nano", nano, 256, pag) for pag in (False, True)),
        *(autoencoding(place, DC_AE_NANO, 256, way) for way in ("decode", "encode")),
        text_features(place, NANO),
        *(image(place, "nano", nano, NANO, DC_AE_NANO, 256, new) for new in (True, False)),
        sprint(place, "Sprint nano", sprinter, 256, DC_AE_NANO),
    ]


def forward(place: Place, name: str, config: SanaConfig, pixels: int, batch: int, compiled: bool = False) -> Row:
    """One forward pass of the transformer; batch 2 is a guided step, batch 3 one with perturbed attention as well."""
    title = f"forward, {name}, {pixels} px, batch {batch}"
    build = partial(works.forward, place, config, pixels, batch, compiled)
    return _row(title, build, pixels, compiled)


def sampling(
    place: Place, name: str, config: SanaConfig, pixels: int, pag: bool = False, compiled: bool = False
) -> Row:
    """20 guided steps from noise to latents, text features given."""
    title = f"{works.STEPS} steps{', PAG' if pag else ''}, {name}, {pixels} px"
    autoencoder = DC_AE_NANO if name == "nano" else DC_AE
    return _row(title, partial(works.sampling, place, config, pixels, autoencoder, pag, compiled), pixels, compiled)


def sprint(place: Place, name: str, config: SanaConfig, pixels: int, autoencoder: str = DC_AE) -> Row:
    """2 steps of Sana-Sprint from noise to latents, text features given."""
    build = partial(works.sprint, place, config, pixels, autoencoder)
    return _row(f"{works.SPRINT_STEPS} steps, {name}, {pixels} px", build, pixels)


def autoencoding(place: Place, name: str, pixels: int, way: str, compiled: bool = False) -> Row:
    """The autoencoder on one picture."""
    title = f"{'DC-AE nano' if name == 'dc-ae-nano' else 'DC-AE'} {way}, {pixels} px"
    return _row(title, partial(works.autoencoding, place, name, pixels, way, compiled), pixels, compiled)


def text_features(place: Place, name: str) -> Row:
    """Text features of a new prompt, with the instruction."""
    return _row(f"text features, {name}", partial(works.text_features, place, name))


def image(place: Place, name: str, config: SanaConfig, text: str, autoencoder: str, pixels: int, new: bool) -> Row:
    """Prompt to pixels in 20 guided steps."""
    title = f"whole image, {'new' if new else 'repeated'} prompt, {name}, {pixels} px"
    return _row(title, partial(works.image, place, config, text, autoencoder, pixels, new), pixels)


def _row(name: str, build: Callable[[], Contest], pixels: int = 0, compiled: bool = False) -> Row:
    return Row(name + (", compiled" if compiled else ""), build, rounds=5 if pixels >= 4096 else 20)
