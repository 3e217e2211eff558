"""Streams by a counter: Philox as published, a row for each seed whatever the batch, and `--streams counter`."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import error_of, files, neon

from neon import NeonError, counter
from neon.counter import Counted, philox
from neon.distributed import World
from neon.dropout import dropout, masks_of
from neon.family import get_family
from neon.sampling import Streams, drawn_by, new_streams

# Known answers of Random123, the authors' library: counter, key → output.
KNOWN = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def words(text: str) -> list[torch.Tensor]:
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN)
def test_philox_gives_the_published_answers(case):
    given, key, wanted = map(words, case)
    assert [int(word) for word in philox(given, key)] == [int(word) for word in wanted]


def draws(seeds):
    """A sequence of draws of all kinds."""
    streams = Counted(seeds)
    return [
        streams.randn((3, 5, 7)),
        streams.randint(10),
        streams.rand((33,), dtype=torch.float64),
        streams.exponential((2, 3)),
        streams.randn(()),
        streams.randn((3, 5, 7), dtype=torch.float64),
    ]


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=6), st.data())
@settings(max_examples=50, deadline=None)
def test_a_row_depends_on_its_seed_alone(seeds, data):
    i = data.draw(st.integers(0, len(seeds) - 1))
    for rows, alone in zip(draws(seeds), draws(seeds[i : i + 1])):
        assert rows.dtype == alone.dtype and rows.shape[0] == len(seeds)
        assert torch.equal(rows[i], alone[0])


def test_no_draw_repeats_another_and_no_seed_another():
    streams = Counted([7, 8, 7 + 2**32])
    many = torch.cat([streams.rand((50,), dtype=torch.float64) for _ in range(4)], 1)
    assert many.unique().numel() == many.numel()


def test_as_shapes_and_dtypes_are_asked_for():
    streams = Counted(torch.tensor([3, 4]))
    assert streams.randn((2, 3)).shape == (2, 2, 3) and streams.randn(()).shape == (2,)
    assert streams.rand((0,)).shape == (2, 0) and streams.randint(5).dtype == torch.int64
    assert Counted([]).randn((3,)).shape == (0, 3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = Counted(range(200)).rand((100,), dtype=dtype)
        assert found.dtype == dtype and found.min() >= 0 and found.max() < 1  # never 1, however coarse the dtype


def test_the_numbers_are_of_their_distributions():
    n = 200_000
    normal = Counted([5]).randn((n,)).double()[0]
    uniform = Counted([6]).rand((n,)).double()[0]
    waits = Counted([7]).exponential((n,)).double()[0]
    within = 5 / math.sqrt(n)  # five standard errors of a mean of variance 1
    assert abs(normal.mean()) < within and abs(normal.square().mean() - 1) < within * math.sqrt(2)
    assert abs(normal.pow(4).mean() - 3) < within * math.sqrt(96)
    assert abs((normal[:-1] * normal[1:]).mean()) < within  # the two numbers of a pair are independent
    assert abs(uniform.mean() - 0.5) < within and abs(uniform.square().mean() - 1 / 3) < within
    assert abs(waits.mean() - 1) < within and waits.min() > 0
    assert torch.kthvalue(normal, int(0.95 * n)).values == pytest.approx(1.645, abs=0.02)
    dice = Counted(range(60_000)).randint(6).bincount(minlength=6)
    assert len(dice) == 6 and (dice - 10_000).abs().max() < 5 * math.sqrt(10_000)


def test_large_draws_are_made_in_parts_that_change_nothing(monkeypatch):
    whole = draws(range(5))
    monkeypatch.setattr(counter, "AT_ONCE", 40)
    assert all(map(torch.equal, whole, draws(range(5))))


def test_the_kind_in_force_makes_the_streams_and_masks():
    x = torch.ones(2, 40)
    with masks_of(torch.tensor([1, 2]), "cpu"):
        plain = dropout(x, 0.5)
    with drawn_by("counter"):
        assert type(new_streams([1])) is Counted
        with masks_of(torch.tensor([2]), "cpu"):
            alone = dropout(x[:1], 0.5)
        with masks_of(torch.tensor([1, 2]), "cpu"):
            counted = dropout(x, 0.5)
    assert type(new_streams([1])) is Streams
    assert torch.equal(counted[1:], alone) and not torch.equal(counted, plain)


def test_results_say_which_streams_they_are_of():
    assert "streams" not in World().identity()  # as in rows before there was a choice
    assert World(streams="counter").identity()["streams"] == "counter"


def test_a_sampler_that_needs_generators_says_so():
    family = get_family("diffusers")
    model, options = family.create("digits", device="cpu"), dataclasses.asdict(family.Sampling())
    seeds = torch.arange(2)
    with drawn_by("counter"), pytest.raises(NeonError, match="leave out --streams counter"):
        family.sample(model, seeds, family.labels(model, seeds), **options)


def test_generate_evaluate_search_final_and_grid(mini, tmp_path):
    """Any batch makes the same images; rows and sets of the two kinds are never mixed."""
    kind = ("--streams", "counter")
    set_of = ("generate", *mini.sampling, "--model", mini.base, "--seeds", "0-11")
    neon(*set_of, "--out", tmp_path / "torch")
    for batch in (3, 12):
        neon(*set_of, *kind, "--batch_size", batch, "--out", tmp_path / f"S{batch}")
    assert files(tmp_path / "S3") == files(tmp_path / "S12") != files(tmp_path / "torch")
    assert "streams differs" in error_of(*set_of, "--out", tmp_path / "S3")

    found = ("--base", mini.base, "--selftrained", mini.snapshots[1], "--w", "0,1", "--method", "grid")
    measured = ("--seeds", "0-19", "--out", tmp_path / "search.jsonl")
    neon("search", *mini.measuring, *found, *measured)
    neon("search", *mini.measuring, *found, *measured, *kind)
    rows = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [row.get("streams") for row in rows] == [None, None, "counter", "counter"]
    assert len({row["fid"] for row in rows}) == 4

    final = ("final", *mini.measuring, "--base", mini.base, "--seeds", "20-39", "--search", tmp_path / "search.jsonl")
    neon(*final, *kind, "--out", tmp_path / "final.jsonl")
    neon("grid", "--family", "edm", "--final", tmp_path / "final.jsonl", "--seeds", "0-3", "--out", tmp_path / "sheets")
    plain = tmp_path / "plain.jsonl"
    plain.write_text((tmp_path / "final.jsonl").read_text().replace('"streams": "counter"', '"streams": "torch"'))
    neon("grid", "--family", "edm", "--final", plain, "--seeds", "0-3", "--out", tmp_path / "others")
    assert files(tmp_path / "sheets") != files(tmp_path / "others")
    plain.write_text(plain.read_text().replace('"streams": "torch"', '"streams": "dice"'))
    odd = ("grid", "--family", "edm", "--final", plain, "--seeds", "0-3", "--out", tmp_path / "odd")
    assert "rows of --streams dice" in error_of(*odd)
