"""What it costs to sample, to measure and to train, counted without computing: networks run on the meta device.

FLOPs are those of matrix products, convolutions and attention, two for a multiply-add, by the formulas of torch's
FlopCounterMode. On the meta device attention is made of products, so it is counted too; that is what the fused kernels
compute, except that their backward pass forms the attention weights again. Element-wise work, norms, random numbers and
the optimizer's step are not counted: the utilisation has to allow for them.
"""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from neon import NeonError
from neon import precision as precisions
from neon.dropout import masks_of
from neon.family import Family, NoiseMap, Recipe, named, noise_map_of
from neon.guidance import Guide, check_guidable
from neon.measure.features import load_extractor
from neon.precision import DTYPES, autocast, on_meta
from neon.recompute import HELD, blocks_of

META = torch.device("meta")
UNCOUNTED = {F.gelu, F.silu, F.layer_norm, F.group_norm, F.rms_norm, F.normalize, torch.clamp, torch.Tensor.clamp}
BATCH = 4  # images that are counted at once: a group of IMM's loss

# Dense TFLOP/s at most, from the vendors' data sheets (H100: SXM; half precision sums in float32).
DEVICES = {
    "A100": {"float32": 19.5, "tf32": 156.0, "float16": 312.0, "bfloat16": 312.0},
    "H100": {"float32": 67.0, "tf32": 494.7, "float16": 989.4, "bfloat16": 989.4},
    "H200": {"float32": 67.0, "tf32": 494.7, "float16": 989.4, "bfloat16": 989.4},
    "L40S": {"float32": 91.6, "tf32": 183.2, "float16": 362.1, "bfloat16": 362.1},
    "RTX4090": {"float32": 82.6, "tf32": 82.6, "float16": 165.2, "bfloat16": 165.2},
}
UTILISATION = 0.35
TF32 = {"float32": "tf32"}
NETWORK, DECODER = "float16", "bfloat16"  # stand for the two precisions of a sampler, whose cost is counted once


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of an image, or of many: FLOPs by the precision in which they run, and passes of the network."""

    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)  # 'float32', 'tf32', 'float16', 'bfloat16'
    passes: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.flops.values())

    def __add__(self, other: "Cost") -> "Cost":
        names = {**self.flops, **other.flops}
        flops = {name: self.flops.get(name, 0) + other.flops.get(name, 0) for name in names}
        return Cost(flops, self.passes + other.passes)

    def __mul__(self, factor: float) -> "Cost":
        return Cost({name: flops * factor for name, flops in self.flops.items()}, self.passes * factor)

    def with_precision(self, names: Mapping[str, str]) -> "Cost":
        """The same with other names of precisions: {'float32': 'tf32'} where TensorFloat-32 is allowed."""
        renamed = (Cost({names.get(name, name): flops}) for name, flops in self.flops.items())
        return sum(renamed, Cost(passes=self.passes))


@dataclasses.dataclass(frozen=True)
class Device:
    """How fast it computes: TFLOP/s at most, by precision, and which part of it is reached."""

    name: str
    tflops: Mapping[str, float]
    utilisation: float

    def hours(self, cost: Cost) -> float:
        rates = {name: self.tflops[name] * 1e12 * self.utilisation for name in cost.flops}
        return sum(flops / rates[name] for name, flops in cost.flops.items()) / 3600


def device(name: str, tflops: float | None = None, utilisation: float = UTILISATION) -> Device:
    """A device of DEVICES, or 'cpu', whose float32 products are timed here. Raises NeonError.

    tflops: a measured rate, which replaces the data sheet's times the utilisation, in every precision.
    """
    if tflops is not None:
        return Device(f"{tflops:g} TFLOP/s as measured", dict.fromkeys((*DTYPES, "tf32"), tflops), 1.0)
    if name == "cpu":
        return Device(name, dict.fromkeys((*DTYPES, "tf32"), cpu_tflops()), utilisation)
    return Device(name, named(DEVICES, name, "device"), utilisation)


def cpu_tflops(side: int = 768, rounds: int = 5) -> float:
    """What this machine's CPU reaches in float32 products of large matrices, at best of some rounds."""
    a, b, spent = torch.ones(side, side), torch.ones(side, side), []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        a @ b
        spent.append(time.perf_counter() - started)
    return 2 * side**3 / min(spent[1:]) / 1e12


def sampling(
    family: Family,
    network: str | Path,
    options: Mapping[str, object],
    precision: str = "float32",
    guided: bool = False,
    passes: int = 1,
) -> Cost:
    """Of an image of the family's sampler, decoded. options: fields of Sampling that are not at their defaults.

    guided: by a second network, whose passes count too. passes: how often the way from noise to latents is passed
    before one is decoded (neon.gmo). Steps that cost the same are counted once: the cost of n steps is that of two and
    (n - 2) times a third. Raises NeonError if the sampler cannot be guided, or is no map of its noise for several
    passes.
    """
    given = _defaults(family) | dict(options)
    chosen, field = family.countable(given)
    if passes > 1:
        _map_on_meta(family, network, given)

    def cost(**changed) -> Cost:
        at = tuple({**chosen, **changed}.items())
        found, _ = _sampling(family, network, at, guided)
        if passes > 1:
            found += _mapping(family, network, at) * (passes - 1)
        return found.with_precision({NETWORK: precisions.network(precision), DECODER: precisions.decoder(precision)})

    if (steps := chosen.get(field, 0)) <= 3:
        return cost()
    two = cost(**{field: 2})
    return two + (cost(**{field: 3}) + two * -1) * (steps - 2)


@lru_cache(maxsize=256)
def _sampling(
    family: Family, network: str | Path, options: tuple, guided: bool = False
) -> tuple[Cost, tuple[int, ...]]:
    """Of an image, with the FLOPs in the network's precision under the name NETWORK and in the decoder's under DECODER;
    and its (C, H, W)."""
    model, second = _guided(family, network) if guided else (_model(family, network), ())
    shapes = []

    def run() -> None:
        seeds = torch.arange(BATCH)
        shapes.append(family.sample(model, seeds, family.labels(model, seeds), **dict(options)).shape[1:])

    return count(model, family, run, *second) * (1 / BATCH), tuple(shapes[0])


@lru_cache(maxsize=256)
def _mapping(family: Family, network: str | Path, options: tuple) -> Cost:
    """As _sampling, of the way from noise to latents alone."""
    sampler = _map_on_meta(family, network, dict(options))
    with torch.no_grad():
        return count(_model(family, network), family, lambda: sampler.map(sampler.noise)) * (1 / BATCH)


def _map_on_meta(family: Family, network: str | Path, options: Mapping[str, object]) -> NoiseMap:
    model, seeds = _model(family, network), torch.arange(BATCH)
    with _values():
        return noise_map_of(family)(model, seeds, family.labels(model, seeds), **options)


TRAINED: dict[tuple, Cost] = {}  # what `training` counted; a recipe has no hash


def training(family: Family, network: str | Path, recipe: Recipe) -> Cost:
    """Of an image in a training step: the loss with what it needs, such as latents, forward and backward."""
    key = family, network, repr(recipe)
    if key not in TRAINED:
        TRAINED[key] = _training(family, network, recipe)
    return TRAINED[key]


def _training(family: Family, network: str | Path, recipe: Recipe) -> Cost:
    model = family.hollow(network, **recipe.network)
    family.weights(model).train().requires_grad_(True)
    shape, seeds = image_shape(family, network), torch.arange(BATCH)
    here = torch.Generator().manual_seed(0)

    def step() -> None:
        draws = family.draw(model, BATCH, here, images=lambda: _pixels(shape, "cpu"), **recipe.loss)
        labels = family.labels(model, seeds)
        labels = None if labels is None else labels.to(META)
        with autocast(META, recipe.precision), masks_of(seeds, META):
            family.loss(model, _pixels(shape, META), labels, draws, **recipe.loss).backward()

    return (count(model, family, step) * (1 / BATCH)).with_precision(TF32 if recipe.tf32 else {})


@lru_cache(maxsize=64)
def features(spec: str, shape: tuple[int, int, int]) -> Cost:
    """Of the features of an image (C, H, W). spec: as of --features; Inception's weights are not needed."""
    module = _extractor(spec).to(META)
    images = _pixels((3, *shape[1:]), META)
    with torch.no_grad(), _values(), _counter() as flops:
        module(images)
    return Cost(dict(flops)) * (1 / BATCH)


@lru_cache(maxsize=4)
def _extractor(spec: str) -> torch.nn.Module:
    return load_extractor("inception:random" if spec.partition(":")[0] == "inception" else spec).module


def image_shape(family: Family, network: str | Path) -> tuple[int, int, int]:
    """(C, H, W) of what the family samples."""
    options, steps = family.countable(_defaults(family))
    return _sampling(family, network, tuple((options | ({steps: 2} if steps else {})).items()))[1]


def training_memory(
    family: Family, network: str | Path, recipe: Recipe, processes: int, sharded: bool, recompute: bool
) -> tuple[float, float]:
    """Bytes that each process needs next to activations: at all times (weights, gradients, moments, the average; what
    is frozen), and in addition within a step (gathered weights and their gradients, copies in half precision)."""
    model = family.hollow(network, **recipe.network)
    trained = family.weights(model)
    parameters, blocks = _bytes(dict(trained.named_parameters())), list(map(_bytes_of, blocks_of(trained)))
    held, two = parameters * (4 + (recipe.ema_beta() is not None)), 2 * max(blocks, default=parameters)
    frozen = _bytes(dict(model.named_parameters())) - parameters
    copies = (two / 2 if sharded and recompute else parameters) / 2 if recipe.precision != "float32" else 0
    if not sharded:
        return held + frozen, copies
    gathered = parameters if parameters <= HELD else min(parameters - sum(blocks) + two, parameters)
    return held / processes + frozen, copies + 2 * gathered


def _bytes_of(module: torch.nn.Module) -> int:
    return _bytes(dict(module.named_parameters()))


def sizes(family: Family, network: str | Path) -> tuple[int, int, int]:
    """Bytes in float32 of a checkpoint, of its trained parameters alone, and of the autoencoder."""
    model = _model(family, network)
    weights = family.weights(model)
    checkpoint, whole = (_bytes(module.state_dict()) for module in (weights, model))
    return checkpoint, _bytes(dict(weights.named_parameters())), whole - checkpoint


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())


@lru_cache(maxsize=32)
def _model(family: Family, network: str | Path) -> torch.nn.Module:
    return family.hollow(network, precision=f"{NETWORK}+{DECODER}")


@lru_cache(maxsize=4)
def _guided(family: Family, network: str | Path) -> tuple[torch.nn.Module, tuple[torch.nn.Module]]:
    """A model that samples guided by a second network, and that network."""
    check_guidable(family)
    model, second = (family.hollow(network, precision=f"{NETWORK}+{DECODER}") for _ in range(2))
    Guide(family.weights(model)).set(1.0, family.weights(second))
    return model, (family.weights(second),)


def _defaults(family: Family) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(family.Sampling)}


def _pixels(shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return torch.zeros(BATCH, *shape, dtype=torch.uint8, device=device)


def count(model: torch.nn.Module, family: Family, run: Callable[[], object], *others: torch.nn.Module) -> Cost:
    """What `run`, on the meta device, costs. A pass of the network or of others is a row that leaves its last layer."""
    rows = []
    lasts = [[m for m in network.modules() if m._parameters][-1] for network in (family.weights(model), *others)]
    hooks = [last.register_forward_hook(lambda module, inputs, output: rows.append(len(output))) for last in lasts]
    try:
        with _values(), _counter() as flops:
            run()
    except NotImplementedError as error:
        raise NeonError(f"{family.name}: its cost cannot be counted on the meta device ({error})") from None
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(dict(flops), float(sum(rows)))


@contextmanager
def _counter():
    """FLOPs by precision of what runs inside: that of the autocast around it, else that of the tensors."""
    flops = defaultdict(float)

    def by_precision(formula):
        def counted(*args, out_val=None, **kwargs):
            found = formula(*args, out_val=out_val, **kwargs)
            flops[_precision(args)] += found
            return found

        counted._get_raw = True  # as torch marks formulas that want tensors, not shapes
        return counted

    formulas = {op: by_precision(formula) for op, formula in flop_registry.items()}
    with FlopCounterMode(display=False, custom_mapping=formulas):
        yield flops


def _precision(args) -> str:
    name = on_meta()
    if name == "float32":
        name = str(next(arg.dtype for arg in args if isinstance(arg, torch.Tensor))).removeprefix("torch.")
    return name if name in DTYPES else "float32"


class _values(TorchFunctionMode):
    """Where a sampler looks at values, which meta tensors lack: every check passes, and what moves to the CPU is 0.

    UNCOUNTED functions return their input, and layers add no bias, for their shapes take most of the time.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if func in UNCOUNTED:
                return args[0]
            if func is F.linear:
                return func(*args[:2])
            if func is torch.Tensor.__bool__:
                return True
            if func is torch.Tensor.cpu:
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            if func is torch.Tensor.exponential_:
                kwargs.pop("generator", None)
        return func(*args, **kwargs)
