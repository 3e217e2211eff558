"""The training loop: θ_r → θ_s on the model's own samples, and, at mini scale, a base from nothing.

What a step does depends on its number alone (learning rate, images, random numbers). So a run that was killed resumes
from its last saved state and ends with the same weights as one that was not. Micro-batches and processes divide a step;
they change its result by the order of floating-point sums only.
"""

import json
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
from neon.state import STATE, Run, difference, identity_of, save
from neon.stop import Terminated, deferred
from neon.whole import Whole


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
    place: Whole | None = None,
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
    replace: delete another run that is there;
    place: how the processes hold the network, with place.model as `model` (default: neon.whole.Whole, each all of it).
    Raises NeonError if the folder holds another run or anything else, if another process writes there, if the disk has
    no room for a state and a snapshot, or if weights or loss are not finite (the last snapshot stays); Terminated, with
    the state saved, if SIGTERM or SIGHUP comes in a block of neon.stop.attended.
    """
    out = Path(out)
    family.check(model, data.shape, data.labels)
    place = place or Whole(family, lambda device: model, world)
    params = place.params
    beta = recipe.ema_beta()
    ema = {name: p.detach().clone() for name, p in params.items()} if beta is not None else None
    optimizer = make_optimizer(params, recipe)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "float16")
    run = Run(params, ema, optimizer, scaler)
    identity = identity_of(recipe, seed, world, len(data), origin)
    if replace:
        another = bool(difference(out / STATE, identity))
        world.barrier()
        if another and world.rank == 0:
            discard(out)
        world.barrier()
    images = place.restore(out, identity, run)
    if images < recipe.budget and world.rank == 0:
        check_room(out, _bytes_of(params) * (5 if ema else 4))  # a state (weights, two moments, average), a snapshot
    if images == 0:
        _check_finite(place, 0, out)
        if world.rank == 0:
            save(out / STATE, identity, 0)  # from now on the folder is this run's

    mine = part_of(recipe.batch, world.rank, world.size)
    idle = mine.start == mine.stop  # more processes than images: computes an image that counts 0, to have gradients
    mine = slice(0, 1) if idle else mine
    parts = _parts(mine.stop - mine.start, micro_batch)
    counted = 0 if idle else len(parts)
    parts += parts[:1] * (place.passes(len(parts)) - len(parts))  # what joins in with other processes counts 0, too
    order = islice(ORDERS[recipe.order](len(data), seed), images, None)
    stream = batches(data, order, recipe.batch, mine)
    generator = torch.Generator(world.device)
    every = max(recipe.budget // recipe.batch // 100, 1) * recipe.batch
    log = _Log(out / "log.jsonl", images, world, every, tensorboard)
    metadata = place.metadata | {"data_images": str(len(data))}
    with place.running(), deferred() as asked, progress(recipe.budget, "img", "train", world.rank, images) as bar:
        requests = _Requests(world, asked, save_minutes)
        while images < recipe.budget:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(images)
            streams = seed_step(generator, seed, images, recipe.batch, world.rank)
            pixels, labels, whole = next(stream)
            # Random numbers are drawn for the whole step, so that they do not depend on how it is divided.
            draws = family.draw(model, recipe.batch, generator, images=whole, **recipe.loss)
            total = torch.zeros((), device=world.device)
            for number, part in enumerate(parts, 1):
                place.begin_pass(last=number == len(parts))
                x = pixels[part].to(world.device, non_blocking=True)
                y = None if labels is None else labels[part].to(world.device, non_blocking=True)
                own = slice(mine.start + part.start, mine.start + part.stop)
                # Gradients are averaged over processes.
                weight = len(x) * world.size / recipe.batch if number <= counted else 0
                with autocast(world.device, recipe.precision), masks_of(streams[own], world.device):
                    drawn = rows_of(draws, own.start, own.stop, recipe.batch)
                    loss = family.loss(model, x, y, drawn, **recipe.loss) * weight
                scaler.scale(loss).backward()
                total += loss.detach()
            norm = _step(run, recipe, place)
            if ema is not None:
                _update_average(place.local(list(ema.values())), place.local(list(params.values())), beta)

            due = [_crosses(images, recipe.batch, every) for every in (recipe.snapshot, save_every or recipe.snapshot)]
            images += recipe.batch
            bar.update(recipe.batch)
            last = images >= recipe.budget
            stop, save_now = requests.at_step()
            keep = last or stop or save_now or any(due)
            if line := log.add(images, total, norm, optimizer.param_groups[0]["lr"], flush=keep):
                bar.set_postfix_str(f"loss {line['loss']:.4g}", refresh=False)
            if last or due[0]:
                _check_finite(place, images, out)
                about = metadata | {"images": str(images)}
                if raw and ema is not None:
                    place.write(out / snapshot_name(images, "raw"), {}, about)
                place.write(out / snapshot_name(images), ema or {}, about)
            if keep:
                place.save(out, identity, images, run, ended=last)
            if stop and not last:
                place.settle()
                world.barrier()  # the launcher ends the others as soon as one has ended: not before the state is there
                raise Terminated(f"the state after {images} images is saved in {out}; the same command resumes")
        place.settle()
    log.close()
    world.barrier()
    return snapshots(out)


def _parts(share: int, micro_batch: int | None) -> list[slice]:
    """The images of each forward pass of a process, of its share of a step."""
    size = micro_batch or share
    return [slice(start, min(start + size, share)) for start in range(0, share, size)]


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


def _step(run: Run, recipe: Recipe, place: Whole) -> torch.Tensor:
    """One optimizer step from the accumulated gradients; returns their norm before clipping."""
    grads = [p.grad for p in run.params.values() if p.grad is not None]
    place.average(grads)
    run.scaler.unscale_(run.optimizer)
    if recipe.clean_grads:
        for grad in place.local(grads):
            torch.nan_to_num_(grad, nan=0.0, posinf=1e5, neginf=-1e5)
    norm = place.gathered(torch.nn.utils.get_total_norm(grads))
    if recipe.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(run.params.values(), recipe.clip, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return norm


@torch.no_grad()
def _update_average(ema: list[torch.Tensor], params: list[torch.Tensor], beta: float) -> None:
    """ema ← params + beta (ema − params)."""
    torch._foreach_lerp_(ema, params, 1 - beta)


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


def _check_finite(place: Whole, images: int, out: Path) -> None:
    if name := place.not_finite():
        raise NeonError(f"{name} is not finite after {images} images; {_last_good(out)}")


def _last_good(out: Path) -> str:
    last = snapshots(out)[-1]
    return "there is no snapshot yet" if last == out else f"the last good snapshot is {last}"


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
