"""What the method needs to know of a model family, and how it finds one. Imports no torch: `neon --help` needs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from neon import NeonError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    # Random numbers of a training step: a tensor whose rows belong to its images, a (named) tuple of such, or None.
    Draws = torch.Tensor | tuple | None

FAMILIES = {
    "edm": "edm.family",
    "flow": "flow.family",
    "var": "VAR.family",
    "xar": "xAR.family",
    "imm": "imm.family",
    "diffusers": "pipelines.family",
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: a base from nothing, or θ_s from θ_r. Every count is in images, not steps."""

    batch: int  # images per step, over all processes
    lr: float
    budget: int  # images in all (B)
    snapshot: int  # images between snapshots
    ramp: int = 0  # lr rises linearly from 0 over so many images; the first step has lr 0
    anneal: Literal["none", "linear"] = "none"  # then falls to 0 at the budget
    optimizer: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # adamw only, on tensors of two or more dimensions
    ema_halflife: float | None = None  # images
    ema_decay: float | None = None  # per step; at most one of the two is set
    clip: float | None = None  # global gradient norm
    clean_grads: bool = False  # NaN → 0, ±inf → ±1e5 before the step
    precision: Literal["float32", "float16", "bfloat16"] = "float32"  # autocast; on CPUs the command takes float32
    tf32: bool = False  # allow TensorFloat-32 in float32 products
    order: Literal["window", "epoch"] = "epoch"  # how images are shuffled (neon.data)
    network: Mapping[str, object] = field(default_factory=dict)  # constructor options changed
    loss: Mapping[str, object] = field(default_factory=dict)  # options of the family's loss

    def lr_at(self, images: int) -> float:
        """Learning rate of the step that starts after `images` images."""
        lr = self.lr * min(images / self.ramp, 1) if self.ramp else self.lr
        left = 1 - max(images - self.ramp, 0) / max(self.budget - self.ramp, 1)
        if self.anneal == "linear":
            lr *= left
        return lr

    def ema_beta(self) -> float | None:
        """Weight of the old average in one step, or None if there is no average."""
        return self.ema_decay if self.ema_halflife is None else 0.5 ** (self.batch / self.ema_halflife)


@dataclass(frozen=True)
class Preset:
    """A model of the paper: its files, how S and θ_s are made, how it is sampled and searched, and what came out.

    Paths are those of downloads.csv, relative to the project's root.
    """

    network: str  # a name in the family's networks
    base: str  # θ_r
    reference: str  # data set that FID is measured against
    synthetic: int  # |S|
    made_with: Mapping[str, object]  # sampling options of S
    recipe: str  # a name in the family's recipes
    micro_batch: int  # images per forward pass and process in training
    sampling: Mapping[str, object]  # sampling options of the evaluation, at the best guidance if the paper gives one
    batch_size: int  # images per forward pass and process elsewhere
    w: str  # grid of the search; its ends are the range in which the surface looks
    fid: tuple[float | None, float]  # the paper's numbers: base, Neon; None is not given
    rows: tuple[str | None, str]  # the models' names in Table A.1: base, Neon
    kind: Literal["cond", "uncond"] = "cond"  # and the column there
    grid: str = ""  # what is searched next to w: OPTION=GRID
    snapshot: int = 0  # images between the snapshots that are kept; 0: as often as the recipe, which is as the paper
    sets: int = 1  # sets of 50k images to report: EDM's papers give the minimum of three
    best_w: float | None = None  # the paper's, if it is given
    released: str = ""  # the authors' θ_neon
    readme: Mapping[str, object] = field(default_factory=dict)  # its sampling in the released README, where it differs
    vae: str = ""  # file or folder of the autoencoder; models of pixels have none
    precision: str = ""  # in which S is made; '' is the default of the command
    trained_as: str = ""  # rows that share S and θ_s have this name in common

    @property
    def seeds(self) -> str:
        """Of S."""
        return f"0-{self.synthetic - 1}"

    @property
    def searched(self) -> str:
        """The sampling option that is searched next to w; '' is none."""
        return self.grid.partition("=")[0]

    @property
    def fixed(self) -> dict[str, object]:
        """The sampling options that are the same over a whole search."""
        return {name: value for name, value in self.sampling.items() if name != self.searched}


class Family(Protocol):
    """All that `neon` asks of a family: a module such as edm.family.

    Images are uint8 (N, C, H, W), on any device. labels: int64 (N,), or None for unconditional models. seeds: int64
    (N,), on the CPU. tests/test_family.py holds every family to this. A family of the user's own may leave out what
    neon.own_family has a default for.
    """

    name: str
    networks: Mapping[str, object]  # named constructor options
    recipes: Mapping[str, Recipe]
    presets: Mapping[str, Preset]  # the paper's models
    Sampling: type  # frozen dataclass, the options of the sampler; fields with help texts, also on the command line
    Loading: type  # frozen dataclass, options of load and create that name further files, also on the command line
    released_precision: str  # in which the released code evaluates on a GPU; see neon.precision
    released_tf32: bool  # and whether it allows TensorFloat-32
    # Does `sample` ask the network only by calling weights(model), and does no call change what another one returns?
    # Then a second network can guide it: neon.guidance.
    guidable: bool

    def is_buffer(self, tensor_name: str) -> bool:
        """Whether the tensor of that name in a state dict is no weight, so that merges take it from the base."""

    def create(self, config: str, *, device: torch.device | str, **options) -> torch.nn.Module:
        """A new model from a named configuration, initialised from the global generator, in eval mode.

        options: fields of Loading, and changes to the configuration. Raises NeonError.
        """

    def hollow(self, config: str | Path, *, precision: str = "float32", **options) -> torch.nn.Module:
        """A model on the meta device, which has shapes and no values, of a named configuration or of a checkpoint's.

        Reads no weights and needs no autoencoder. precision, options: as of load, except the fields of Loading. Raises
        NeonError.
        """

    def countable(self, sampling: Mapping[str, object]) -> tuple[dict[str, object], str]:
        """Sampling options that cost as much as these and whose cost does not depend on the images; and which of them
        is a number of steps that all cost the same, except the first two. '' is none."""

    def load(
        self, path: str | Path, *, device: torch.device | str, precision: str = "float32", **options
    ) -> torch.nn.Module:
        """A model from an original checkpoint or one of ours, in eval mode.

        precision: in which `sample` computes. options: fields of Loading, and changes to the recorded configuration.
        The model's `compile()` compiles what `sample` runs. Raises NeonError.
        """

    def weights(self, model: torch.nn.Module) -> torch.nn.Module:
        """The part of the model that is trained, merged and stored."""

    def metadata(self, model: torch.nn.Module) -> dict[str, str]:
        """What load needs besides the weights, for the header of a .safetensors file.

        'vae_sha256': neon.weights.checkpoint.values_sha256 of the autoencoder, if the model decodes with one.
        """

    def labels(self, model: torch.nn.Module, seeds: torch.Tensor) -> torch.Tensor | None:
        """The classes that the images named by seeds have if the user names none; each depends on its seed only."""

    def sample(
        self, model: torch.nn.Module, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling
    ) -> torch.Tensor:
        """One image per seed, on the model's device; image i depends on seeds[i], labels[i] and sampling only.

        sampling: all fields of Sampling. Raises NeonError for impossible ones, Diverged if an image is not finite.
        """

    def check(self, model: torch.nn.Module, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
        """Raise NeonError if the model cannot be trained on images of that (C, H, W) and labels."""

    def draw(
        self,
        model: torch.nn.Module,
        n: int,
        generator: torch.Generator,
        *,
        images: Callable[[], torch.Tensor],
        **options,
    ) -> Draws:
        """All random numbers but dropout's of a training step of n images, on the generator's device or the CPU.

        images(): the n images, for a loss that pairs them with its noise. options: Recipe.loss.
        """

    def loss(
        self, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None, draws: Draws, **options
    ) -> torch.Tensor:
        """Mean training loss of some images of a step, a scalar. draws: their rows of `draw`. options: Recipe.loss."""


class NoiseMap(NamedTuple):
    """A sampler as a map of its noise. Row i of each step depends on row i of the one before and on label i only."""

    noise: torch.Tensor  # (N, …) float
    map: Callable[[torch.Tensor], torch.Tensor]  # noise → (N, …) float: latents, or pixels before rounding
    finish: Callable[[torch.Tensor], torch.Tensor]  # those → uint8 (N, C, H, W)

    def images(self) -> torch.Tensor:
        """What `sample` returns."""
        return self.finish(self.map(self.noise))


class Differentiable(Protocol):
    """What a family may have next to the parts of Family: `neon generate --gmo` needs it."""

    def noise_map(
        self, model: torch.nn.Module, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling
    ) -> NoiseMap:
        """The sampler, if it draws nothing after its noise and can be differentiated, forward and backward; parameters
        as of sample. `map` runs with the gradients that its caller allows. Raises NeonError for other samplers."""


def noise_map_of(family: Family) -> Callable[..., NoiseMap]:
    """family.noise_map. Raises NeonError if there is none."""
    if not hasattr(family, "noise_map"):
        raise NeonError(
            f"{family.name}: this family's sampler is not a differentiable map of its noise: --gmo needs a noise_map"
        )
    return family.noise_map


def rows_of(draws: Draws, start: int, stop: int, n: int) -> Draws:
    """The rows of images start … stop − 1 of a step of n. A tensor with n / m rows has one for every m images."""
    if draws is None:
        return None
    if isinstance(draws, tuple):
        parts = (rows_of(part, start, stop, n) for part in draws)
        return type(draws)(*parts) if hasattr(draws, "_fields") else tuple(parts)
    shared_by = n // len(draws)
    return draws[start // shared_by : stop // shared_by]


def get_family(name: str) -> Family:
    """The family of that name: one of FAMILIES, or the user's own, as 'path/to/file.py', 'package.module' or the name
    of an installed entry point of the group `neon.families`. Raises NeonError if there is none.

    get_family(family.name) is the same family.
    """
    if name in FAMILIES:
        return importlib.import_module(FAMILIES[name])
    from neon.own_family import find

    return find(name, FAMILIES)


def find_preset(name: str, family: str | None = None) -> tuple[Family, Preset]:
    """The preset of that name, and the family that has it: the given one, or any.

    Raises NeonError that lists the names there are.
    """
    families = [get_family(one) for one in ([family] if family else FAMILIES)]
    known = {key: (one, row) for one in families for key, row in one.presets.items()}
    return named(known, name, "preset")


def check_images(shape: tuple[int, ...], labels: torch.Tensor | None, wanted: tuple[int, ...], classes: int) -> None:
    """Raises NeonError unless images of that (C, H, W), with labels in [0, classes), can train a network on `wanted`.

    classes = 0: the network takes no labels.
    """
    if tuple(shape) != tuple(wanted):
        raise NeonError(f"images are {tuple(shape)}, the network is trained on {tuple(wanted)}")
    if classes and labels is None:
        raise NeonError("the network is trained on labelled images; the set has no labels")
    if classes and not 0 <= labels.min() <= labels.max() < classes:
        raise NeonError(f"labels must lie in 0…{classes - 1}, the set has {labels.min()}…{labels.max()}")


def option(default, help: str):
    """A field of Sampling or Loading, with the text that the command line shows."""
    return field(default=default, metadata={"help": help})


def named(table: Mapping[str, object], name: str, what: str):
    """table[name]. Raises NeonError that lists the names there are."""
    if name not in table:
        raise NeonError(f"unknown {what} {name!r} (know {', '.join(table)})")
    return table[name]
