"""IMM as the method sees it (neon.family.Family): a network that is trained, and a frozen VAE if it models latents."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from imm import loss as loss_numbers
from imm.autoencoder import StableDiffusionVAE, find_vae
from imm.configs import NETWORKS, PRESETS, RECIPES
from imm.latents import decode, encode, sample_posterior
from imm.network import IMMPrecond
from imm.sampler import jumps, start_noise
from neon import NeonError
from neon.family import NoiseMap, check_images, named, option
from neon.precision import autocast, decoder, network
from neon.sampling import from_uint8, new_streams, to_uint8
from neon.weights import network as recorded
from neon.weights.checkpoint import values_sha256

name = "imm"
networks, recipes, presets = NETWORKS, RECIPES, PRESETS
# The released code samples under float16 autocast, which its network turns off: only the VAE decodes in float16.
released_precision, released_tf32 = "float32+float16", True
guidable = True
PAPER = PRESETS["imm_t8"].sampling


@dataclass(frozen=True)
class Sampling:
    """Options of the pushforward sampler; the defaults are those of the released model's evaluation."""

    num_steps: int = option(PAPER["num_steps"], "jumps from noise to data")
    cfg_scale: float = option(PAPER["cfg_scale"], "guidance scale; 1 is none")
    schedule: Literal["uniform", "edm"] = option("uniform", "times of the jumps: uniform, or in EDM's noise levels")


@dataclass(frozen=True)
class Loading:
    """What load and create need besides the checkpoint."""

    vae: str = option("", "folder or hub id of the VAE (default: looked for near the checkpoint)")


class IMM(nn.Module):
    """A network; the VAE of its latents, or None if it models pixels; and the precision in which they sample."""

    def __init__(self, net: IMMPrecond, vae: StableDiffusionVAE | None, precision: str = "float32"):
        super().__init__()
        self.net, self.vae, self.precision = net, vae, precision
        self.eval().requires_grad_(False)

    def compile(self, *args, **kwargs):
        """The blocks, which are alike, so that one compilation serves all of them."""
        for block in self.net.model.blocks:
            block.compile(*args, **kwargs)


def is_buffer(tensor_name: str) -> bool:
    return False  # the position table is a parameter, and merged like any other


def create(config: str, *, device: torch.device | str, vae: str = "", **options) -> IMM:
    """A new network, initialised from the global generator. Raises NeonError for an unknown configuration."""
    net = recorded.build(IMMPrecond, {**named(networks, config, "IMM network"), **options})
    return IMM(net, _vae_of(net, find_vae(vae))).to(device)


def hollow(config: str | Path, *, precision: str = "float32", **options) -> IMM:
    """On the meta device, of a named configuration or of a checkpoint's, with a VAE of Stable Diffusion's shape."""
    net = recorded.hollow(config, networks, IMMPrecond, "IMM", **options)
    return IMM(net, StableDiffusionVAE("") if net.img_channels == 4 else None, precision)


def countable(sampling: Mapping[str, object]) -> tuple[dict[str, object], str]:
    return {**sampling, "cfg_scale": 1.0 if sampling["cfg_scale"] == 1 else 2.0}, "num_steps"


def load(path: str | Path, *, device: torch.device | str, precision: str = "float32", vae: str = "", **options) -> IMM:
    """A model from an original .pkl or an own .safetensors, in eval mode; options override the network's constructor's.

    precision: of the autocast in which sampling and decoding run. vae: folder or hub id, see find_vae. Raises NeonError
    if the file is of no IMM, if its tensors do not fit, or if the VAE is missing or another than the recorded one.
    """
    net, known = recorded.load(path, IMMPrecond, "IMM", device, **options)
    model = IMM(net, _vae_of(net, find_vae(vae, path)), precision).to(device)
    if model.vae and "vae_sha256" in known and known["vae_sha256"] != values_sha256(model.vae):
        raise NeonError(f"{model.vae.source}: not the VAE that {path} was trained with, which was {known['vae']}")
    return model


def _vae_of(net: IMMPrecond, source: str) -> StableDiffusionVAE | None:
    """Four channels are latents, as in the original; one or three are pixels."""
    return StableDiffusionVAE(source) if net.img_channels == 4 else None


def weights(model: IMM) -> IMMPrecond:
    return model.net


def metadata(model: IMM) -> dict[str, str]:
    vae = {"vae": model.vae.source, "vae_sha256": values_sha256(model.vae)} if model.vae else {}
    return recorded.metadata(model.net) | vae


def labels(model: IMM, seeds: torch.Tensor) -> torch.Tensor | None:
    """The classes in turn: balanced over any range of seeds, and fixed for each."""
    return seeds % model.net.label_dim if model.net.label_dim else None


@torch.no_grad()
def sample(model: IMM, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling) -> torch.Tensor:
    """uint8 (N, C, H, W); sampling: fields of Sampling."""
    return noise_map(model, seeds, labels, **sampling).images()


def noise_map(
    model: IMM, seeds: torch.Tensor, labels: torch.Tensor | None, *, num_steps: int, cfg_scale: float, schedule: str
) -> NoiseMap:
    """The noise and the latents are float64."""
    device = model.net.model.pos_embed.device
    guidance = None if labels is None or cfg_scale == 1 else cfg_scale
    jump = jumps(model.net, labels, steps=num_steps, cfg=guidance, kind=schedule)

    def latents(x: torch.Tensor) -> torch.Tensor:
        with autocast(device, network(model.precision)):
            return jump(x)

    def finish(x: torch.Tensor) -> torch.Tensor:
        with autocast(device, decoder(model.precision)):
            return decode(model.vae, x) if model.vae else to_uint8(2 * x)

    return NoiseMap(start_noise(model.net, new_streams(seeds, device)).double(), latents, finish)


def check(model: IMM, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    """Raises NeonError if the model cannot be trained on images of that (C, H, W) and labels."""
    net = model.net
    side = net.img_resolution * (8 if model.vae else 1)
    check_images(shape, labels, (3 if model.vae else net.img_channels, side, side), net.label_dim)


class Draws(NamedTuple):
    """The random numbers of a training step of N images."""

    latent: torch.Tensor | None  # (N, 4, h, w) standard normal: which latent of its posterior an image gets
    matching: loss_numbers.Draws


def draw(model: IMM, n: int, generator: torch.Generator, **_) -> Draws:
    """Random numbers of a step, in the order of the fields. Raises NeonError unless n is a multiple of four."""
    net, here = model.net, {"generator": generator, "device": generator.device}
    shape = (n, net.img_channels, net.img_resolution, net.img_resolution)
    latent = torch.randn(shape, **here) if model.vae else None
    return Draws(latent, loss_numbers.draw(shape, generator))


def loss(model: IMM, images: torch.Tensor, labels: torch.Tensor | None, draws: Draws, **options) -> torch.Tensor:
    """Mean over groups of the moment-matching loss; options are those of moment_matching_loss.

    Every visit of an image draws another latent from its posterior. Pixels are trained on at half their range,
    which has about the standard deviation sigma_data. Raises NeonError unless the images are whole groups of four.
    """
    net = model.net
    if model.vae:
        x = sample_posterior(encode(model.vae, images), draws.latent.to(images.device))
    else:
        x = from_uint8(images) / 2
    rows = F.one_hot(labels, net.label_dim).float() if net.label_dim else x.new_zeros(len(x), 0)
    return loss_numbers.moment_matching_loss(net, x, rows, draws.matching, **options).mean()
