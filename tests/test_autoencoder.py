"""When the autoencoder works whole and when in tiles; that both agree is tests/models/test_tiling.py's."""

import pytest
import torch

from sana_core import autoencoder
from sana_core.autoencoder import decode_latents, encode_pixels
from sana_core.models.memory import decode_memory, encode_memory
from tests import tiny

WAYS = {
    "decode": (decode_latents, (2, 32, 2, 3), decode_memory),
    "encode": (encode_pixels, (2, 3, 64, 96), encode_memory),
}


@pytest.fixture(scope="module")
def vae():
    return tiny.dc_ae()


@pytest.fixture
def tiles(monkeypatch):
    """The tile of each tiled call."""
    asked = []
    for way in WAYS:
        function = getattr(autoencoder, f"{way}_tiled")

        def record(model, item, tile, function=function):
            asked.append(tile)
            return function(model, item, tile)

        monkeypatch.setattr(autoencoder, f"{way}_tiled", record)
    return asked


@pytest.mark.parametrize("way", WAYS)
def test_tiles_give_the_same(vae, tiles, way):
    function, shape, _ = WAYS[way]
    batch = torch.rand(shape)
    with torch.no_grad():
        torch.testing.assert_close(function(vae, batch, True), function(vae, batch, False), atol=1e-6, rtol=1e-6)
    assert len(tiles) == len(batch), "one picture after the other"


@pytest.mark.parametrize("way", WAYS)
def test_little_free_memory_calls_for_tiles(vae, tiles, monkeypatch, way):
    function, shape, memory = WAYS[way]
    batch = torch.rand(1, *shape[1:])
    needed = memory(vae.config, 64, 96, torch.float32)
    with torch.no_grad():
        for available in (None, needed, needed - 1):
            monkeypatch.setattr(autoencoder, "free_memory", lambda device, free=available: free)
            function(vae, batch)
        assert len(tiles) == 1 and memory(vae.config, 64, 96, torch.float32, tiles[0]) < needed
        function(vae, batch, False)
    assert len(tiles) == 1


@pytest.mark.parametrize("way", WAYS)
def test_what_breaks_is_named(vae, way):
    function, shape, _ = WAYS[way]
    with torch.no_grad(), pytest.raises(FloatingPointError, match=f"the DC-AE {way}r"):
        function(vae, torch.full(shape, torch.nan))
