"""Numbers of processes and batch sizes, for every family: the images are the same."""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
from processes import words

from hostile.commands import OUT
from hostile.runs import Whole, difference, unbroken
from hostile.workers import Finding

MOST = 4  # processes
BATCHES = 64  # images of a batch, at most
SEEDS = "5-76"  # more than a batch of BATCHES, and no multiple of anything
# Networks and options of the samplers: as small as they have a meaning.
NETWORKS = {
    "edm": ("digits", {}, ("--num_steps", 2)),
    "flow": ("digits", {}, ("--num_steps", 2, "--solver", "euler")),
    "var": ("tiny", {}, ("--top_k", 20)),
    "xar": ("digits", {}, ("--flow_steps", 2)),
    "imm": ("digits", {}, ("--num_steps", 1)),
}
LEVELS = 1  # by which a pixel may differ, where float sums of another order are rounded to another side


@dataclass(frozen=True)
class Model:
    """A network in a file; options: of the commands that sample from it and that measure it."""

    sampling: tuple
    measuring: tuple


def models(folder: Path, family: str) -> Model:
    """A network of the family, with weights that let every part matter, features of its images and a reference."""
    import torch

    from mini.features import DigitsCNN, save_digits_cnn
    from neon.family import get_family
    from neon.weights.checkpoint import save_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    module, (config, options, sampling) = get_family(family), NETWORKS[family]
    loading, words = {}, ()
    if family == "var":
        from var_cases import TINY, write_pair

        vae = write_pair(folder, TINY).parent / "vae_ch160v4096z32.pth"
        loading, words = {"vae_ckpt": str(vae)}, ("--vae_ckpt", vae)
    torch.manual_seed(0)
    made = module.create(config, device="cpu", **loading, **options)
    with torch.no_grad():
        for parameter in module.weights(made).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = folder / "base.safetensors"
    save_safetensors(path, module.weights(made).state_dict(), module.metadata(made))
    save_digits_cnn(DigitsCNN(16, 64 if family == "var" else 8), folder / "features.safetensors")
    np.savez(folder / "ref.npz", mu=np.zeros(16), sigma=np.eye(16))
    common = ("--family", family, "--model", path, *words, *sampling, "--seeds", SEEDS)
    features = ("--features", f"digits:{folder / 'features.safetensors'}", "--ref", folder / "ref.npz")
    return Model(
        ("generate", *common, "--out", f"{OUT}/S"),
        ("evaluate", *common, *features, "--metrics", "fid", "--out", f"{OUT}/row.json"),
    )


def program(command: tuple, batch: int):
    from neon.cli import main

    return partial(main, words([*command, "--batch_size", batch]))


def divided(model: Model, wholes: SimpleNamespace, number: int, random: Random) -> None:
    """Raises Finding unless images, or their row of results, are those of one process and batches of 16."""
    ranks, batch = 1 + number % MOST, random.choice([1, BATCHES, random.randint(2, BATCHES - 1)])
    kind = random.choice(["sampling", "measuring"])
    try:
        found = unbroken(program(getattr(model, kind), batch), OUT, ranks)
        images = kind == "sampling" and _pixels(Path(OUT))
    finally:
        shutil.rmtree(OUT, ignore_errors=True)
    wanted: Whole = getattr(wholes, kind)
    if text := difference(_without_images(found.found, ranks), _without_images(wanted.found, ranks)):
        raise Finding("lost", f"{ranks} processes, batches of {batch}: {text}")
    if kind == "sampling":
        far = max(int(np.abs(images[name] - wholes.pixels[name]).max()) for name in wholes.pixels)
        if far > LEVELS:
            raise Finding("lost", f"{ranks} processes, batches of {batch}: an image differs by {far} levels")


def whole(model: Model) -> SimpleNamespace:
    """What one process with batches of 16 leaves."""
    found = {}
    for kind in ("sampling", "measuring"):
        found[kind] = unbroken(program(getattr(model, kind), 16), OUT)
        if kind == "sampling":
            found["pixels"] = _pixels(Path(OUT))
        shutil.rmtree(OUT)
    return SimpleNamespace(**found)


def _pixels(folder: Path) -> dict[str, np.ndarray]:
    from PIL import Image

    return {path.name: np.array(Image.open(path)).astype(int) for path in folder.rglob("*.png")}


def _without_images(found: dict, ranks: int) -> dict:
    """Names of the images without their bytes; rows without the number of processes."""
    kept = {name: None if name.endswith(".png") else value for name, value in found.items()}
    return json.loads(json.dumps({name: _alone(value) for name, value in kept.items()}, default=str))


def _alone(value):
    return {key: v for key, v in value.items() if key != "world"} if isinstance(value, dict) else value
