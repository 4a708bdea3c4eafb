"""The MODEL gives what the plain transformer gives, takes ComfyUI's patches, and says what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_core.checkpoint import CheckpointError, load_transformer, save_transformer
from sana_core.config import TRANSFORMERS
from tests import tiny


@pytest.fixture(scope="module")
def path(tiny_models):
    return tiny_models / "diffusion_models" / "tiny.safetensors"


@pytest.fixture
def patcher(part, path):
    return part("nodes.adapter").load_model(path)


@pytest.fixture
def network(patcher):
    return patcher.model.diffusion_model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[0, 7:] = 0
    mask[1, 40:] = 0
    return {
        "x": torch.randn(2, 32, 3, 5, generator=generator),
        "timesteps": torch.tensor([999.7, 321.5]),
        "context": torch.randn(2, 300, tiny.CHANNELS, generator=generator),
        "attention_mask": mask,
    }


def close(actual, expected, tolerance=2e-6):
    return (actual - expected).abs().max() <= tolerance * expected.abs().max()


def reference(path, inputs, **changes):
    x, timestep, context, mask = {**inputs, **changes}.values()
    return load_transformer(path)(x, timestep, context, mask)


def test_is_the_plain_transformer(network, path, inputs):
    assert close(network(**inputs), reference(path, inputs))


def test_fractional_and_whole_timesteps(part, network, path, inputs):
    floored = network(**inputs, transformer_options={part("nodes.adapter").FLOOR_TIMESTEPS: True})
    assert close(floored, reference(path, inputs, timesteps=inputs["timesteps"].floor()))
    assert not close(floored, reference(path, inputs))


def test_a_model_that_divides_the_timestep_keeps_its_fractions(part, tmp_path, inputs):
    path = tmp_path / "teacher.safetensors"
    save_transformer(tiny.transformer(timestep_scale=0.001), path)
    adapter = part("nodes.adapter")
    network = adapter.load_model(path).model.diffusion_model
    floored = network(**inputs, transformer_options={adapter.FLOOR_TIMESTEPS: True})
    assert torch.equal(floored, network(**inputs))


def patched(patch, *names):
    kind, *block = names
    return {"patches_replace": {kind: {tuple(block): patch}}}


def test_attn1_of_the_middle_block_is_perturbed_attention(network, path, inputs):
    layer = tiny.TRANSFORMER.perturbed_layer
    out = network(**inputs, transformer_options=patched(lambda q, k, v, options: v, "attn1", "middle", 0))
    plain = load_transformer(path)
    attention = plain.blocks[layer].attn
    attention.forward = lambda x, *_: attention.proj(attention.qkv(x).chunk(3, dim=-1)[2])
    x, timestep, context, mask = inputs.values()
    assert close(out, plain(x, timestep, context, mask))
    assert not close(out, network(**inputs), 1e-4)
    assert close(network(**inputs), reference(path, inputs)), "a patch must not outlive its call"


def test_attn1_of_a_named_block(network, inputs):
    seen = []

    def patch(q, k, v, options):
        seen.append((options["block"], options["n_heads"], options["dim_head"], q.shape))
        return v

    network(**inputs, transformer_options=patched(patch, "attn1", "block", 0))
    assert seen == [(("block", 0), 2, 32, (2, 15, 64))]


@pytest.mark.parametrize("name", ["double_block", "block"])
def test_dit_patch_may_skip_or_run_a_block(network, path, inputs, name):
    skipped = network(**inputs, transformer_options=patched(lambda args, extra: args, "dit", name, 1))
    plain = load_transformer(path)
    plain.blocks[1].forward = lambda tokens, *_: tokens
    x, timestep, context, mask = inputs.values()
    assert close(skipped, plain(x, timestep, context, mask))
    run = network(**inputs, transformer_options=patched(lambda a, extra: extra["original_block"](a), "dit", name, 1))
    assert close(run, reference(path, inputs))


def test_attention_override_sees_the_cross_attention(network, inputs):
    calls = []

    def override(function, *args, **kwargs):
        calls.append(args[0].shape)
        return function(*args, **kwargs)

    network(**inputs, transformer_options={"optimized_attention_override": override})
    assert calls == [(2, 15, 64)] * tiny.TRANSFORMER.depth


def test_diffusion_model_wrapper_runs(network, comfy, inputs):
    import comfy.patcher_extension

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    options = {"wrappers": {kind: {"test": [lambda executor, *args, **kwargs: 2 * executor(*args, **kwargs)]}}}
    assert torch.equal(network(**inputs, transformer_options=options), 2 * network(**inputs))


def test_compiles(network, inputs):
    compiled = torch.compile(network, backend="eager", fullgraph=False)
    assert close(compiled(**inputs), network(**inputs))


@pytest.mark.parametrize("sampling", ["ModelSamplingSD3", "ModelSamplingAuraFlow", "ModelSamplingFlux"])
def test_timesteps_are_0_to_1000_under_every_model_sampling(patcher, comfy, sampling):
    import comfy_extras.nodes_model_advanced as nodes_model_advanced

    node = getattr(nodes_model_advanced, sampling)()
    model = (
        node.patch(patcher, 1.15, 0.5, 256, 256)[0]
        if "Flux" in sampling
        else getattr(node, node.FUNCTION)(patcher, 3.0)[0]
    )
    model = model[0] if isinstance(model, tuple) else model
    model.patch_model(device_to=torch.device("cpu"))
    sigma = torch.tensor([0.5])
    fed = model.model.process_timestep(model.model.model_sampling.timestep(sigma))
    model.unpatch_model()
    assert fed.item() == pytest.approx(500)


def conds(patcher, **kwargs):
    return patcher.model.extra_conds(noise=torch.zeros(1, 32, 2, 2), device=torch.device("cpu"), **kwargs)


def test_captions_without_mask_are_attended_to(patcher):
    out = conds(patcher, cross_attn=torch.zeros(1, 5, tiny.CHANNELS))
    assert "attention_mask" not in out
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    out = conds(patcher, cross_attn=torch.zeros(1, 5, tiny.CHANNELS), attention_mask=mask)
    assert out["attention_mask"].cond.tolist() == [[1, 1, 0, 1, 1]]
    out = conds(patcher, cross_attn=torch.zeros(1, 2, tiny.CHANNELS), attention_mask=mask)
    assert out["attention_mask"].cond.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "context, error, message",
    [
        (torch.zeros(1, 77, 768), ValueError, "width 768.*width 32"),
        (None, ValueError, "no text features"),
        (torch.full((1, 3, tiny.CHANNELS), float("nan")), FloatingPointError, "text encoder"),
    ],
)
def test_a_foreign_conditioning_is_refused(patcher, context, error, message):
    with pytest.raises(error, match=message):
        conds(patcher, cross_attn=context)


def test_sprint_is_refused_by_flow_samplers(part, tiny_models):
    sprint = part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "sprint.safetensors")
    with pytest.raises(ValueError, match="Use the Sana Sprint Sampler instead, or load a base model"):
        conds(sprint, cross_attn=torch.zeros(1, 3, tiny.CHANNELS))


def test_nan_is_named_by_its_stage(patcher):
    bad = torch.full((1, 32, 2, 2), float("inf"))
    with pytest.raises(FloatingPointError, match="Sana transformer"):
        patcher.model.process_latent_out(bad)
    with pytest.raises(FloatingPointError, match="latent to sample from"):
        patcher.model.process_latent_in(bad)


def test_latent_format(patcher, part):
    latent = patcher.model.latent_format
    assert (latent.latent_channels, latent.spacial_downscale_ratio, latent.scale_factor) == (32, 32, 0.41407)
    assert (len(latent.latent_rgb_factors), len(latent.latent_rgb_factors_bias)) == (32, 3)
    for preview in part("nodes.adapter")._PREVIEW_FACTORS.values():
        assert preview is None or [len(row) for row in [*preview["factors"], preview["bias"]]] == [3] * 33


def test_settings_come_from_the_preset(part):
    config = part("sana_core.config").TRANSFORMERS["Sana_1600M_4Kpx_BF16"]
    model_config = part("nodes.adapter").SanaModelConfig(config)
    assert model_config.sampling_settings == {"shift": 6.0}
    assert torch.float16 not in model_config.supported_inference_dtypes
    assert model_config.memory_usage_factor == pytest.approx(4.0)
    half = part("nodes.adapter").SanaModelConfig(part("sana_core.config").TRANSFORMERS["Sana_1600M_1024px"])
    assert torch.float16 in half.supported_inference_dtypes


@pytest.mark.parametrize("name", ["Sana_1600M_4Kpx_BF16", "sana-nano"])
def test_saved_weights_carry_what_shapes_do_not_tell(part, tmp_path, name, inputs):
    preset = TRANSFORMERS[name]
    kept = {"pos_embed_base", "pos_embed_interpolation", "shift", "image_size", "pag_layer"}
    path, saved = tmp_path / "any.safetensors", tmp_path / "saved.safetensors"
    save_transformer(tiny.transformer(**{field: getattr(preset, field) for field in kept}), path)
    load_model = part("nodes.adapter").load_model
    patcher = load_model(path)
    state_dict = patcher.state_dict_for_saving()
    assert all(key.startswith("model.diffusion_model.") for key in state_dict)
    save_file({key: tensor.clone() for key, tensor in state_dict.items()}, saved)  # without metadata, as core does
    again = load_model(saved)
    assert again.model.diffusion_model.config == patcher.model.diffusion_model.config
    before, after = (p.model.diffusion_model.state_dict() for p in (patcher, again))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(again.model.diffusion_model(**inputs), patcher.model.diffusion_model(**inputs))


def test_core_can_make_a_fresh_copy(patcher):
    copy = patcher.clone(force_deepcopy=True)
    assert copy.model is not patcher.model
    assert torch.equal(
        copy.model.diffusion_model.x_embedder.proj.weight, patcher.model.diffusion_model.x_embedder.proj.weight
    )
    load, arguments = patcher.cached_patcher_init
    assert load(*arguments, disable_dynamic=True).model.diffusion_model.config == patcher.model.diffusion_model.config


def test_lora_keys_of_core_reach_every_layer(patcher, comfy):
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    assert keys["diffusion_model.blocks.0.attn.qkv"] == "diffusion_model.blocks.0.attn.qkv.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_weights_compute_in_float32_on_a_cpu(part, path, inputs, dtype, monkeypatch):
    monkeypatch.setattr(part("nodes.bfloat16"), "multiplies_bfloat16", lambda: False)
    model = part("nodes.adapter").load_model(path, dtype=dtype).model
    assert model.diffusion_model.dtype == dtype
    out = model.diffusion_model(**inputs)
    assert out.dtype == torch.float32
    assert close(out, reference(path, inputs), 0.05 if dtype == torch.bfloat16 else 0.5)


def test_loads_where_core_makes_linear_layers_without_weights(part, comfy, path, inputs, monkeypatch):
    import comfy.memory_management

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)  # as with dynamic memory on an NVIDIA GPU
    network = part("nodes.adapter").load_model(path).model.diffusion_model
    monkeypatch.undo()
    assert close(network(**inputs), reference(path, inputs))


def broken(path, tmp_path, change):
    tensors = load_file(path)
    change(tensors)
    out = tmp_path / "broken.safetensors"
    config = {"sana_config": json.dumps(vars(tiny.TRANSFORMER))}
    save_file(tensors, out, metadata=config)
    return out


def test_weights_are_checked(part, path, tmp_path):
    load_model = part("nodes.adapter").load_model
    with pytest.raises(ValueError, match="missing: blocks.1.attn.proj.bias"):
        load_model(broken(path, tmp_path, lambda tensors: tensors.pop("blocks.1.attn.proj.bias")))
    with pytest.raises(ValueError, match="not expected: stray"):
        load_model(broken(path, tmp_path, lambda tensors: tensors.update(stray=torch.zeros(1))))
    with pytest.raises(ValueError, match="not a Sana transformer"):
        load_model(path.parents[1] / "vae" / "tiny.safetensors")
    assert issubclass(CheckpointError, ValueError)
