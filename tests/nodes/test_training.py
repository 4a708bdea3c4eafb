"""Training in a graph: in inference mode, as ComfyUI runs nodes, on its MODEL, to what its own nodes take."""

import pytest
import torch

from sana_core.checkpoint import load_transformer, read_lora
from sana_core.models.lora import apply_lora
from sana_core.training.progress import Progress
from tests.training.pictures import picture, write

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def folders(part, tmp_path, monkeypatch):
    """ComfyUI's input and output folders, with four pictures in input/cats."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    files = {f"{number}.png": picture(256, 256, number) for number in range(4)}
    write(tmp_path / "input" / "cats", files | {f"{number}.txt": f"a red cat {number}" for number in range(4)})
    return tmp_path


@pytest.fixture
def dataset(part, folders):
    return lambda **options: part("nodes.dataset").SanaDataset.execute("cats", "256", **options)


@pytest.fixture
def parts(part, tiny_models):
    model = part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors")
    vae = part("nodes.vae").load_vae(tiny_models / "vae" / "tiny.safetensors")
    return model, vae, part("nodes.clip").load_clip(tiny_models / "text_encoders" / "tiny.safetensors")


@pytest.fixture
def train(part, parts, dataset):
    """Runs the node as ComfyUI does."""

    def run(model=None, run_name="run", **options):
        options = {
            "mode": "lora", "steps": 3, "batch_size": 2, "learning_rate": 0.01, "rank": 4, "seed": 0, "save_every": 9,
            "sample_every": 0, **options,
        }  # fmt: skip
        with torch.inference_mode():
            (data,) = dataset().result
            node = part("nodes.trainer").SanaTrainer
            return node.execute(model or parts[0], *parts[1:], data, run_name, **options).result

    return run


def weights_of(patcher):
    """The weights that ComfyUI samples with."""
    patcher.patch_model(device_to=CPU)
    weights = {key: tensor.clone() for key, tensor in patcher.model.diffusion_model.state_dict().items()}
    patcher.unpatch_model()
    return weights


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[key].float() - other[key].float()).abs().max().item() for key in one)


def test_the_data_set_shows_the_report(dataset, parts, folders):
    write(folders / "input" / "cats", {"silent.png": picture(256, 256)})
    output = dataset(clip=parts[2])
    text = output.ui.as_dict()["text"][0]
    assert "4 pictures, in buckets of 256 px" in text
    assert "4 different captions of" in text
    assert "Left out: 1 x no caption\n  silent.png" in text
    assert "different captions" not in dataset().ui.as_dict()["text"][0]


@pytest.mark.parametrize("name", ["../output", "/etc", "dogs", ""])
def test_only_folders_within_the_input_folder_are_read(part, folders, name):
    (folders / "output").mkdir()
    node = part("nodes.dataset").SanaDataset
    assert isinstance(node.validate_inputs(name), str)
    with pytest.raises(ValueError, match="input folder"):
        node.execute(name, "256")


def test_a_changed_folder_is_read_again(part, folders):
    node = part("nodes.dataset").SanaDataset
    before = node.fingerprint_inputs("cats", resolution="256")
    assert node.fingerprint_inputs("cats", resolution="256") == before
    (folders / "input" / "cats" / "1.txt").write_text("a blue cat")
    assert node.fingerprint_inputs("cats", resolution="256") != before


def test_a_lora_for_core_is_the_saved_file(train, parts, tiny_models, folders):
    import comfy.sd

    before = weights_of(parts[0])
    lora, model, loss, path = train()
    assert path == str(folders / "output" / "sana_training" / "run")
    merged = load_transformer(tiny_models / "diffusion_models" / "tiny.safetensors")
    apply_lora(merged, read_lora(f"{path}/lora.safetensors", merged.config).layers, 1.0)
    expected = merged.state_dict()
    by_core, _ = comfy.sd.load_lora_for_models(parts[0], None, lora, 1.0, 0)
    assert largest_difference(weights_of(by_core), expected) < 1e-6
    assert largest_difference(weights_of(model), expected) < 1e-6
    assert largest_difference(before, expected) > 1e-4
    assert largest_difference(weights_of(parts[0]), before) == 0, "the MODEL that came in stays as it is"
    assert len(loss["loss"]) == 3 and all(value > 0 for value in loss["loss"])


def test_all_weights(train, parts, folders):
    lora, model, _, path = train(mode="full")
    saved = load_transformer(f"{path}/transformer.safetensors").state_dict()
    assert largest_difference(weights_of(model), saved) == 0
    assert largest_difference(weights_of(parts[0]), saved) > 1e-4
    assert "use the MODEL" in lora.message


def test_what_was_patched_into_the_model_is_trained_on(train, parts):
    first = train()
    again = train(model=first[1], run_name="second", learning_rate=1e-9)
    assert largest_difference(weights_of(again[1]), weights_of(first[1])) < 1e-6
    assert largest_difference(weights_of(again[1]), weights_of(parts[0])) > 1e-4


def test_cancel_saves_and_the_same_node_goes_on(train, folders, monkeypatch):
    import comfy.model_management as management

    unbroken = train(run_name="unbroken", steps=4)
    calls = []

    def cancel():
        calls.append(True)
        if len(calls) == 10 + 2:  # of 4 pictures, their 4 captions, the empty one, then steps
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(management.InterruptProcessingException):
        train(run_name="broken", steps=4)
    run = folders / "output" / "sana_training" / "broken"
    (state,) = run.glob("step_*")
    assert 0 < int(state.name[5:]) < 4
    assert (run / "lora.safetensors").is_file()
    resumed = train(run_name="broken", steps=4)
    assert resumed[2] == unbroken[2]
    assert all(torch.equal(resumed[0][key], unbroken[0][key]) for key in unbroken[0])


def test_a_finished_run_gives_its_result_again(train):
    first, again = train(), train()
    assert all(torch.equal(first[0][key], again[0][key]) for key in first[0])
    assert first[2] == again[2]


def test_a_run_of_other_settings_is_not_continued(train):
    train()
    with pytest.raises(ValueError, match="rank: 4 -> 8"):
        train(rank=8, steps=9)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".cache", "x ", "a\\b"])
def test_a_run_stays_in_the_output_folder(part, name):
    assert "expected the name of a folder" in part("nodes.trainer").SanaTrainer.validate_inputs(name)


def test_foreign_parts_are_refused(part, train, parts, dataset):
    class Other:
        model = type("Other", (), {"diffusion_model": None})

    with pytest.raises(ValueError, match="The model is a NoneType.*Connect Load Sana Model"):
        train(model=Other())


def test_the_preview_has_curve_and_samples(part, folders, monkeypatch):
    import comfy.utils

    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *args, **_: shown.append(args))
    display = part("nodes.trainer")._Display(folders, None)
    display.training(Progress(1, 3, 2.0, 2.0, 1e-4, 0.5, 1.0, 2.0))
    display.training(Progress(2, 3, 1.0, 1.9, 1e-4, 0.5, 1.0, 1.0))
    display.drawn([picture(256, 256, 1)])
    display.training(Progress(3, 3, 1.5, 1.8, 1e-4, 0.5, 1.0, 0.0))
    assert [(value, total) for value, total, _ in shown] == [(1, 3), (3, 3)]
    assert shown[0][2][1].size == (512, 192)
    assert shown[1][2][1].size == (512, 192 + 256)
