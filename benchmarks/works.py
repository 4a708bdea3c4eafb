"""The work of each row, and how each side does it at its best: the same weights, noise, features and noise levels."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.contest import OURS, PEER, Contest, Contestant
from benchmarks.networks import Place
from benchmarks.peers import (
    CAPTION,
    EMPTY,
    POSITIONS,
    KeptFeatures,
    Prompts,
    caption_mask,
    encode,
    flow_pipeline,
    normal,
    sprint_pipeline,
    text_pipeline,
)
from sana_core import SanaPipeline
from sana_core.config import SanaConfig
from sana_core.models.graph import GraphedCalls
from sana_core.models.packing import PLAIN_CALLS, PackedCalls
from sana_core.models.tiling import decode_tiled, encode_tiled
from sana_core.sampling import prepare_noise
from sana_core.text import CaptionCache

GUIDANCE, PAG, STEPS, SPRINT_STEPS = 4.5, 2.0, 20, 2
KEPT_CAPTION, KEPT_FEATURES = "the caption's keys and values", "text features"
NO_GRAPH = "ours, no graph"
KEPT_NEGATIVE = "text features of the negative prompt"

# Largest differences in float32, where the sides sum in different orders. The autoencoder's is a few times what
# diffusers is off from float64. A trained trajectory multiplies differences by some hundred: there, half a step of
# 8 bits is the most that no picture shows.
ONE_PASS, AUTOENCODER, TRAJECTORY, PICTURE = 2e-6, 1e-5, 1e-5, 0.5 / 255


def forward(place: Place, config: SanaConfig, pixels: int, batch: int, compiled: bool) -> Contest:
    """One pass through the transformer; the rows of the batch are a caption, the empty prompt, a caption."""
    pair = networks.transformers(config, place)
    side = pixels // 32
    x = normal(place, batch, config.in_channels, side, side, seed=1)
    timestep = torch.full((batch,), 500.0, device=place.device)
    context = normal(place, batch, POSITIONS, config.caption_channels, seed=2)
    mask = caption_mask(place, [CAPTION, EMPTY, CAPTION][:batch])
    kept = pair.ours.prepare_context(context, mask, absorb=True)
    packed = PackedCalls(pair.ours)
    if place.device.type == "cpu":
        for _ in range(PLAIN_CALLS + 1):  # so that what is judged is what is timed
            packed(x, timestep, kept)
    warm = KEPT_CAPTION if packed.weights is None else f"{KEPT_CAPTION}, packed weights"

    def peer(network: nn.Module, dtype: torch.dtype = place.dtype) -> Tensor:
        inputs = x.to(dtype), context.to(dtype), timestep
        return network(*inputs, encoder_attention_mask=mask, return_dict=False)[0]

    contestants = [
        Contestant(OURS, partial(GraphedCalls(pair.ours, packed), x, timestep, kept), (pair.ours,), warm),
        Contestant("ours, new caption", partial(pair.ours, x, timestep, context, mask), (pair.ours,)),
        Contestant(PEER, partial(peer, pair.theirs), (pair.theirs,)),
    ]
    if place.device.type == "cuda":
        contestants.append(Contestant(NO_GRAPH, partial(pair.ours, x, timestep, kept), (pair.ours,), KEPT_CAPTION))
    if compiled:
        contestants.append(_compiled(partial(peer, _compile(pair.theirs)), pair.theirs))

    def truth() -> Tensor:
        if place.is_exact:
            return peer(networks.float64(pair.theirs), torch.float64)
        return peer(networks.float32(pair.theirs), torch.float32)

    return Contest(contestants, truth=truth)


def sampling(place: Place, config: SanaConfig, pixels: int, dc_ae: str, pag: bool, compiled: bool) -> Contest:
    """Guided steps from given noise to latents."""
    pair, vae = networks.transformers(config, place), networks.autoencoders(dc_ae, place)
    features = KeptFeatures.random(place, config.caption_channels)
    options = _options(place, config, pixels) | {"output_type": "latent"}

    def peer(network: nn.Module, dtype: torch.dtype = place.dtype) -> Callable[[], Tensor]:
        pipe = flow_pipeline(network, vae.theirs, config, perturbs=pag)
        given = features.for_diffusers(dtype) | ({"pag_scale": PAG} if pag else {})
        return lambda: pipe(**options, **given, use_resolution_binning=False).images

    def ours(cuda_graph: bool) -> Callable[[], Tensor]:
        pipe = SanaPipeline(pair.ours, vae.ours, features, cuda_graph=cuda_graph)
        return partial(pipe, "a caption", **options, pag_guidance_scale=PAG if pag else 1.0)

    contestants = [
        Contestant(OURS, ours(True), (pair.ours,), KEPT_FEATURES),
        Contestant(PEER, peer(pair.theirs), (pair.theirs,), KEPT_FEATURES),
    ]
    if place.device.type == "cuda":
        contestants.append(Contestant(NO_GRAPH, ours(False), (pair.ours,), KEPT_FEATURES))
    if compiled:
        contestants.append(replace(_compiled(peer(_compile(pair.theirs)), pair.theirs), warm=KEPT_FEATURES))
    truth = _truth(place, lambda: peer(networks.float32(pair.theirs), torch.float32)())
    return Contest(contestants, TRAJECTORY, truth)


def sprint(place: Place, config: SanaConfig, pixels: int, dc_ae: str) -> Contest:
    """Sana-Sprint's steps from noise to latents."""
    pair, vae = networks.transformers(config, place), networks.autoencoders(dc_ae, place)
    features = KeptFeatures.random(place, config.caption_channels)
    options = _options(place, config, pixels) | {"output_type": "latent", "num_inference_steps": SPRINT_STEPS}
    del options["latents"]  # the generator is to give all noise
    pipe = SanaPipeline(pair.ours, vae.ours, features)

    def peer(network: nn.Module, dtype: torch.dtype = place.dtype) -> Callable[[], Tensor]:
        pipe = sprint_pipeline(network, vae.theirs)
        given = features.for_diffusers(dtype, guided=False) | {"use_resolution_binning": False}
        return lambda: pipe(**options, **given, generator=torch.Generator().manual_seed(1)).images

    contestants = [
        Contestant(OURS, partial(pipe, "a caption", **options, seed=1), (pair.ours,), KEPT_FEATURES),
        Contestant(PEER, peer(pair.theirs), (pair.theirs,), KEPT_FEATURES),
    ]
    truth = _truth(place, lambda: peer(networks.float32(pair.theirs), torch.float32)())
    return Contest(contestants, TRAJECTORY, truth)


def autoencoding(place: Place, name: str, pixels: int, way: str, compiled: bool) -> Contest:
    """`way` is "encode" or "decode", of one picture."""
    pair = networks.autoencoders(name, place)
    config = pair.ours.config
    side = pixels // config.spatial_compression
    latent = normal(place, 1, config.latent_channels, side, side, seed=1) / config.scaling_factor
    given = latent if way == "decode" else normal(place, 1, 3, pixels, pixels, seed=1).clamp(-1, 1)
    tiled = decode_tiled if way == "decode" else encode_tiled

    def peer(network: nn.Module, dtype: torch.dtype = place.dtype) -> Tensor:
        return getattr(network, way)(given.to(dtype), return_dict=False)[0]

    theirs = Contestant(PEER, partial(peer, pair.theirs), (pair.theirs,), prepare=pair.theirs.disable_tiling)
    contestants = [Contestant(OURS, partial(getattr(pair.ours, way), given), (pair.ours,)), theirs]
    if pixels >= 2048:
        contestants.append(Contestant("ours, tiled", partial(tiled, pair.ours, given), (pair.ours,)))
        contestants.append(replace(theirs, name="diffusers, tiled", prepare=pair.theirs.enable_tiling))
    if compiled:
        run = _compile(getattr(pair.theirs, way))
        contestants.append(_compiled(lambda: run(given, return_dict=False)[0], pair.theirs))

    def truth() -> Tensor:
        if pixels < 4096:
            return peer(networks.float32(pair.theirs), torch.float32)
        # Whole and in float32 it takes more than most GPUs have; our tiles give what the whole gives.
        return tiled(networks.float32(pair.ours), given.float())

    return Contest(contestants, AUTOENCODER, _truth(place, truth))


def text_features(place: Place, name: str) -> Contest:
    """Text features of a new prompt, with the instruction."""
    encoder = networks.text_encoder(name, place)
    ours, theirs = Prompts(), Prompts()

    def peer(model: nn.Module, prompts: Prompts) -> Callable[[], Tensor]:
        pipe = text_pipeline(encoder, model)
        return lambda: _attended(*encode(pipe, prompts.text))

    contestants = [
        Contestant(OURS, lambda: _attended(*encoder.encode(ours.text)), (encoder.model,), prepare=ours.turn),
        Contestant(PEER, peer(encoder.model, theirs), (encoder.model,), prepare=theirs.turn),
    ]
    truth = _truth(place, lambda: peer(networks.float32(encoder.model), theirs)())
    return Contest(contestants, ONE_PASS, truth)


def image(place: Place, config: SanaConfig, text: str, dc_ae: str, pixels: int, new: bool) -> Contest:
    """Prompt to pixels; features of a repeated prompt, and of the negative one, are kept by both sides."""
    pair, vae = networks.transformers(config, place), networks.autoencoders(dc_ae, place)
    encoder = networks.text_encoder(text, place)
    options = _options(place, config, pixels) | {"output_type": "pt"}
    ours, theirs = Prompts(), Prompts()
    pipe = SanaPipeline(pair.ours, vae.ours, CaptionCache(encoder))

    def peer(transformer: nn.Module, autoencoder: nn.Module, model: nn.Module) -> Callable[[], Tensor]:
        pipe, reader = flow_pipeline(transformer, autoencoder, config), text_pipeline(encoder, model)
        empty, kept = encode(reader, ""), None if new else encode(reader, theirs.text)

        def run() -> Tensor:
            features = KeptFeatures(kept or encode(reader, theirs.text), empty)
            given = features.for_diffusers(transformer.dtype)
            return pipe(**options, **given, use_resolution_binning=False).images

        return run

    warm = KEPT_NEGATIVE if new else KEPT_FEATURES
    parts = pair.theirs, vae.theirs, encoder.model
    contestants = [
        Contestant(OURS, lambda: pipe(ours.text, **options), parts, warm),
        Contestant(PEER, peer(*parts), parts, warm),
    ]
    if new:
        turns = ours.turn, theirs.turn
        contestants = [replace(one, prepare=turn) for one, turn in zip(contestants, turns, strict=True)]
    return Contest(contestants, PICTURE, _truth(place, lambda: peer(*map(networks.float32, parts))()))


def _options(place: Place, config: SanaConfig, pixels: int) -> dict:
    """What both pipelines are told."""
    side = pixels // 32
    noise = prepare_noise((1, config.in_channels, side, side), seed=1).to(place.device)
    size = {"height": pixels, "width": pixels}
    return size | {"latents": noise, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}


def _attended(embeds: Tensor, mask: Tensor) -> Tensor:
    """Features without those of the padding, which counts for nothing."""
    return embeds * mask[:, :, None]


def _truth(place: Place, work: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
    return None if place.is_exact else work


def _compile(work):
    return torch.compile(work, mode="max-autotune")


def _compiled(run: Callable[[], Tensor], network: nn.Module) -> Contestant:
    return Contestant(f"{PEER}, compiled", run, (network,))
