"""FID between evaluations: interpolate the moments of the features, not FID.

Evaluations that share their images' noise have features whose mean and covariance change smoothly with w, guidance and
budget, even where single images jump. FID is a known function of these two. So a few evaluations tell it everywhere
near them: the moments there are polynomials through the measured moments, and FID is computed of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import numpy as np
import torch
from scipy.special import stdtrit

from neon.measure.metrics import Moments, Reference

DEGREE = 4  # of the polynomials, at most
SMOOTH = 0.3  # weight of a degree relative to the one below: low degrees explain what they can
REACH = 3.0  # how far nodes can be trusted: to twice the distance of two of them, see `Surface.reach`
BLOCKS = 10  # of seeds, for the jackknife

Map = Callable[[Callable, Sequence], list]  # (function, items) → its results, perhaps computed by several processes


class Surface:
    """FID over coordinates (a,), through nodes at which features were measured.

    The first coordinate is the distance gone from the base, 0 at the base; further ones are sampling options, scaled to
    [−1, 1]. budget: the last one is the budget, also in [−1, 1]; it has no effect at distance 0, where all budgets are
    the base.
    """

    def __init__(self, reference: Reference, device: torch.device | str = "cpu", budget: bool = False):
        self.reference, self.device, self.budget = reference, torch.device(device), budget
        self.root, self.mu = reference.root.to(device), reference.mu.to(device)
        self.trace = float(reference.sigma.trace())
        self.places: list[tuple[float, ...]] = []
        self.features: list[torch.Tensor] = []  # (n, d) float32 on the CPU
        self.moments: list[Moments] = []
        self._crosses: list[torch.Tensor] = []  # Lᵀ Σ L with L Lᵀ the reference's covariance: (d, d)

    def add(self, place: Sequence[float], features: torch.Tensor) -> None:
        """A node. features: (n, d), image i of every node from the same seed."""
        moments = Moments(features.shape[1], self.device)
        moments.update(features.to(self.device))
        self._add(place, features, moments)

    def _add(self, place, features, moments) -> None:
        self.places.append(tuple(place))
        self.features.append(features)
        self.moments.append(moments)
        self._crosses.append(self.root.T @ moments.cov @ self.root)

    def weights(self, places: np.ndarray) -> np.ndarray:
        """(q, a) → (q, k): the moments there are these sums of those at the k nodes. Each row sums to 1.

        The interpolating polynomial of least norm, in which each degree counts SMOOTH times the one below it. At a node
        it is that node alone.
        """
        return _weights(np.asarray(self.places), np.asarray(places, dtype=float), self.budget)

    def reach(self, places: np.ndarray) -> np.ndarray:
        """(q, a) → (q,): about 1 among the nodes; beyond them it grows, as the errors do.

        It is the sum of the absolute weights of an interpolation that is linear in each coordinate: 3 at twice the
        distance of two nodes.
        """
        return np.abs(_weights(np.asarray(self.places), np.asarray(places, dtype=float), self.budget, 1)).sum(1)

    def fid(self, places: Sequence, share: Map | None = None) -> np.ndarray:
        """FID of the interpolated moments at (q, a) places: (q,) float64.

        Where the interpolated covariance has negative eigenvalues these count as 0.
        """
        if not len(places):
            return np.empty(0)
        weights = torch.from_numpy(self.weights(np.asarray(places, dtype=float))).to(self.device)
        return np.asarray((share or _alone)(self._fid, list(weights)))

    def _fid(self, weights: torch.Tensor) -> float:
        mean = sum(w * m.mean for w, m in zip(weights, self.moments))
        cross = sum(w * c for w, c in zip(weights, self._crosses))
        values = torch.linalg.eigvalsh(cross)
        trace = float(sum(w * m.cov.diagonal().sum() for w, m in zip(weights, self.moments)))
        if values[0] < -1e-9 * values[-1]:
            cov = sum(w * m.cov for w, m in zip(weights, self.moments))
            trace = float(torch.linalg.eigvalsh(cov).clamp(min=0).sum())
        cross = float(values.clamp(min=0).sqrt().sum())
        return float((mean - self.mu).square().sum()) + trace + self.trace - 2 * cross

    def without(self, node: int) -> "Surface":
        """The surface through the other nodes."""
        other = Surface(self.reference, self.device, self.budget)
        for i in range(len(self.places)):
            if i != node:
                other._add(self.places[i], self.features[i], self.moments[i])
        return other

    def jackknife(self) -> Iterator["Surface"]:
        """The surfaces of the same nodes, each without one of BLOCKS blocks of the images: one at a time in memory."""
        edges = np.arange(BLOCKS + 1) * len(self.features[0]) // BLOCKS
        for first, last in pairwise(edges):
            other = Surface(self.reference, self.device, self.budget)
            for place, features, moments in zip(self.places, self.features, self.moments):
                block = features[first:last].to(self.device)
                other._add(place, features, _less(moments, block))
            yield other


def _alone(function, items) -> list:
    return [function(item) for item in items]


def _weights(nodes: np.ndarray, places: np.ndarray, budget: bool, highest: int = DEGREE) -> np.ndarray:
    """See Surface.weights. highest: power of a coordinate."""
    at_nodes, there = (_monomials(x, budget, highest) for x in (nodes, places))
    k, gram = len(nodes), at_nodes @ at_nodes.T
    system = np.ones((k + 1, k + 1))  # bordered by ones: constants are met exactly, at no cost
    system[:k, :k] = gram + 1e-10 * np.trace(gram) / k * np.eye(k)
    system[k, k] = 0
    right = np.vstack([at_nodes @ there.T, np.ones(len(there))])
    return np.linalg.solve(system, right)[:k].T


def _monomials(places: np.ndarray, budget: bool, highest: int) -> np.ndarray:
    """(q, a) → (q, m): all products of powers of the coordinates, none above `highest`, together not above DEGREE.

    The power of a budget, the last coordinate, is never above that of the distance.
    """
    powers = [p for p in product(range(highest + 1), repeat=places.shape[1]) if sum(p) <= DEGREE]
    if budget:
        powers = [p for p in powers if p[-1] <= p[0]]
    powers = np.array(powers)
    return np.prod(places[:, None, :] ** powers, axis=2) * SMOOTH ** powers.sum(1)


def _less(moments: Moments, block: torch.Tensor) -> Moments:
    """The moments of the images that are not in the block."""
    part = Moments(block.shape[1], block.device)
    part.update(block)
    rest = Moments(block.shape[1], block.device)
    rest.n = moments.n - part.n
    rest.mean = moments.mean + (moments.mean - part.mean) * (part.n / rest.n)
    shift = (rest.mean - part.mean) * math.sqrt(part.n * rest.n / moments.n)
    rest.m2 = moments.m2 - part.m2 - torch.outer(shift, shift)
    return rest


def jackknife_error(parts: Sequence) -> float | np.ndarray:
    """Standard error of a number from its values without each of the blocks."""
    parts = np.asarray(parts, dtype=float)
    return np.sqrt((len(parts) - 1) / len(parts) * np.square(parts - parts.mean(0)).sum(0))


def half_width(error: float, level: float = 0.95) -> float:
    """Half of the interval that belongs to a jackknife error."""
    return float(stdtrit(BLOCKS - 1, (1 + level) / 2)) * error
