"""The state of a training run, from which it resumes: one file, or with --shard one that points to a folder of them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from neon import NeonError
from neon.weights.checkpoint import Weights, check_metadata, open_weights, save_safetensors

STATE = "state.safetensors"
SHARDS = "shards"  # the entry of its metadata that names the folder, in a run with --shard
SLOTS = ("step", "exp_avg", "exp_avg_sq")  # what the optimizer keeps for a parameter, from its first gradient on


class Run(NamedTuple):
    """What changes while a network is trained. Tensors lie as the network does: whole, or in shards."""

    params: Mapping[str, torch.nn.Parameter]
    ema: Mapping[str, torch.Tensor] | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def identity_of(recipe, seed: int, world, n: int, origin) -> dict:
    """What decides the weights of a run, as JSON has it. n: images of its data."""
    identity = vars(recipe) | {"seed": seed, "data_images": n} | world.identity() | dict(origin or {})
    return json.loads(json.dumps(identity, default=dict))


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    tensors = {f"param/{name}": p for name, p in run.params.items()}
    tensors |= {f"ema/{name}": p for name, p in (run.ema or {}).items()}
    for name, p in run.params.items():
        tensors |= {f"{slot}/{name}": value for slot, value in run.optimizer.state[p].items()}
    return tensors


def save(path: Path, identity: dict, images: int, tensors: Mapping | None = None, scaler=None, **more: str) -> None:
    """more: joins the metadata."""
    metadata = {"run": json.dumps(identity), "images": str(images), "scaler": json.dumps(scaler), **more}
    save_safetensors(path, tensors or {}, metadata)


def difference(path: Path, identity: dict) -> str | None:
    """How the run whose state is at `path` differs from that of `identity`; None if it does not, or there is none."""
    if not path.exists():
        return None
    with open_weights(path) as state:
        if "run" not in state.metadata:
            raise NeonError(f"{path} is not the state of a training run; choose another --out")
        saved = check_metadata(state, "run")
    for key in sorted(identity.keys() | saved.keys()):
        if identity.get(key) != saved.get(key):
            was, now = saved.get(key), identity.get(key)
            return f"{path.parent} holds another run ({key} is {was} there, {now} here); choose another --out"
    return None


def is_there(path: Path, identity: dict) -> bool:
    """Is there a state of this run? Raises NeonError if there is anything else."""
    if not path.exists():
        if any(not file.name.startswith(".") for file in path.parent.glob("*")):
            raise NeonError(f"{path.parent} is not empty and not a training folder; choose another --out")
        return False
    if found := difference(path, identity):
        raise NeonError(found)
    return True


@torch.no_grad()
def restore(path: Path, identity: dict, run: Run) -> int:
    """Load a saved state in place; returns the images seen so far, 0 without a state."""
    if not is_there(path, identity):
        return 0
    with open_weights(path) as state:
        if SHARDS in state.metadata:
            raise NeonError(f"{path.parent} holds a run with --shard; resume it with --shard")
        images = check_state(state, run, identity)
        if not len(state):  # not begun, or finished
            return images
        for name, p in run.params.items():
            p.copy_(state[f"param/{name}"])
            if run.ema is not None:
                run.ema[name].copy_(state[f"ema/{name}"])
            found = {slot: state[f"{slot}/{name}"] for slot in SLOTS if f"{slot}/{name}" in state}
            # Moments take the memory layout of their parameter, which fused optimizers need.
            run.optimizer.state[p] = {
                k: torch.empty_like(p).copy_(t) if t.ndim else t.to(p.device) for k, t in found.items()
            }
        run.scaler.load_state_dict(json.loads(state.metadata["scaler"]))
        return images


def check_state(state: Weights, run: Run, identity: Mapping) -> int:
    """The images that a saved state has seen. Raises NeonError unless all in it is as `save` has written it for these
    parameters: a moment of another shape would be written over other memory by fused optimizers."""
    images = check_images(state, identity)
    if bool(len(state)) != (0 < images < identity["budget"]):
        raise damaged(state.path, f"{len(state)} tensors after {images} images")
    if not len(state):
        return images
    wanted = specs_of(run)
    for name, p in run.params.items():
        slots = {"step": (torch.float32, ()), "exp_avg": spec_of(p), "exp_avg_sq": spec_of(p)}
        slots = {f"{slot}/{name}": spec for slot, spec in slots.items()}
        if any(slot in state for slot in slots):  # a parameter without gradients has none
            wanted |= slots
    for name in [*wanted, *state]:
        if name not in state or name not in wanted:
            raise damaged(state.path, f"{name} is {'missing' if name in wanted else 'not of this network'}")
        if state.spec(name) != wanted[name]:
            raise damaged(state.path, f"{name} is {state.spec(name)}, not {wanted[name]}")
    check_scaler(state, run.scaler)
    return images


def damaged(path: Path, what: str) -> NeonError:
    return NeonError(f"{path} is damaged, or not of this run: {what}")


def check_images(state: Weights, identity: Mapping) -> int:
    """The images that a saved state has seen. Raises NeonError if they cannot be those of this run."""
    images, batch, budget = state.metadata.get("images", ""), identity["batch"], identity["budget"]
    if not (re.fullmatch(r"\d{1,18}", images, re.ASCII) and int(images) % batch == 0 and int(images) < budget + batch):
        raise damaged(state.path, f"images is {images[:40]!r}")
    return int(images)


def check_scaler(state: Weights, scaler: torch.amp.GradScaler) -> None:
    """Raises NeonError unless the scaler of the state is one of this kind."""
    found, own = check_metadata(state, "scaler"), scaler.state_dict()
    if found.keys() != own.keys() or any(type(found[name]) not in (int, float) for name in own):
        raise damaged(state.path, f"its scaler is {str(found)[:60]}")


def specs_of(run: Run) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What every state of the run holds: weights, and their average if there is one."""
    wanted = {f"param/{name}": spec_of(p) for name, p in run.params.items()}
    return wanted | {f"ema/{name}": spec_of(p) for name, p in (run.ema or {}).items()}


def spec_of(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)
