"""Downloads from a hub on this machine, and everything that cuts them off."""

import os
from dataclasses import replace

import pytest
from huggingface_hub import constants

from sana_core import SanaPipeline, hub
from sana_core.hub import DownloadError, download, fetch_model
from sana_core.published import AUTOENCODER, PUBLISHED, TEXT_ENCODER
from tests.hub_server import COMMIT, content, local_hub

SIZE = 60_000
DATA = content(SIZE)
FILE = replace(PUBLISHED["Sana_1600M_1024px_BF16"], size=SIZE)
TOKEN = "hf_a_secret"


@pytest.fixture
def server():
    with local_hub() as server:
        server.publish(FILE, DATA)
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models" / "diffusion_models"


def fetch(folder, *files, watch=lambda file, done: None):
    return list(download(files or [FILE], lambda file: folder, watch=watch))


def part_of(folder):
    (part,) = folder.glob("*.part")
    return part


def break_off(server, folder):
    """A download that ends half-way, however often it is tried again within itself."""
    server.cuts = [20_000, 10_000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError) as error:
        fetch(folder)
    server.cuts = []
    return str(error.value)


def test_a_file_comes_whole_and_once(server, folder):
    path = folder / "Sana_1600M_1024px_BF16.safetensors"
    assert fetch(folder) == [(path, False)]
    assert path.read_bytes() == DATA
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    assert [name for name, _, _ in server.requests] == ["HEAD", "GET", "GET"]  # the second one at the content network
    assert server.asked("GET")[0]["accept-encoding"] == "identity", "bytes can be counted on the way"
    assert f"/resolve/{COMMIT}/" in server.requests[1][1], "the version that was asked about, not a newer one"
    assert path.stat().st_mode & 0o044 == 0o044 & ~os.umask(os.umask(0)), "others may read it, as the umask says"

    server.requests.clear()
    assert fetch(folder) == [(path, True)]
    assert server.requests == []


def test_how_far_it_is_can_be_watched(server, folder):
    seen = []
    fetch(folder, watch=lambda file, done: seen.append((file, done)))
    amounts = [done for _, done in seen]
    assert {file for file, _ in seen} == {FILE}
    assert amounts == sorted(amounts) and amounts[0] == 0 and amounts[-1] == SIZE
    assert len(set(amounts)) > 10


def test_a_short_interruption_is_gone_over(server, folder):
    server.cuts = [20_000]
    ((path, _),) = fetch(folder)
    assert path.read_bytes() == DATA
    assert [headers.get("range") for headers in server.asked("GET")] == [None, "bytes=16384-"]


def test_a_download_that_was_cut_off_goes_on_where_it_ended(server, folder):
    message = break_off(server, folder)
    kept = part_of(folder).stat().st_size
    assert kept == 16384 + 8192  # whole pieces of what came
    assert "failed" in message and f"{kept:,} bytes are kept: the same download goes on there" in message
    assert not (folder / FILE.filename).exists()

    server.requests.clear()
    ((path, _),) = fetch(folder)
    assert [headers["range"] for headers in server.asked("GET")] == [f"bytes={kept}-"]
    assert path.read_bytes() == DATA
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_watcher_may_end_it(server, folder, stop):
    def watch(file, done):
        if done > SIZE / 2:
            raise stop

    with pytest.raises(stop):
        fetch(folder, watch=watch)
    kept = part_of(folder).read_bytes()
    assert SIZE / 2 < len(kept) < SIZE and DATA.startswith(kept)
    ((path, _),) = fetch(folder)
    assert server.asked("GET")[-1]["range"] == f"bytes={len(kept)}-"
    assert path.read_bytes() == DATA


def test_a_server_that_sends_all_of_it_again_is_understood(server, folder):
    break_off(server, folder)
    server.ignores_range = True
    ((path, _),) = fetch(folder)
    assert path.read_bytes() == DATA


def test_the_part_of_another_version_is_not_gone_on_with(server, folder):
    break_off(server, folder)
    newer = content(SIZE, seed=1)
    server.publish(FILE, newer)
    server.requests.clear()
    ((path, _),) = fetch(folder)
    assert "range" not in server.asked("GET")[0]
    assert path.read_bytes() == newer
    assert list(folder.iterdir()) == [path]


def test_a_whole_part_only_gets_its_name(server, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hub.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        with pytest.raises(DownloadError, match="cannot be written: Permission denied"):
            fetch(folder)
    server.requests.clear()
    fetch(folder)
    assert server.asked("GET") == []
    assert (folder / FILE.filename).read_bytes() == DATA


def test_another_size_than_the_tables_is_not_fetched(server, folder):
    server.publish(FILE, DATA[: SIZE // 2])
    with pytest.raises(DownloadError, match="of 30,000 bytes, expected about 60,000.*Update the pack"):
        fetch(folder)
    assert server.asked("GET") == []
    assert not folder.exists()


def test_a_few_bytes_of_header_are_no_other_file(server, folder):
    longer = content(SIZE + 40)
    server.publish(FILE, longer)
    assert fetch(folder)[0][0].read_bytes() == longer
    assert fetch(folder)[0][1], "it is there"


@pytest.mark.parametrize("difference", [-30, 30])
def test_a_size_that_the_hub_did_not_state_is_not_put_in_place(server, folder, difference):
    server.stated_size = SIZE + difference
    with pytest.raises(DownloadError) as error:
        fetch(folder)
    assert f"{SIZE:,}" in str(error.value)
    assert not (folder / FILE.filename).exists()


def test_bytes_that_the_server_does_not_have_are_dropped(server, folder):
    server.stated_size = SIZE + 30
    for expected in ("ended after 60,000 of 60,030", "status 416.*0 bytes are kept"):
        with pytest.raises(DownloadError, match=expected):
            fetch(folder)
    assert list(folder.iterdir()) == []


def test_damaged_bytes_are_seen_by_their_checksum(server, folder):
    server.sent[f"{FILE.repository}/{FILE.path}"] = content(SIZE, seed=2)
    with pytest.raises(DownloadError, match="not what the hub has.*checksum.*deleted"):
        fetch(folder)
    assert list(folder.iterdir()) == []


def test_a_file_of_the_users_is_left_alone(server, folder):
    folder.mkdir(parents=True)
    mine = folder / FILE.filename
    mine.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="has 4 bytes, the published file about 60,000.*Move or delete it"):
        fetch(folder)
    assert mine.read_bytes() == b"mine"
    assert server.requests == []


@pytest.mark.parametrize("status, code", [(401, "GatedRepo"), (403, "GatedRepo"), (401, "RepoNotFound")])
def test_a_gated_repository_is_explained_and_the_token_kept_secret(server, folder, monkeypatch, status, code):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.refused[FILE.repository] = (status, code)
    with pytest.raises(DownloadError, match=f"status {status}.*sign in and accept its licence.*HF_TOKEN") as error:
        fetch(folder)
    assert f"https://huggingface.co/{FILE.repository} " in str(error.value)
    assert TOKEN not in str(error.value)
    assert server.requests[0][2]["authorization"] == f"Bearer {TOKEN}"


def test_the_content_network_does_not_get_the_token(server, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(folder)
    hub_requests = [headers for _, path, headers in server.requests if "/resolve/" in path]
    assert len(hub_requests) == 2 and all(headers["authorization"] == f"Bearer {TOKEN}" for headers in hub_requests)
    assert ["authorization" in headers for headers in server.asked("GET")] == [False]


@pytest.mark.parametrize(
    "status, code, words",
    [(404, "EntryNotFound", "has no transformer/.*any more"), (503, "", "status 503. Try again later")],
)
def test_other_answers_are_explained(server, folder, status, code, words):
    server.refused[FILE.repository] = (status, code)
    with pytest.raises(DownloadError, match=words):
        fetch(folder)


def test_a_page_of_a_proxy_is_no_hub(server, folder):
    server.is_hub = False
    with pytest.raises(DownloadError, match="no hub.*proxy"):
        fetch(folder)


def test_offline_is_said_and_what_is_there_is_used(server, folder, monkeypatch):
    other = replace(PUBLISHED["Sana_600M_512px"], size=SIZE)
    fetch(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(folder)[0][1]
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        fetch(folder, FILE, other)


def test_no_network_is_said(folder):
    with local_hub() as server:
        server.publish(FILE, DATA)
        server.__exit__()
        with pytest.raises(DownloadError, match=r"connection to http://localhost:\d+ failed.*Check the network"):
            fetch(folder)
        server.__enter__()


def test_room_is_asked_for_all_files_together_before_the_first(server, folder, monkeypatch):
    other = replace(PUBLISHED["Sana_600M_512px"], size=SIZE)
    usage = hub.shutil.disk_usage(folder.parents[1])
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage._replace(free=2 * SIZE - 1))
    with pytest.raises(
        DownloadError, match="119,999 bytes are free on this disk, and 120,000 bytes or more are needed"
    ):
        fetch(folder, FILE, other)
    assert server.requests == []

    break_off(server, folder)  # what is there of a file need not be found room for
    server.publish(other, DATA)
    assert len(fetch(folder, FILE, other)) == 2


def test_a_folder_that_cannot_be_written_is_said(server, folder):
    folder.parent.write_text("a file where the folder would be")
    with pytest.raises(DownloadError, match=f"{folder.parent} cannot be written: Not a directory. Choose another"):
        fetch(folder)
    assert server.requests == []


def test_a_disk_that_fills_up_is_said(server, folder):
    break_off(server, folder)
    part = part_of(folder)
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="the disk is full. Make room"):
        fetch(folder)


@pytest.fixture
def small_model(server, tmp_path, monkeypatch):
    """The table with files of some bytes, and a cache of its own."""
    for index, name in enumerate(["Sana_Sprint_0.6B_1024px", TEXT_ENCODER, AUTOENCODER]):
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], size=5000 + index))
        server.publish(PUBLISHED[name], content(5000 + index))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"


def test_a_model_comes_as_the_files_of_a_pipeline(small_model, server, tmp_path):
    cache = tmp_path / "cache" / "sana"
    assert fetch_model(small_model) == {
        "transformer": cache / "diffusion_models" / "Sana_Sprint_0.6B_1024px.safetensors",
        "text_encoder": cache / "text_encoders" / "gemma_2_2b_it_elm_bf16.safetensors",
        "vae": cache / "vae" / "dc-ae-f32c32-sana-1.1.safetensors",
    }
    server.requests.clear()
    fetch_model("Sana_Sprint_0.6B_1024px")
    assert server.requests == []


def test_inside_comfyui_a_model_goes_to_its_folders(small_model, tmp_path, monkeypatch):
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "ComfyUI-Sana"
    monkeypatch.setattr(hub, "__file__", str(pack / "sana_core" / "hub.py"))
    assert hub.comfyui_models() is None, "there is no models folder"
    models = tmp_path / "ComfyUI" / "models"
    models.mkdir(parents=True)
    assert hub.comfyui_models() == models
    assert {path.parents[1] for path in fetch_model(small_model).values()} == {models}


def test_a_pipeline_is_made_of_a_published_model(small_model, server, tiny_models, monkeypatch):
    places = {"Sana_Sprint_0.6B_1024px": "diffusion_models", TEXT_ENCODER: "text_encoders", AUTOENCODER: "vae"}
    for name, folder in places.items():
        stem = "sprint" if folder == "diffusion_models" else "tiny"
        data = (tiny_models / folder / f"{stem}.safetensors").read_bytes()
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], size=len(data)))
        server.publish(PUBLISHED[name], data)
    assert SanaPipeline.from_pretrained(small_model, device="cpu").is_sprint


def test_a_pipeline_refuses_other_repositories(server):
    with pytest.raises(FileNotFoundError, match="is not a folder.*not in the table.*Did you mean Sana_Sprint_1.6B"):
        SanaPipeline.from_pretrained("someone/Sana_Sprint_1.6B_1024px_finetuned")
    with pytest.raises(FileNotFoundError, match="no model that draws pictures on its own"):
        SanaPipeline.from_pretrained("Comfy-Org/PixelDiT")
    assert server.requests == []
