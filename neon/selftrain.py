"""The training loop: θ_r → θ_s on the model's own samples, and, at mini scale, a base from nothing.

What a step does depends on its number alone (learning rate, images, random numbers). So a run that was killed resumes
from its last saved state and ends with the same weights as one that was not. Micro-batches and processes divide a step;
they change its result by the order of floating-point sums only.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from neon import NeonError, extra
from neon.data import ORDERS, ImageSet, batches
from neon.distributed import World
from neon.dropout import masks_of
from neon.family import Family, Recipe, rows_of
from neon.files import check_room, discard, filling, progress, regular, to_json
from neon.lock import one_writer
from neon.precision import autocast
from neon.sampling import part_of
from neon.stop import Terminated, deferred
from neon.weights.checkpoint import Weights, check_metadata, open_weights, save_safetensors

STATE = "state.safetensors"


def snapshot_name(images: int, kind: str = "snapshot") -> str:
    return f"{kind}-{images:09d}.safetensors"


def snapshots(path: str | Path) -> list[Path]:
    """The snapshots in a training folder, earliest first; a path that is no such folder is returned as it is."""
    path = Path(path)
    return sorted(path.glob("snapshot-*.safetensors")) or [path]


@one_writer
def train(
    family: Family,
    model: torch.nn.Module,
    data: ImageSet,
    recipe: Recipe,
    out: str | Path,
    *,
    world: World,
    seed: int = 0,
    micro_batch: int | None = None,
    save_every: int | None = None,
    save_minutes: float | None = None,
    tensorboard: str | Path | None = None,
    origin: Mapping[str, object] | None = None,
    replace: bool = False,
    raw: bool = False,
) -> list[Path]:
    """Train `model` on `data` for recipe.budget images and return the paths of the snapshots.

    Written to `out`: snapshot-<images>.safetensors, the weights that are sampled from and merged (the moving average if
    the recipe has one, else the raw weights), log.jsonl, and state.safetensors, from which an interrupted run resumes;
    before the first step and after the last it holds no tensors, only the run's identity: recipe, seed, device kind,
    data size and `origin` (say, the sha256 of the base).

    micro_batch: images per forward pass and process (default all of the process's share; a step is divided over the
    processes as evenly as it goes);
    save_every: images between states (default recipe.snapshot); save_minutes: also a state every so many minutes;
    tensorboard: a folder for the numbers of log.jsonl as TensorBoard reads them;
    raw: where there is an average, also write raw-<images>.safetensors, the weights themselves;
    replace: delete another run that is there. Raises NeonError if the folder holds another run or anything else, if
    another process writes there, if the disk has no room for a state and a snapshot, or if weights or loss are not
    finite (the last snapshot stays); Terminated, with the state saved, if SIGTERM or SIGHUP comes in a block of
    neon.stop.attended.
    """
    out = Path(out)
    family.check(model, data.shape, data.labels)
    network = family.weights(model).train().requires_grad_(True)
    params = dict(network.named_parameters())
    beta = recipe.ema_beta()
    ema = {name: p.detach().clone() for name, p in params.items()} if beta is not None else None
    optimizer = make_optimizer(params, recipe)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "float16")
    identity = _identity(recipe, seed, world, len(data), origin)
    if replace:
        another = bool(_difference(out / STATE, identity))
        world.barrier()
        if another and world.rank == 0:
            discard(out)
        world.barrier()
    images = _restore(out / STATE, identity, params, ema, optimizer, scaler)
    if images < recipe.budget and world.rank == 0:
        check_room(out, _bytes_of(params) * (5 if ema else 4))  # a state (weights, two moments, average), a snapshot
    if images == 0:
        _check_finite(params, 0, out)
        if world.rank == 0:
            _save(out / STATE, identity, 0)  # from now on the folder is this run's

    mine = part_of(recipe.batch, world.rank, world.size)
    idle = mine.start == mine.stop  # more processes than images: computes an image that counts 0, to have gradients
    mine = slice(0, 1) if idle else mine
    share = mine.stop - mine.start
    order = islice(ORDERS[recipe.order](len(data), seed), images, None)
    stream = batches(data, order, recipe.batch, mine)
    generator = torch.Generator(world.device)
    micro_batch = micro_batch or share
    every = max(recipe.budget // recipe.batch // 100, 1) * recipe.batch
    log = _Log(out / "log.jsonl", images, world, every, tensorboard)
    metadata = family.metadata(model) | {"data_images": str(len(data))}
    with deferred() as asked, progress(recipe.budget, "img", "train", world.rank, images) as bar:
        requests = _Requests(world, asked, save_minutes)
        while images < recipe.budget:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(images)
            streams = seed_step(generator, seed, images, recipe.batch, world.rank)
            pixels, labels, whole = next(stream)
            # Random numbers are drawn for the whole step, so that they do not depend on how it is divided.
            draws = family.draw(model, recipe.batch, generator, images=whole, **recipe.loss)
            total = torch.zeros((), device=world.device)
            for start in range(0, share, micro_batch):
                part = slice(start, min(start + micro_batch, share))
                x = pixels[part].to(world.device, non_blocking=True)
                y = None if labels is None else labels[part].to(world.device, non_blocking=True)
                own = slice(mine.start + part.start, mine.start + part.stop)
                weight = 0 if idle else len(x) * world.size / recipe.batch  # gradients are averaged over processes
                with autocast(world.device, recipe.precision), masks_of(streams[own], world.device):
                    drawn = rows_of(draws, own.start, own.stop, recipe.batch)
                    loss = family.loss(model, x, y, drawn, **recipe.loss) * weight
                scaler.scale(loss).backward()
                total += loss.detach()
            norm = _step(params, optimizer, scaler, recipe, world)
            if ema is not None:
                _update_average(ema, params, beta)

            due = [_crosses(images, recipe.batch, every) for every in (recipe.snapshot, save_every or recipe.snapshot)]
            images += recipe.batch
            bar.update(recipe.batch)
            last = images >= recipe.budget
            stop, save = requests.at_step()
            keep = last or stop or save or any(due)
            if line := log.add(images, total, norm, optimizer.param_groups[0]["lr"], flush=keep):
                bar.set_postfix_str(f"loss {line['loss']:.4g}", refresh=False)
            if last or due[0]:
                _check_finite(params, images, out)
                if world.rank == 0:
                    _write_snapshot(out, images, network, ema, metadata | {"images": str(images)}, raw)
            if world.rank == 0 and keep:
                tensors = None if last else _state(params, ema, optimizer)
                _save(out / STATE, identity, images, tensors, scaler.state_dict())
            if stop and not last:
                world.barrier()  # the launcher ends the others as soon as one has ended: not before the state is there
                raise Terminated(f"the state after {images} images is saved in {out}; the same command resumes")
    log.close()
    world.barrier()
    return snapshots(out)


def _bytes_of(params: Mapping[str, torch.nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in params.values())


def make_optimizer(params: Mapping[str, torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam or AdamW as the recipe says; AdamW decays tensors of two or more dimensions."""
    options = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps, "fused": True}
    if recipe.optimizer == "adam":
        return torch.optim.Adam(params.values(), **options)
    decayed = [p for p in params.values() if p.ndim >= 2]
    plain = [p for p in params.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **options)


def _step(params, optimizer, scaler, recipe: Recipe, world: World) -> torch.Tensor:
    """One optimizer step from the accumulated gradients; returns their norm before clipping."""
    grads = [p.grad for p in params.values() if p.grad is not None]
    world.average(grads)
    scaler.unscale_(optimizer)
    if recipe.clean_grads:
        for grad in grads:
            torch.nan_to_num_(grad, nan=0.0, posinf=1e5, neginf=-1e5)
    norm = torch.nn.utils.get_total_norm(grads)
    if recipe.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(params.values(), recipe.clip, norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def _update_average(ema: Mapping[str, torch.Tensor], params: Mapping[str, torch.Tensor], beta: float) -> None:
    """ema ← params + beta (ema − params)."""
    torch._foreach_lerp_(list(ema.values()), list(params.values()), 1 - beta)


def seed_step(generator: torch.Generator, seed: int, images: int, batch: int, rank: int) -> torch.Tensor:
    """Seed all randomness of a step; returns the seeds of its images' own streams, (batch,) int64."""
    state = np.random.SeedSequence([seed, images, 0]).generate_state(2, np.uint64) >> np.uint64(1)
    loss_seed, dropout_seed = map(int, state)
    generator.manual_seed(loss_seed)
    torch.manual_seed(dropout_seed + rank)  # for a network's own uses of the global generator
    return dropout_seed % 2**32 + torch.arange(batch)


def _crosses(images: int, batch: int, every: int) -> bool:
    """Does this step reach or pass a multiple of `every`?"""
    return (images + batch) // every > images // every


def _check_finite(params: Mapping[str, torch.Tensor], images: int, out: Path) -> None:
    for name, p in params.items():
        if not p.isfinite().all():
            raise NeonError(f"{name} is not finite after {images} images; {_last_good(out)}")


def _last_good(out: Path) -> str:
    last = snapshots(out)[-1]
    return "there is no snapshot yet" if last == out else f"the last good snapshot is {last}"


def _write_snapshot(out: Path, images: int, network: torch.nn.Module, ema, metadata: dict[str, str], raw: bool) -> None:
    state = network.state_dict()
    if raw and ema is not None:
        save_safetensors(out / snapshot_name(images, "raw"), state, metadata)
    save_safetensors(out / snapshot_name(images), state | (ema or {}), metadata)


def _identity(recipe: Recipe, seed: int, world: World, n: int, origin) -> dict:
    identity = vars(recipe) | {"seed": seed, "data_images": n} | world.identity() | dict(origin or {})
    return json.loads(json.dumps(identity, default=dict))


def _state(params, ema, optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"param/{name}": p for name, p in params.items()}
    tensors |= {f"ema/{name}": p for name, p in (ema or {}).items()}
    for name, p in params.items():
        tensors |= {f"{slot}/{name}": value for slot, value in optimizer.state[p].items()}
    return tensors


def _save(path: Path, identity: dict, images: int, tensors: Mapping | None = None, scaler=None) -> None:
    metadata = {"run": json.dumps(identity), "images": str(images), "scaler": json.dumps(scaler)}
    save_safetensors(path, tensors or {}, metadata)


def _difference(path: Path, identity: dict) -> str | None:
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


@torch.no_grad()
def _restore(path: Path, identity: dict, params, ema, optimizer, scaler) -> int:
    """Load a saved state in place; returns the images seen so far, 0 without a state."""
    if not path.exists():
        if any(not file.name.startswith(".") for file in path.parent.glob("*")):
            raise NeonError(f"{path.parent} is not empty and not a training folder; choose another --out")
        return 0
    if difference := _difference(path, identity):
        raise NeonError(difference)
    with open_weights(path) as state:
        images = check_state(state, params, ema, scaler, identity)
        if not len(state):  # not begun, or finished
            return images
        for name, p in params.items():
            p.copy_(state[f"param/{name}"])
            if ema is not None:
                ema[name].copy_(state[f"ema/{name}"])
            slots = ("step", "exp_avg", "exp_avg_sq")  # none before the first step
            found = {slot: state[f"{slot}/{name}"] for slot in slots if f"{slot}/{name}" in state}
            # Moments take the memory layout of their parameter, which fused optimizers need.
            optimizer.state[p] = {
                k: torch.empty_like(p).copy_(t) if t.ndim else t.to(p.device) for k, t in found.items()
            }
        scaler.load_state_dict(json.loads(state.metadata["scaler"]))
        return images


def check_state(state: Weights, params: Mapping, ema: Mapping | None, scaler, identity: Mapping) -> int:
    """The images that a saved state has seen. Raises NeonError unless all in it is as _save has written it for these
    parameters: a moment of another shape would be written over other memory by fused optimizers."""
    wrong = f"{state.path} is damaged, or not of this run: "
    images, batch, budget = state.metadata.get("images", ""), identity["batch"], identity["budget"]
    if not (re.fullmatch(r"\d{1,18}", images, re.ASCII) and int(images) % batch == 0 and int(images) < budget + batch):
        raise NeonError(f"{wrong}images is {images[:40]!r}")
    if bool(len(state)) != (0 < int(images) < budget):
        raise NeonError(f"{wrong}{len(state)} tensors after {images} images")
    if not len(state):
        return int(images)
    wanted = {f"param/{name}": _spec(p) for name, p in params.items()}
    wanted |= {f"ema/{name}": _spec(p) for name, p in (ema or {}).items()}
    for name, p in params.items():
        slots = {"step": (torch.float32, ()), "exp_avg": _spec(p), "exp_avg_sq": _spec(p)}
        slots = {f"{slot}/{name}": spec for slot, spec in slots.items()}
        if any(slot in state for slot in slots):  # a parameter without gradients has none
            wanted |= slots
    for name in [*wanted, *state]:
        if name not in state or name not in wanted:
            raise NeonError(f"{wrong}{name} is {'missing' if name in wanted else 'not of this network'}")
        if state.spec(name) != wanted[name]:
            raise NeonError(f"{wrong}{name} is {state.spec(name)}, not {wanted[name]}")
    found, own = check_metadata(state, "scaler"), scaler.state_dict()
    if found.keys() != own.keys() or any(type(found[name]) not in (int, float) for name in own):
        raise NeonError(f"{wrong}its scaler is {str(found)[:60]}")
    return int(images)


def _spec(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


class _Requests:
    """What all processes agree to do at the end of a step: stop (a signal came to one of them), save (it is time).

    Several processes ask each other about once a second, in the same step: to ask after every step would make a GPU
    wait for the next step's commands.
    """

    def __init__(self, world: World, asked: Callable[[], bool], save_minutes: float | None):
        self.world, self.asked = world, asked
        self.seconds = float("inf") if save_minutes is None else 60 * save_minutes
        self.saved = self.then = time.monotonic()
        self.steps = self.left = 1  # between the last time they asked and the next; until then

    def at_step(self) -> tuple[bool, bool]:
        """(stop, save), the same on every rank."""
        self.left -= 1
        if self.left:
            return False, False
        now = time.monotonic()
        in_a_second = self.steps / max(now - self.then, 1e-3)
        found = self.world.gather((self.asked(), now - self.saved >= self.seconds, max(int(in_a_second), 1)))
        _, save, steps = found[0]
        self.steps = self.left = steps if self.world.size > 1 else 1
        self.then = now
        if save:
            self.saved = now
        return any(stop for stop, _, _ in found), save


class _Log:
    """log.jsonl: one JSON line per hundredth of the budget, snapshot and saved state.

    images: seen so far; loss: its mean since the last line; grad_norm: of the step, before clipping; lr; time: UTC;
    images_per_second: of all processes, since the last line. Of lines after the saved state a run that resumes keeps
    none.
    """

    def __init__(self, path: Path, images: int, world: World, every: int, tensorboard: str | Path | None = None):
        self.path, self.world, self.every = path, world, every
        self.losses: list[torch.Tensor] = []
        self.images, self.then = images, time.monotonic()
        self.board = _board(tensorboard, images) if tensorboard and world.rank == 0 else None
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = regular(path).read_bytes().splitlines(keepends=True) if path.exists() else []
            path.write_bytes(b"".join(line for line in lines if _images_of(line, path) <= images))

    def add(self, images: int, loss: torch.Tensor, norm: torch.Tensor, lr: float, flush: bool) -> dict | None:
        """Count a step; the line, if one is due. Raises NeonError if the mean loss is not finite."""
        self.losses.append(loss)
        if not flush and images % self.every:
            return None
        mean = torch.stack(self.losses).mean()
        self.world.average([mean])
        self.losses.clear()
        if not mean.isfinite():
            raise NeonError(f"the loss is not finite after {images} images; {_last_good(self.path.parent)}")
        now = time.monotonic()
        rate = (images - self.images) / max(now - self.then, 1e-9)
        self.images, self.then = images, now
        numbers = {"loss": mean.item(), "grad_norm": norm.item(), "lr": lr, "images_per_second": round(rate, 3)}
        row = {"images": images, **numbers, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        if self.world.rank == 0:
            with filling(self.path), self.path.open("a") as f:
                f.write(to_json(row) + "\n")
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, images)
            self.board.flush()
        return row

    def close(self) -> None:
        if self.board:
            self.board.close()


def _board(folder: str | Path, images: int):
    """A TensorBoard writer that hides what an interrupted run wrote after so many images. Raises NeonError."""
    with extra("tensorboard"):
        import tensorboard  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=images + 1)


def _images_of(line: bytes, path: Path) -> float:
    """Of a line of the log; inf for one that was torn by a kill. Raises NeonError if it is none of a log."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return float("inf")
    images = found.get("images") if isinstance(found, dict) else None
    if type(images) is not int or images < 0:
        raise NeonError(f"{path}: not the log of a training run ({str(found)[:60]})")
    return images
