"""The benchmark of speed, with tiny rows: who is wrong has no speed, and the table says what the JSON says."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import contest, networks, plot, report, run, works
from benchmarks.contest import OURS, PEER, Contest, Contestant, Row
from benchmarks.networks import Place
from benchmarks.rows import cpu_rows, gpu_rows, quick_rows
from sana_core.config import TRANSFORMERS
from tests import tiny

CPU = Place(torch.device("cpu"), torch.float32)
NARROW = Place(torch.device("cpu"), torch.bfloat16)
VALUE = torch.tensor([1.0, 2.0, 4.0])


def answers(name, value, calls=None, **options):
    """A contestant that does nothing but answer."""

    def run():
        if calls is not None:
            calls.append(name)
        if isinstance(value, Exception):
            raise value
        return value

    return Contestant(name, run, (torch.nn.Linear(2, 2, bias=False),), **options)


def held(*contestants, limit=1e-3, truth=None, rounds=3):
    return contest.hold(Row("a row", lambda: Contest(contestants, limit, truth), rounds), CPU.device)


def entry(row, name):
    (found,) = (one for one in row["contestants"] if one["name"] == name)
    return found


@pytest.fixture
def tiny_pair(monkeypatch):
    """Works that ask for a transformer or an autoencoder get a tiny one."""
    pair, vae = networks.pair_transformer(tiny.transformer()), networks.pair_dc_ae(tiny.dc_ae())
    monkeypatch.setattr(networks, "transformers", lambda config, place: pair)
    monkeypatch.setattr(networks, "autoencoders", lambda name, place: vae)
    monkeypatch.setattr(works, "STEPS", 3)
    return pair


def test_contestants_take_turns():
    assert "".join(contest.turns("ABC", 3)) == "ABCCBAABC"
    calls = []
    held(answers(OURS, VALUE, calls), answers(PEER, VALUE, calls), rounds=4)
    once = [OURS, PEER]
    assert calls == once + once + (once + once[::-1]) * 2, "for the result, for memory, then timed"


def test_percentiles_by_hand():
    assert contest.percentiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median_ms": 3.0, "p10_ms": 1.4, "p90_ms": 4.6}
    assert contest.percentiles([2.0, 4.0])["median_ms"] == 3.0
    assert contest.percentiles([7.0]) == {"median_ms": 7.0, "p10_ms": 7.0, "p90_ms": 7.0}


def test_differences_by_hand():
    assert contest.largest_difference(VALUE + torch.tensor([0.0, 1.0, 0.0]), VALUE) == 0.25
    assert contest.rms_difference(torch.tensor([3.0, 5.0]), torch.tensor([0.0, 5.0])) == pytest.approx(3 / 5)


@pytest.mark.parametrize("wrong", [VALUE * 1.01, VALUE * torch.nan, RuntimeError("out of memory")], ids=repr)
def test_who_is_wrong_has_no_speed(wrong):
    calls = []
    row = held(answers(OURS, wrong, calls), answers("ours, tiled", VALUE * 1.0001), answers(PEER, VALUE))
    ours = entry(row, OURS)
    assert not {"times_ms", "median_ms", "p10_ms", "host_ms"} & set(ours)
    assert calls == [OURS], "called for its result, and never again"
    assert len(entry(row, PEER)["times_ms"]) == len(entry(row, "ours, tiled")["times_ms"]) == 3
    assert not run.is_right(row) and report.speedup(row, OURS) is None
    line = report.table([row]).splitlines()[2]
    assert line.startswith("| a row | **ours** | ") and line.endswith("|  |  |  |  |  |")
    assert any(words in line for words in ("parity failed: 1.0e-02", "NaN or infinity", "out of memory"))
    assert "NOT TIMED" in report.summary(row)
    assert "not timed" in plot.bars(results_of([row]))


def test_without_diffusers_result_nothing_is_timed():
    row = held(answers(OURS, VALUE), answers(PEER, ValueError("no such size")))
    assert row["contestants"] == [] and "ValueError: no such size" in row["failure"]
    assert not run.is_right(row) and "not measured" in report.table([row]) and "NOT MEASURED" in report.summary(row)


@pytest.mark.parametrize("error, passed", [(0.0, True), (0.0109, True), (0.0111, False)])
def test_a_narrow_dtype_may_be_a_little_further_from_float32_than_diffusers(error, passed):
    row = held(answers(OURS, VALUE * (1 - error)), answers(PEER, VALUE * 1.01), truth=lambda: VALUE, limit=0)
    assert entry(row, OURS)["passed"] is passed
    assert row["parity"]["measure"] == contest.RMS and row["parity"]["limit"] == pytest.approx(0.011, rel=1e-4)
    assert entry(row, PEER)["parity"] == pytest.approx(0.01, rel=1e-4)


def test_a_row_knows_memory_and_caches():
    network = torch.nn.Linear(8, 8, bias=False)
    x = torch.ones(100, 8)
    ours = Contestant(OURS, lambda: network(x), (network,), warm="something")
    record = entry(held(ours, replace(ours, name=PEER)), OURS)
    assert record["memory"] == {"weights": 256, "work": 6400} and record["warm"] == "something"


def test_what_is_prepared_is_not_timed():
    calls = []
    held(answers(OURS, VALUE, calls, prepare=partial(calls.append, "next")), answers(PEER, VALUE), rounds=1)
    assert calls == ["next", OURS] * 3


def test_rows_agree_with_diffusers(tiny_pair):
    config = tiny_pair.ours.config
    rows = {
        "forward": partial(works.forward, CPU, config, 96, 3, False),
        "steps": partial(works.sampling, CPU, config, 64, "tiny", False, False),
        "pag": partial(works.sampling, CPU, config, 64, "tiny", True, False),
        "decode": partial(works.autoencoding, CPU, "tiny", 64, "decode", False),
        "encode": partial(works.autoencoding, CPU, "tiny", 64, "encode", False),
    }
    for name, build in rows.items():
        row = contest.hold(Row(name, build, 1), CPU.device)
        assert run.is_right(row), row
        assert row["contestants"][-1]["name"] == PEER and "median_ms" in row["contestants"][-1]


def test_a_wrong_kernel_is_found(tiny_pair, monkeypatch):
    kernels = tiny_pair.ours.blocks[1].attn.kernels
    broken = replace(kernels, linear_attention=lambda *args: 1.001 * kernels.linear_attention(*args))
    monkeypatch.setattr(tiny_pair.ours.blocks[1].attn, "kernels", broken)
    row = contest.hold(Row("x", partial(works.forward, CPU, tiny_pair.ours.config, 96, 2, False), 1), CPU.device)
    assert not run.is_right(row) and row["parity"]["limit"] < entry(row, OURS)["parity"] < 1e-2


@pytest.mark.parametrize("new", [True, False])
def test_whole_images_and_their_prompts(tiny_pair, monkeypatch, new):
    encoder, texts = tiny.text_encoder(), []
    monkeypatch.setattr(networks, "text_encoder", lambda name, place: encoder)
    encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: texts.append(kwargs.get("input_ids", args[0] if args else None)), with_kwargs=True
    )
    built = works.image(CPU, tiny_pair.ours.config, "tiny", "tiny", 64, new)
    row = contest.hold(Row("image", lambda: built, 2), CPU.device)
    assert run.is_right(row), row
    texts.clear()
    for contestant in built.contestants:
        contestant.call()
    assert len(texts) == (2 if new else 0), "a new prompt is encoded by both, a repeated one by none"
    if new:
        assert torch.equal(*texts), "both have had as many prompts"


def test_narrow_rows_are_compared_with_float32(monkeypatch):
    pair = networks.pair_transformer(tiny.transformer().bfloat16())
    monkeypatch.setattr(networks, "transformers", lambda config, place: pair)
    build = partial(works.forward, NARROW, pair.ours.config, 96, 2, False)
    row = contest.hold(Row("forward", build, 1), NARROW.device)
    assert row["parity"]["measure"] == contest.RMS and 1e-3 < entry(row, PEER)["parity"] < 0.05
    assert pair.theirs.dtype == torch.bfloat16, "float32 is a copy's"


def test_both_hold_the_same_weights():
    pair = networks.pair_transformer(tiny.transformer())
    ours = {tensor.data_ptr() for tensor in pair.ours.state_dict().values()}
    assert ours <= {tensor.data_ptr() for tensor in pair.theirs.state_dict().values()}
    filled = networks.randomize(tiny.transformer())
    assert not torch.equal(filled.blocks[0].attn.qkv.weight, tiny.transformer().blocks[0].attn.qkv.weight)


def test_every_row_has_a_name_of_its_own():
    for rows in (gpu_rows(NARROW), cpu_rows(CPU), quick_rows(CPU)):
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
    for wanted in ("0.6B, 512 px, batch 1", "1.6B, 4096 px, batch 3", "PAG, 0.6B", "repeated prompt, 1.6B", "compiled"):
        assert any(wanted in row.name for row in gpu_rows(NARROW)), wanted
    assert {row.rounds for row in gpu_rows(NARROW) if "4096" in row.name} == {5}
    assert [row.name for row in run.select_rows(CPU, True, "pag|sprint")] == [
        "20 steps, PAG, nano, 256 px",
        "2 steps, Sprint nano, 256 px",
    ]
    assert TRANSFORMERS["sana-nano"].image_size == 256


# ---- files


def results_of(rows, date="2026-01-02", device="A device, 2 cores"):
    rows = [row | {"load_average": [0.5, 1, 1], "clocks": None} for row in rows]
    machine = run.describe_machine(CPU) | {"device": device}
    return {"date": date, "machine": machine, "left_out": [], "rows": rows}


def fixed_row(name="a row", ours=10.0, theirs=25.0):
    """A row as JSON has it, with times that are easy to check."""
    row = held(answers(OURS, VALUE * 1.0001, warm="some"), answers(PEER, VALUE)) | {"name": name}
    for one, time in ((entry(row, OURS), ours), (entry(row, PEER), theirs)):
        one |= contest.percentiles([time - 1, time, time + 1])
        one["memory"] = {"weights": 2_000_000, "work": 5_400_000}
    return row


def test_the_table_is_what_the_json_says(tmp_path):
    (tmp_path / "results").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{report.START}\n\nold\n\n{report.END}\nafter\n", encoding="utf-8")
    for date, ours in (("2026-01-02", 10.0), ("2026-01-01", 5.0)):
        results = results_of([fixed_row(ours=ours)], date)
        path = run.results_path(tmp_path / "results", results["machine"], date)
        path.write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "results" / "precision.json").write_text('{"figures": {}}', encoding="utf-8")
    report.update_readme(readme, tmp_path / "results")
    text = readme.read_text(encoding="utf-8")
    assert "| a row | **ours** | 10.0 | 9.20 to 10.8 | 2.50 | 2 + 5 | 1.0e-04 of 1.0e-03 | some |" in text
    assert "|  | diffusers | 25.0 | 24.2 to 25.8 |  | 2 + 5 |  | none |" in text
    assert "## A device, 2 cores, float32, 2026-01-02" in text and "2026-01-01" not in text, "the newest"
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    picture = tmp_path / "results" / "2026-01-02-A-device-2-cores.svg"
    assert "(results/2026-01-02-A-device-2-cores.svg)" in text
    assert "a row: 2.50<" in picture.read_text(encoding="utf-8")
    again = text
    report.update_readme(readme, tmp_path / "results")
    assert readme.read_text(encoding="utf-8") == again


def test_a_readme_without_its_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="each of these lines once"):
        report.update_readme(tmp_path / "README.md", tmp_path)


def test_readme_has_its_markers():
    text = (run.HERE / "README.md").read_text(encoding="utf-8")
    assert text.count(report.START) == text.count(report.END) == 1


def test_the_json(tmp_path):
    rows = [Row(name, lambda: Contest([answers(OURS, VALUE), answers(PEER, VALUE)], 0), 2) for name in ("a", "b")]
    results = run.run(rows, CPU, tmp_path)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    assert path.name.startswith(results["date"]) and path.suffix == ".json"
    assert set(results) == {"date", "machine", "left_out", "rows"}
    assert {"device", "threads", "dtype", "torch", "diffusers", "tf32", "cudnn_benchmark", "commit"} <= set(
        results["machine"]
    )
    for row in results["rows"]:
        assert set(row) == {"name", "rounds", "failure", "parity", "contestants", "load_average", "clocks"}
        for one in row["contestants"]:
            assert one["passed"] is (True if one["name"] == OURS else None)
            assert one["p10_ms"] <= one["median_ms"] <= one["p90_ms"] and len(one["times_ms"]) == 2
            assert {"host_ms", "first_call_s", "kernels", "memory", "warm", "parity", "failure"} <= set(one)


def test_rows_of_the_same_day_and_machine_are_kept(tmp_path, monkeypatch):
    def row(name, value=VALUE):
        return Row(name, lambda: Contest([answers(OURS, value), answers(PEER, VALUE)], 0), 1)

    run.run([row("a"), row("b", VALUE * 2)], CPU, tmp_path)
    results = run.run([row("b")], CPU, tmp_path)
    assert [(each["name"], run.is_right(each)) for each in results["rows"]] == [("a", True), ("b", True)]
    assert run.run([row("b"), row("c")], CPU, tmp_path, minutes=0)["left_out"] == ["c"]
    monkeypatch.setattr(run, "_commit", lambda: "another")
    assert [each["name"] for each in run.run([row("c")], CPU, tmp_path)["rows"]] == ["c"]


def test_main_fails_where_ours_is_wrong(tmp_path, monkeypatch, capsys):
    right, wrong = (
        Row(name, lambda value=value: Contest([answers(OURS, value), answers(PEER, VALUE)], 0), 1)
        for name, value in (("right", VALUE), ("wrong", VALUE * 2))
    )
    monkeypatch.setattr(run, "quick_rows", lambda place: [right, wrong])
    monkeypatch.setattr(run, "QUICK_RESULTS", tmp_path)
    options = ["run", "--quick", "--device", "cpu", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", [*options, "--rows", "right", "--rounds", "1"])
    assert run.main() == 0
    assert "| right | **ours** |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", options)
    assert run.main() == 1
    monkeypatch.setattr(sys, "argv", [*options, "--rows", "nonsense"])
    with pytest.raises(SystemExit):
        run.main()
    assert "no row's name has 'nonsense'" in capsys.readouterr().err
