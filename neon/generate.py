"""The synthetic set S: a model's samples as an image set on disk (EDM's convention), resumable."""

import json
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from neon import NeonError
from neon.data import encode_png, image_name
from neon.distributed import World
from neon.files import atomic, discard, progress, read_object, sync_folder, synced, write_json
from neon.lock import one_writer
from neon.sampling import shard as batches_of


@one_writer
@torch.no_grad()
def generate(
    sample: Callable[[torch.Tensor], torch.Tensor],
    seeds: torch.Tensor,
    labels: Callable[[torch.Tensor], torch.Tensor | None],
    out: str | Path,
    *,
    identity: dict,
    batch: int,
    world: World,
    replace: bool = False,
    shard: int | None = None,
) -> None:
    """Write one PNG per seed, named by the seed, to `out`, and dataset.json when all are there.

    sample: seeds (b,) → uint8 (b, C, H, W); labels: seeds (b,) → (b,) int64 or None. identity: JSON values that no
    other set has (checkpoint, sampling options), kept in generate.json. Images that are there are kept, so an
    interrupted run resumes; the files are the same for any batch size and number of processes. An image that is empty,
    as a power loss can leave it, is made again. replace: delete another set that is there. shard: every so many images,
    in the order of `seeds`, become one uncompressed .zip as soon as they are there (neon.data reads both alike). Raises
    NeonError if the folder holds anything else, if another process writes there, or if seeds repeat; Diverged.
    """
    if len(seeds.unique()) < len(seeds):
        raise NeonError("a seed that is given twice would be one image: every seed once")
    out = Path(out)
    _claim(out, identity | ({"shard": shard} if shard else {}), world, replace)
    here = _whole(out) if world.rank == 0 else None
    there = world.gather(here)[0]  # of all ranks one list, so that they divide the same work
    parts = seeds.split(shard or len(seeds))
    missing = [_missing(part, there) for part in parts]

    def write(seed: int, image: torch.Tensor) -> None:
        with atomic(out / image_name(seed), sync=False) as partial:
            partial.write_bytes(encode_png(image))

    with (
        progress(len(seeds), "img", "generate", world.rank, len(seeds) - sum(map(len, missing))) as bar,
        ThreadPoolExecutor(4) as pool,
    ):
        for part, todo in zip(parts, missing):
            mine = batches_of(len(todo), world.rank, world.size, batch)
            for chosen in mine:
                images = sample(todo[chosen]).cpu()
                list(pool.map(write, todo[chosen].tolist(), images))
                bar.update(len(images) * world.size)
            if not shard:
                sync_images(out, [seed for chosen in mine for seed in todo[chosen].tolist()], pool)
            world.barrier()
            if shard and world.rank == 0:
                _pack(out, part, there)
    if world.rank == 0:
        _write_labels(out, seeds, [labels(part) for part in seeds.split(batch)])


def _whole(out: Path) -> set[str]:
    """The files of the set that are there and not empty, relative to it."""
    return {file.relative_to(out).as_posix() for file in out.rglob("*.*") if file.stat().st_size}


def sync_images(out: Path, seeds: Sequence[int], pool: ThreadPoolExecutor) -> None:
    """These images are on the disk: once for all that this process made, for one by one costs more."""
    made = [out / image_name(seed) for seed in seeds]
    list(pool.map(synced, made))
    list(pool.map(sync_folder, {file.parent for file in made}))


def _claim(out: Path, identity: dict, world: World, replace: bool) -> None:
    """Make `out` the folder of this set. Raises NeonError if it holds anything else."""
    record = out / "generate.json"
    world.barrier()
    if replace and world.rank == 0 and record.exists() and read_object(record) != identity:
        discard(out)
    world.barrier()
    if record.exists() and (found := read_object(record)) != identity:
        differs = next(k for k in sorted(found.keys() | identity.keys()) if found.get(k) != identity.get(k))
        raise NeonError(f"{out} holds another set ({differs} differs); choose another --out")
    if not record.exists() and out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise NeonError(f"{out} is not empty and not a set of generated images; choose another --out")
    world.barrier()
    if world.rank == 0:
        write_json(record, identity)
    world.barrier()


def _archive(part: torch.Tensor) -> str:
    """Name of the .zip of these seeds."""
    return f"{part[0]:08d}.zip"


def _missing(part: torch.Tensor, there: set[str]) -> torch.Tensor:
    """The seeds of a part that have no image: neither a file of their own nor the .zip of the part is there."""
    if _archive(part) in there:
        return part[:0]
    return part[[image_name(seed) not in there for seed in part.tolist()]]


def _pack(out: Path, part: torch.Tensor, there: set[str]) -> None:
    """Move the images of these seeds into their .zip, if a run before has not; there: what that run left."""
    names = [image_name(seed) for seed in part.tolist()]
    if _archive(part) in there:
        names = [name for name in names if name in there]  # killed before it had deleted these
    else:
        with atomic(out / _archive(part)) as partial, zipfile.ZipFile(partial, "w") as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), (out / name).read_bytes())  # no date: equal sets, equal bytes
    for name in names:
        (out / name).unlink()


def _write_labels(out: Path, seeds: torch.Tensor, labels: Sequence[torch.Tensor | None]) -> None:
    """Folders without images go, dataset.json comes. labels: in parts, in the order of the seeds; None has none."""
    for folder in (path for path in out.iterdir() if path.is_dir() and not any(path.iterdir())):
        folder.rmdir()
    names = [image_name(seed) for seed in seeds.tolist()]
    pairs = None if any(part is None for part in labels) else list(zip(names, torch.cat(list(labels)).tolist()))
    with atomic(out / "dataset.json") as partial:
        partial.write_text(json.dumps({"labels": pairs}))
