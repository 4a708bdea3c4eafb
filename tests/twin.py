"""Diffusers' networks with the weights of ours, carried over as files."""

from diffusers import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel

from sana_core.checkpoint import save_dc_ae, save_transformer
from sana_core.checkpoint.configuration import transformer_to_diffusers
from sana_core.checkpoint.keys import CONTROLNET_RULES, official_to_diffusers


def transformer(model, folder):
    """Diffusers' transformer, its cross-attention q/k norms at the authors' eps of 1e-6."""
    save_transformer(model, folder, layout="diffusers")
    return _with_the_authors_eps(SanaTransformer2DModel.from_pretrained(folder).eval())


def controlnet(net, base):
    """Diffusers' ControlNet, with copies of the embedders of the transformer that it controls."""
    embedders = {key: tensor for key, tensor in base.state_dict().items() if not key.startswith(("blocks", "final"))}
    theirs = SanaControlNetModel.from_config(controlnet_config(net.config)).eval()
    theirs.load_state_dict(official_to_diffusers({**embedders, **net.state_dict()}, CONTROLNET_RULES))
    return _with_the_authors_eps(theirs)


def controlnet_config(config) -> dict:
    """config.json of diffusers' ControlNet, which knows fewer entries than its transformer."""
    content = transformer_to_diffusers(config)
    for entry in ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale"):
        del content[entry]
    return content | {"_class_name": "SanaControlNetModel"}


def dc_ae(model, folder):
    """Diffusers' autoencoder."""
    save_dc_ae(model, folder, layout="diffusers")
    return AutoencoderDC.from_pretrained(folder).eval()


def _with_the_authors_eps(model):
    for block in model.transformer_blocks:
        for norm in (block.attn2.norm_q, block.attn2.norm_k):
            if norm is not None:
                norm.eps = 1e-6
    return model
