"""Diffusers' networks with the weights of ours, carried over as files."""

from diffusers import AutoencoderDC, SanaTransformer2DModel

from sana_core.checkpoint import save_dc_ae, save_transformer


def transformer(model, folder):
    """Diffusers' transformer, its cross-attention q/k norms at the authors' eps of 1e-6."""
    save_transformer(model, folder, layout="diffusers")
    twin = SanaTransformer2DModel.from_pretrained(folder).eval()
    for block in twin.transformer_blocks:
        for norm in (block.attn2.norm_q, block.attn2.norm_k):
            if norm is not None:
                norm.eps = 1e-6
    return twin


def dc_ae(model, folder):
    """Diffusers' autoencoder."""
    save_dc_ae(model, folder, layout="diffusers")
    return AutoencoderDC.from_pretrained(folder).eval()
