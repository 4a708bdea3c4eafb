"""The benchmark of training: who trains otherwise has no speed, and the tables say what the JSON says."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import duel, report, steps, training, training_memory, training_report
from benchmarks.contest import OURS, PEER
from benchmarks.networks import Place
from benchmarks.recipe import LAYERS, Features, Recipe
from benchmarks.steps import Data, Job
from benchmarks.training_memory import Plan, Taken
from sana_core.training import loss
from sana_core.training.loss import FlowMatching
from sana_core.training.presets import PRESETS
from tests import tiny
from tests.memory import peak_bytes

CPU = torch.device("cpu")
LORA, FULL = (Job("tiny", tiny.TRANSFORMER, 64, mode, 3, rounds=2) for mode in ("lora", "full"))
BOTH = pytest.mark.parametrize("job", [LORA, FULL], ids=lambda job: job.mode)


def parity(job):
    return steps.parity(job, steps.build(job, CPU), CPU)


# ---- both sides do the same


@pytest.mark.parametrize("recompute", [False, True])
@BOTH
def test_loss_and_gradients_agree(job, recompute):
    found = parity(replace(job, recompute=recompute))
    assert found["passed"] and found["value"] < 2e-5
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)


def test_a_model_with_qk_norm_agrees():
    assert parity(replace(FULL, config=replace(tiny.TRANSFORMER, qk_norm=True)))["passed"]


def test_all_layers_of_the_recipe_are_compared():
    pair = steps.build(LORA, CPU)
    names = set(steps.trained(pair.theirs))
    assert len(names) == 2 * len(LAYERS) * 2 * tiny.TRANSFORMER.depth
    assert set(steps.as_diffusers(pair.ours, steps.trained(pair.ours))) == names
    full = steps.build(FULL, CPU)
    assert len(steps.trained(full.theirs)) == len(list(full.theirs.parameters()))
    ours = {parameter.untyped_storage().data_ptr() for parameter in full.ours.parameters()}
    assert not ours & {parameter.untyped_storage().data_ptr() for parameter in full.theirs.parameters()}


def another_target(monkeypatch):
    def errors(velocity_model, x0, noise, sigma):
        level = sigma.to(x0)[:, None, None, None]
        velocity = velocity_model((1 - level) * x0 + level * noise, loss.timesteps_of(sigma))
        return (velocity - noise).square().mean((1, 2, 3))

    monkeypatch.setattr(loss, "flow_matching_errors", errors)


def another_shift(monkeypatch):
    monkeypatch.setattr(
        steps, "FlowMatching", lambda shift, null, **options: FlowMatching(shift + 0.1, null, **options)
    )


def fractions_of_timesteps(monkeypatch):
    monkeypatch.setattr(loss, "timesteps_of", lambda sigma: sigma * 1000)


def captions_with_padding(monkeypatch):
    plain = loss.FlowMatching._captions

    def captions(self, batch, dropped):
        embeds, mask = plain(self, batch, dropped)
        return embeds, torch.ones_like(mask)

    monkeypatch.setattr(loss.FlowMatching, "_captions", captions)


def another_clip(monkeypatch):
    monkeypatch.setattr(steps, "MAX_GRAD_NORM", 0.01)


FAULTS = [another_target, another_shift, fractions_of_timesteps, captions_with_padding, another_clip]


@BOTH
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_ours_is_found_and_nothing_is_timed(monkeypatch, fault, job):
    fault(monkeypatch)
    row = duel.hold(job, CPU)
    assert row["contestants"] == [] and row["failure"] is None
    assert not row["parity"]["passed"] and row["parity"]["value"] > 10 * steps.LIMIT
    assert not training.is_right({"rows": [row], "memory": []})
    assert "parity failed" in training_report.table([row]) and "NOT TIMED" in training_report.summary(row)


@BOTH
def test_a_dropped_gradient_is_found(job):
    for name in steps.trained(steps.build(job, CPU).ours):
        if re.search(r"blocks\.1\.(attn\.qkv\.(up\.1|weight)|cross_attn\.kv_linear\.(down\.0|weight))", name):
            pair = steps.build(job, CPU)
            steps.trained(pair.ours)[name].register_hook(torch.zeros_like)
            found = steps.parity(job, pair, CPU)
            assert not found["passed"] and "transformer_blocks.1" in found["furthest"], name


def test_a_weight_that_one_side_does_not_train_is_named(monkeypatch):
    build = steps.build

    def frozen(job, device):
        pair = build(job, device)
        pair.theirs.transformer_blocks[1].attn2.to_q.requires_grad_(False)
        return pair

    monkeypatch.setattr(duel, "build", frozen)
    row = duel.hold(FULL, CPU)
    assert "trained by one side alone, transformer_blocks.1.attn2.to_q" in row["failure"]
    assert row["contestants"] == [] and "not measured" in training_report.table([row])


def test_what_is_not_a_number_is_no_agreement():
    theirs = 1.0, {"a": torch.ones(2), "b": torch.ones(2)}
    value, furthest = steps.disagreement((1.0, {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}), theirs)
    assert value != value and furthest == "b"


def test_the_disagreement_by_hand():
    theirs = 2.0, {"large": torch.tensor([3.0, 4.0]), "small": torch.tensor([0.01])}
    assert steps.disagreement((2.002, dict(theirs[1])), theirs) == (pytest.approx(1e-3), "loss")
    value, furthest = steps.disagreement(
        (2.0, {"large": torch.tensor([3.0, 4.05]), "small": torch.tensor([0.01])}), theirs
    )
    assert (value, furthest) == (pytest.approx(0.01, rel=1e-4), "large"), "0.05 of a norm of 5"
    value, furthest = steps.disagreement((2.0, {**theirs[1], "small": torch.tensor([0.0])}), theirs)
    assert (value, furthest) == (pytest.approx(0.02, rel=1e-4), "small"), "0.01 of a tenth of 5"


def test_the_recipe_draws_logit_normal_levels_without_shift():
    torch.manual_seed(0)
    pair = steps.build(LORA, CPU)
    many = Features(torch.zeros(4000, 1, 1, 1), torch.zeros(1), torch.zeros(1))
    recipe = Recipe(pair.theirs, many, "fp32", False)
    noise, sigmas, timesteps = recipe.draw()
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert torch.equal(sigmas * 1000, timesteps) and 0 < sigmas.min() and sigmas.max() <= 1
    assert torch.logit(sigmas.clamp(1e-3, 0.999)).std() == pytest.approx(1, abs=0.05)
    assert sigmas.median() == pytest.approx(0.5, abs=0.02)


def test_both_have_the_same_data():
    data = Data.random(LORA, CPU, 3)
    batch, features = data.batch, data.features
    assert features.embeds.shape[1] == 300 and batch.embeds.shape[1] == 70 == batch.mask.sum(1).max()
    assert torch.equal(features.embeds[:, :70], batch.embeds) and not features.embeds[:, 70:].any()
    assert torch.equal(features.mask.sum(1), batch.mask.sum(1)) and torch.equal(features.latents, batch.latents)


# ---- times and memory


def test_steps_take_turns(monkeypatch):
    order = []
    for name in ("begin", "end"):
        plain = getattr(duel.Side, name)

        def noted(self, watched=False, name=name, plain=plain):
            if name == "end" and not watched:
                order.append(self.name)
            return plain(self, watched)

        monkeypatch.setattr(duel.Side, name, noted)
    row = duel.hold(replace(LORA, rounds=3), CPU)
    assert order == [OURS, PEER, PEER, OURS, OURS, PEER]
    assert [len(entry["times_ms"]) for entry in row["contestants"]] == [3, 3]


@BOTH
def test_a_row(job):
    row = duel.hold(job, CPU)
    assert training.is_right({"rows": [row], "memory": []})
    count = sum(parameter.numel() for parameter in steps.trained(steps.build(job, CPU).ours).values())
    for entry, name in zip(row["contestants"], (OURS, PEER), strict=True):
        assert entry["name"] == name and entry["images_per_second"] == pytest.approx(
            3000 / entry["median_ms"], rel=1e-3
        )
        assert 8 * count <= entry["memory"]["optimizer"] <= 8 * count + 1000, (
            "two averages to a weight, and step counts"
        )
        assert entry["memory"]["work"] > 4 * count, "its gradients among them"
    assert row["contestants"][0]["memory"]["weights"] == row["contestants"][1]["memory"]["weights"]


def test_weights_beside_a_lora_are_narrow_where_it_computes_so():
    job = replace(LORA, precision="bf16")
    pair = steps.build(job, CPU)
    steps.narrow(job, pair)
    for network in (pair.ours, pair.theirs):
        dtypes = {parameter.requires_grad: parameter.dtype for parameter in network.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}
    row = duel.hold(job, CPU)
    assert len(row["contestants"]) == 2


@pytest.fixture
def tiny_plan(monkeypatch):
    monkeypatch.setitem(training_memory.TRANSFORMERS, "tiny", tiny.TRANSFORMER)
    return lambda mode: Plan("tiny", "12gb", "tiny", 512, mode)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_is_followed_is_the_allocators_peak(tiny_plan, mode):
    plan = tiny_plan(mode)
    followed = training_memory.follow(plan)
    kernels = replace(training_memory.REFERENCE, modulate=training_memory.as_on_a_gpu)
    model = training_memory.model_of(plan, kernels)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    measured = peak_bytes(lambda: training_memory._step(plan, model, trained))
    assert 0.9 * measured <= followed.work <= 1.05 * measured, "workspaces of operations are theirs alone"
    count = sum(parameter.numel() for parameter in trained)
    bytes_each = 8 if mode == "lora" else 2.03125
    assert followed.optimizer == round(bytes_each * count) and followed.average == 0
    assert training_memory.follow(replace(plan, ema=True)).average == 4 * count


def test_a_card_is_full_but_for_its_reserve(monkeypatch):
    plan = Plan("0.6B", "12gb", "Sana_600M_512px", 512, "lora")
    free = 12 * 2**30 - training_memory.RESERVE - training_memory.AUTOENCODER
    for work, fits in ((free - 60, True), (free - 59, False)):
        monkeypatch.setattr(training_memory, "follow", lambda plan, work=work: Taken(10, 20, 30, work))
        row = training_memory.row(plan, measured=False)
        assert row["fits"] is fits and row["promised"]
        assert training.is_right({"rows": [], "memory": [row]}) is fits
    assert row["how"] == "followed, not measured on a GPU"
    assert training.is_right({"rows": [], "memory": [row | {"promised": False}]}), "no preset promises an average"


def test_every_preset_has_its_plans_and_the_goals_are_there():
    assert {plan.preset for plan in training_memory.PLANS} == set(PRESETS)
    names = [plan.name for plan in training_memory.PLANS]
    assert len(set(names)) == len(names)
    goals = {(plan.title, plan.pixels, plan.mode, plan.gigabytes) for plan in training_memory.PLANS}
    assert goals >= {("0.6B", 512, "lora", 12), ("1.6B", 1024, "full", 32)}


# ---- rows, tables, files


def test_every_row_has_a_name_of_its_own():
    for jobs in (training.gpu_jobs(), training.cpu_jobs(), training.quick_jobs()):
        assert len({job.name for job in jobs}) == len(jobs)
    for wanted in ("LoRA, 0.6B, 512", "all weights, 0.6B, 512", "LoRA, 1.6B, 1024", "all weights, 1.6B, 1024"):
        assert any(job.name.startswith(wanted) for job in training.gpu_jobs()), wanted
    assert {job.precision for job in training.gpu_jobs()} == {"bf16"}


def fixed_row(name="a row"):
    """As JSON has it, with figures that are easy to check."""
    memory = {"weights": 20_600_000, "optimizer": 600_000, "work": 115_000_000}

    def entry(name, speed, time):
        spread = {"median_ms": time, "p10_ms": time - 1, "p90_ms": time + 1}
        return {"name": name, "images_per_second": speed, **spread, "times_ms": [time], "memory": memory}

    parity = {"value": 2e-6, "limit": 1e-4, "furthest": "loss", "passed": True, "losses": [1.0, 1.0]}
    known = {"name": name, "failure": None, "parity": parity, "load_average": [0.5, 1, 1]}
    return known | {"contestants": [entry(OURS, 30.0, 100.0), entry(PEER, 20.0, 150.0)]}


def results_of(rows, memory=()):
    machine = training.describe_machine(Place(CPU, torch.float32)) | {"device": "A device", "peft": "1"}
    return {"date": "2026-01-02", "machine": machine, "left_out": ["another"], "rows": rows, "memory": list(memory)}


def test_the_tables_are_what_the_json_says(tmp_path):
    taken = {"weights": 6.4e9, "optimizer": 12.8e9, "average": 0, "work": 8.37e9, "peak": 28.24e9}
    plan = {"name": "a plan", "preset": "32gb", "how": "followed, not measured on a GPU", "failure": None, "fits": True}
    memory = [plan | taken, plan | taken | {"name": "larger", "fits": False}, plan | {"failure": "RuntimeError: no"}]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "2026-01-02-A-device-training.json").write_text(
        json.dumps(results_of([fixed_row()], memory))
    )
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{training_report.START}\nold\n{training_report.END}\nafter\n", encoding="utf-8")
    training_report.update_readme(readme, tmp_path / "results")
    text = readme.read_text(encoding="utf-8")
    assert "| a row | **ours** | 30.0 | 1.50 | 100 | 99.0 to 101 | 21 + 1 + 115 | 2.0e-06 of 1.0e-04 |" in text
    assert "|  | diffusers | 20.0 |  | 150 | 149 to 151 | 21 + 1 + 115 |  |" in text
    assert "| a plan | 32 GB | 6.4 | 12.8 | 0.0 | 8.4 | 28.2 | yes |" in text
    assert "| larger | 32 GB | 6.4 | 12.8 | 0.0 | 8.4 | 28.2 | **no** |" in text
    assert "not followed, not measured on a GPU: RuntimeError: no" in text and "as the time was up: another" in text
    assert "### A device, float32, 2026-01-02" in text and "in GB, followed, not measured on a GPU:" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert report.newest(tmp_path / "results") == [], "the other benchmark leaves these results alone"
    training_report.update_readme(readme, tmp_path / "results")
    assert readme.read_text(encoding="utf-8") == text


def test_readme_has_its_markers():
    text = (training.HERE / "README.md").read_text(encoding="utf-8")
    assert text.count(training_report.START) == text.count(training_report.END) == 1


def test_all_that_needs_a_gpu_fits_nine_minutes():
    script = (training.HERE / "gpu.sh").read_text(encoding="utf-8")
    seconds = [int(number) for number in re.findall(r"^(?:step \S+|timeout) (\d+) ", script, re.MULTILINE)]
    assert len(seconds) == 6 and sum(seconds) <= 540
    assert "benchmarks.training" in script


# ---- the command


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "QUICK_RESULTS", tmp_path)
    monkeypatch.setattr(training, "quick_jobs", lambda: [LORA, FULL])

    def run(*arguments):
        threads = str(torch.get_num_threads())
        monkeypatch.setattr(sys, "argv", ["training", "--quick", "--device", "cpu", "--threads", threads, *arguments])
        return training.main()

    return run


def test_a_quick_run_end_to_end(command, tmp_path, capsys):
    assert command("--rounds", "1") == 0
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-training.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert [row["name"] for row in results["rows"]] == [LORA.name, FULL.name] and results["memory"] == []
    assert {row["rounds"] for row in results["rows"]} == {1} and results["machine"]["peft"]
    assert f"| {LORA.name} | **ours** |" in capsys.readouterr().out
    assert command("--rows", "all weights", "--minutes", "0") == 0
    results = json.loads(path.read_text(encoding="utf-8"))
    assert len(results["rows"]) == 2 and results["left_out"] == [], "rows of the same day and machine are kept"


def test_a_wrong_gradient_ends_with_status_1(command, monkeypatch, capsys):
    another_target(monkeypatch)
    assert command("--rows", "LoRA") == 1
    assert "parity failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "nonsense"], "no row's name has 'nonsense'"),
        (["--rows", "("], "no regular expression"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--threads", "-1"], "--threads is -1, expected at least 1"),
        (["--measure"], "finds no usable GPU"),
        (["--device", "cuda"], "finds no usable GPU"),
        (["--device", "tpu"], "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused(command, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_on_a_gpu(tiny_plan, monkeypatch, mode):
    monkeypatch.setitem(PRESETS, "12gb", replace(PRESETS["12gb"], full_optimizer="adamw"))
    job = replace(LORA if mode == "lora" else FULL, precision="bf16")
    row = duel.hold(job, torch.device("cuda"))
    assert training.is_right({"rows": [row], "memory": []}), row
    assert training_memory.measure(tiny_plan(mode)).work > 0
