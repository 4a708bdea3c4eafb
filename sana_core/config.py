"""What tells one Sana model from another: two frozen dataclasses and one table of presets each.

Sources: NVlabs/Sana `configs/` and `diffusion/model/nets/`, mit-han-lab/efficientvit `dc_ae.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SanaConfig:
    """Architecture of a Sana transformer, and the sampling defaults that its weights were trained for."""

    depth: int
    hidden_size: int
    num_cross_heads: int
    caption_channels: int = 2304  # width of Gemma-2-2b
    in_channels: int = 32  # latent channels
    head_dim: int = 32  # of the linear self-attention
    mlp_ratio: float = 2.5
    qk_norm: bool = False  # RMSNorm on q and k of both attentions: SANA-1.5 and Sprint
    guidance_embed: bool = False  # the guidance scale is an input: Sprint
    timestep_scale: float = 1.0  # the Sprint teachers divide the timestep by 1000
    pos_embed_base: int | None = None  # latent size that spans the position embedding; None: no position embedding
    pos_embed_interpolation: float = 1.0

    image_size: int = 1024  # pixels a side
    shift: float = 3.0  # of the flow schedule
    pag_layer: int | None = None  # block that perturbed-attention guidance perturbs; None: the middle one
    dtype: str = "bfloat16"  # that the published weights were trained in

    @property
    def perturbed_layer(self) -> int:
        """Index of the block that perturbed-attention guidance perturbs when the user names none."""
        return self.depth // 2 if self.pag_layer is None else self.pag_layer

    def perturbed_layers(self, layers: Sequence[int] | None = None) -> tuple[int, ...]:
        """Indices of the blocks that perturbed-attention guidance perturbs: those named, or the model's own for None.

        Raises:
            ValueError: no block is named, or one that the model does not have.
        """
        layers = (self.perturbed_layer,) if layers is None else tuple(layers)
        wrong = [layer for layer in layers if layer not in range(self.depth)]
        if wrong or not layers:
            raise ValueError(
                f"perturbed-attention guidance shall perturb the blocks {list(layers)}: expected one or more of 0 to "
                f"{self.depth - 1}, the blocks of this model. Its own choice is {self.perturbed_layer}"
            )
        return layers

    @property
    def clamps_attention(self) -> bool:
        """Whether self-attention is clamped to the range of float16.

        The 1.0 models were trained in float16 with this clamp and need it in every dtype (NVlabs/Sana before
        commit 92c7459); shapes cannot tell them from their bfloat16 siblings, which never reach the limit.
        """
        return not self.qk_norm


_SANA_600M = SanaConfig(depth=28, hidden_size=1152, num_cross_heads=16, pag_layer=14, dtype="float16")
_SANA_1600M = SanaConfig(depth=20, hidden_size=2240, num_cross_heads=20, pag_layer=8, dtype="float16")
_SANA_1600M_BF16 = replace(_SANA_1600M, dtype="bfloat16")
_SANA15_1600M = replace(_SANA_1600M_BF16, qk_norm=True)
_SPRINT_600M = replace(_SANA_600M, qk_norm=True, guidance_embed=True, dtype="bfloat16")
_SPRINT_1600M = replace(_SANA15_1600M, guidance_embed=True)

TRANSFORMERS: dict[str, SanaConfig] = {
    "Sana_600M_512px": replace(_SANA_600M, image_size=512),
    "Sana_600M_1024px": replace(_SANA_600M, shift=4.0),
    "Sana_1600M_512px": replace(_SANA_1600M, image_size=512),
    "Sana_1600M_512px_MultiLing": replace(_SANA_1600M, image_size=512),
    "Sana_1600M_1024px": _SANA_1600M,
    "Sana_1600M_1024px_MultiLing": _SANA_1600M,
    "Sana_1600M_1024px_BF16": _SANA_1600M_BF16,
    "Sana_1600M_2Kpx_BF16": replace(_SANA_1600M_BF16, image_size=2048, pos_embed_base=64),
    "Sana_1600M_4Kpx_BF16": replace(
        _SANA_1600M_BF16, image_size=4096, shift=6.0, pos_embed_base=128, pos_embed_interpolation=2.0
    ),
    "SANA1.5_1.6B_1024px": _SANA15_1600M,
    "SANA1.5_4.8B_1024px": replace(_SANA15_1600M, depth=60),
    "Sana_Sprint_0.6B_1024px": _SPRINT_600M,
    "Sana_Sprint_1.6B_1024px": _SPRINT_1600M,
    "Sana_Sprint_0.6B_1024px_teacher": replace(_SPRINT_600M, guidance_embed=False, timestep_scale=0.001),
    "Sana_Sprint_1.6B_1024px_teacher": replace(_SPRINT_1600M, guidance_embed=False, timestep_scale=0.001),
    "sana-nano": SanaConfig(
        depth=8, hidden_size=192, num_cross_heads=6, caption_channels=192, image_size=256, shift=2.0
    ),
}

# ControlNets: the transformer that they control, cut down to the blocks that they copy.
CONTROLNETS: dict[str, SanaConfig] = {
    "Sana_600M_1024px_ControlNet_HED": replace(TRANSFORMERS["Sana_600M_1024px"], depth=7),
    "Sana_1600M_1024px_BF16_ControlNet_HED": replace(_SANA_1600M_BF16, depth=7),
}


@dataclass(frozen=True)
class DCAEConfig:
    """Architecture of a deep-compression autoencoder. Each tuple has one entry per stage, from the pixels down."""

    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    encoder_depths: tuple[int, ...]  # 0 in the first stage: the first convolution changes resolution at once
    decoder_depths: tuple[int, ...]
    encoder_attention: tuple[bool, ...]  # EfficientViT blocks instead of residual blocks
    decoder_attention: tuple[bool, ...]
    multiscale: bool  # attention sees a 5x5-aggregated copy of q, k, v as well
    downsample: str  # "conv" or "pixel_unshuffle"
    upsample: str  # "interpolate" or "pixel_shuffle"
    decoder_batch_norm: tuple[bool, ...]  # batch norm and ReLU instead of RMS norm and SiLU
    decoder_out_act: str  # "relu" or "silu"
    scaling_factor: float  # latents times this have about unit deviation
    latent_channels: int = 32

    @property
    def spatial_compression(self) -> int:
        """Pixels a side that one latent position stands for."""
        return 2 ** (len(self.encoder_channels) - 1)


_WIDTHS = (128, 256, 512, 512, 1024, 1024, 2048, 2048)
_ATTENTION = (False, False, False, True, True, True, True, True)

_DCAE_SANA = DCAEConfig(
    encoder_channels=_WIDTHS[:6],
    decoder_channels=_WIDTHS[:6],
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
    encoder_attention=_ATTENTION[:6],
    decoder_attention=_ATTENTION[:6],
    multiscale=True,
    downsample="conv",
    upsample="interpolate",
    decoder_batch_norm=(False,) * 6,
    decoder_out_act="relu",
    scaling_factor=0.41407,
)


def _dcae_in(stages: int, latent_channels: int, scaling_factor: float) -> DCAEConfig:
    return DCAEConfig(
        encoder_channels=_WIDTHS[:stages],
        decoder_channels=_WIDTHS[:stages],
        encoder_depths=(0, 4, 8, 2, 2, 2, 2, 2)[:stages],
        decoder_depths=(0, 5, 10, 2, 2, 2, 2, 2)[:stages],
        encoder_attention=_ATTENTION[:stages],
        decoder_attention=_ATTENTION[:stages],
        multiscale=False,
        downsample="pixel_unshuffle",
        upsample="pixel_shuffle",
        decoder_batch_norm=tuple(stage < 3 for stage in range(stages)),
        decoder_out_act="relu",
        scaling_factor=scaling_factor,
        latent_channels=latent_channels,
    )


AUTOENCODERS: dict[str, DCAEConfig] = {
    "dc-ae-f32c32-sana-1.0": _DCAE_SANA,
    "dc-ae-f32c32-sana-1.1": _DCAE_SANA,
    "dc-ae-lite-f32c32-sana-1.1": replace(
        _DCAE_SANA,
        decoder_depths=(0, 3, 5, 4, 4, 4),
        decoder_attention=(False,) * 6,
        upsample="pixel_shuffle",
        decoder_out_act="silu",
    ),
    "dc-ae-f32c32-in-1.0": _dcae_in(6, 32, 0.3189),
    "dc-ae-f32c32-mix-1.0": _dcae_in(6, 32, 0.4552),
    "dc-ae-f64c128-in-1.0": _dcae_in(7, 128, 0.2889),
    "dc-ae-f64c128-mix-1.0": _dcae_in(7, 128, 0.4538),
    "dc-ae-f128c512-in-1.0": _dcae_in(8, 512, 0.4883),
    "dc-ae-f128c512-mix-1.0": _dcae_in(8, 512, 0.3620),
    "dc-ae-nano": replace(
        _DCAE_SANA,
        encoder_channels=(16, 32, 64, 128, 128, 128),
        decoder_channels=(16, 32, 64, 128, 128, 128),
        encoder_depths=(0, 2, 2, 2, 2, 2),
        decoder_depths=(0, 2, 2, 2, 2, 2),
        encoder_attention=(False, False, False, False, False, True),
        decoder_attention=(False, False, False, False, False, True),
        multiscale=False,
        downsample="pixel_unshuffle",
    ),
}
