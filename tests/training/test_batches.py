"""The plan of the batches: complete, the same for everyone, and each a function of its number."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from sana_core.resolution import Size
from sana_core.training.batches import Batches
from sana_core.training.cache import Cache, CachedSample
from sana_core.training.captions import Caption, CaptionChoice
from sana_core.training.dataset import read_dataset
from tests.training.pictures import picture, write
from tests.training.toy_encoders import CHANNELS, LATENTS, TEXT

SQUARE, WIDE, TALL = Size(256, 256), Size(192, 352), Size(352, 192)


def samples(**counts):
    sizes = {"square": SQUARE, "wide": WIDE, "tall": TALL}
    return [
        CachedSample(f"{name}{number}", sizes[name], (Caption("x"),), f"{name}{number}", ("x",))
        for name, count in counts.items()
        for number in range(count)
    ]


def plan(batches, epoch=0):
    return [batches.indices(epoch * len(batches) + step) for step in range(len(batches))]


def sized(items, batch_size, **options):
    return Batches(items, None, batch_size, **options)


def test_an_epoch_has_every_sample_once():
    batches = sized(samples(square=10, wide=5, tall=1), 4)
    assert len(batches) == 3 + 2 + 1
    for epoch in range(3):
        steps = plan(batches, epoch)
        assert sorted(index for step in steps for index in step) == list(range(16))
        assert sorted(map(len, steps)) == [1, 1, 2, 4, 4, 4]
        assert all(len({batches.samples[index].bucket for index in step}) == 1 for step in steps)


def test_epochs_differ_and_the_seed_decides():
    items = samples(square=30, wide=30)
    batches = sized(items, 4, seed=1)
    assert plan(batches, 0) != plan(batches, 1)
    assert plan(batches, 0) != plan(sized(items, 4, seed=2), 0)
    assert [plan(batches, epoch) for epoch in (2, 0, 1)] == [
        plan(sized(items, 4, seed=1), epoch) for epoch in (2, 0, 1)
    ]


def test_the_plan_of_today_is_that_of_tomorrow():
    """A plan that changed with a release would break the resuming of runs: these numbers were written down."""
    assert plan(sized(samples(square=5, wide=3), 2, seed=7)) == [(0, 2), (6, 7), (1,), (5,), (3, 4)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_share_every_batch_equally(world_size):
    items = samples(square=11, wide=5, tall=1)
    ranks = [sized(items, 2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for epoch in range(2):
        seen = Counter()
        for shares in zip(*(plan(batches, epoch) for batches in ranks), strict=True):
            assert len({len(share) for share in shares}) == 1 and shares[0]
            together = [index for share in shares for index in share]
            assert len({items[index].bucket for index in together}) == 1
            seen.update(together)
        assert seen.keys() == set(range(len(items)))
        assert sum(seen.values()) - len(items) <= 3 * (world_size - 1)  # repeated, in 3 buckets


def test_one_rank_repeats_nothing_and_sees_what_all_ranks_see_of_one_global_batch():
    items = samples(square=12, wide=8)
    alone = sized(items, 4, seed=3)
    ranks = [sized(items, 2, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert len(alone) == len(ranks[0])
    for step in range(2 * len(alone)):
        assert set(alone.indices(step)) == set(ranks[0].indices(step)) | set(ranks[1].indices(step))


def test_position_in_samples():
    items = samples(square=10, wide=5, tall=1)
    batches = sized(items, 2, world_size=3)
    counts = [batches.samples_before(step) for step in range(2 * len(batches) + 1)]
    assert counts[0] == 0 and counts[len(batches)] == 16 and counts[-1] == 32
    assert counts == sorted(set(counts))
    for step, count in enumerate(counts):
        assert batches.step_after(count) == step
    assert batches.step_after(counts[1] + 1) == 2


@pytest.mark.parametrize("before, after", [((4, 1), (4, 2)), ((2, 3), (5, 1))])
def test_another_world_size_goes_on_at_the_same_place(before, after):
    items = samples(square=40, wide=20)
    old, new = (sized(items, size, world_size=world) for size, world in (before, after))
    for step in (0, 1, len(old), len(old) + 3):
        seen = old.samples_before(step)
        resumed = new.samples_before(new.step_after(seen))
        assert seen <= resumed < seen + after[0] * after[1]
    assert new.step_after(old.samples_before(5 * len(old))) == 5 * len(new)


@pytest.fixture
def cached(tmp_path):
    files = {}
    for number in range(3):
        files |= {f"{number}.png": picture(256, 256, number), f"{number}.txt": "x" * (3 * number + 1)}
    files |= {"wide.png": picture(352, 192), "wide.txt": "wide"}
    cache = Cache(tmp_path / "cache", LATENTS, TEXT)
    found, _ = cache.fill(read_dataset(write(tmp_path / "data", files), 256))
    return cache, found


def test_a_batch_is_what_the_cache_holds(cached):
    cache, found = cached
    batches = Batches(found, cache, 3)
    by_size = {len(batches.indices(step)): batches.batch(step) for step in range(len(batches))}
    batch = by_size[3]
    assert batch.latents.shape == (3, 3, 8, 8) and batch.latents.dtype == torch.float32
    assert batch.embeds.shape == (3, 8, CHANNELS) and batch.embeds.dtype == torch.float32
    assert batch.mask.shape == (3, 8) and batch.mask.dtype == torch.bool
    for name, latents, embeds, mask in zip(batch.names, batch.latents, batch.embeds, batch.mask, strict=True):
        sample = next(sample for sample in found if sample.name == name)
        length = 3 * int(name[0]) + 2  # the caption, after its beginning
        assert torch.equal(latents, cache.latents(sample))
        assert mask.tolist() == [True] * length + [False] * (8 - length)
        assert torch.equal(embeds[:length], cache.features(sample.features[0]))
        assert (embeds[length:] == 0).all()
    assert by_size[1].latents.shape == (1, 3, 6, 11) and by_size[1].names == ("wide.png",)
    assert torch.equal(batches.null_features, torch.zeros(1, CHANNELS))


def test_a_batch_depends_on_its_step_alone(cached):
    cache, found = cached
    batches, again = Batches(found, cache, 2, seed=5), Batches(found, cache, 2, seed=5)
    for step in (7, 0, 3):
        one, other = batches.batch(step), again.batch(step)
        assert one.names == other.names
        assert torch.equal(one.latents, other.latents) and torch.equal(one.embeds, other.embeds)


def test_a_batch_moves(cached):
    moved = Batches(cached[1], cached[0], 2).batch(0).to("meta")
    assert {part.device.type for part in (moved.latents, moved.embeds, moved.mask)} == {"meta"} and moved.names


def test_captions_are_drawn_by_score_anew_in_each_epoch():
    captions = (Caption("a", 10.0), Caption("b", 30.0), Caption("c", None))
    features = {"ka": torch.full((1, 2), 1.0), "kb": torch.full((1, 2), 2.0), "kc": torch.full((1, 2), 3.0)}
    cache = SimpleNamespace(latents=lambda sample: torch.zeros(1, 1, 1), features=features.get)
    sample = CachedSample("a", SQUARE, captions, "k", tuple(features))
    batches = Batches([sample] * 8, cache, 8, choice=CaptionChoice(0, 1))
    drawn = torch.cat([batches.batch(step).embeds[:, 0, 0] for step in range(150)])
    assert (drawn == 1).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert (drawn == 2).float().mean().item() == pytest.approx(0.75, abs=0.04)
    assert len(batches.batch(0).embeds[:, 0, 0].unique()) == 2, "not the same caption for a whole batch"


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_shares_that_do_not_exist_are_refused(options):
    with pytest.raises(ValueError, match="no such share"):
        Batches(samples(square=2), None, **{"batch_size": 1} | options)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        Batches([], None, 1)
