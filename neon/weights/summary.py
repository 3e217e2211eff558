"""What a merge did, for people: what it merged, what it took from the base and why, how far θ_s is from θ_r."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from neon import NeonError
from neon.family import Family
from neon.merge import EQUAL
from neon.weights.checkpoint import Weights

# Last parts of names under which running statistics and other state that training does not learn are stored:
# batch normalisation (torch, TensorFlow, BigGAN), StyleGAN's averages, codebooks kept as averages (vector
# quantisation), counters of an average, ranges for quantised inference, the vectors of spectral normalisation.
STATISTICS = re.compile(
    r"(running_\w+|moving_(mean|var|variance|avg|average)|stored_(mean|var)|num_batches_tracked"
    r"|w_avg|latent_avg|pl_mean|\w+_ema"
    r"|(ema_)?cluster_size|embed_avg|ema_\w+"
    r"|num_updates|min_val|max_val|weight_u|_u|_v|u\d|sv\d)"
)
HALF = (torch.float16, torch.bfloat16)
MUCH = 0.1  # share of weights whose steps are lost, from which on it is a warning
CHUNK = 2**20  # numbers per step of a norm: no copy of a large tensor, no rounding of a long float32 sum


def buffer_rules(base: Weights, family: Family | None, pattern: str | None) -> dict[str, Callable[[str], object]]:
    """Who says that a tensor is a buffer ('buffers of edm') → predicate on names: the family, the file, the pattern.

    Raises NeonError if the pattern is no regular expression, or is found in no name of the base.
    """
    rules: dict[str, Callable[[str], object]] = {}
    if family:
        rules[f"buffers of {family.name}"] = family.is_buffer
    if base.buffers:
        rules[f"buffers of {base.path.name}"] = base.buffers.__contains__
    if pattern is not None:
        try:
            found = re.compile(pattern).search
        except (re.error, OverflowError, RecursionError) as error:
            raise NeonError(f"--buffers {pattern!r} is not a regular expression: {error}") from None
        if not any(map(found, base)):
            raise NeonError(f"--buffers {pattern!r} matches no name in {base.path}")
        rules[f"--buffers {pattern}"] = found
    return rules


class Drift:
    """How far tensors s are from tensors r, ‖s − r‖ / ‖r‖ over all that were added, and how many values are equal."""

    def __init__(self):
        self.values = self.unmoved = 0
        self.base_norm = self.norm = 0.0

    def add(self, r: torch.Tensor, s: torch.Tensor) -> None:
        """Count two tensors of one shape that differ; both real."""
        self.values += r.numel()
        for old, new in zip(r.reshape(-1).split(CHUNK), s.reshape(-1).split(CHUNK)):
            old, new = old.double(), new.to(old.device, torch.float64)
            self.unmoved += int((old == new).sum())
            self.base_norm = math.hypot(self.base_norm, old.norm())
            self.norm = math.hypot(self.norm, (new - old).norm())

    def add_equal(self, r: torch.Tensor) -> None:
        """Count a tensor that is the same on both sides. It is part of no norm: a mask may hold infinities."""
        self.values += r.numel()
        self.unmoved += r.numel()

    @property
    def ratio(self) -> float:
        return self.norm / self.base_norm if self.base_norm else math.inf

    @property
    def unmoved_share(self) -> str:
        """'12.3 %', for people: 0 % and 100 % are exact."""
        share = 100 * self.unmoved / max(self.values, 1)
        if 0 < share < 0.1 or 99.9 < share < 100:
            return "< 0.1 %" if share < 50 else "> 99.9 %"
        return f"{share:.3g} %"


class MergeSummary:
    """Counts what neon.merge.merge does, which is given its `is_buffer` and `observe`. buffers: see buffer_rules."""

    def __init__(self, buffers: Mapping[str, Callable[[str], object]]):
        self.buffers = buffers
        self.tensors, self.values = Counter(), Counter()  # by reason to keep; None: merged
        self.merged: list[str] = []
        self.drift = Drift()
        self.half, self.rounded = Drift(), Drift()  # of θ_s in half precision; of the merge in half precision
        self.halves: set[str] = set()  # the names of these precisions
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None

    def is_buffer(self, name: str) -> bool:
        return any(rule(name) for rule in self.buffers.values())

    def observe(self, name: str, old: torch.Tensor, new: torch.Tensor, reason: str | None) -> None:
        """Count a tensor of θ_r (old) and θ_s (new), both real if it is merged, and why it is not."""
        if reason == "buffer":
            reason = next(source for source, rule in self.buffers.items() if rule(name))
        self.tensors[reason] += 1
        self.values[reason] += old.numel()
        self._pair = None if reason else (old, new)
        if reason not in (None, EQUAL):
            return
        unmoved = self.drift.unmoved
        if reason:
            self.drift.add_equal(old)
        else:
            self.merged.append(name)
            self.drift.add(old, new)
        if new.dtype in HALF:
            self.half.values += old.numel()
            self.half.unmoved += self.drift.unmoved - unmoved
        if {old.dtype, new.dtype} & set(HALF):
            self.halves |= {str(t.dtype).removeprefix("torch.") for t in (old, new) if t.dtype in HALF}

    def watch(self, merged: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The pairs of the merge that calls `observe`; of those in half precision, count the steps that rounding
        undoes: values that differ between θ_r and θ_s, and are θ_r's in the merge."""
        for name, tensor in merged:
            if self._pair and tensor.dtype in HALF and tensor is not self._pair[0]:
                old, new = self._pair
                self.rounded.values += int((moved := old != new.to(old.device)).sum())
                self.rounded.unmoved += int((moved & (tensor == old)).sum())
            yield name, tensor

    def lines(self) -> Iterator[str]:
        """A table of tensors and values, the drift ‖θ_s − θ_r‖ / ‖θ_r‖ over what was merged, and what did not move."""
        yield f"{'tensors':>9}{'values':>16}"
        for reason in (None, *(reason for reason in self.tensors if reason)):
            what = f"from the base: {reason}" if reason else "merged"
            yield f"{self.tensors[reason]:9,}{self.values[reason]:16,}  {what}"
        if self.merged:
            yield f"drift    ‖θ_s − θ_r‖ / ‖θ_r‖ = {self.drift.ratio:.4g} over what was merged"
        if self.drift.values:
            yield f"unmoved  {self.drift.unmoved_share} of the weights are the same in θ_r and θ_s"
        if self.rounded.unmoved:
            yield f"rounded  {self.rounded.unmoved_share} of the steps are lost, for the base is in half precision"

    def warnings(self) -> Iterator[str]:
        """One line for each thing that is probably not meant."""
        if not self.merged:
            yield "nothing was merged: the result is the base"
        yield from self._lost()
        found = [name for name in self.merged if _is_statistic(name, self.merged)]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            ends = "|".join(dict.fromkeys(name.rpartition(".")[2] for name in found))
            yield (
                f"merged, though the names look like running statistics: {', '.join(found[:3])}{more}; "
                f"to take them from the base, add --buffers '(^|\\.)({ends})$'"
            )

    def _lost(self) -> Iterator[str]:
        """What half precision has lost."""
        which = "/".join(sorted(self.halves))
        if self.merged and self.half.unmoved > MUCH * self.half.values:
            yield (
                f"{self.half.unmoved_share} of the weights of θ_s, which is in {which}, are exactly θ_r's: unless their"
                " layers were frozen, steps below its spacing are lost; save θ_s in float32"
            )
        if self.rounded.unmoved > MUCH * self.rounded.values:
            share = self.rounded.unmoved_share
            yield f"{share} of the steps are lost in the base's {which}: merge into a base in float32"


def _is_statistic(name: str, names: list[str]) -> bool:
    """By its name. `weight_v` is one next to `weight_u` (spectral normalisation), a weight next to `weight_g`."""
    last = name.rpartition(".")[2]
    return bool(STATISTICS.fullmatch(last)) or (last == "weight_v" and f"{name[:-1]}u" in names)
