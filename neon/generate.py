"""The synthetic set S: a model's samples as an image set on disk (EDM's convention), resumable."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from neon import NeonError
from neon.data import encode_png, image_name
from neon.distributed import World
from neon.files import atomic, discard, progress, read_json, write_json
from neon.sampling import shard


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
) -> None:
    """Write one PNG per seed, named by the seed, to `out`, and dataset.json when all are there.

    sample: seeds (b,) → uint8 (b, C, H, W); labels: seeds (b,) → (b,) int64 or None. identity: JSON values that no
    other set has (checkpoint, sampling options), kept in generate.json. Images that are there are kept, so an
    interrupted run resumes; the files are the same for any batch size and number of processes. replace: delete another
    set that is there. Raises NeonError if the folder holds anything else, or if seeds repeat; Diverged.
    """
    if len(seeds.unique()) < len(seeds):
        raise NeonError("a seed that is given twice would be one image: every seed once")
    out = Path(out)
    record = out / "generate.json"
    world.barrier()
    if replace and world.rank == 0 and record.exists() and read_json(record) != identity:
        discard(out)
    world.barrier()
    if record.exists() and (found := read_json(record)) != identity:
        differs = next(k for k in sorted(found.keys() | identity.keys()) if found.get(k) != identity.get(k))
        raise NeonError(f"{out} holds another set ({differs} differs); choose another --out")
    if not record.exists() and out.exists() and any(out.iterdir()):
        raise NeonError(f"{out} is not empty and not a set of generated images; choose another --out")
    world.barrier()
    if world.rank == 0:
        write_json(record, identity)
    names = [image_name(seed) for seed in seeds.tolist()]
    todo = torch.tensor([i for i, name in enumerate(names) if not (out / name).exists()], dtype=torch.int64)
    world.barrier()  # all ranks have listed what is missing before any of them writes

    def write(name: str, image: torch.Tensor) -> None:
        with atomic(out / name) as partial:
            partial.write_bytes(encode_png(image))

    with (
        progress(len(seeds), "img", "generate", world.rank, len(seeds) - len(todo)) as bar,
        ThreadPoolExecutor(4) as pool,
    ):
        for part in shard(len(todo), world.rank, world.size, batch):
            chosen = todo[part]
            images = sample(seeds[chosen]).cpu()
            list(pool.map(write, [names[i] for i in chosen], images))
            bar.update(len(chosen) * world.size)
    world.barrier()
    if world.rank == 0:
        with atomic(out / "dataset.json") as partial:
            found = [labels(part) for part in seeds.split(batch)]
            pairs = (
                None
                if any(part is None for part in found)
                else [list(pair) for pair in zip(names, torch.cat(found).tolist())]
            )
            partial.write_text(json.dumps({"labels": pairs}))
