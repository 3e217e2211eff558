"""What is installed, by `make setup` and by pip."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml
from processes import BIN, ROOT

from neon.weights.checkpoint import load_weights, save_safetensors

OLD = """#!/bin/sh
# An older Python: fails where a version is asked for, and makes a .venv if it may.
[ "$1" = --version ] && echo Python 3.10.13 && exit
[ "$1" = -c ] && exit 1
[ "$1" = -m ] && mkdir -p "$3/bin"
"""


@pytest.fixture
def folder(tmp_path):
    """What `make setup` reads, and a folder of programs that come first."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "programs").mkdir()
    return tmp_path


def make(folder, *words):
    path = f"{folder / 'programs'}:/usr/bin:/bin"
    return subprocess.run(["make", *words], cwd=folder, env={"PATH": path}, capture_output=True, text=True, timeout=60)


def program(folder, name, text):
    file = folder / "programs" / name
    file.write_text(text)
    file.chmod(0o755)


def test_setup_with_an_older_python_stops_at_once(folder):
    program(folder, "python3", OLD)
    done = make(folder, "setup")
    assert done.returncode != 0 and not (folder / ".venv").exists()
    line = done.stderr.splitlines()[0]
    assert line.startswith("error: Python 3.11 or newer is needed, python3 is Python 3.10.13; type make setup PYTHON=")


def test_setup_takes_the_python_that_is_named_and_leaves_no_half_venv(folder):
    """This one breaks off in the middle, as where ensurepip is missing."""
    program(folder, "python3", OLD)
    program(folder, "newer", '#!/bin/sh\n[ "$1" = -m ] && mkdir -p "$3/bin" && echo no ensurepip >&2 && exit 3\ntrue\n')
    done = make(folder, "setup", "PYTHON=newer")
    assert done.returncode != 0 and "no ensurepip" in done.stderr and not (folder / ".venv").exists()


def workflows():
    return {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}


def test_workflows_may_only_what_they_need():
    """Two jobs write: one makes a release, one the page; actions are pinned; every supported Python is tested."""
    found, writers = workflows(), {("release.yml", "publish"), ("pages.yml", "publish")}
    for name, workflow in found.items():
        assert workflow["permissions"] in ({}, {"contents": "read"}), name
        for job, of in workflow["jobs"].items():
            assert "write" not in of.get("permissions", {}).values() or (name, job) in writers
            for step in of["steps"]:
                assert len(step.get("uses", "@" + "0" * 40).partition("@")[2]) == 40
    matrix = found["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"] and {"ubuntu-latest", "macos-latest"} <= {*matrix["os"]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_in_an_empty_environment(tmp_path):
    """Built, installed with what it asks for, and used outside of the repository."""
    uv, dist, env = BIN / "uv", tmp_path / "dist", tmp_path / "env"
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "results", "*.egg-info"))

    def run(*words, **options):
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=1000, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run(uv, "build", "--quiet", "--out-dir", dist, source)
    (wheel,) = dist.glob("*.whl")
    assert len(list(dist.glob("*.tar.gz"))) == 1
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/__init__.py")}
    packages -= {path for path in packages if path.startswith((".", "tests", "benchmarks", "paper", "build"))}
    inside = {name.rpartition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {"neon", "edm", "flow", "VAR", "xAR", "imm", "nets", "report"} <= packages <= inside

    run(uv, "venv", "--quiet", "--python", sys.executable, env)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VIRTUAL_ENV": str(env)}
    run(uv, "pip", "install", "--quiet", "--constraint", ROOT / "requirements.lock", wheel, env=clean)
    there = {"cwd": tmp_path / "elsewhere", "env": clean}
    there["cwd"].mkdir()
    neon = env / "bin" / "neon"
    assert "selftrain" in run(neon, "--help", **there)
    for family in ("edm", "flow", "var", "xar", "imm"):
        assert f"sampling options of {family}" in run(neon, "generate", "--family", family, "--help", **there)
    for name, value in (("base", 1.0), ("selftrained", 2.0)):
        save_safetensors(there["cwd"] / f"{name}.safetensors", {"w": torch.full((2, 2), value)}, {})
    words = (
        "--base",
        "base.safetensors",
        "--selftrained",
        "selftrained.safetensors",
        "-w",
        0.5,
        "--out",
        "o.safetensors",
    )
    run(neon, "merge", *words, **there)
    assert (load_weights(there["cwd"] / "o.safetensors")["w"] == 0.5).all()
