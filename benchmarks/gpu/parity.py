"""The card next to the CPU, on the same noise: what networks return, images, gradients.

The random numbers of an image depend on the kind of device, so here the card gets those of the CPU. VAR draws codes:
one that falls the other way changes all that follows. So the card computes with the codes that the CPU drew, and the
codes that it would have drawn itself are counted.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.bench import PRECISIONS, Bench, Measurement
from benchmarks.gpu.card import Card, Graphed, tf32
from benchmarks.gpu.targets import FEW, build, compute_in, options_of
from neon.family import Family, get_family
from neon.measure.rows import images_of_seeds
from neon.precision import autocast
from neon.sampling import Streams
from VAR import family as var_family
from VAR.sampler import race, sample_codes


class Tolerance(NamedTuple):
    """How far the card may be from the CPU's float32."""

    network: float  # of what the network returns at any call: norm of the difference over the norm
    levels: float  # of images: mean of the absolute difference in levels of 256
    draws: float  # of VAR's codes: the share that falls another way
    gradient: float  # of a training loss: norm of the difference over the norm


# Of float32: so small that TensorFloat-32, which moves networks by 4e-4 or more, does not pass for it.
TOLERANCES = {
    "float32": Tolerance(1e-4, 0.05, 0.002, 1e-4),
    "tf32": Tolerance(1e-2, 0.5, 0.02, 2e-2),
    "float16": Tolerance(1e-2, 0.5, 0.02, 2e-2),
    "bfloat16": Tolerance(8e-2, 4.0, 0.15, 1e-1),
}
# The layers of the paper's networks, fewer and narrower: (network, options, options of the autoencoder). No dropout,
# whose masks are drawn on the device.
NARROW = {"channels": 32}
REDUCED: dict[str, list[tuple[str, dict, dict]]] = {
    "edm": [
        ("cifar10_cond", {"num_blocks": 1, "model_channels": 32, "dropout": 0.0}, {}),
        ("ffhq64", {"num_blocks": 1, "model_channels": 32, "dropout": 0.0}, {}),
    ],
    "flow": [("cifar10", {"num_res_blocks": 1, "num_channels": 64, "dropout": 0.0}, {})],
    "var": [
        ("d16_256", {"sides": (1, 2, 3, 4), "depth": 2, "width": 128, "heads": 2, "drop_path": 0.0}, NARROW),
        ("d36_512", {"sides": (1, 2, 4, 6), "depth": 2, "width": 128, "heads": 2, "drop_path": 0.0}, NARROW),
    ],
    "xar": [("xar_base", {"dim": 128, "depth": 2, "heads": 2, "side": 8, "cell": 4, "dropout": 0.0}, {"width": 32})],
    "imm": [
        (
            "imagenet256",
            {"img_resolution": 8, "depth": 2, "hidden_size": 128, "num_heads": 2},
            {"block_out_channels": (32, 32, 32, 32)},
        )
    ],
    "diffusers": [("digits", {}, {})],
}
DIGITS = {"edm": {}, "flow": {}, "var": {"drop_path": 0.0}, "xar": {}, "imm": {}, "diffusers": {}}  # as above
FULL = {"edm": {"dropout": 0.0}, "flow": {"dropout": 0.0}, "var": {"drop_path": 0.0}, "xar": {"dropout": 0.0}}
GUIDED = {"var": {"cfg": 1.5}, "xar": {"cfg": 2.0}, "imm": {"cfg_scale": 1.5}}  # guidance runs both halves
SCALED = 2.0**10  # about what a loss is multiplied to, as by a gradient scaler, so that float16 can hold its gradients


def reduced(bench: Bench) -> Iterator[Measurement]:
    """Every family's real layer types, in every precision, and replayed from graphs."""
    for case in cases(bench):
        for precision in PRECISIONS:
            yield Measurement(f"{case.name}, {precision}", 20, partial(compared, bench.card, case, precision))
        if case.family.guidable:  # else its calls share a cache that grows
            yield Measurement(f"{case.name}, graph", 20, partial(compared, bench.card, case, "float32", "graph"))


def compiled(bench: Bench) -> Iterator[Measurement]:
    """The same networks, compiled."""
    for case in cases(bench):
        yield Measurement(f"{case.name}, compile", 60, partial(compared, bench.card, case, "float32", "compile"))


def whole(bench: Bench) -> Iterator[Measurement]:
    """The targets' networks as they are, in float32 and in the released precision; one image, a few steps."""
    for target in bench.targets:
        case = Case(target.family, target.network, FULL.get(target.family.name, {}), {}, 1, gradients=False)
        precision = target.family.released_precision.partition("+")[0]
        for name in dict.fromkeys(("float32", precision)):
            yield Measurement(f"{target.name}, {name}", 90, partial(compared, bench.card, case, name))


@dataclass(frozen=True)
class Case:
    """A network to be compared."""

    family: Family
    network: str
    options: Mapping[str, object]
    vae: Mapping[str, object] = field(default_factory=dict)
    images: int = 4
    gradients: bool = True

    @property
    def name(self) -> str:
        return f"{self.family.name} {self.network}"

    def model(self, device: torch.device) -> nn.Module:
        """The same weights on any device: made on the CPU, without the initial zeros that hide what is behind them."""
        model = build(self.family, self.network, "cpu", self.vae, **self.options)
        for p in self.family.weights(model).parameters():
            p.add_(0.02 * torch.randn_like(p))
        return model.to(device)

    @cached_property
    def wanted(self) -> "tuple[Found, Codes]":
        """What the CPU makes in float32, and the codes that it drew."""
        codes = Codes()
        return Found.of(self, self.model(torch.device("cpu")), "float32", codes), codes

    def sampling(self) -> dict[str, object]:
        """All options of the sampler: a few steps, guided."""
        return options_of(self.family, FEW[self.family.name] | GUIDED.get(self.family.name, {}))


def cases(bench: Bench) -> list[Case]:
    if bench.rehearse:
        return [Case(get_family(name), "digits", options) for name, options in DIGITS.items()]
    return [Case(get_family(name), *row) for name, rows in REDUCED.items() for row in rows]


# ---------------------------------------------------------------- comparisons


def compared(card: Card, case: Case, precision: str, way: str = "eager") -> dict:
    """How far the card in that precision is from the CPU in float32, and whether that is near enough."""
    tolerance, (name, allowed) = TOLERANCES[precision], PRECISIONS[precision]
    wanted, codes = case.wanted
    codes = Codes(codes.kept)
    with tf32(allowed):
        found = Found.of(case, faster(case.family, case.model(card.device), way, card), name, codes, way)
    row: dict[str, object] = {
        "precision": precision,
        "way": way,
        "levels": float((found.images.float() - wanted.images.float()).abs().mean()),
        "largest_level": int((found.images.int() - wanted.images.int()).abs().max()),
    }
    if way != "compile":
        calls = len(found.outputs) == len(wanted.outputs)
        row["network"] = max(map(distance, found.outputs, wanted.outputs)) if calls else float("inf")
    if case.family is var_family:
        row["draws"] = codes.other / codes.drawn
    if found.gradient is not None:
        row["gradient"] = distance(found.gradient, wanted.gradient)
    near = all(row[key] <= limit for key, limit in tolerance._asdict().items() if key in row)
    return row | {"tolerance": tolerance._asdict(), "passed": near}


def faster(family: Family, model: nn.Module, way: str, card: Card) -> nn.Module:
    """The model as it is ('eager'), its network replayed from CUDA graphs ('graph'), or compiled ('compile')."""
    if way == "graph":
        network = family.weights(model)
        network.forward = Graphed(network.forward, card)
    elif way == "compile":
        torch.compiler.reset()
        model.compile(**card.compile_options())
    return model


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm; inf if anything is not finite."""
    if not (found.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


class Found(NamedTuple):
    """What a model makes of the CPU's noise, on the CPU."""

    outputs: list[Tensor]  # of the network, at every call, float64; [] of a compiled one
    images: Tensor  # uint8
    gradient: Tensor | None  # of a training loss, of all weights, (n,) float64; None unless eager

    @classmethod
    def of(cls, case: Case, model: nn.Module, precision: str, codes: "Codes", way: str = "eager") -> "Found":
        compute_in(case.family, model, precision)
        outputs = [] if way == "compile" else outputs_of(case.family, model)
        images = sampled(case, model, codes).cpu()
        eager = way == "eager" and case.gradients
        return cls(list(outputs), images, gradient(case, model, precision, images.shape[1:]) if eager else None)


def outputs_of(family: Family, model: nn.Module) -> list[Tensor]:
    """A list to which every call of the network adds what it returns."""
    network, outputs = family.weights(model), []

    def keep(output) -> None:
        outputs.append(tree_leaves(output)[0].detach().double().cpu())

    if family is var_family:  # its sampler calls a method
        call = network.next_scale

        def next_scale(*args):
            keep(output := call(*args))
            return output

        network.next_scale = next_scale
    else:
        network.register_forward_hook(lambda module, inputs, output: keep(output))
    return outputs


@torch.no_grad()
def sampled(case: Case, model: nn.Module, codes: "Codes") -> Tensor:
    """Images of a few steps, on the CPU's noise."""
    with noise_of_the_cpu(), mock.patch.object(var_family, "sample_codes", partial(sample_codes, draw=codes.draw)):
        return images_of_seeds(case.family, model, torch.arange(case.images), **case.sampling())


def gradient(case: Case, model: nn.Module, precision: str, shape: Sequence[int]) -> Tensor:
    """Of the family's loss of a group of images (C, H, W), on random numbers drawn on the CPU."""
    family, n = case.family, 4
    network = family.weights(model).train().requires_grad_(True)
    device = next(network.parameters()).device
    drawn = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, *shape), generator=drawn, dtype=torch.uint8)
    labels = family.labels(model, torch.arange(n))
    draws = family.draw(model, n, drawn, images=lambda: images)
    with autocast(device, precision), codes_without_tf32(model):
        loss = family.loss(model, images.to(device), None if labels is None else labels.to(device), draws)
    scale = 2.0 ** round(math.log2(SCALED / loss.item()))
    (loss * scale).backward()
    parts = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return torch.cat(parts).double().cpu() / scale


@contextmanager
def codes_without_tf32(model: nn.Module) -> Iterator[None]:
    """Inside, VAR finds the codes of images without TensorFloat-32: another code would be another target."""
    if not isinstance(model, var_family.VAR):
        yield
        return
    encode = model.vqvae.encode

    def exact(images: Tensor) -> Tensor:
        with tf32(False):
            return encode(images)

    with mock.patch.object(model.vqvae, "encode", exact):
        yield


# ---------------------------------------------------------------- the same random numbers


@contextmanager
def noise_of_the_cpu() -> Iterator[None]:
    """Inside, random streams of images on any device draw what they draw on the CPU."""
    begin, draw, choose = Streams.__init__, Streams._stack, Streams.randint

    def __init__(self, seeds, device="cpu"):
        begin(self, seeds, "cpu")
        self.onto = torch.device(device)

    def _stack(self, *args):
        return draw(self, *args).to(self.onto)

    def randint(self, high):
        return choose(self, high).to(self.onto)

    with ExitStack() as stack:
        for function in (__init__, _stack, randint):
            stack.enter_context(mock.patch.object(Streams, function.__name__, function))
        yield


class Codes:
    """Draws of VAR: keeps them, or follows those that were kept and counts those that would have been others."""

    def __init__(self, followed: Sequence[Tensor] = ()):
        self.kept: list[Tensor] = []
        self.followed, self.drawn, self.other = list(followed), 0, 0

    def draw(self, probs: Tensor, streams: Streams) -> Tensor:
        """As VAR.sampler.race."""
        ids = race(probs, streams)
        if self.followed:
            own, ids = ids, self.followed.pop(0).to(ids.device)
            self.other += int((own != ids).sum())
        self.drawn += ids.numel()
        self.kept.append(ids.cpu())
        return ids
