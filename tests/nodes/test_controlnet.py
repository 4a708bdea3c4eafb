"""CONTROL_NET through ComfyUI's own conditioning and sampling, against the plain transformer with the plain branch."""

import pytest
import torch
from safetensors.torch import save_file

from sana_core.checkpoint import load_controlnet, load_dc_ae, load_transformer, save_controlnet, save_transformer
from sana_core.models.controlnet import Control
from sana_core.models.sana import Perturbation
from tests import tiny

SIGMA = 0.6
SCALE = 0.41407
CFG = 4.5


@pytest.fixture(autouse=True)
def inference_mode():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(part, tiny_models):
    return part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors")


@pytest.fixture(scope="module")
def vae(part, tiny_models):
    return part("nodes.vae").load_vae(tiny_models / "vae" / "tiny.safetensors")


@pytest.fixture(scope="module")
def control_net(part, tiny_models):
    return part("nodes.control").load_control(tiny_models / "controlnet" / "tiny.safetensors")


@pytest.fixture
def conditionings():
    """A positive and a negative caption, of different lengths."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in (7, 40):
        mask = (torch.arange(300) < length).long()[None]
        found.append([[torch.randn(1, 300, tiny.CHANNELS, generator=generator), {"attention_mask": mask}]])
    return found


@pytest.fixture
def image():
    """Lines that fit latents of 2 x 3."""
    pixels = torch.zeros(1, 64, 96, 3)
    pixels[:, 20:24] = 1
    pixels[:, :, 70:75] = 1
    return pixels


@pytest.fixture
def x():
    return torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(8))


def apply(conditionings, control_net, image, vae=None, strength=1.0, start=0.0, end=1.0):
    """ComfyUI's Apply ControlNet."""
    import nodes

    return nodes.ControlNetApplyAdvanced().apply_controlnet(
        *conditionings, control_net, image, strength, start, end, vae
    )


class AskOnce:
    """A sampler that asks the guided model once, at one noise level, and returns its x0."""

    def sample(self, guider, sigmas, extra_args, callback, noise, *_):
        return SCALE * guider(noise, torch.full((len(noise),), SIGMA), **extra_args)


def ask(model, conditionings, x):
    """x0 of the guided model in ComfyUI's own machinery."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*conditionings)
    guider.set_cfg(CFG)
    return guider.sample(x, torch.zeros_like(x), AskOnce(), torch.tensor([SIGMA, 0.0]), disable_pbar=True, seed=0)


def hint_of(tiny_models, image):
    vae = load_dc_ae(tiny_models / "vae" / "tiny.safetensors")
    return SCALE * vae.encode(2 * image.movedim(-1, 1) - 1)


def expected(tiny_models, conditionings, x, positive=(), negative=(), pag=0.0):
    """x0 by the formula; positive and negative are (hint, strength) each. The last block is perturbed."""
    transformer = load_transformer(tiny_models / "diffusion_models" / "tiny.safetensors")
    net = load_controlnet(tiny_models / "controlnet" / "tiny.safetensors")
    timestep = torch.full((len(x),), 1000 * SIGMA)

    def velocity(conditioning, controls):
        (embeds, options), rows = conditioning[0], len(x)
        embeds, mask = embeds.expand(rows, -1, -1), options["attention_mask"].expand(rows, -1)
        control = [Control(net, *control) for control in controls]
        return transformer(x, timestep, embeds, mask, perturbation=Perturbation((1,), rows), control=control)

    (cond, perturbed), (uncond, _) = (
        velocity(*side).chunk(2) for side in zip(conditionings, (positive, negative), strict=True)
    )
    return x - SIGMA * (uncond + CFG * (cond - uncond) + pag * (cond - perturbed))


def assert_close(actual, wanted):
    assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()


def differs(one, other):
    return (one - other).abs().max() > 1e-2 * other.abs().max()


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("rows", [1, 2])
def test_stock_apply_controls_both_sides(model, vae, control_net, conditionings, image, x, strength, rows, tiny_models):
    x = torch.cat([x, -x])[:rows]
    result = ask(model, apply(conditionings, control_net, image, vae, strength), x)
    control = [(hint_of(tiny_models, image), strength)]
    assert_close(result, expected(tiny_models, conditionings, x, control, control))
    assert differs(result, expected(tiny_models, conditionings, x))


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_one_side_alone(model, vae, control_net, conditionings, image, x, side, tiny_models):
    positive, negative = apply(conditionings, control_net, image, vae)
    mixed = [positive, conditionings[1]] if side == "positive" else [conditionings[0], negative]
    control = [(hint_of(tiny_models, image), 1.0)]
    assert_close(ask(model, mixed, x), expected(tiny_models, conditionings, x, **{side: control}))


def test_equal_captions_run_as_one_batch(model, vae, control_net, conditionings, image, x, tiny_models):
    """With two pictures for two latents the hint is repeated for the negative rows."""
    images = torch.cat([image, image.flip(2)])
    x = torch.cat([x, -x])
    same = [conditionings[0]] * 2
    control = [(hint_of(tiny_models, images), 1.0)]
    result = ask(model, apply(same, control_net, images, vae), x)
    assert_close(result, expected(tiny_models, same, x, control, control))


def test_chained_controls_add_up(model, vae, control_net, conditionings, image, x, tiny_models):
    once = apply(conditionings, control_net, image, vae, 0.7)
    twice = apply(once, control_net, image.flip(2), vae, 0.4)
    control = [(hint_of(tiny_models, image), 0.7), (hint_of(tiny_models, image.flip(2)), 0.4)]
    assert_close(ask(model, twice, x), expected(tiny_models, conditionings, x, control, control))


@pytest.mark.parametrize("start, end, counts", [(0.0, 0.5, False), (0.9, 1.0, False), (0.5, 0.9, True)])
def test_part_of_the_schedule(model, vae, control_net, conditionings, image, x, start, end, counts, tiny_models):
    """Of the schedule of shift 3 two thirds are over at sigma 0.6: 3 * (1 - p) / (1 + 2 * (1 - p)) = 0.6."""
    result = ask(model, apply(conditionings, control_net, image, vae, 1.0, start, end), x)
    assert differs(result, expected(tiny_models, conditionings, x)) == counts


def test_an_earlier_control_outlasts_a_later_one(model, vae, control_net, conditionings, image, x, tiny_models):
    once = apply(conditionings, control_net, image, vae)
    twice = apply(once, control_net, image.flip(2), vae, 1.0, 0.0, 0.1)
    control = [(hint_of(tiny_models, image), 1.0)]
    assert_close(ask(model, twice, x), expected(tiny_models, conditionings, x, control, control))


def test_strength_0_is_no_control(model, vae, control_net, conditionings, image, x):
    assert torch.equal(ask(model, apply(conditionings, control_net, image, vae, 0.0), x), ask(model, conditionings, x))


def test_own_node_is_the_stock_one(part, model, vae, control_net, conditionings, image, x):
    node = part("nodes.controlnet").SanaControlNetApply
    ours = node.execute(*conditionings, control_net, image, vae, 0.6, 0.1, 0.9).result
    assert torch.equal(ask(model, ours, x), ask(model, apply(conditionings, control_net, image, vae, 0.6, 0.1, 0.9), x))


@pytest.mark.parametrize("percents, is_said", [((0.8, 0.2), True), ((0.5, 0.5), False), ((0.2, 0.8), False)])
def test_a_range_that_holds_no_step_is_said(part, vae, control_net, conditionings, image, percents, is_said, caplog):
    output = part("nodes.controlnet").SanaControlNetApply.execute(
        *conditionings, control_net, image, vae, 1.0, *percents
    )
    assert ("counts nowhere" in caplog.text) is is_said and (output.ui is not None) is is_said
    assert len(output.result) == 2


def test_perturbed_attention_is_controlled_too(part, model, vae, control_net, conditionings, image, x, tiny_models):
    """Without a control the perturbed prediction would steer away from the lines."""
    patched = part("nodes.guidance").perturb_attention(model, 2.0, [1])
    control = [(hint_of(tiny_models, image), 1.0)]
    wanted = expected(tiny_models, conditionings, x, control, control, pag=2.0)
    assert_close(ask(patched, apply(conditionings, control_net, image, vae), x), wanted)
    assert differs(wanted, expected(tiny_models, conditionings, x, control, control))


def test_the_picture_is_encoded_once_for_a_size(model, vae, control_net, conditionings, image, x, monkeypatch):
    encoded = []
    monkeypatch.setattr(vae, "encode", lambda pixels: encoded.append(pixels.shape) or torch.zeros(1, 32, *x.shape[2:]))
    controlled = apply(conditionings, control_net, image, vae)
    control = controlled[0][0][1]["control"]
    control.timestep_range = (1.0, 0.0)
    for _ in range(3):
        control.get_control(x, torch.tensor([0.5]), {}, 1, {})
    assert encoded == [(1, 64, 96, 3)]
    control.cleanup()
    assert control.cond_hint is None and control.timestep_range is None


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.repeat(1, 1, 1, 1)[..., :1],
        lambda image: torch.cat([image, torch.zeros_like(image[..., :1])], dim=3),
        lambda image: torch.cat([image[..., :1], torch.zeros_like(image[..., :1])], dim=3),
    ],
    ids=["grey", "colour and alpha", "grey and alpha"],
)
def test_channels_of_the_picture(model, vae, control_net, conditionings, image, x, change):
    """The lines are white, so that the grey picture is the same one."""
    result = ask(model, apply(conditionings, control_net, change(image), vae), x)
    assert_close(result, ask(model, apply(conditionings, control_net, image, vae), x))


def test_size_of_the_picture(part):
    fit = part("nodes.control").fit
    ramp = torch.linspace(0, 1, 96).expand(1, 3, 64, 96)
    assert torch.equal(fit(ramp, 64, 96), ramp)
    cut = fit(ramp, 64, 64)
    assert cut.shape == (1, 3, 64, 64) and torch.allclose(cut, ramp[..., 16:80], atol=1e-6)
    for height, width in ((32, 32), (1, 500), (200, 7), (640, 96)):
        fitted = fit(ramp, height, width)
        assert fitted.shape == (1, 3, height, width)
        assert 0 <= fitted.min() and fitted.max() <= 1


def test_thin_lines_survive_scaling_down(part):
    """Each white row of 64 is an eighth as bright in a picture of 8 rows: nothing is left out."""
    lines = torch.zeros(1, 3, 64, 64)
    lines[:, :, 32] = 1
    assert part("nodes.control").fit(lines, 8, 8).sum(dim=2).mean() == pytest.approx(1 / 8, rel=0.2)


def test_any_picture_size_samples(model, vae, control_net, conditionings, x):
    for height, width in ((7, 9), (333, 200)):
        image = torch.rand(1, height, width, 3)
        assert ask(model, apply(conditionings, control_net, image, vae), x).isfinite().all()


def test_a_missing_or_foreign_vae_is_an_error_in_plain_words(comfy, control_net, conditionings, image):
    with pytest.raises(ValueError, match="no VAE is connected. Connect Load Sana DC-AE to the vae input"):
        apply(conditionings, control_net, image)
    other = comfy.sd.VAE(sd={"pixel_space_vae": torch.zeros(1)})
    with pytest.raises(ValueError, match="makes latents of 3 channels, Sana's have 32"):
        apply(conditionings, control_net, image, other)


def test_another_model_is_refused(vae, control_net, conditionings, image):
    class SDXL:
        model_sampling = None

    control = apply(conditionings, control_net, image, vae)[0][0][1]["control"]
    with pytest.raises(ValueError, match="The ControlNet is Sana's and the model is a SDXL"):
        control.pre_run(SDXL(), None)


def foreign():
    """A ControlNet that does not know Sana, and gives what UNets take."""
    import comfy.controlnet

    class Foreign(comfy.controlnet.ControlBase):
        def copy(self):
            copied = Foreign()
            self.copy_to(copied)
            return copied

        def get_control(self, *_):
            return {"input": [], "middle": [], "output": []}

    return Foreign()


def test_another_controlnet_is_refused(part, model, vae, control_net, conditionings, image, x):
    with pytest.raises(ValueError, match="a ControlNet for another model, which cannot control Sana"):
        ask(model, apply(conditionings, foreign(), image), x)
    chained = apply(apply(conditionings, foreign(), image), control_net, image, vae)
    with pytest.raises(ValueError, match="for another model is chained with Sana's"):
        ask(model, chained, x)
    with pytest.raises(ValueError, match="The control_net is a Foreign for another model"):
        part("nodes.controlnet").SanaControlNetApply.execute(*conditionings, foreign(), image, vae)


def test_another_width_is_refused(part, model, vae, conditionings, image, x, tmp_path):
    save_controlnet(tiny.controlnet(hidden_size=32, num_cross_heads=1), tmp_path / "narrow.safetensors")
    narrow = part("nodes.control").load_control(tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="ControlNet is 32 wide .*; this model is 64 wide"):
        ask(model, apply(conditionings, narrow, image, vae), x)


def test_weights_are_in_the_hands_of_comfyui(comfy, vae, control_net, conditionings, image):
    import comfy.model_management
    import comfy.sampler_helpers

    once = apply(conditionings, control_net, image, vae)
    (positive, _) = apply(once, control_net, image, vae)
    models, _ = comfy.sampler_helpers.get_additional_models({"positive": [positive[0][1]]}, torch.float32)
    assert models == [control_net.patcher, control_net.patcher]
    comfy.model_management.load_models_gpu(models)
    assert control_net.patcher.loaded_size() == control_net.patcher.model_size() > 0
    control_net.patcher.detach()


def test_copies_share_weights_and_nothing_else(vae, control_net, conditionings, image):
    control = apply(conditionings, control_net, image, vae, 0.5, 0.2, 0.8)[0][0][1]["control"]
    again = control.copy()
    assert again.patcher is control.patcher is control_net.patcher
    assert (again.strength, again.timestep_percent_range, again.vae) == (0.5, (0.2, 0.8), vae)
    assert control_net.cond_hint_original is None and control_net.vae is None
    clone = control.deepclone_multigpu(torch.device("cpu"), autoregister=True)
    assert control.get_instance_for_device(torch.device("cpu")) is clone
    assert clone.patcher.model is not control.patcher.model and clone.strength == 0.5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_another_dtype_compute_in_the_models(part, model, vae, conditionings, image, x, stored, tmp_path):
    save_controlnet(tiny.controlnet().to(stored), tmp_path / "net.safetensors")
    stored_net = part("nodes.control").load_control(tmp_path / "net.safetensors")
    save_controlnet(tiny.controlnet().to(stored).float(), tmp_path / "wide.safetensors")
    wide = part("nodes.control").load_control(tmp_path / "wide.safetensors")
    results = [ask(model, apply(conditionings, net, image, vae), x) for net in (stored_net, wide)]
    assert (results[0] - results[1]).abs().max() < 2e-2 * results[1].abs().max()


def test_float16_models_take_it(part, vae, conditionings, image, x, tiny_models):
    adapter, control = part("nodes.adapter"), part("nodes.control")
    half = adapter.load_model(tiny_models / "diffusion_models" / "tiny.safetensors", dtype=torch.bfloat16)
    net = control.load_control(tiny_models / "controlnet" / "tiny.safetensors")
    result = ask(half, apply(conditionings, net, image, vae), x)
    hint = [(hint_of(tiny_models, image), 1.0)]
    wanted = expected(tiny_models, conditionings, x, hint, hint)
    assert (result - wanted).abs().max() < 5e-2 * wanted.abs().max()


@pytest.fixture
def folder(part, tmp_path, monkeypatch):
    """A models/controlnet of its own."""
    import folder_paths

    extensions = folder_paths.folder_names_and_paths["controlnet"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "controlnet", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_loader_lists_and_loads_files_and_folders(part, folder):
    from tests import twin

    save_controlnet(tiny.controlnet(), folder / "own.safetensors")
    twin.controlnet(tiny.controlnet(), tiny.transformer()).save_pretrained(folder / "theirs")
    loader = part("nodes.controlnet").SanaControlNetLoader
    options = loader.GET_SCHEMA().inputs[0].options
    assert {"own.safetensors", "theirs"} <= set(options)
    for name in ("own.safetensors", "theirs"):
        (control,) = loader.execute(name).result
        weights = control.patcher.model.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in tiny.controlnet().state_dict().items())


def test_wrong_files_are_refused(part, folder):
    save_transformer(tiny.transformer(), folder / "base.safetensors")
    state_dict = tiny.controlnet().state_dict()
    state_dict.pop("controlnet.0.before_proj.bias")
    save_file(state_dict, folder / "cut.safetensors", metadata={"sana_config": "{}"})
    loader = part("nodes.controlnet").SanaControlNetLoader
    with pytest.raises(ValueError, match="is not a Sana ControlNet: it looks like a Sana transformer"):
        loader.execute("base.safetensors")
    with pytest.raises(ValueError, match="cut.safetensors"):
        loader.execute("cut.safetensors")
    with pytest.raises(FileNotFoundError):
        loader.execute("missing.safetensors")
