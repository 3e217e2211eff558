"""Pipelines of diffusers as the method sees them (neon.family.Family)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from neon import NeonError
from neon.family import check_images, option
from neon.precision import autocast
from neon.sampling import from_uint8
from pipelines import loss as losses
from pipelines.configs import NETWORKS, PRESETS, RECIPES
from pipelines.loss import Draws
from pipelines.model import Model, described, new, read
from pipelines.sampler import sample as sample_pipeline

name = "diffusers"
networks, recipes, presets = NETWORKS, RECIPES, PRESETS
released_precision, released_tf32 = "float32", False
guidable = True


@dataclass(frozen=True)
class Sampling:
    """What a pipeline is called with; its scheduler is its own."""

    num_inference_steps: int = option(50, "steps of the pipeline's scheduler")
    guidance_scale: float = option(1.0, "of class or prompt; 1: none")
    eta: float = option(0.0, "noise that DDIM adds at its steps: 0 is none, 1 as much as DDPM")


@dataclass(frozen=True)
class Loading:
    """What load needs besides a file of weights."""

    pipeline: str = option("", "folder of the pipeline, if the file lies in none (default: the one it was trained in)")
    prompts: str = option("", "file with a prompt on each line; the image of seed i has prompt i mod n")


def is_buffer(tensor_name: str) -> bool:
    return tensor_name.endswith("pos_embed.pos_embed")  # a table of sines


def create(config: str, *, device: torch.device | str, pipeline: str = "", prompts: str = "", **options) -> Model:
    """A new UNet2DModel, initialised from the global generator, with DDIM. Raises NeonError."""
    if pipeline or prompts:
        raise NeonError("a new network models pixels without text: it takes no --pipeline and no --prompts")
    rank, checkpointing, options = _training(options)
    return _trained_so(new(config, **options).to(device), rank, checkpointing)


def hollow(config: str | Path, *, precision: str = "float32", **options) -> Model:
    """On the meta device, of a named configuration, a pipeline's folder or a file of weights, with one empty prompt."""
    rank, _, options = _training(options)  # what checkpointing computes again is not counted
    if isinstance(config, Path):
        model = read(config, precision=precision, hollow=True)
    else:
        model = new(config, hollow=True, **options)
        model.precision = precision
    return _trained_so(model, rank, False)


def countable(sampling: Mapping[str, object]) -> tuple[dict[str, object], str]:
    guidance = 1.0 if sampling["guidance_scale"] <= 1 else 2.0
    return {**sampling, "guidance_scale": guidance, "eta": 0.0}, "num_inference_steps"


def load(
    path: str | Path,
    *,
    device: torch.device | str,
    precision: str = "float32",
    pipeline: str = "",
    prompts: str = "",
    **options,
) -> Model:
    """A model from a pipeline's folder, from a component's folder or file in one, or from a .safetensors of weights.

    precision: of the autocast in which sampling and decoding run. options: lora_rank, to train adapters of that rank;
    gradient_checkpointing, to train in less memory. Raises NeonError.
    """
    rank, checkpointing, rest = _training(options)
    if rest:
        raise NeonError(f"{path}: a pipeline's network is as its config says; {next(iter(rest))} cannot be changed")
    model = read(Path(path), pipeline=pipeline, prompts=prompts, precision=precision).to(device)
    return _trained_so(model, rank, checkpointing)


def _training(options: Mapping) -> tuple[int, bool, dict]:
    """The rank of adapters (0: none), whether gradients are checkpointed, and the other options."""
    rest = dict(options)
    return rest.pop("lora_rank", 0), rest.pop("gradient_checkpointing", False), rest


def _trained_so(model: Model, rank: int, checkpointing: bool) -> Model:
    if rank:
        model.adapt(rank)
    if checkpointing and getattr(model.network, "_supports_gradient_checkpointing", False):
        if any(isinstance(part, nn.Dropout) and part.p for part in model.network.modules()):
            raise NeonError("gradient_checkpointing would draw dropout's masks twice")
        model.network.enable_gradient_checkpointing()
    return model


def weights(model: Model) -> nn.Module:
    return model.adapted or model.network


def metadata(model: Model) -> dict[str, str]:
    """'pipeline': classes and configs, and the folder of what is frozen, if anything is.

    'vae_sha256' is of all that decides an image next to the weights: prompts and scheduler, too, so that rows of
    results tell them apart.
    """
    record = {
        "class": type(model.pipe).__name__,
        "component": model.component,
        "network": described(model.network),
        "scheduler": described(model.pipe.scheduler),
    }
    if model.frozen:
        record |= {"folder": str(model.folder), "frozen_sha256": model.frozen_sha256}
    return {"pipeline": json.dumps(record), "vae_sha256": model.around_sha256}


def labels(model: Model, seeds: torch.Tensor) -> torch.Tensor | None:
    """Classes, or the numbers of prompts, in turn: balanced over any range of seeds, and fixed for each."""
    return seeds % model.classes if model.classes else None


def sample(model: Model, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling) -> torch.Tensor:
    """uint8 (N, C, H, W); sampling: fields of Sampling."""
    return sample_pipeline(model, seeds, _labels(model, seeds, labels), asdict(Sampling()) | sampling)


def _labels(model: Model, seeds: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
    """The given labels, or the seeds' own. Raises NeonError if they do not go with the model."""
    if given is None or not model.classes:
        if given is not None:
            raise NeonError("this pipeline is unconditional: sample it without class labels")
        return labels(model, seeds)
    if len(given) != len(seeds) or not 0 <= given.min() <= given.max() < model.classes:
        raise NeonError(f"{len(seeds)} seeds need as many labels in 0…{model.classes - 1}")
    return given


def check(model: Model, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    """Raises NeonError if the model cannot be trained on images of that (C, H, W) and labels."""
    check_images(shape, labels, model.image_shape, model.classes)
    _ = model.levels  # of a kind that is known here


def draw(model: Model, n: int, generator: torch.Generator, *, drop: float = 0.0, **_) -> Draws:
    """Random numbers of a step. drop: probability that an image is trained without its class or prompt."""
    return losses.draw(n, model.shape, generator, model.vae is not None, drop if model.kind.labels else 0.0)


def loss(model: Model, images: torch.Tensor, labels: torch.Tensor | None, draws: Draws, **_) -> torch.Tensor:
    """Mean over pixels and images of the squared error of what the scheduler's config says that the network predicts.

    Latents are drawn from the VAE's posterior. Outputs in addition to that, such as a variance, are not trained.
    """
    eps, u = draws.noise.to(images.device), draws.u.to(images.device)
    x = from_uint8(images) if model.vae is None else _latents(model.vae, images, draws.latent.to(images.device))
    times, signal, noise = model.levels.at(u, x.ndim)
    found = model.kind.predict(model, signal * x + noise * eps, times, labels, draws.dropped)
    return (found[:, : x.shape[1]].float() - model.levels.target(x, eps, signal, noise)).square().mean()


@torch.no_grad()
def _latents(vae: nn.Module, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) → a latent of each, as the network is trained on, (N, C, h, w) float32."""
    with autocast(images.device, "float32"):
        posterior = vae.encode(from_uint8(images)).latent_dist
    latents = posterior.mean + posterior.std * noise
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
