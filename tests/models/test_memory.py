"""What the estimates promise, against what PyTorch's allocator records while the autoencoder runs."""

import pytest
import torch

from sana_core.config import AUTOENCODERS
from sana_core.models.memory import SCRATCH, choose_tile, decode_memory, encode_memory, free_memory
from sana_core.models.tiling import decode_tiled, encode_tiled
from tests.memory import peak_bytes
from tests.models.test_dc_ae import random_dc_ae
from tests.models.test_tiling import FAMILIES, small

SIZE = (128, 192)
SANA = AUTOENCODERS["dc-ae-f32c32-sana-1.1"]


def measure(model, direction, tile, size=SIZE):
    """Peak bytes of one run, with what it is given."""
    compression = model.config.spatial_compression
    if direction == "decode":
        given = torch.randn(1, model.config.latent_channels, *(side // compression for side in size))
        whole, tiled = model.decode, decode_tiled
    else:
        given = torch.randn(1, 3, *size)
        whole, tiled = model.encode, encode_tiled
    given = given.to(model.dtype)
    with torch.no_grad():
        return given.nbytes + peak_bytes(lambda: whole(given) if tile is None else tiled(model, given, tile))


def test_the_record_is_right():
    megabyte = torch.zeros(250_000).nbytes
    assert peak_bytes(lambda: [torch.zeros(250_000) for _ in range(3)]) == 3 * megabyte
    assert megabyte <= peak_bytes(lambda: [torch.zeros(250_000).sum() for _ in range(3)]) < 1.1 * megabyte


@pytest.mark.parametrize("direction, estimate", [("decode", decode_memory), ("encode", encode_memory)])
@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_estimates_bound_what_is_used(name, tile, direction, estimate):
    model = random_dc_ae(small(name))
    used = measure(model, direction, tile)
    promised = estimate(model.config, *SIZE, model.dtype, tile)
    assert used <= promised <= 2 * used + SCRATCH, f"used {used / 2**20:.1f} MiB, promised {promised / 2**20:.1f} MiB"


@pytest.mark.parametrize("tile", [None, 2])
def test_estimates_bound_bfloat16(tile):
    model = random_dc_ae(small("dc-ae-lite-f32c32-sana-1.1")).bfloat16()
    assert measure(model, "decode", tile) <= decode_memory(model.config, *SIZE, model.dtype, tile)


def test_tiles_save_memory():
    model = random_dc_ae(small("dc-ae-f32c32-sana-1.1"))
    assert measure(model, "decode", 2) < 0.3 * measure(model, "decode", None)
    size = (256, 384)  # of which a tile of 64 pixels sees less than all
    assert measure(model, "encode", 2, size) < 0.6 * measure(model, "encode", None, size)


def test_a_4k_picture_takes_less_than_4_gib():
    weights = 2 * 313e6  # bfloat16, encoder and decoder
    assert decode_memory(SANA, 4096, 4096, torch.bfloat16, 32) + weights < 4 * 2**30
    assert decode_memory(SANA, 4096, 4096, torch.bfloat16) > 12 * 2**30


@pytest.mark.parametrize("estimate", [decode_memory, encode_memory])
def test_the_whole_grows_with_the_pixels(estimate):
    one, four = (estimate(SANA, side, side, torch.bfloat16) for side in (1024, 2048))
    assert 3.9 * one < four <= 4 * one


def test_tiles_shrink_until_they_fit():
    def memory(tile):
        return decode_memory(SANA, 4096, 4096, torch.bfloat16, tile)

    assert choose_tile(SANA, memory, None) == 32
    assert choose_tile(SANA, memory, memory(32)) == 32
    assert choose_tile(SANA, memory, memory(32) - 1) == 16
    assert choose_tile(SANA, memory, 0) == 1


def test_nobody_knows_what_is_free_on_a_cpu():
    assert free_memory(torch.device("cpu")) is None
