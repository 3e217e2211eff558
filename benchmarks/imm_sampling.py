"""Images per second of IMM sampling, by steps, precision and way of guidance, and the share of the VAE.

    python benchmarks/imm_sampling.py [--depth 28] [--batch 8] [--rounds 3]

Weights are initial values: speed does not depend on them. Variants take turns in every round, and a ratio is the median
over rounds, so that a machine that slows down or is shared slows all of them.
"""

import argparse
import statistics
import tempfile

import torch
from diffusers import AutoencoderKL
from timing import seconds

from imm import family
from imm.latents import decode
from neon.distributed import world

STABLE_DIFFUSION = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


def in_two_passes(net):
    """net.forward that evaluates the guided network's two branches one after the other instead of as one batch."""
    once = net.forward

    def jump(x, t, s, rows, cfg=None):
        without, given = once(x, t, s), once(x, t, s, rows)
        return without + cfg * (given - without)

    return jump


def variants(depth: int, device: torch.device, compiled: bool):
    """name → (model, steps), all of the same initial weights."""
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(**STABLE_DIFFUSION).save_pretrained(folder)
        model = family.create("imagenet256", device=device, vae=folder, depth=depth)

    def like(precision="float32", net=model.net):
        return family.IMM(net, model.vae, precision)

    def copy():
        net = family.IMMPrecond(**family.networks["imagenet256"], depth=depth).to(device)
        net.load_state_dict(model.net.state_dict())
        return net

    yield "float32", (model, 8)
    slow = copy()
    slow.forward = in_two_passes(slow)
    yield "float32, guidance in two passes", (like(net=slow), 8)
    half = "float16" if device.type == "cuda" else "bfloat16"
    yield half, (like(half), 8)
    if compiled:
        fast = like(half, copy())
        fast.compile()
        yield f"{half}, compile", (fast, 8)
    for steps in (4, 2, 1):
        yield f"float32, {steps} steps", (model, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=28, help="blocks; the released network has 28")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    with world() as here, torch.no_grad():
        runs = dict(variants(args.depth, here.device, not args.no_compile))
        seeds, times = torch.arange(args.batch), {name: [] for name in runs}
        for round in range(-1, args.rounds):  # round -1 warms up
            for name, (model, steps) in runs.items():

                def run(model=model, steps=steps):
                    options = {"num_steps": steps, "cfg_scale": 1.8, "schedule": "uniform"}
                    family.sample(model, seeds, family.labels(model, seeds), **options)

                elapsed = seconds(run, here.device)
                if round >= 0:
                    times[name].append(elapsed)
        first = times["float32"]
        gpu = here.device.type == "cuda"
        where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        print(f"IMM, {args.depth} blocks, 8 steps, cfg 1.8, batch {args.batch}, {where}, torch {torch.__version__}")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(first, values))
            print(f"{name:34s}{args.batch / statistics.median(values):9.3f} images/s{ratio:7.2f}×")
        model, _ = runs["float32"]
        latents = torch.randn(args.batch, 4, 32, 32, device=here.device)
        share = seconds(lambda: decode(model.vae, latents), here.device) / statistics.median(first)
        print(f"VAE: {share:.1%} of float32")


if __name__ == "__main__":
    main()
