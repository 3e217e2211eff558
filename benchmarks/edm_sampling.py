"""Images per second of EDM sampling, each variant as a ratio to eager float32, and the time spent outside the network.

    python benchmarks/edm_sampling.py [--network cifar10_cond] [--batch 64] [--num_steps 18] [--images 128]

Weights are initial values: speed does not depend on them. Variants take turns in every round, and a ratio is the median
over rounds, so that a machine that slows down or is shared slows all of them.
"""

import argparse
import statistics

import torch
from timing import seconds

from edm import family
from edm.sampler import edm_sampler
from neon.distributed import world
from neon.sampling import Streams


def variants(network: str, device: torch.device, compiled: bool):
    """name → network, built one by one from the same initial weights."""

    def build(precision="float32", layout=torch.channels_last, compile=False):
        torch.manual_seed(0)
        net = family.create(network, device=device).eval().requires_grad_(False).to(memory_format=layout)
        net.dtype = getattr(torch, precision)
        if compile:
            net.compile()
        return net

    yield "eager, float32, NCHW", build(layout=torch.contiguous_format)
    yield "channels_last", build()
    yield "channels_last, bfloat16", build("bfloat16")
    if device.type == "cuda":
        yield "channels_last, float16", build("float16")
    if compiled:
        yield "channels_last, compile", build(compile=True)
        half = "float16" if device.type == "cuda" else "bfloat16"
        yield f"channels_last, compile, {half}", build(half, compile=True)


def outside(net, seeds: torch.Tensor, num_steps: int, device: torch.device) -> float:
    """Share of a batch's time that is not the network's: random streams, solver state, conversion to uint8."""
    labels, shape = family.labels(net, seeds), (net.img_channels, net.img_resolution, net.img_resolution)

    def free(x, sigma, class_labels):  # a network that costs nothing
        return x

    free.sigma_min, free.sigma_max = net.sigma_min, net.sigma_max  # the sampler keeps within the network's range
    rest = seconds(lambda: edm_sampler(free, Streams(seeds, device).randn(shape), num_steps=num_steps), device)
    return rest / seconds(lambda: family.sample(net, seeds, labels, num_steps=num_steps), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar10_cond")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num_steps", type=int, default=18)
    parser.add_argument("--images", type=int, default=128, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    with world() as here, torch.no_grad():
        nets = dict(variants(args.network, here.device, not args.no_compile))
        parts = torch.arange(args.images).split(args.batch)
        times: dict[str, list[float]] = {name: [] for name in nets}
        for round in range(-1, args.rounds):  # round -1 warms up
            for name, net in nets.items():

                def run(net=net):
                    for seeds in parts:
                        family.sample(net, seeds, family.labels(net, seeds), num_steps=args.num_steps)

                elapsed = seconds(run, here.device)
                if round >= 0:
                    times[name].append(elapsed)
        first = times[next(iter(times))]
        where = (
            torch.cuda.get_device_name() if here.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        print(f"{args.network}, {args.num_steps} Heun steps, batch {args.batch}, {where}, torch {torch.__version__}")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(first, values))
            print(f"{name:36s}{args.images / statistics.median(values):8.2f} images/s{ratio:7.2f}×")
        share = outside(nets["channels_last"], parts[0], args.num_steps, here.device)
        print(f"outside the network (channels_last): {share:.1%}")


if __name__ == "__main__":
    main()
