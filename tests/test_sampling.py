"""Streams per image, lists of seeds, balanced labels and shares: the same whatever the batch and the processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neon import NeonError
from neon.sampling import Streams, parse_seeds, shard, whole_batches

EDM = Path(__file__).parent / "golden" / "edm"

seeds = st.lists(st.integers(0, 2**40), min_size=1, max_size=6)


def draws(seeds):
    """A sequence of draws of all kinds, one list of rows per draw."""
    streams = Streams(seeds)
    return [
        streams.randn((3, 5, 7)),
        streams.randint(10),
        streams.randn((17,), dtype=torch.float64),
        streams.rand((2, 3)),
        streams.randn(()),
        streams.rand((33,), dtype=torch.float64),
    ]


@given(seeds, st.data())
@settings(max_examples=50, deadline=None)
def test_a_row_depends_on_its_seed_alone(seeds, data):
    together = draws(seeds)
    i = data.draw(st.integers(0, len(seeds) - 1))
    for rows, alone in zip(together, draws(seeds[i : i + 1])):
        assert rows.dtype == alone.dtype and rows.shape[0] == len(seeds)
        assert torch.equal(rows[i], alone[0])


def test_draws_follow_each_other_in_one_stream():
    streams = Streams(torch.tensor([5, 6]))
    first, second = streams.randn((4,)), streams.randn((4,))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1]) and len(streams) == 2
    g = torch.Generator().manual_seed(6)
    assert torch.equal(first[1], torch.randn(4, generator=g)) and torch.equal(second[1], torch.randn(4, generator=g))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draws([0, 1])
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_count_modulo_two_to_the_32():
    assert torch.equal(Streams([2**32 + 1, -1]).rand((5,)), Streams([1, 2**32 - 1]).rand((5,)))


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("size", [32, 64])
def test_streams_are_those_of_the_original(case, size):
    golden = np.load(EDM / "stacked_rng.npz")
    streams = Streams(golden[f"{case}_seeds"].tolist())
    latents = streams.randn((3, size, size))
    rows = latents.reshape(len(streams), -1).numpy()
    assert np.array_equal(rows[:, :16], golden[f"{case}_latents{size}_first16"])
    assert np.array_equal(rows[:, -4:], golden[f"{case}_latents{size}_last4"])
    assert np.array_equal(streams.randint(10), golden[f"{case}_labels_after_latents{size}"])
    noise = streams.randn((3, 64, 64), torch.float64).reshape(len(streams), -1)
    assert np.array_equal(noise[:, :8], golden[f"{case}_randnlike64_after_{size}_first8"])


def test_ranges_of_the_draws():
    streams = Streams(range(200))
    uniform, whole = streams.rand((50,)), streams.randint(7)
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert set(whole.tolist()) == set(range(7)) and whole.dtype == torch.int64 and whole.shape == (200,)
    assert abs(streams.randn((50,)).std() - 1) < 0.03


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0", [0]),
        ("0-4", [0, 1, 2, 3, 4]),
        ("1,3,8-10", [1, 3, 8, 9, 10]),
        ("8-10, 3 ,1", [8, 9, 10, 3, 1]),
        ("7-7", [7]),
        ("5,5", [5, 5]),
        ("4294967296-4294967297", [2**32, 2**32 + 1]),
    ],
)
def test_parse_seeds(text, wanted):
    found = parse_seeds(text)
    assert found.dtype == torch.int64 and found.tolist() == wanted


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "a", "1-b", "-1", "5-", "-", "1-2-3", "1--2", "4-3", "1.5", "0:4", "1 2"]
)
def test_bad_seeds(text):
    with pytest.raises(NeonError, match="seeds") as caught:
        parse_seeds(text)
    assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 20)), min_size=1, max_size=5))
@settings(deadline=None)
def test_parse_seeds_reads_what_is_written(ranges):
    text = ",".join(f"{low}-{low + more}" if more else str(low) for low, more in ranges)
    assert parse_seeds(text).tolist() == [i for low, more in ranges for i in range(low, low + more + 1)]


# ---------------------------------------------------------------- labels and shares


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 40))
@settings(deadline=None)
def test_shards_cover_everything_once(n, world, batch):
    ranks = [shard(n, rank, world, batch) for rank in range(world)]
    indices = [[i for part in parts for i in range(n)[part]] for parts in ranks]
    assert [i for mine in indices for i in mine] == list(range(n))
    assert all(0 < part.stop - part.start <= batch for parts in ranks for part in parts)
    sizes = [len(mine) for mine in indices]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["99999999999999999999", "0-99999999999"])
def test_seeds_out_of_range(text):
    with pytest.raises(NeonError, match="out of range"):
        parse_seeds(text)


# ---------------------------------------------------------------- whole batches


@given(st.integers(0, 23), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_whole_batches_make_the_same_images_in_one_shape(n, batch):
    shapes = set()

    def sample(seeds):
        shapes.add(len(seeds))
        return seeds[:, None] * 2

    sample_whole = whole_batches(sample, batch)
    made = [sample_whole(part) for part in torch.arange(n).split(batch) if len(part)]
    assert torch.equal(torch.cat(made) if made else torch.empty(0, 1), torch.arange(n)[:, None] * 2)
    assert shapes <= {batch}
