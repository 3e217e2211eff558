"""How the house is built: what may import what, what a start loads, what works without the extras."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import ROOT

from imm.autoencoder import StableDiffusionVAE
from neon import NeonError
from neon.cli import main
from neon.data import ImageSet
from neon.family import FAMILIES

PACKAGES = {path.partition(".")[0] for path in FAMILIES.values()}
# What each layer may import of the house, itself included. Everything else (report, mini, …) may import what it likes.
LAYERS = {"neon": {"neon"}, "nets": {"nets", "neon"}, **{name: {name, "nets", "neon"} for name in PACKAGES}}
HEAVY = {"torch", "numpy", "scipy", "pandas"}


def python(code: str, *argv: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, started in the root of the project."""
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------- layers


class Module(NamedTuple):
    tree: ast.Module
    package: str  # which relative imports start from


@cache
def modules(root: Path) -> dict[str, Module]:
    """Every module of the packages in `root`, by its dotted name; a package has the name of its folder."""
    found = {}
    for file in (file for package in root.glob("*/__init__.py") for file in package.parent.rglob("*.py")):
        package = ".".join(file.relative_to(root).parent.parts)
        name = package if file.stem == "__init__" else f"{package}.{file.stem}"
        found[name] = Module(ast.parse(file.read_text()), package)
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node of a module's tree that runs when it is imported."""
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    for child in ast.iter_child_nodes(node):
        yield from at_import(child)


def imported(nodes: Iterator[ast.AST], package: str) -> set[str]:
    """The dotted names in import statements; for `from a import b` a and a.b, for b may be a module."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return names


def crossings(root: Path) -> set[tuple[str, str]]:
    """(module, package of the house that its layer may not import), also inside functions."""
    house = {path.name for path in root.iterdir() if path.is_dir()}
    found = set()
    for name, (tree, package) in modules(root).items():
        tops = {other.partition(".")[0] for other in imported(ast.walk(tree), package)}
        found |= {(name, top) for top in tops & house - LAYERS.get(package.partition(".")[0], house)}
    return found


def circle(root: Path) -> list[str]:
    """Modules each of which imports the next while it is imported; [] if there is no circle."""
    house = modules(root)
    graph = {
        name: imported(at_import(tree), package) & house.keys() - {name} for name, (tree, package) in house.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        file = root / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)


def test_each_layer_imports_only_those_below_it():
    assert {"neon.merge", "nets.autoencoder", "VAR.VAR_imagenet_256.merge", "report.page"} <= modules(ROOT).keys()
    assert crossings(ROOT) == set()


def test_a_crossing_is_found(tmp_path):
    write(tmp_path, nets__ok="import torch, neon.data", edm__ok="from nets import ok\nfrom . import loss")
    write(tmp_path, mini__ok="from report import ok\nfrom edm.ok import x", report__ok="import mini, edm, VAR")
    (tmp_path / "paper").mkdir()
    write(tmp_path, neon__a="def f():\n    from edm.family import load", neon__b="import report.page as page")
    write(tmp_path, neon__c="class A:\n    if 1:\n        from paper import claims", nets__a="from edm import ok")
    write(tmp_path, edm__a="from VAR import family", VAR__a="async def f(): import mini.features")
    assert crossings(tmp_path) == {
        ("neon.a", "edm"),
        ("neon.b", "report"),
        ("neon.c", "paper"),
        ("nets.a", "edm"),
        ("edm.a", "VAR"),
        ("VAR.a", "mini"),
    }


def test_no_module_imports_itself_through_others():
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    ("back", "found"),
    [
        ("from neon import a", True),
        ("from neon.a import x", True),
        ("from . import a", True),
        ("from .a import x", True),
        ("try:\n    import neon.a\nexcept ImportError:\n    pass", True),
        ("def f():\n    from neon import a", False),
        ("if TYPE_CHECKING:\n    from neon import a", False),
        ("import torch", False),
    ],
)
def test_a_circle_is_found(tmp_path, back, found):
    write(tmp_path, neon__a="import neon.b", neon__b="from neon.c import x", neon__c=back)
    assert set(circle(tmp_path)) == ({"neon.a", "neon.b", "neon.c"} if found else set())


# ---------------------------------------------------------------- start-up


LINES = ["--help", "--version", "search --help", "train --help", "grid --help", "merge --help"]


@pytest.mark.parametrize("line", LINES)
def test_help_and_version_load_nothing_heavy(line):
    code = f"""
import sys
from neon.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({HEAVY} & sys.modules.keys()), file=sys.stderr)
"""
    done = python(code, *line.split())
    assert done.returncode == 0 and done.stdout and done.stderr == "[]\n"


@pytest.mark.parametrize("command", ["train", "selftrain", "generate", "evaluate", "search", "final", "grid"])
def test_help_says_how_to_see_a_familys_options(command, capsys):
    """Without a family its last lines name all; with one, its options are there."""
    last = " ".join(help_of(command, capsys=capsys).strip().rpartition("\n\n")[2].split())
    assert last.startswith(f"families: {', '.join(FAMILIES)}. `neon {command} --family NAME --help` also shows")
    shown = help_of(command, "--family", "var", capsys=capsys)
    assert "--vae_ckpt" in shown and "families:" not in shown


def help_of(*argv: str, capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*argv, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------- dependencies


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    """The distributions of requirements; an extra of our own stands for what it holds."""
    found = set()
    for requirement in requirements:
        name, extra_names = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if name == PROJECT["name"]:
            found = found.union(*(names(EXTRAS[extra_name]) for extra_name in extra_names.split(",")))
        else:
            found.add(name.replace("_", "-"))
    return found


CORE = names(PROJECT["dependencies"])
OTHERS = names(EXTRAS["all"]) - CORE
DISTRIBUTIONS = packages_distributions()


def distributions(module: str) -> set[str]:
    """Who installs a top-level module; nobody, for the standard library and our own."""
    return {name.lower().replace("_", "-") for name in DISTRIBUTIONS.get(module, [])} - {PROJECT["name"]}


def needed(nodes: Iterator[ast.AST]) -> set[str]:
    return set().union(*(distributions(name.partition(".")[0]) for name in imported(nodes, "")))


def outside_extras(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not extra_of(node):
        for child in ast.iter_child_nodes(node):
            yield from outside_extras(child)


def extra_of(node: ast.AST) -> str | None:
    """The NAME of `with extra(NAME):`."""
    call = node.items[0].context_expr if isinstance(node, ast.With) else None
    return call.args[0].value if isinstance(call, ast.Call) and ast.unparse(call.func) == "extra" else None


def test_the_core_depends_on_what_it_imports_and_on_nothing_else():
    trees = [tree for tree, package in modules(ROOT).values() if package.partition(".")[0] in LAYERS]
    of_others = {"torchvision"}  # torch-fidelity needs it
    assert set().union(*(needed(outside_extras(tree)) for tree in trees)) == CORE - of_others
    blocks = [node for tree in trees for node in ast.walk(tree) if extra_of(node)]
    assert {extra_of(block) for block in blocks} >= {"imm", "parquet"}
    for block in blocks:
        assert needed(ast.walk(block)) <= names(EXTRAS[extra_of(block)])


@pytest.mark.parametrize(("folder", "extra_name"), [("report", "notebooks"), ("report", "pipeline"), ("mini", "mini")])
def test_an_extra_holds_what_its_folder_imports(folder, extra_name):
    trees = [tree for tree, package in modules(ROOT).values() if package == folder]
    found = set().union(*(needed(ast.walk(tree)) for tree in trees))
    assert found - CORE and found <= CORE | names(EXTRAS[extra_name])


def test_all_has_every_extra_and_the_lock_has_all():
    assert names(EXTRAS["all"]) == set().union(*(names(part) for key, part in EXTRAS.items() if key != "dev"))
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert CORE | OTHERS | names(EXTRAS["dev"]) <= locked


def test_the_commands_and_families_load_without_the_extras():
    code = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
for module in ["neon.cli.commands", "mini.features", *{list(FAMILIES.values())}]:
    importlib.import_module(module)
"""
    blocked = [module for module in DISTRIBUTIONS if distributions(module) & OTHERS]
    assert {"dvc", "pandas", "matplotlib", "sklearn", "diffusers", "pyarrow", "nbformat"} <= set(blocked)
    done = python(code, *blocked)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    for module in ("pyarrow", "diffusers"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "train.parquet").touch()
    with pytest.raises(NeonError, match=r"^this needs pyarrow, of the extra parquet: pip install '\.\[parquet\]'"):
        ImageSet(tmp_path / "train.parquet")
    with pytest.raises(NeonError, match=r"^this needs diffusers, of the extra imm: pip install '\.\[imm\]'"):
        StableDiffusionVAE("somewhere")
