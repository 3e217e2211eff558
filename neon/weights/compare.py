"""Two checkpoints next to each other: what one has and the other lacks, and how far their weights are apart."""

from collections.abc import Iterator

import torch

from neon.files import sha256
from neon.weights.checkpoint import Weights
from neon.weights.summary import Drift

GROUPS = 24  # at most so many lines for groups of tensors
MOVERS = 5


def compare(a: Weights, b: Weights) -> Iterator[str]:
    """Lines about b as seen from a, one tensor of each in memory: names, shapes, dtypes, drift, and who made them."""
    yield f"A  {a.origin}"
    yield f"B  {b.origin}"
    for here, there, side in ((a, b, "A"), (b, a, "B")):
        yield from _listed(f"only in {side}", [name for name in here if name not in there])
    both = [name for name in a if name in b]
    shapes = [name for name in both if a.spec(name)[1] != b.spec(name)[1]]
    yield from _listed("shapes differ", [f"{name} {a.spec(name)[1]} {b.spec(name)[1]}" for name in shapes])
    dtypes = [name for name in both if a.spec(name)[0] != b.spec(name)[0]]
    yield from _listed("dtypes differ", [f"{name} {_dtype(a, name)} {_dtype(b, name)}" for name in dtypes])
    yield from _drifts(a, b, [name for name in both if name not in set(shapes)])
    yield from _made_by(a, b)


def _drifts(a: Weights, b: Weights, names: list[str]) -> Iterator[str]:
    """Drift over groups of tensors and over all, and the tensors that moved most."""
    group_of = _groups(names)
    groups: dict[str, Drift] = {group: Drift() for group in group_of.values()}
    alone, total, others = {}, Drift(), []
    for name in names:
        r, s = a[name], b[name]
        equal = torch.equal(r.to(torch.promote_types(r.dtype, s.dtype)), s.to(torch.promote_types(r.dtype, s.dtype)))
        if not r.is_floating_point():
            others += [] if equal else [name]
            continue
        alone[name] = Drift()
        for drift in (groups[group_of[name]], alone[name], total):
            drift.add_equal(r) if equal else drift.add(r, s)
    yield from _listed("not floating point, and different", others)
    yield f"\n{'values':>16}{'drift':>12}{'unmoved':>10}"
    shown = [(group, drift) for group, drift in groups.items() if drift.values]
    rest = [(f"… {len(shown) - GROUPS} groups more", None)] if len(shown) > GROUPS else []
    for group, drift in [*shown[:GROUPS], *rest, ("all: ‖B − A‖ / ‖A‖", total)]:
        yield f"{drift.values:16,}{_ratio(drift):>12}{drift.unmoved_share:>10}  {group}" if drift else f"{'':40}{group}"
    moved = sorted((name for name in alone if alone[name].norm), key=lambda name: -alone[name].ratio)
    if moved:
        yield "\nmoved most"
        yield from (f"{alone[name].ratio:16.4g}  {name}" for name in moved[:MOVERS])


def _ratio(drift: Drift) -> str:
    return f"{drift.ratio:.4g}" if drift.norm else "0"


def _groups(names: list[str]) -> dict[str, str]:
    """name → its first parts, as many as keep the groups few."""
    for parts in (3, 2, 1):
        found = {name: ".".join(name.split(".")[:parts]) for name in names}
        if len(set(found.values())) <= GROUPS:
            break
    return found


def _made_by(a: Weights, b: Weights) -> Iterator[str]:
    """What their metadata say of a merge, and whether one was made from the other."""
    digests = {"A": sha256(a.path), "B": sha256(b.path)}
    yield ""
    for side, other, weights in (("A", "B", a), ("B", "A", b)):
        yield f"sha256 of {side}  {digests[side]}"
        yield from (f"{side}: {key}  {text}" for key, text in weights.metadata.items() if key.startswith("neon_"))
        for what, symbol in (("base", "θ_r"), ("selftrained", "θ_s")):
            if weights.metadata.get(f"neon_{what}_sha256") == digests[other]:
                yield f"{other} is the {symbol} that {side} was merged from"


def _listed(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{what}: {', '.join(names[:3])}{more}"


def _dtype(weights: Weights, name: str) -> str:
    return str(weights.spec(name)[0]).removeprefix("torch.")
