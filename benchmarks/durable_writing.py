"""Seconds to write the PNGs of a set, as ratios to writing them without a thought for power loss.

    python benchmarks/durable_writing.py [--images 1000] [--size 64] [--rounds 3] [--folder .]

none: renamed when whole, which is enough for a process that is killed. once: `neon generate`'s way, files and
folders of a part are synced after its last image. each: file and folder are synced for every image. All take
turns in every round, and a ratio is the median over rounds. The cost depends on the disk: --folder chooses it.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from neon.data import encode_png, image_name
from neon.files import atomic
from neon.generate import sync_images

WAYS = ("none", "once", "each")


def write(out: Path, images: list[torch.Tensor], n: int, way: str) -> None:
    """n images, with the four threads of `neon generate`."""

    def one(seed: int) -> None:
        with atomic(out / image_name(seed), sync=way == "each") as partial:
            partial.write_bytes(encode_png(images[seed % len(images)]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(n)))
        if way == "once":
            sync_images(out, range(n), pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=".", help="where a scratch folder is made")
    args = parser.parse_args()
    noise = torch.Generator().manual_seed(0)
    images = list(torch.randint(256, (16, 3, args.size, args.size), dtype=torch.uint8, generator=noise))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
                started = time.perf_counter()
                write(Path(scratch, "S"), images, args.images, way)
                seconds[way].append(time.perf_counter() - started)
    for way in WAYS:
        ratio = statistics.median(mine / plain for mine, plain in zip(seconds[way], seconds["none"]))
        each = 1000 * statistics.median(seconds[way]) / args.images
        print(f"{way:5s} {ratio:6.2f} times  {each:6.2f} ms an image")


if __name__ == "__main__":
    main()
