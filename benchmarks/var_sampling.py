"""Images per second of VAR sampling, and where the time goes.

    python benchmarks/var_sampling.py [--network d16_256] [--batches 1,4,16] [--rounds 3]

Weights are initial values: speed does not depend on them. Variants take turns in every round, and a ratio is the median
over rounds, so that a machine that slows down or is shared slows all of them.
"""

import argparse
import resource
import statistics
import tempfile
from pathlib import Path

import torch
from timing import seconds

from neon.distributed import world
from neon.sampling import Streams
from VAR import family
from VAR.configs import CONFIGS
from VAR.sampler import filter_logits, race
from VAR.vqvae import VQVAE


def without_cache(model):
    """next_scale of the model's transformer, recomputing all earlier scales: it keeps their inputs instead of keys."""
    network, seen = model.transformer, []

    def next_scale(s, inputs, scale, cache):
        seen[:] = [*seen, inputs] if scale else []
        mask = network.attn_bias_for_masking[..., : (n := sum(p**2 for p in network.config.sides[: scale + 1])), :n]
        x = network.embed(s, torch.cat(seen or [inputs], dim=1), 0)
        return network.logits(x, s, mask=mask)[:, -(network.config.sides[scale] ** 2) :]

    return next_scale


def variants(network: str, folder: Path, device: torch.device, compiled: bool):
    """name → model, all of the same initial weights."""
    torch.manual_seed(0)
    torch.save(VQVAE(CONFIGS[network]).state_dict(), folder / "vae.pth")

    def build(precision="float32", compile=False):
        torch.manual_seed(0)
        model = family.create(network, device=device, vae_ckpt=str(folder / "vae.pth"))
        model.precision = precision
        if compile:
            model.compile()
        return model

    half = "float16" if device.type == "cuda" else "bfloat16"
    yield "float32", build()
    model = build()
    model.transformer.next_scale = without_cache(model)
    yield "float32, no KV cache", model
    yield half, build(half)
    if compiled:
        yield f"{half}, compile", build(half, compile=True)


def drawing(config, batch: int, device: torch.device, sampling: dict) -> float:
    """Seconds to filter the logits of all scales of a batch and to draw from them."""
    streams = Streams(range(batch), device)
    logits = [torch.randn(batch, side**2, config.vocab, device=device) for side in config.sides]

    def run():
        for scale in logits:
            race(filter_logits(scale, sampling["top_k"], sampling["top_p"]).softmax(-1), streams)

    run()
    return seconds(run, device)


def peak_gib(device: torch.device) -> float:
    """Of GPU memory, or of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="d16_256")
    parser.add_argument("--batches", default="1,4,16", help="batch sizes (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top_k", type=int, default=900)
    parser.add_argument("--no_compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    sampling = {"cfg": 2.9, "top_k": args.top_k, "top_p": 0.95}
    with world() as here, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        on_gpu = here.device.type == "cuda"
        models = dict(variants(args.network, Path(folder), here.device, not args.no_compile))
        where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        print(f"{args.network}, cfg 2.9, top-k {args.top_k}, top-p 0.95, {where}, torch {torch.__version__}")
        for batch in map(int, args.batches.split(",")):
            seeds = torch.arange(batch)
            times: dict[str, list[float]] = {name: [] for name in models}
            peaks: dict[str, float] = {}
            for round in range(-1, args.rounds):  # round -1 warms up
                for name, model in models.items():
                    if on_gpu:
                        torch.cuda.reset_peak_memory_stats()
                    labels = family.labels(model, seeds)
                    elapsed = seconds(
                        lambda m=model, y=labels, s=seeds: family.sample(m, s, y, **sampling), here.device
                    )
                    peaks[name] = peak_gib(here.device)
                    if round >= 0:
                        times[name].append(elapsed)
            first = times["float32"]
            for name, values in times.items():
                ratio = statistics.median(a / b for a, b in zip(first, values))
                rate = batch / statistics.median(values)
                print(f"batch {batch:3d}  {name:24s}{rate:9.3f} images/s{ratio:7.2f}×{peaks[name]:8.1f} GiB peak")
            share = drawing(models["float32"].config, batch, here.device, sampling) / statistics.median(first)
            print(f"batch {batch:3d}  filtering and drawing: {share:.1%} of float32")


if __name__ == "__main__":
    main()
