"""Merged weights in one network: the numbers of neon.merge, nothing left of the last point, no second copy."""

import math
import weakref

import pytest
import torch

from edm import family
from neon import Diverged, NeonError
from neon.measure import candidates as module
from neon.measure.candidates import Candidates
from neon.merge import merge, merge_tensor
from neon.weights.checkpoint import load_weights, save_safetensors


@pytest.fixture
def candidates(mini):
    return Candidates(family, mini.base, "cpu")


def changed(mini, path, change):
    """θ_s with a change(state), written to path."""
    state = load_weights(mini.snapshots[0])
    change(state)
    save_safetensors(path, state)
    return path


def assert_same(model, wanted):
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(state[name].numpy().tobytes() == wanted[name].numpy().tobytes() for name in wanted)


@pytest.mark.parametrize("w", [1.5, -1.0, 0.1])
def test_the_network_holds_the_merge_bit_for_bit(mini, candidates, w):
    base, new = load_weights(mini.base), load_weights(mini.snapshots[1])
    candidates.load(mini.snapshots[0], 2.0)
    wanted = {n: t if family.is_buffer(n) else merge_tensor(t, new[n], w) for n, t in base.items()}
    assert_same(candidates.load(mini.snapshots[1], w), wanted)
    assert_same(candidates.load(None, 0.0), base)


def test_buffers_are_the_bases(mini, candidates, tmp_path):
    base = load_weights(mini.base)
    buffers = [name for name in base if family.is_buffer(name)]
    path = changed(mini, tmp_path / "new.safetensors", lambda state: [state[name].add_(1) for name in buffers])
    state = candidates.load(path, 1.0).state_dict()
    assert buffers and all(torch.equal(state[name], base[name]) for name in buffers)


def test_one_merged_tensor_at_a_time(mini, candidates, monkeypatch):
    alive, most = weakref.WeakSet(), 0

    def watched(base, *args):
        nonlocal most
        for name, tensor in merge(base, *args):
            if tensor is not base[name]:
                alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(module, "merge", watched)
    candidates.load(mini.snapshots[0], 1.0)
    assert 1 <= most <= 3


def test_a_base_alone_is_read_once(candidates, monkeypatch):
    monkeypatch.delattr(module, "open_weights")
    assert candidates.load(None, 0.0) is candidates.model


def test_nothing_stays_of_a_merge_that_failed(mini, candidates, tmp_path):
    def overflow(state):
        name = [name for name in state if not family.is_buffer(name)][-1]
        state[name].fill_(3e38)

    with pytest.raises(Diverged, match="not finite in the merge"):
        candidates.load(changed(mini, tmp_path / "new.safetensors", overflow), -2.0)
    assert_same(candidates.load(None, 0.0), load_weights(mini.base))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda state: state.update(more=torch.ones(2)), "more: missing in the base"),
        (lambda state: state.pop(next(iter(state))), "missing in the self-trained model"),
        (lambda state: state.update({n: t[None] for n, t in state.items()}), "shape"),
        (
            lambda state: [t.fill_(math.nan) for n, t in state.items() if not family.is_buffer(n)],
            "not finite in the se",
        ),
    ],
)
def test_what_does_not_fit_is_refused(mini, candidates, tmp_path, change, message):
    with pytest.raises(NeonError, match=message):
        candidates.load(changed(mini, tmp_path / "new.safetensors", change), 1.0)


def test_drift_is_the_distance_of_the_weights(mini, candidates, tmp_path):
    base, new = load_weights(mini.base), load_weights(mini.snapshots[0])
    names = [name for name in base if not family.is_buffer(name)]
    squares = [(new[name].double() - base[name].double()).square().sum() for name in names]
    assert candidates.drift(mini.snapshots[0]) == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-12)

    moved = changed(mini, tmp_path / "new.safetensors", lambda s: [t.add_(1) for n, t in s.items() if n not in names])
    assert candidates.drift(moved) == candidates.drift(mini.snapshots[0])
    assert candidates.drift(mini.base) == 0
