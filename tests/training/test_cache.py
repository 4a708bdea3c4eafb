"""The cache: what is in it, when it is used again and when not, and what a kill leaves behind."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sana_core.autoencoder import encode_pixels
from sana_core.resolution import Size
from sana_core.training import shards
from sana_core.training.cache import Cache, fingerprint
from sana_core.training.dataset import read_dataset
from sana_core.training.encoders import latent_encoder, module_identity, text_feature_encoder
from sana_core.training.folders import DatasetError
from sana_core.training.images import fit_to_bucket, read_image
from sana_core.training.shards import Shards
from tests import tiny
from tests.training.pictures import encoded, picture, write, write_tar
from tests.training.toy_encoders import LATENTS, TEXT, letters, means

ROOT = Path(__file__).parents[2]


def pairs(folder, count, start=0):
    files = {}
    for number in range(start, start + count):
        files |= {f"{number:03d}.png": picture(256, 256, number), f"{number:03d}.txt": f"caption {number}"}
    return write(folder, files)


class Counting:
    """An encoder that notes what it was asked for."""

    def __init__(self, encoder):
        self.calls = []
        self.encoder = replace(encoder, encode=lambda value: self.calls.append(value) or encoder.encode(value))


def fill(folder, data, latents=LATENTS, text=TEXT, **options):
    cache = Cache(folder, latents, text)
    samples, problems = cache.fill(read_dataset(data, 256), **options)
    return cache, samples, problems


def entries(folder):
    """Every entry below the cache's folder."""
    found = {}
    for part in sorted(folder.glob("*/*")):
        store = Shards(part)
        found |= {(part.parent.name, part.name, key): store[key] for key in store._files}
    return found


def assert_same_entries(one, other):
    one, other = entries(one), entries(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_it_holds_what_the_networks_return(tmp_path):
    data = pairs(tmp_path / "data", 2)
    write(data, {"001.png": picture(300, 520, 5)})
    vae, encoder = tiny.dc_ae(), tiny.text_encoder()
    cache, samples, problems = fill(tmp_path / "cache", data, latent_encoder(vae), text_feature_encoder(encoder))
    assert problems == [] and [sample.bucket for sample in samples] == [Size(256, 256), Size(352, 192)]
    for sample in samples:
        pixels = fit_to_bucket(read_image(data / sample.name), sample.bucket.height, sample.bucket.width)
        with torch.no_grad():
            latents = encode_pixels(vae, pixels[None])[0]
        kept = cache.latents(sample)
        assert kept.dtype == torch.float32 and torch.equal(kept, latents.half().float())
        assert ((kept - latents).abs() <= latents.abs() * 2**-11 + 2**-25).all()
        embeds, mask = encoder.encode(sample.captions[0].text)
        assert torch.equal(cache.features(sample.features[0]), embeds[0, : int(mask.sum())])
    embeds, mask = encoder.encode("")
    assert mask.sum() == 1 and torch.equal(cache.null_features, embeds[0, :1])


def test_padding_is_not_kept(tmp_path):
    cache, (sample,), _ = fill(tmp_path / "cache", pairs(tmp_path / "data", 1))
    assert torch.equal(cache.features(sample.features[0]), letters("caption 0")[0][0, : len("caption 0") + 1])
    assert torch.equal(cache.null_features, torch.zeros(1, 4))


def test_the_second_run_computes_nothing(tmp_path):
    data = pairs(tmp_path / "data", 3)
    _, first, _ = fill(tmp_path / "cache", data)
    latents, text = Counting(LATENTS), Counting(TEXT)
    _, second, _ = fill(tmp_path / "cache", data, latents.encoder, text.encoder)
    assert latents.calls == text.calls == []
    assert first == second and fingerprint(first) == fingerprint(second)


def test_a_moved_data_set_and_one_in_a_tar_share_the_entries(tmp_path):
    data = pairs(tmp_path / "data", 2)
    fill(tmp_path / "cache", data)
    latents, text = Counting(LATENTS), Counting(TEXT)
    members = {path.name: path.read_bytes() for path in sorted(data.iterdir())}
    write_tar(tmp_path / "tars" / "0.tar", members)
    _, samples, _ = fill(tmp_path / "cache", tmp_path / "tars", latents.encoder, text.encoder)
    assert len(samples) == 2 and latents.calls == text.calls == []


def test_an_edited_file_is_computed_anew_and_nothing_else(tmp_path):
    data = pairs(tmp_path / "data", 4)
    _, before, _ = fill(tmp_path / "cache", data)
    times = (data / "001.png").stat().st_mtime_ns
    write(data, {"001.png": picture(256, 256, 99), "002.txt": "another caption"})
    os.utime(data / "001.png", ns=(times, times))  # as an editor that keeps the date leaves it
    latents, text = Counting(LATENTS), Counting(TEXT)
    cache, after, _ = fill(tmp_path / "cache", data, latents.encoder, text.encoder)
    assert len(latents.calls) == 1 and text.calls == ["another caption"]
    changed = [old.name for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["001.png", "002.png"]
    pixels = fit_to_bucket(picture(256, 256, 99), 256, 256)
    assert torch.equal(cache.latents(after[1]), means(pixels[None])[0].half().float())
    assert fingerprint(before) != fingerprint(after)


def test_another_encoder_or_bucket_has_entries_of_its_own(tmp_path):
    data = write(tmp_path / "data", {"a.png": picture(512, 512), "a.txt": "a"})
    fill(tmp_path / "cache", data)
    other = Counting(replace(LATENTS, identity="other"))
    fill(tmp_path / "cache", data, other.encoder)
    assert len(other.calls) == 1
    latents = Counting(LATENTS)
    cache = Cache(tmp_path / "cache", latents.encoder, TEXT)
    (sample,), _ = cache.fill(read_dataset(data, 512))
    assert len(latents.calls) == 1 and cache.latents(sample).shape == (3, 16, 16)


def test_the_identity_is_that_of_the_weights_and_settings():
    vae, encoder = tiny.dc_ae(), tiny.text_encoder()
    same = latent_encoder(vae).identity
    assert same == latent_encoder(tiny.dc_ae()).identity
    assert same != latent_encoder(tiny.dc_ae().bfloat16()).identity
    assert same != latent_encoder(tiny.dc_ae(scaling_factor=0.5)).identity
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-6
    assert same != latent_encoder(vae).identity
    identities = {text_feature_encoder(encoder, chi).identity for chi in (True, False, "other")}
    assert len(identities) == 3 and text_feature_encoder(tiny.text_encoder()).identity in identities


def test_weights_on_another_place_in_memory_have_the_same_identity():
    layer = torch.nn.Linear(3, 5)
    twin = torch.nn.Linear(3, 5)
    twin.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())  # other strides
    twin.bias = layer.bias
    assert module_identity(layer) == module_identity(twin)
    assert module_identity(layer) != module_identity(layer, "setting")


def test_pictures_that_turn_out_damaged_are_left_out_by_name(tmp_path, caplog):
    data = pairs(tmp_path / "data", 3)
    content = encoded(picture(256, 256, 1), "JPEG")
    write(data, {"bad.jpg": content[: len(content) // 2], "bad.txt": "bad"})
    _, samples, problems = fill(tmp_path / "cache", data)
    assert len(samples) == 3
    assert [(problem.name, problem.reason) for problem in problems] == [("bad.jpg", "picture cannot be read")]
    assert "bad.jpg" in caplog.text


def test_a_picture_that_vanished_is_left_out_by_name(tmp_path):
    dataset = read_dataset(pairs(tmp_path / "data", 2), 256)
    (tmp_path / "data" / "000.png").unlink()
    samples, problems = Cache(tmp_path / "cache", LATENTS, TEXT).fill(dataset)
    assert [sample.name for sample in samples] == ["001.png"]
    assert str(problems[0]) == "000.png: picture cannot be read (No such file or directory)"


def test_nothing_left_is_an_error(tmp_path):
    dataset = read_dataset(pairs(tmp_path / "data", 1), 256)
    (tmp_path / "data" / "000.png").unlink()
    with pytest.raises(DatasetError, match=r"not one of 1 pictures could be read. 000\.png"):
        Cache(tmp_path / "cache", LATENTS, TEXT).fill(dataset)


@pytest.mark.parametrize(
    "latents, text, said",
    [
        (lambda pixels: means(pixels) * float("nan"), letters, r"000\.png: the autoencoder returned NaN"),
        (lambda pixels: means(pixels) + 1e6, letters, r"000\.png: the autoencoder returned NaN or infinity"),
        (means, lambda caption: (letters(caption)[0], letters("longer " + caption)[1]), r"\(caption\): the text enc"),
    ],
    ids=["NaN", "beyond float16", "NaN in the text"],
)
def test_nan_names_the_file_and_is_not_kept(tmp_path, latents, text, said):
    data = pairs(tmp_path / "data", 1)
    with pytest.raises(FloatingPointError, match=said):
        fill(tmp_path / "cache", data, replace(LATENTS, encode=latents), replace(TEXT, encode=text))
    assert all(torch.isfinite(entry).all() for entry in entries(tmp_path / "cache").values())


def test_the_autoencoders_own_error_names_the_file(tmp_path):
    vae = tiny.dc_ae()
    with torch.no_grad():
        next(vae.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"000\.png: the DC-AE encoder returned NaN"):
        fill(tmp_path / "cache", pairs(tmp_path / "data", 1), latent_encoder(vae))


def test_repeated_samples_stay_repeated(tmp_path):
    data = pairs(tmp_path / "data", 2)
    write(data, {"meta_data.json": '{"img_names": ["000", "001", "000"]}'})
    latents = Counting(LATENTS)
    _, samples, _ = fill(tmp_path / "cache", data, latents.encoder)
    assert [sample.name for sample in samples] == ["000.png", "000.png", "001.png"]
    assert len(latents.calls) == 2


def test_progress_is_told_and_cancelling_keeps_what_was_done(tmp_path):
    data, done = pairs(tmp_path / "data", 4), []

    class Cancelled(BaseException):
        pass

    def cancel(count, total):
        done.append((count, total))
        if count == 7:
            raise Cancelled

    with pytest.raises(Cancelled):
        fill(tmp_path / "cache", data, on_progress=cancel)
    assert done == [(count, 9) for count in range(1, 8)]  # 4 pictures, 4 captions and the empty one
    latents, text = Counting(LATENTS), Counting(TEXT)
    done.clear()
    fill(tmp_path / "cache", data, latents.encoder, text.encoder, on_progress=lambda *count: done.append(count))
    assert done[-1] == (9, 9) and text.calls == [] and len(latents.calls) == 2


def test_a_damaged_shard_is_computed_anew(tmp_path):
    data = pairs(tmp_path / "data", 3)
    fill(tmp_path / "whole", data)
    fill(tmp_path / "cache", data)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-5])
    fill(tmp_path / "cache", data)
    assert_same_entries(tmp_path / "whole", tmp_path / "cache")


FILL = """
import sys, time
from dataclasses import replace
from pathlib import Path
from sana_core.training import shards
from sana_core.training.cache import Cache
from sana_core.training.dataset import read_dataset
from tests.training.toy_encoders import LATENTS, TEXT
shards.FLUSH_SECONDS = 0.0
def slow(pixels):
    time.sleep(float(sys.argv[3]))
    return LATENTS.encode(pixels)
Cache(Path(sys.argv[2]), replace(LATENTS, encode=slow), TEXT).fill(read_dataset(sys.argv[1], 256))
"""


def start(data, cache, pause):
    command = [sys.executable, "-c", FILL, str(data), str(cache), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def test_killed_in_the_middle_it_goes_on_to_the_same_entries(tmp_path):
    data = pairs(tmp_path / "data", 20)
    fill(tmp_path / "whole", data)
    for written in (3, 9):  # files of latents that are there when it is killed
        process = start(data, tmp_path / "cache", 0.2)
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "cache").glob("latents/*/*.safetensors"))) < written:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    partly = len(entries(tmp_path / "cache"))
    assert partly < len(entries(tmp_path / "whole"))
    latents = Counting(LATENTS)
    fill(tmp_path / "cache", data, latents.encoder)
    assert 0 < len(latents.calls) <= 20 - 9
    assert_same_entries(tmp_path / "whole", tmp_path / "cache")


def test_two_processes_fill_one_cache_at_once(tmp_path):
    data = pairs(tmp_path / "data", 12)
    fill(tmp_path / "whole", data)
    processes = [start(data, tmp_path / "cache", 0.05) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert_same_entries(tmp_path / "whole", tmp_path / "cache")
    latents, text = Counting(LATENTS), Counting(TEXT)
    fill(tmp_path / "cache", data, latents.encoder, text.encoder)
    assert latents.calls == text.calls == []


RANKS = """
import os, pickle, sys, time
from pathlib import Path
from dataclasses import replace
import torch.distributed
from sana_core.training import shards
from sana_core.training.cache import Cache
from sana_core.training.dataset import read_dataset
from sana_core.training.distributed import from_environment
from tests.training.toy_encoders import LATENTS, TEXT
shards.FLUSH_SECONDS = 0.0
ranks = from_environment("cpu")
Path(sys.argv[3], f"pid{ranks.rank}").write_text(str(os.getpid()))
calls = []
def slow(pixels):
    calls.append(0)
    time.sleep(float(sys.argv[4]))
    return LATENTS.encode(pixels)
folder = Path(sys.argv[2].replace("RANK", str(ranks.rank)))
found = Cache(folder, replace(LATENTS, encode=slow), TEXT).fill(read_dataset(sys.argv[1], 256), ranks=ranks)
Path(sys.argv[3], f"rank{ranks.rank}").write_bytes(pickle.dumps((*found, len(calls))))
torch.distributed.destroy_process_group()  # else the interpreter ends beside the group's threads, and may abort
"""


def start_ranks(data, cache, out, pause=0.0):
    out.mkdir(exist_ok=True)
    (out / "fill.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", out / "fill.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [*map(str, torchrun), str(data), str(cache), str(out), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=(out / "said").open("ab"))


def said(out):
    return (out / "said").read_text()


def results(out):
    return [pickle.loads((out / f"rank{rank}").read_bytes()) for rank in range(2)]


def test_two_ranks_encode_a_share_each_and_go_on_after_a_kill(tmp_path):
    data = pairs(tmp_path / "data", 20)
    content = encoded(picture(256, 256, 1), "JPEG")
    write(data, {"bad.jpg": content[: len(content) // 2], "bad.txt": "bad"})
    _, samples, problems = fill(tmp_path / "whole", data)
    process = start_ranks(data, tmp_path / "cache", tmp_path / "out", 0.2)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cache").glob("latents/*/*.safetensors"))) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for rank in range(2):
        os.kill(int((tmp_path / "out" / f"pid{rank}").read_text()), signal.SIGKILL)
    assert process.wait(120) != 0
    kept = len(list((tmp_path / "cache").glob("latents/*/*.safetensors")))
    assert start_ranks(data, tmp_path / "cache", tmp_path / "out").wait(120) == 0, said(tmp_path / "out")
    assert_same_entries(tmp_path / "whole", tmp_path / "cache")
    (*first, calls), (*second, more_calls) = results(tmp_path / "out")
    assert first == second == [samples, problems]
    assert min(calls, more_calls) > 0 and calls + more_calls == 20 - kept


def test_ranks_that_share_no_disk_encode_what_they_lack(tmp_path):
    data = pairs(tmp_path / "data", 4)
    fill(tmp_path / "whole", data)
    assert start_ranks(data, tmp_path / "cache RANK", tmp_path / "out").wait(120) == 0, said(tmp_path / "out")
    for rank in range(2):
        assert_same_entries(tmp_path / "whole", tmp_path / f"cache {rank}")
    assert [calls for *_, calls in results(tmp_path / "out")] == [4, 4]


def test_entries_do_not_depend_on_what_else_is_encoded(tmp_path):
    """Nor on whether they were interrupted: with real networks a batch's size changes the last bits."""
    vae, encoder = latent_encoder(tiny.dc_ae()), text_feature_encoder(tiny.text_encoder())
    data = pairs(tmp_path / "data", 3)
    fill(tmp_path / "together", data, vae, encoder)
    for number in range(3):
        fill(tmp_path / "apart", pairs(tmp_path / f"part{number}", 1, start=number), vae, encoder)
    assert_same_entries(tmp_path / "together", tmp_path / "apart")


def test_a_small_flush_limit_makes_the_same_entries(tmp_path, monkeypatch):
    data = pairs(tmp_path / "data", 4)
    fill(tmp_path / "one", data)
    monkeypatch.setattr(shards, "FLUSH_BYTES", 1)
    fill(tmp_path / "many", data)
    assert len(list((tmp_path / "many").rglob("*.safetensors"))) == 9
    assert_same_entries(tmp_path / "one", tmp_path / "many")
