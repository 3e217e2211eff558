"""θ_s under the names of θ_r: prefixes that wrappers add to names, and tied weights that one side leaves out."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from neon.weights.checkpoint import Weights

PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel and DDP, torch.compile, a trainer's or Hugging Face's
CHAINS = ("", *PREFIXES, *(a + b for a in PREFIXES for b in PREFIXES if a != b))
MATCHED = "names matched"  # how the line about a prefix begins
FEW = 8  # more missing tensors than this are not tied weights, but another network


class Renamed(Mapping[str, torch.Tensor]):
    """Tensors of a mapping under other names. names: the new name → the one in the mapping."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]):
        self.tensors, self.names = tensors, names

    def __getitem__(self, name):
        return self.tensors[self.names[name]]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __contains__(self, name):  # Mapping's own would read the tensor
        return name in self.names


def matched(
    base: Mapping[str, torch.Tensor], selftrained: Mapping[str, torch.Tensor]
) -> tuple[Mapping[str, torch.Tensor], list[str]]:
    """θ_s under the base's names where they can be found, and a line for people about each thing that was changed.

    Two changes: a prefix of CHAINS that the names of one side have, and tied weights (the same values under two names)
    of which one side has one name only. What fits neither keeps its name, and neon.merge.merge refuses it.
    """
    if set(base) == set(selftrained):
        return selftrained, []
    names, said = _prefix(base, selftrained)
    used = set(names.values())
    missing = [name for name in base if name not in names]
    extra = [name for name in selftrained if name not in used]
    if len(missing) + len(extra) <= FEW:
        for name in missing:
            if twin := _twin(base, name, names):
                names[name] = names[twin]
                said.append(f"{name}: only in the base, where it is tied to {twin}")
        for name in extra[:]:
            if twin := _twin(selftrained, name, used):
                extra.remove(name)
                said.append(f"{name}: only in θ_s, where it is tied to {twin}")
    return Renamed(selftrained, {name: name for name in extra} | names), said


def _prefix(base: Iterable[str], selftrained: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The base's names → those of θ_s, with the prefix on one side that finds most of them, and what to say of it."""
    best, said = {name: name for name in base if name in selftrained}, []
    for prefix in CHAINS[1:]:
        ours = {name: prefix + name for name in base if prefix + name in selftrained}
        theirs = {prefix + name: name for name in selftrained if prefix + name in base}
        for names, side in ((ours, "θ_s"), (theirs, "the base")):
            if len(names) > len(best):
                best, said = names, [f"{MATCHED}: those of {side} begin with {prefix}"]
    return best, said


def _twin(tensors: Mapping[str, torch.Tensor], name: str, others: Iterable[str]) -> str | None:
    """Another name of the same matrix: equal values, and not all of them one number, as in two new biases."""
    spec = _spec(tensors, name)
    candidates = [other for other in others if other in tensors and _spec(tensors, other) == spec]
    if len(spec[1]) < 2 or not candidates:
        return None
    tensor = tensors[name]
    if not tensor.numel() or bool((tensor == tensor.flatten()[0]).all()):
        return None
    return next((other for other in candidates if torch.equal(tensors[other], tensor)), None)


def _spec(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(tensors, Weights):
        return tensors.spec(name)
    return tensors[name].dtype, tuple(tensors[name].shape)


def shapes(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, without reading tensors where the format allows."""
    return ((name, _spec(tensors, name)[1]) for name in tensors)
