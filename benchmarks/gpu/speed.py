"""Rates: matrix products, sampling of every preset in every way, and what next to the network takes time.

Weights are random: speed does not depend on them, except that of dopri5, whose steps depend on the image. In its place
Euler's method runs with as many passes (family.countable). Steps that cost the same are not all run: the time of n is
that of two and n − 2 times the difference that one more makes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from benchmarks.gpu.bench import PRECISIONS, Bench, Measurement, each
from benchmarks.gpu.card import tf32
from benchmarks.gpu.parity import faster
from benchmarks.gpu.targets import Target, build, compute_in
from benchmarks.overhead import Clock
from neon.data import encode_png
from neon.measure.features import load_extractor
from neon.measure.metrics import Moments, Reference, frechet, kid
from neon.measure.rows import images_of_seeds
from neon.plan import sampled as cost_of_sampling
from neon.sampling import Streams

FEWER = (2, 4)  # steps that are timed where there are more
SIDES = (32, 64, 256, 512)  # of the presets' images
DEPENDS = "its calls share a cache that grows, so their shapes are not static"


def rates(bench: Bench) -> Iterable[Measurement]:
    """Products of large square matrices."""
    return each(PRECISIONS, 5, lambda precision: {"tflops": bench.rate(precision) / 1e12})


# ---------------------------------------------------------------- sampling


def sampling(bench: Bench) -> Iterator[Measurement]:
    """What is wanted most comes first: the released way, then all precisions, then graphs."""
    for target in bench.targets:
        yield Measurement(f"{target.name}, released way", 60, partial(released, bench, target))
    yield from _ways(bench, "eager", PRECISIONS, 30)
    yield from _ways(bench, "graph", ["bfloat16"] if bench.rehearse else PRECISIONS, 30)


def compiled(bench: Bench) -> Iterator[Measurement]:
    """The same with torch.compile, which takes minutes for large networks."""
    return _ways(bench, "compile", ["float32"] if bench.rehearse else PRECISIONS, 150)


def _ways(bench: Bench, way: str, precisions: Iterable[str], needs: float) -> Iterator[Measurement]:
    for precision in precisions:
        for target in bench.targets:
            name = f"{target.name}, {way}, {precision}"
            yield Measurement(name, needs, partial(rate, bench, target, way, precision))


def rate(bench: Bench, target: Target, way: str, precision: str) -> dict:
    """Images per second of a target, the share of the rate of matrix products that is, and the peak memory."""
    about = {"model": target.name, "batch": target.batch, "way": way, "precision": precision}
    if way == "graph" and not target.family.guidable:
        return about | {"not measured": DEPENDS}
    name, allowed = PRECISIONS[precision]
    model = faster(target.family, model_of(bench, target, name), way, bench.card)
    with tf32(allowed):
        spent = spent_at_all_steps(bench, target, partial(images, model, target))
    return about | measured(bench, target, spent, name, allowed)


def released(bench: Bench, target: Target) -> dict:
    """The released way, re-enacted with our code: its precision, a batch after the other, a PNG file for each image."""
    name, allowed = target.family.released_precision, target.family.released_tf32
    if bench.rehearse:
        name = "float32"  # as the commands do on a CPU
    model = model_of(bench, target, name)
    folder = bench.scratch / target.name
    folder.mkdir(exist_ok=True)

    def batch(options: Mapping) -> None:
        for i, image in enumerate(images(model, target, options).cpu()):
            (folder / f"{i:05d}.png").write_bytes(encode_png(image))

    with tf32(allowed):
        spent = spent_at_all_steps(bench, target, batch)
    about = {"model": target.name, "batch": target.batch, "way": "released", "precision": _said(name, allowed)}
    return about | measured(bench, target, spent, name, allowed)


def _said(precision: str, allowed: bool) -> str:
    return precision.replace("float32", "tf32", 1) if allowed else precision


def measured(bench: Bench, target: Target, spent: float, precision: str, allowed: bool) -> dict:
    """Of a batch that takes so many seconds."""
    peak = bench.card.peak_gib()  # before large products are timed
    each_image = cost_of_sampling(target.family, target.network, target.sampling, precision, allowed)
    return {
        "images_per_second": target.batch / spent,
        "tflop_per_image": each_image.total / 1e12,
        "share_of_products": bench.share(each_image, spent / target.batch),
        "peak_gib": peak,
    }


def with_ratios(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """All rows, those of sampling with their images per second as a multiple of their model's released way."""
    first = {row["model"]: row for row in rows["sampling"] if row.get("way") == "released"}

    def ratio(row: dict) -> dict:
        known = first.get(row.get("model"), row)
        if "images_per_second" not in row or known is row:
            return row
        return row | {"times_released": row["images_per_second"] / known["images_per_second"]}

    return rows | {part: [ratio(row) for row in rows[part]] for part in ("sampling", "compiled")}


def model_of(bench: Bench, target: Target, precision: str) -> nn.Module:
    model = build(target.family, target.network, bench.card.device)
    compute_in(target.family, model, precision)
    return model


@torch.no_grad()
def images(model: nn.Module, target: Target, options: Mapping[str, object]) -> torch.Tensor:
    """A batch, uint8, on the card."""
    return images_of_seeds(target.family, model, torch.arange(target.batch), **options)


def spent_at_all_steps(bench: Bench, target: Target, run: Callable[[Mapping], object]) -> float:
    """Seconds of run(options) with the target's number of steps."""
    return at_all_steps(target, lambda options: bench.seconds(lambda: run(options)))


def at_all_steps(target: Target, measure: Callable[[Mapping], float]) -> float:
    """measure(options) with the target's number of steps, of which only FEWER are made."""
    options = dict(target.sampling)
    counted, step = target.family.countable(options)
    if options.get("solver") == "dopri5":
        options = counted
    steps, (few, more) = options.get(step, 0), FEWER
    if steps <= more:
        return measure(options)
    first, last = (measure({**options, step: n}) for n in FEWER)
    return first + (steps - few) * max(last - first, 0) / (more - few)  # a clock can be off by more than is measured


# ---------------------------------------------------------------- the rest of an evaluation


def parts(bench: Bench) -> Iterator[Measurement]:
    """Random streams and decoding of every target; the features' network; statistics; copies."""
    for target in bench.targets:
        yield Measurement(f"{target.name}, random numbers", 40, partial(random_numbers, bench, target))
    for target in bench.targets:
        yield Measurement(f"{target.name}, decoding", 40, partial(decoding, bench, target))
    for precision in ("float32", "tf32"):
        for side in [8] if bench.rehearse else SIDES:
            name = f"Inception, {side} pixels, {precision}"
            yield Measurement(name, 15, partial(features, bench, side, PRECISIONS[precision][1]))
    yield Measurement("moments of features", 10, partial(moments, bench))
    yield Measurement("FID of moments", 30, partial(fid, bench))
    yield Measurement("KID of features", 30, partial(kernel_distance, bench))
    for kind in ("pageable", "pinned"):
        yield Measurement(f"images to the host, {kind}", 10, partial(copies, bench, kind == "pinned"))


def random_numbers(bench: Bench, target: Target) -> dict:
    """Milliseconds an image in which its stream is set up and drawn from."""
    if target.family.name == "diffusers":
        return {"not measured": "its pipeline draws them"}
    watched = [(Streams, "_stack"), (Streams, "randint"), (Streams, "exponential")]
    return per_image(bench, target, watched)


# Where latents become pixels: the owner of a method, and its name.
DECODERS: dict[str, Callable[[nn.Module, Target], tuple[object, str]]] = {
    "var": lambda model, target: (model.vqvae, "decode_latent"),
    "xar": lambda model, target: (model.vae, "decode"),
    "imm": lambda model, target: (target.family, "decode"),
}


def decoding(bench: Bench, target: Target) -> dict:
    """Milliseconds an image in which latents become pixels."""
    if target.family.name not in DECODERS or (target.family.name, target.network) == ("imm", "digits"):
        return {"not measured": "it models pixels"}
    return per_image(bench, target, [], DECODERS[target.family.name])


def per_image(bench: Bench, target: Target, watched: list, of_model: Callable | None = None) -> dict:
    """Milliseconds an image inside functions, in the released precision (float32 in a rehearsal)."""
    precision = "float32" if bench.rehearse else target.family.released_precision
    model = model_of(bench, target, precision)
    places = [*watched, *([of_model(model, target)] if of_model else [])]

    def inside(options: Mapping) -> float:
        images(model, target, options)
        clock = Clock(bench.card.device)
        with ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(clock.watch("inside", owner, name))
            images(model, target, options)
        return clock.spent["inside"]

    with tf32(target.family.released_tf32):
        spent = at_all_steps(target, inside)
    return {"model": target.name, "ms_per_image": 1e3 * spent / target.batch, "precision": precision}


def features(bench: Bench, side: int, allowed: bool) -> dict:
    """Of Inception with random weights: speed does not depend on them."""
    n = bench.size(256, 2)
    extractor = load_extractor("inception:random", bench.card.device)
    pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, device=bench.card.device)
    with tf32(allowed):
        spent = bench.seconds(lambda: extractor(pixels))
    return {"ms_per_image": 1e3 * spent / n, "images_per_second": n / spent, "peak_gib": bench.card.peak_gib()}


def moments(bench: Bench) -> dict:
    n, dim = bench.size(256, 8), bench.size(2048, 16)
    found, rows = Moments(dim, bench.card.device), torch.randn(n, dim, device=bench.card.device)
    spent = bench.seconds(lambda: found.update(rows))
    return {"ms_per_image": 1e3 * spent / n, "images_per_second": n / spent}


def fid(bench: Bench) -> dict:
    """Once an evaluation, whatever the number of images."""
    dim = bench.size(2048, 16)
    reference, own = (_some_moments(dim, bench, seed) for seed in (0, 1))
    real = Reference(reference.mean, reference.cov)
    _ = real.root
    return {"seconds_each": bench.seconds(lambda: frechet(own.mean, own.cov, real).value)}


def _some_moments(dim: int, bench: Bench, seed: int) -> Moments:
    found = Moments(dim, bench.card.device)
    found.update(torch.randn(2 * dim, dim, generator=torch.Generator().manual_seed(seed)))
    return found


def kernel_distance(bench: Bench) -> dict:
    n, dim = bench.size(5_000, 20), bench.size(2048, 16)
    own, real = torch.randn(2, n, dim, device=bench.card.device)
    spent = bench.seconds(lambda: kid(own, real, subset_size=min(1000, n)))
    return {"seconds_each": spent}


def copies(bench: Bench, pinned: bool) -> dict:
    """From the card to host memory."""
    images = torch.zeros(bench.size(2**28, 2**16), dtype=torch.uint8, device=bench.card.device)
    host = torch.zeros(len(images), dtype=torch.uint8)
    host = bench.card.pinned(host) if pinned else host
    spent = bench.seconds(lambda: host.copy_(images, non_blocking=pinned))
    return {"gb_per_second": len(images) / spent / 1e9}
