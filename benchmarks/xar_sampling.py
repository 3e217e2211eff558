"""Images per second of xAR sampling: what caching, a smaller first cell, precision and compiling are worth.

    python benchmarks/xar_sampling.py [--network xar_base] [--batches 1,4,16] [--flow_steps 10] [--rounds 3]

Weights are initial values: speed does not depend on them. Variants take turns in every round, and a ratio is the median
over rounds, so that a machine that slows down or is shared slows all of them. Latents; the decoder is timed apart.
"""

import argparse
import statistics
from functools import partial
from unittest import mock

import torch
from timing import seconds

from neon.distributed import world
from neon.precision import autocast
from neon.sampling import Streams
from xAR import family, sampler
from xAR.configs import NETWORKS
from xAR.sampler import guided_velocity
from xAR.vae import AutoencoderKL


def always_doubled(model, x, t, labels, cfg, cache):
    """As in the original: both halves for the first cell, too, which is never guided."""
    return guided_velocity(model, x, t, labels, max(cfg, 1 + 1e-9), cache)


def without_cache():
    """All clean cells pass the network again in every step."""
    clean = []

    def velocity(model, x, t, labels, cfg, cache):
        if t.shape[1] > 1:
            clean.append(x[:, : model.size])
        elif t[0, 0] == 1:
            clean.clear()
        x, t = x[:, -model.size :], t[:, -1:]
        times = torch.cat([t.new_zeros(len(t), len(clean)), t], 1)
        return guided_velocity(model, torch.cat([*clean, x], 1), times, labels, cfg, None)

    return velocity


def make(model, batch: int, device: torch.device, cfg: float, steps: int) -> torch.Tensor:
    labels = torch.arange(batch) % model.classes
    return sampler.sample(model, Streams(range(batch), device), labels, cfg=cfg, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="xar_base")
    parser.add_argument("--batches", default="1,4,16", help="batch sizes (default %(default)s)")
    parser.add_argument("--flow_steps", type=int, default=10)
    parser.add_argument("--cfg", type=float, default=2.7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    config = NETWORKS[args.network]
    with world() as here, torch.no_grad():
        on_gpu = here.device.type == "cuda"
        half = "float16" if on_gpu else "bfloat16"

        def build():
            torch.manual_seed(0)
            return family.new_transformer(config).eval().to(here.device)

        plain, compiled = build(), build()
        for block in (*compiled.encoder_blocks, *compiled.decoder_blocks):
            block.mlp.compile(dynamic=True)
        variants = {
            "float32": (plain, "float32", guided_velocity),
            "float32, always doubled": (plain, "float32", always_doubled),
            "float32, no KV cache": (plain, "float32", without_cache()),
            half: (plain, half, guided_velocity),
        }
        if not args.no_compile:
            variants[f"{half}, compile"] = (compiled, half, guided_velocity)
        where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        print(f"{args.network}, cfg {args.cfg}, {args.flow_steps} steps, {where}, torch {torch.__version__}")
        for batch in map(int, args.batches.split(",")):
            times: dict[str, list[float]] = {name: [] for name in variants}
            for round in range(-1, args.rounds):  # round -1 warms up
                for name, (model, precision, velocity) in variants.items():
                    latents = partial(make, model, batch, here.device, args.cfg, args.flow_steps)
                    with mock.patch.object(sampler, "guided_velocity", velocity), autocast(here.device, precision):
                        elapsed = seconds(latents, here.device)
                    if round >= 0:
                        times[name].append(elapsed)
            first = times["float32"]
            for name, values in times.items():
                ratio = statistics.median(a / b for a, b in zip(first, values))
                print(f"batch {batch:3d}  {name:26s}{batch / statistics.median(values):9.3f} images/s{ratio:7.2f}×")
            if config["vae"]:
                vae = AutoencoderKL(plain.channels, **config["vae"]).eval().to(here.device)
                latents = torch.randn(batch, plain.channels, plain.side, plain.side, device=here.device)
                vae.decode(latents[:1])
                spent = seconds(lambda v=vae, z=latents: v.decode(z), here.device)
                print(f"batch {batch:3d}  decoder, float32: {spent / statistics.median(first):.0%} of that")


if __name__ == "__main__":
    main()
