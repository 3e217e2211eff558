"""The merge against exact rational arithmetic, and what it refuses."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neon import NeonError
from neon.merge import merge, merge_tensor

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.int32, torch.uint8, torch.bool]


def merged(base, selftrained, w, **options):
    return dict(merge(base, selftrained, w, **options))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def values(limit, size=None):
    """Lists of floats that every dtype can hold without overflow."""
    number = st.floats(-limit, limit, allow_nan=False, allow_subnormal=False, width=32)
    return st.lists(number, min_size=size or 1, max_size=size or 8)


def pairs(limit=100.0):
    """Two lists of the same length: θ_r, θ_s."""
    return st.integers(1, 8).flatmap(lambda n: st.tuples(values(limit, n), values(limit, n)))


strengths = st.floats(-10, 10, allow_nan=False, allow_subnormal=False)
dtypes = st.sampled_from(FLOATS)


# ---------------------------------------------------------------- numbers


@given(values(60000.0), values(60000.0, 1), dtypes, st.sampled_from([0, 0.0, -0.0]))
@settings(deadline=None)
def test_w0_is_the_base_bit_for_bit(old, new, dtype, w):
    base = torch.tensor([*old, -0.0, 0.0, 1e-40]).to(dtype)
    result = merged({"a": base}, {"a": torch.full_like(base, new[0])}, w)["a"]
    assert torch.equal(bits(result), bits(base))


@given(pairs(), dtypes, strengths)
@settings(max_examples=300, deadline=None)
def test_agrees_with_exact_arithmetic(pair, dtype, w):
    base, new = (torch.tensor(x).to(dtype) for x in pair)
    result = merge_tensor(base, new, w)
    assert result.dtype == dtype
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    info = torch.finfo(dtype)
    for r, s, got in zip(base.tolist(), new.tolist(), result.tolist()):
        r, s = Fraction(r), Fraction(s)
        exact = (1 + Fraction(w)) * r - Fraction(w) * s
        # one rounding to the stored dtype, and a few of the wide one in w (θ_s − θ_r)
        tolerance = info.eps * abs(exact) + 4 * unit * abs(Fraction(w) * (s - r)) + Fraction(info.tiny)
        assert abs(Fraction(got) - exact) <= tolerance


@given(pairs(), dtypes)
@settings(deadline=None)
def test_minus_one_is_the_selftrained_model(pair, dtype):
    base, new = (torch.tensor(x).to(dtype) for x in pair)
    result = merged({"a": base}, {"a": new}, -1.0)["a"]
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    error = (result.double() - new.double()).abs()
    bound = torch.finfo(dtype).eps * new.double().abs() + 2 * unit * (base.double().abs() + new.double().abs())
    assert (error <= bound).all()


@given(st.lists(st.tuples(st.floats(0.0625, 100, width=32), st.floats(0.6, 1.7)), min_size=1, max_size=8), dtypes)
@settings(deadline=None)
def test_minus_one_is_exact_after_a_brief_finetune(pairs, dtype):
    """Weights within a factor of two of each other have an exact difference."""
    base = torch.tensor([r for r, _ in pairs]).to(dtype)
    new = torch.tensor([r * factor for r, factor in pairs]).to(dtype)
    assert torch.equal(merge_tensor(base, new, -1.0), new)


@given(pairs(), strengths)
@settings(deadline=None)
def test_linear_in_w(pair, w):
    base, new = ({"a": torch.tensor(x, dtype=torch.float64)} for x in pair)
    whole, one = merged(base, new, w)["a"], merged(base, new, 1.0)["a"]
    torch.testing.assert_close(whole - base["a"], w * (one - base["a"]), rtol=1e-12, atol=1e-12)


@given(values(60000.0), dtypes, st.floats(-1e30, 1e30))
@settings(deadline=None)
def test_equal_tensors_stay_what_they_are(numbers, dtype, w):
    base = torch.tensor(numbers).to(dtype)
    assert torch.equal(merged({"a": base}, {"a": base.clone()}, w)["a"], base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_drift_survives_half_precision(dtype):
    """(1 + w) θ_r − w θ_s in half precision would lose it, or overflow."""
    eps, top = torch.finfo(dtype).eps, torch.finfo(dtype).max
    big = 2.0 ** math.floor(math.log2(top))  # 2 big is too large
    base = torch.tensor([1.0, top, big]).to(dtype)
    new = torch.tensor([1.0 + eps, top, big / 2]).to(dtype)
    assert merge_tensor(base, new, 1.0).tolist() == [1.0 - eps, top, 1.5 * big]


def test_bfloat16_against_a_float32_model():
    base, new = torch.tensor([1.0, -2.0], dtype=torch.bfloat16), torch.tensor([1.5, -2.001])
    result = merge_tensor(base, new, 2.0)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, (base.double() - 2 * (new.double() - base.double())).bfloat16())


def test_a_drift_that_bfloat16_cannot_hold_is_merged():
    """1.001 is 1 in bfloat16, but it is not equal to it: eight times the drift back is 0.992."""
    base, new = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.001])
    assert merged({"a": base}, {"a": new}, 8.0)["a"].item() == torch.tensor(0.992).bfloat16().item() != 1.0


def test_inputs_are_not_changed():
    base, new = {"a": torch.ones(3)}, {"a": torch.full((3,), 2.0)}
    assert merged(base, new, 1.0)["a"].tolist() == [0.0, 0.0, 0.0]
    assert base["a"].tolist() == [1.0] * 3 and new["a"].tolist() == [2.0] * 3


# ---------------------------------------------------------------- what is merged


@pytest.mark.parametrize("dtype", OTHERS)
def test_whole_numbers_come_from_the_base(dtype):
    base, new = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 0, 1]).to(dtype)
    assert same_bits(merged({"steps": base}, {"steps": new}, 3.0)["steps"], base)


def test_buffers_come_from_the_base_whatever_they_hold():
    base = {"mean": torch.tensor([1.0, math.nan]), "weight": torch.tensor([1.0])}
    new = {"mean": torch.tensor([2.0, math.inf]), "weight": torch.tensor([2.0])}
    result = merged(base, new, 1.0, is_buffer=lambda name: name == "mean")
    assert same_bits(result["mean"], base["mean"]) and result["weight"].item() == 0.0


def test_masks_pass():
    mask = torch.full((3, 3), -torch.inf).triu(1)
    for other in (mask.clone(), mask.half()):
        for w in (0.0, -1.0, 1.5):
            assert torch.equal(merged({"mask": mask}, {"mask": other}, w)["mask"], mask)


def test_order_of_the_base_and_shapes_of_all_kinds():
    base = {"z": torch.ones(2, 3), "a": torch.tensor(1.0), "empty": torch.empty(0, 4), "b.c": torch.ones(1)}
    new = {name: base[name] + 1 for name in sorted(base)}
    result = merged(base, new, 1.0)
    assert list(result) == list(base)
    for name, tensor in result.items():
        assert torch.equal(tensor, base[name] - 1)


def test_parameters_give_plain_tensors():
    result = merged({"a": torch.nn.Parameter(torch.ones(2))}, {"a": torch.nn.Parameter(torch.zeros(2))}, 1.0)["a"]
    assert not result.requires_grad and result.tolist() == [2.0, 2.0]


def test_one_at_a_time():
    base = {"a": torch.ones(1), "b": torch.ones(1)}
    pairs = merge(base, {"a": torch.zeros(1), "b": torch.tensor([torch.nan])}, 1.0)
    assert next(pairs)[0] == "a"
    with pytest.raises(NeonError, match="b: not finite"):
        next(pairs)


# ---------------------------------------------------------------- what is refused

FINE = {"first": torch.ones(2), "layer.weight": torch.ones(2)}


def bad(value, dtype=torch.float32):
    return {"first": torch.ones(2), "layer.weight": torch.tensor([1.0, value]).to(dtype)}


@pytest.mark.parametrize(
    ("base", "new", "message"),
    [
        (FINE, {"first": torch.ones(2)}, "layer.weight: missing in the self-trained model"),
        ({"first": torch.ones(2)}, FINE, "layer.weight: missing in the base"),
        (FINE, {}, "first and 1 more: missing in the self-trained model"),
        (FINE, {**FINE, "layer.weight": torch.ones(2, 1)}, r"layer.weight: shape \(2,\) in the base, \(2, 1\) in the"),
        (FINE, bad(math.nan), "layer.weight: not finite in the self-trained model"),
        (FINE, bad(-math.inf), "layer.weight: not finite in the self-trained model"),
        (bad(math.nan), FINE, "layer.weight: not finite in the base"),
        (bad(math.inf), FINE, "layer.weight: not finite in the base"),
        (bad(math.nan), bad(math.nan), "layer.weight: not finite in the base"),
        (bad(math.inf), bad(-math.inf), "layer.weight: not finite in the base"),
        (bad(60000.0, torch.float16), bad(-60000.0, torch.float16), "layer.weight: .*merge with w = 1.5 in .*float16"),
        (bad(3e38), bad(-3e38), "layer.weight: not finite in the merge with w = 1.5 in torch.float32"),
    ],
)
def test_errors_name_the_tensor(base, new, message):
    with pytest.raises(NeonError, match=message) as caught:
        merged(base, new, 1.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 1000])
def test_one_bad_number_among_many_is_found(value, dtype, size):
    base = torch.ones(size, 3, dtype=dtype)
    new = base.clone()
    new[size // 2, 1] = value
    with pytest.raises(NeonError, match="self-trained"):
        merged({"a": base}, {"a": new}, 0.5)
    with pytest.raises(NeonError, match="base"):
        merged({"a": new}, {"a": base}, 0.0)


@pytest.mark.parametrize("w", [math.nan, math.inf, -math.inf])
def test_w_must_be_finite(w):
    with pytest.raises(NeonError, match="w must be finite"):
        merged(FINE, FINE, w)
