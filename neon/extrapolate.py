"""θ_neon in place and in groups: a model that is θ_neon inside a `with` block, and a w for each group of weights."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from neon import NeonError
from neon.merge import check_same_names, merge
from neon.weights.adapters import Adapted, Adapter, is_adapter, placed, read_adapter
from neon.weights.checkpoint import open_weights
from neon.weights.folders import find_model, located
from neon.weights.match import MATCHED, Renamed, matched

Strength = float | Mapping[str, float]  # one w, or regex → w


def strengths(names: Iterable[str], w: Strength) -> dict[str, float]:
    """name → its w: w itself, or that of the first regex that is found in the name; 0, the base, where none is.

    The regex '' is found in every name: as the last one it gives the w of the rest. Raises NeonError if a regex is not
    one or is found in no name.
    """
    if not isinstance(w, Mapping):
        return dict.fromkeys(names, w)
    names, groups = list(names), [(_compiled(text).search, strength) for text, strength in w.items()]
    for text, (found, _) in zip(w, groups):
        if not any(map(found, names)):
            raise NeonError(f"{text!r} of the weights is found in no name, such as {names[0] if names else 'none'}")
    return {name: next((strength for found, strength in groups if found(name)), 0.0) for name in names}


def _compiled(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise NeonError(f"{text!r} of the weights is not a regular expression: {error}") from None


def merge_groups(
    base: Mapping[str, torch.Tensor],
    selftrained: Mapping[str, torch.Tensor],
    w: Strength,
    is_buffer: Callable[[str], bool] = lambda name: False,
    observe: Callable[[str, torch.Tensor, torch.Tensor, str | None], None] = lambda *seen: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """neon.merge.merge, where w may also be regex → w, see strengths."""
    check_same_names(base, selftrained)
    for name, strength in strengths(base, w).items():
        yield from merge({name: base[name]}, {name: selftrained[name]}, strength, is_buffer, observe)


@contextmanager
def extrapolated(
    model: torch.nn.Module,
    drift: torch.nn.Module | Mapping[str, torch.Tensor] | Adapter | str | Path,
    w: Strength,
) -> Iterator[torch.nn.Module]:
    """Inside it `model`, which is θ_r, is θ_neon; after it θ_r again, bit for bit, also after an exception.

    drift: θ_s as a module of the same architecture, a state dict, a checkpoint, model folder or hub id that is in the
    cache, or a LoRA adapter that was trained on θ_r. w: one number, or regex → w by names of parameters. The weights
    change in place, so optimizers, compiled graphs and pipelines that hold the model see them. Buffers stay. It needs
    memory for a copy of the weights that change. Warns of names that were matched by a prefix.
    Raises NeonError as neon.merge.merge does; the model is then θ_r.
    """
    parameters, before = dict(model.named_parameters()), {}
    with ExitStack() as files:
        selftrained = _of(drift, model, files)
        try:
            for name, tensor in merge_groups(parameters, Renamed(selftrained, {n: n for n in parameters}), w):
                if tensor is not parameters[name]:
                    before[name] = parameters[name].detach().clone()
                    _put(parameters[name], tensor)
            files.close()
            yield model
        finally:
            for name, tensor in before.items():
                _put(parameters[name], tensor)


@torch.no_grad()
def _put(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    parameter.copy_(values)


def _of(drift, model: torch.nn.Module, files: ExitStack) -> Mapping[str, torch.Tensor]:
    """θ_s under the names of the model's state dict. files: gets what must be closed."""
    base, parameters = model.state_dict(), dict(model.named_parameters())
    if isinstance(drift, str | Path):
        drift = located(drift)
        if is_adapter(drift):
            drift = read_adapter(drift)
        else:
            drift = files.enter_context(open_weights(find_model(drift).weights))
    if isinstance(drift, Adapter):
        layers = placed(drift, base, type(model).__name__)
        if tied := [name for name in layers if name not in parameters]:
            raise NeonError(f"{tied[0]}: a second name of a weight, or a buffer; the adapter must not change it")
        return Adapted(base, layers)
    selftrained, said = matched(base, drift.state_dict() if isinstance(drift, torch.nn.Module) else drift)
    for line in said:
        if line.startswith(MATCHED):  # tied weights are the model's own, and no news
            warnings.warn(line, stacklevel=4)
    check_same_names([name for name in base if name in parameters or name in selftrained], selftrained)
    return selftrained
