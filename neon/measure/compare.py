"""Is one model better than another? The difference of their FIDs on common seeds, with its sampling error."""

from typing import NamedTuple

import torch

from neon.measure.metrics import Reference, frechet

NORMAL = 1.96  # half of a 95 % interval in standard errors


class Difference(NamedTuple):
    """value: FID of one minus FID of the other; se: its sampling error."""

    value: float
    se: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return self.value - NORMAL * self.se, self.value + NORMAL * self.se


def fid_difference(one: torch.Tensor, other: torch.Tensor, reference: Reference) -> Difference:
    """Of features (n, d) whose rows i are of the same seed: what the seeds share does not count as error.

    The error is that of the difference of what each seed does to the two FIDs, to first order (delta method).
    """
    parts = []
    for features in (one, other):
        x = features.double()
        fid = frechet(x.mean(0), torch.cov(x.T), reference)
        parts.append((fid.value, fid.influence(features)))
    (value, moves), (other_value, other_moves) = parts
    return Difference(value - other_value, float((moves - other_moves).std() / len(one) ** 0.5))
