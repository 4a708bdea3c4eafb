"""LoRA files for tests: random factors, and their keys as each trainer spells them."""

import torch

RANK = 3


def factors(model, modules, seed=5):
    """{module: (down, up)} of random layers; `model` is any network that has modules of these names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.get_submodule(name).weight.shape for name in modules}
    return {
        name: (
            torch.randn(RANK, *shape[1:], generator=generator) * shape[1:].numel() ** -0.5,
            torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) * 0.3,
        )
        for name, shape in shapes.items()
    }


def dotted(layers, prefix="", down="lora_A.weight", up="lora_B.weight", alpha=None):
    """Keys as PEFT, and all who keep the dots of a module's path, write them."""
    return _spelled(layers, lambda module: f"{prefix}{module}", down, up, alpha)


def flat(layers, prefix="lora_unet_", alpha=None):
    """Keys as kohya's scripts, and all who turn the dots into underscores, write them."""
    return _spelled(
        layers, lambda module: prefix + module.replace(".", "_"), "lora_down.weight", "lora_up.weight", alpha
    )


def _spelled(layers, stem, down, up, alpha):
    tensors = {}
    for module, factors in layers.items():
        tensors |= {f"{stem(module)}.{part}": tensor for part, tensor in zip((down, up), factors, strict=True)}
        if alpha is not None:
            tensors[f"{stem(module)}.alpha"] = torch.tensor(float(alpha))
    return tensors


def fused(layers):
    """The layers of diffusers' q, k and v as one layer each of the official qkv and kv_linear, exactly."""
    groups = {
        "attn.qkv": [f"attn1.to_{part}" for part in "qkv"],
        "cross_attn.q_linear": ["attn2.to_q"],
        "cross_attn.kv_linear": [f"attn2.to_{part}" for part in "kv"],
        "attn.proj": ["attn1.to_out.0"],
        "cross_attn.proj": ["attn2.to_out.0"],
        "mlp.inverted_conv.conv": ["ff.conv_inverted"],
        "mlp.depth_conv.conv": ["ff.conv_depth"],
        "mlp.point_conv.conv": ["ff.conv_point"],
    }
    blocks = sorted({module.split(".")[1] for module in layers})
    out = {}
    for block in blocks:
        for official, parts in groups.items():
            downs, ups = zip(*(layers[f"transformer_blocks.{block}.{part}"] for part in parts), strict=True)
            up = ups[0] if len(ups) == 1 else torch.block_diag(*ups)
            out[f"blocks.{block}.{official}"] = (torch.cat(downs), up)
    return out
