"""The tiled autoencoder is the whole one: in float64 to the last digits, in float32 but for rounding."""

from dataclasses import replace

import pytest
import torch

from sana_core.config import AUTOENCODERS
from sana_core.models import tiling
from sana_core.models.dc_ae import DCAE, ResBlock
from sana_core.models.tiling import Geometry, Grid, Step, decode_tiled, decoder_steps, encode_tiled, encoder_steps
from tests.models.test_dc_ae import narrow, random_dc_ae

FAMILIES = ["dc-ae-f32c32-sana-1.1", "dc-ae-lite-f32c32-sana-1.1", "dc-ae-f32c32-mix-1.0", "dc-ae-nano"]
DEEPER = ["dc-ae-f64c128-in-1.0", "dc-ae-f128c512-mix-1.0"]


def small(name):
    return AUTOENCODERS[name] if name == "dc-ae-nano" else narrow(name)


def slim(name):
    """Every operation of the family, once for each stage."""
    config = small(name)
    depths = {
        side: tuple(min(1, depth) for depth in getattr(config, side)) for side in ("encoder_depths", "decoder_depths")
    }
    channels = tuple(32 for _ in config.encoder_channels)
    return replace(config, **depths, encoder_channels=channels, decoder_channels=channels)


def pixels_for(config, height, width, batch=1):
    size = (height * config.spatial_compression, width * config.spatial_compression)
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def double(monkeypatch):
    """float64 where the attention would go to float32, to tell a wrong halo, however faint, from rounding."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("name", FAMILIES + DEEPER)
@pytest.mark.parametrize("size, tile", [((3, 4), 1), ((5, 3), 2), ((1, 5), 3), ((2, 2), 32)])
def test_double_precision_sees_no_tiles(double, name, size, tile):
    config = slim(name)
    if config.spatial_compression > 32:
        size = tuple(min(side, 3) for side in size)
    model = random_dc_ae(config).double()
    pixels = pixels_for(config, *size).double()
    with torch.no_grad():
        latent = model.encode(pixels)
        assert relative_error(encode_tiled(model, pixels, tile), latent) < 1e-13
        assert relative_error(decode_tiled(model, latent, tile), model.decode(latent)) < 1e-13


@pytest.mark.parametrize("name", FAMILIES)
def test_single_precision_differs_by_rounding_alone(name, monkeypatch):
    """Within 1e-6, or, on a machine that rounds worse, twice what the whole itself is off."""
    model = random_dc_ae(small(name))
    pixels = pixels_for(model.config, 3, 4)
    with torch.no_grad():
        latent = model.encode(pixels)
        picture = model.decode(latent)
        tiles = encode_tiled(model, pixels, 2), decode_tiled(model, latent, 2)
        monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
        model = model.double()
        rounding = (
            relative_error(latent, model.encode(pixels.double())),
            relative_error(picture, model.decode(latent.double())),
        )
    for tiled, whole, off in zip(tiles, (latent, picture), rounding, strict=True):
        assert relative_error(tiled, whole) < max(1e-6, 2 * off)


def test_a_tile_as_large_as_the_picture_changes_no_bit():
    config = small("dc-ae-f32c32-sana-1.1")
    model = random_dc_ae(config)
    latent = torch.randn(1, 32, 2, 3)
    with torch.no_grad():
        assert torch.equal(decode_tiled(model, latent, 32), model.decode(latent))


def test_bfloat16_is_no_further_from_the_truth_than_the_whole():
    model = random_dc_ae(slim("dc-ae-f32c32-sana-1.1"))
    latent = torch.randn(1, 32, 3, 2)
    with torch.no_grad():
        truth = model.decode(latent)
        model, latent = model.bfloat16(), latent.bfloat16()
        tiled, whole = decode_tiled(model, latent, 1), model.decode(latent)
    assert tiled.dtype == torch.bfloat16
    assert (tiled - truth).square().mean() < 1.05 * (whole - truth).square().mean()


def test_each_picture_of_a_batch_has_its_own_attention():
    config = slim("dc-ae-f32c32-sana-1.1")
    model = random_dc_ae(config)
    pixels = pixels_for(config, 2, 3, batch=2)
    with torch.no_grad():
        latent = model.encode(pixels)
        assert relative_error(encode_tiled(model, pixels, 2), latent) < 1e-6
        assert relative_error(decode_tiled(model, latent, 2), model.decode(latent)) < 1e-6


@pytest.mark.parametrize("part", ["before", "after"])
def test_one_position_less_of_halo_would_be_seen(double, monkeypatch, part):
    """The halo is not wider than it must be, hence the errors above come from comparisons that can fail."""
    model = random_dc_ae(slim("dc-ae-f32c32-sana-1.1")).double()
    latent = torch.randn(1, 32, 4, 4, dtype=torch.float64)
    exact = tiling.geometry

    def geometry(op):
        found = exact(op)
        return replace(found, **{part: max(0, getattr(found, part) - 1)}) if isinstance(op, changed) else found

    changed = ResBlock if part == "before" else tiling.InterpolateConv
    monkeypatch.setattr(tiling, "geometry", geometry)
    with torch.no_grad():
        assert relative_error(decode_tiled(model, latent, 2), model.decode(latent)) > 1e-6


def test_the_tail_of_the_published_decoder_sees_seven_positions_at_an_eighth():
    decoder = DCAE(AUTOENCODERS["dc-ae-f32c32-sana-1.1"], device="meta").decoder
    tail = decoder_steps(decoder, 32)[-1]
    assert tail.positions == 32
    first = tail.spans(size=4 * 100, tile=slice(40, 60))[0]
    assert (first.start, first.stop) == (160 - 7, 240 + 7)


def test_the_halo_is_cut_where_the_picture_ends():
    decoder = DCAE(AUTOENCODERS["dc-ae-f32c32-sana-1.1"], device="meta").decoder
    first, last = (decoder_steps(decoder, 32)[-1].spans(400, tile)[0] for tile in (slice(0, 20), slice(80, 100)))
    assert (first.start, first.stop) == (0, 87) and (last.start, last.stop) == (313, 400)


@pytest.mark.parametrize("name", FAMILIES + DEEPER)
def test_no_map_above_an_eighth_is_held_and_each_attention_starts_a_step(name):
    config = AUTOENCODERS[name]
    model = DCAE(config, device="meta")
    compression = config.spatial_compression
    decoder, encoder = decoder_steps(model.decoder, compression), encoder_steps(model.encoder, compression)
    assert all(step.positions * 8 <= compression for step in [*decoder[:-1], *encoder])
    assert decoder[-1].positions == compression and encoder[-1].positions == 1
    for step in [*decoder, *encoder]:
        assert not any(isinstance(op, tiling.EfficientViTBlock) for op in step.ops[1:])


def test_an_odd_span_needs_the_positions_that_it_comes_from():
    assert Geometry(after=1, up=2).needed(slice(5, 7), 10) == slice(2, 4)
    assert Geometry(before=1, up=2).needed(slice(5, 7), 10) == slice(1, 5)
    assert Geometry(before=1, down=2).needed(slice(5, 7), 100) == slice(8, 16)


def test_tiles_are_even():
    grid = Grid.of(33, 5, 32)
    assert [(row.start, row.stop) for row in grid.rows] == [(0, 16), (16, 33)]
    assert len(grid) == len(list(grid)) == 2


def test_progress_counts_every_tile_and_may_stop():
    model, seen = random_dc_ae(slim("dc-ae-f32c32-sana-1.1")), []
    decode_tiled(model, torch.randn(1, 32, 2, 2), 1, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)} and len(seen) % 4 == 0

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        decode_tiled(model, torch.randn(1, 32, 2, 2), 1, stop)


def test_bad_arguments_are_refused():
    model = random_dc_ae(slim("dc-ae-f32c32-sana-1.1"))
    with pytest.raises(ValueError, match="a tile has -1 latent positions"):
        decode_tiled(model, torch.zeros(1, 32, 2, 2), -1)
    with pytest.raises(ValueError, match="multiples of 32, got 100 x 64 pixels"):
        encode_tiled(model, torch.zeros(1, 3, 64, 100))
    with pytest.raises(TypeError, match="no geometry for Linear"):
        Step((torch.nn.Linear(1, 1),), 1).spans(4, slice(0, 1))
