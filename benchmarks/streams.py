"""Time of random numbers, `--streams counter` as a ratio to `--streams torch`, the same draws.

    python benchmarks/streams.py [--rounds 5] [--device cuda]

noise: what a batch of 256 CIFAR-10 images starts from; codes: exponential clocks of VAR's last scale, 2 images; masks:
of EDM's dropout, 64 images of 256 channels at 16×16. Both kinds take turns, a ratio is the median over rounds.
"""

import argparse
import statistics
from functools import partial

import torch
from timing import seconds

from neon.counter import Counted
from neon.sampling import Streams

DRAWS = {
    "noise": (256, lambda streams: streams.randn((3, 32, 32))),
    "codes": (2, lambda streams: streams.exponential((256, 4096))),
    "masks": (64, lambda streams: streams.rand((256, 16, 16))),
}


def made(kind: type[Streams], n: int, draw, device: torch.device) -> torch.Tensor:
    return draw(kind(range(n), device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print("| draw | torch, ms | counter, ms | ratio |\n|---|---|---|---|")
    for name, (n, draw) in DRAWS.items():
        taken = {Streams: [], Counted: []}
        for _ in range(args.rounds + 1):  # the first warms up
            for kind, times in taken.items():
                times.append(1000 * seconds(partial(made, kind, n, draw, device), device))
        plain, counted = (times[1:] for times in taken.values())
        ratio = statistics.median(b / a for a, b in zip(plain, counted))
        print(f"| {name} | {statistics.median(plain):.1f} | {statistics.median(counted):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
