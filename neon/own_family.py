"""A family of the user's own: a file, a module or an installed entry point, checked against the contract and completed
by defaults. Imports no torch by itself; what it loads usually does."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from neon import NeonError
from neon.family import Differentiable, Family, Recipe
from neon.files import existing

GROUP = "neon.families"  # of entry points: a module or any object that has the parts
NEEDED = ("recipes", "load", "sample", "draw", "loss")
PAGE = "docs/own-family.md says what a family needs"


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Sampling or Loading of a family without options."""


class OwnFamily:
    """What the user wrote, with `name` set to the text that finds it again, and defaults for what is missing."""

    name: str
    networks: Mapping[str, object] = {}
    presets: Mapping[str, object] = {}
    Sampling = Loading = NoOptions
    released_precision, released_tf32 = "float32", False
    guidable = False

    def __init__(self, parts: object, name: str):
        """parts: an object that has the parts as attributes, such as a module."""
        self._parts = parts
        for part in (*_parts_of_the_contract(), "released_precision", "released_tf32"):
            if part != "name" and hasattr(parts, part):
                setattr(self, part, getattr(parts, part))
        self.name = name

    def __repr__(self) -> str:
        return f"OwnFamily({self.name})"

    def is_buffer(self, tensor_name: str) -> bool:
        """Running statistics and other state by their usual names."""
        from neon.weights.summary import STATISTICS

        return bool(STATISTICS.fullmatch(tensor_name.rpartition(".")[2]))

    def create(self, config: str, *, device: object, **options):
        raise NeonError(f"{self.name}: it has no create, which makes a network from nothing")

    def hollow(self, config: str | Path, *, precision: str = "float32", **options):
        """As create or load make it, then without values: this one does read the weights of a checkpoint."""
        import torch

        if isinstance(config, Path):
            return self.load(config, device="cpu", **options).to("meta")
        with torch.device("meta"):
            return self.create(config, device="meta", **options)

    def countable(self, sampling: Mapping[str, object]) -> tuple[dict[str, object], str]:
        """Counted as it is, all steps."""
        return dict(sampling), ""

    def weights(self, model):
        """All of it."""
        return model

    def metadata(self, model) -> dict[str, str]:
        return {}

    def labels(self, model, seeds):
        """Unconditional."""
        return None

    def check(self, model, shape: tuple[int, ...], labels: object) -> None:
        """Whatever does not fit fails in the loss."""


def find(text: str, known: typing.Collection[str]) -> Family:
    """The family of 'path/to/file.py', 'package.module' or an entry point's name. Raises NeonError.

    known: names of the families that come with `neon`, for the error.
    """
    if text.endswith(".py"):
        path = existing(text).resolve()
        return _of_file(path, _name(path))
    for entry in entry_points(group=GROUP):
        if entry.name == text:
            return _of_entry(entry)
    if "." in text and all(part.isidentifier() for part in text.split(".")):
        return _of_module(text)
    names = ", ".join([*known, *sorted(entry.name for entry in entry_points(group=GROUP))])
    raise NeonError(f"unknown family {text!r} (know {names}; your own: path/to/file.py or package.module)")


def _name(path: Path) -> str:
    """Relative to the working folder if it is in it, so that rows find the file as they find their checkpoints."""
    here = Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@lru_cache
def _of_file(path: Path, name: str) -> OwnFamily:
    """The file's folder joins the end of sys.path, for modules next to it."""
    unique = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{unique}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    _append_to_path(path.parent)
    _run(name, lambda: spec.loader.exec_module(module))
    return _adopted(module, name)


@lru_cache
def _of_module(name: str) -> OwnFamily:
    """Also from the working folder, as with python -m."""
    _append_to_path(Path.cwd())
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of a package above it
        found = None
    except Exception as error:
        raise _failed(name, error) from None
    if found is None:
        raise NeonError(f"unknown family {name!r}: no module of that name")
    return _adopted(_run(name, lambda: importlib.import_module(name)), name)


@lru_cache
def _of_entry(entry) -> OwnFamily:
    return _adopted(_run(entry.name, entry.load), entry.name)


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _run(name: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise _failed(name, error) from None


def _failed(name: str, error: BaseException) -> NeonError:
    reason = " ".join(str(error).split())
    return NeonError(f"{name}: not a family, importing it raises {type(error).__name__}: {reason}")


def _adopted(parts: object, name: str) -> OwnFamily:
    """Raises NeonError that names the first part that is missing or is not what the contract asks for."""
    if missing := [part for part in NEEDED if not hasattr(parts, part)]:
        raise NeonError(f"{name}: not a family, it lacks {', '.join(missing)} ({PAGE})")
    family = OwnFamily(parts, name)
    for part, wanted in (vars(Family) | vars(Differentiable)).items():
        if inspect.isfunction(wanted) and not part.startswith("_") and hasattr(family, part):
            _check_function(name, part, getattr(family, part), wanted)
    for part in ("recipes", "networks", "presets"):
        if not isinstance(getattr(family, part), Mapping):
            raise NeonError(f"{name}: not a family, {part} must be a dict ({PAGE})")
    if not all(isinstance(recipe, Recipe) for recipe in family.recipes.values()):
        raise NeonError(f"{name}: not a family, recipes must be of neon.family.Recipe ({PAGE})")
    for part in ("Sampling", "Loading"):
        _check_options(name, part, getattr(family, part))
    return family


def _check_function(name: str, part: str, found: object, wanted: Callable) -> None:
    if not callable(found):
        raise NeonError(f"{name}: not a family, {part} must be a function ({PAGE})")
    takes = inspect.signature(found).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for parameter in list(inspect.signature(wanted).parameters.values())[1:]:
        by_name = anything and parameter.kind is parameter.KEYWORD_ONLY
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in takes and not by_name:
            raise NeonError(f"{name}: not a family, {part} does not take {parameter.name} ({PAGE})")


def _check_options(name: str, part: str, options: object) -> None:
    """Also turns types that are written as text (`from __future__ import annotations`) into types."""
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        raise NeonError(f"{name}: not a family, {part} must be a dataclass ({PAGE})")
    try:
        types = typing.get_type_hints(options)
    except Exception as error:
        raise _failed(name, error) from None
    for field in dataclasses.fields(options):
        field.type = types[field.name]
        if field.default is dataclasses.MISSING:
            raise NeonError(f"{name}: not a family, {part}.{field.name} needs a default ({PAGE})")


def _parts_of_the_contract() -> list[str]:
    """Needed or not."""
    functions = vars(Family) | vars(Differentiable)
    return [*Family.__annotations__, *(part for part in functions if not part.startswith("_"))]
