"""xAR as the method sees it (neon.family.Family): a transformer that is trained and a frozen VAE."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from neon import NeonError
from neon.family import check_images, named, option
from neon.precision import autocast, decoder, network
from neon.sampling import from_uint8, new_streams, to_uint8
from neon.weights.checkpoint import Weights, load_into, load_weights, open_weights, values_sha256
from neon.weights.network import check_arguments, recorded
from nets.images import mirror
from xAR import loss as loss_numbers
from xAR.configs import NETWORKS, PRESETS, RECIPES
from xAR.network import XAR
from xAR.sampler import sample as sample_latents
from xAR.vae import AutoencoderKL, Patches

name = "xar"
networks, recipes, presets = NETWORKS, RECIPES, PRESETS
released_precision, released_tf32 = "float16", False
guidable = False  # its calls share a cache of keys and values
PAPER = PRESETS["xar_l"].sampling
DECODED = 16  # images that pass the VAE's decoder at once, which bounds its memory


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler; the defaults are those of the paper's number for xAR-L."""

    cfg: float = option(PAPER["cfg"], "guidance scale of the last cell; it rises from 1, which is none, at the first")
    flow_steps: int = option(PAPER["flow_steps"], "network calls per cell")


@dataclass(frozen=True)
class Loading:
    """What load and create need besides the checkpoint."""

    vae_path: str = option(str(Path(__file__).parent / "pretrained" / "kl16.ckpt"), "file of the VAE")


class Model(nn.Module):
    """The transformer, not yet filled; what makes latents of images; and the precision in which both sample.

    config: an entry of networks. vae_path None: all stays on the meta device. Raises NeonError if the VAE's file is
    missing or does not fit.
    """

    def __init__(self, config: Mapping[str, object], vae_path: str | None, precision: str = "float32"):
        super().__init__()
        self.config, self.precision = dict(config), precision
        with torch.device("meta"):  # filled from files
            self.transformer = new_transformer(config)
            channels, vae = self.transformer.channels, config["vae"]
            self.vae = AutoencoderKL(channels, **vae) if vae else Patches(channels)
        if vae_path is not None:
            self.to_empty(device="cpu")
            if vae:
                fill_vae(self.vae, Path(vae_path))
        self.eval().requires_grad_(False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        side = self.transformer.side * self.vae.factor
        return self.vae.image_channels, side, side

    def compile(self, *args, **kwargs):
        """The MLPs, which are alike; attention would be compiled again for every state of its cache."""
        for block in (*self.transformer.encoder_blocks, *self.transformer.decoder_blocks):
            block.mlp.compile(*args, dynamic=True, **kwargs)


def new_transformer(config: Mapping[str, object]) -> XAR:
    return XAR(**{option: value for option, value in config.items() if option != "vae"})


def fill_vae(vae: AutoencoderKL, path: Path) -> None:
    """Read the VAE's weights; the file may hold more than them. Raises NeonError."""
    if not path.exists():
        fetch = "hf download xwen99/mar-vae-kl16 --include kl16.ckpt --local-dir xAR/pretrained"
        raise NeonError(f"{path}: no such file; get the VAE with `{fetch}`, or say where it is with --vae_path")
    state = load_weights(path)
    load_into(vae, {name: state[name] for name in vae.state_dict() if name in state}, path)


def is_buffer(tensor_name: str) -> bool:
    return tensor_name == "mask" or ".attn.rope." in tensor_name


def create(config: str, *, device: torch.device | str, vae_path: str = Loading.vae_path, **options) -> Model:
    """A new transformer, initialised from the global generator, with a trained VAE.

    Raises NeonError for an unknown configuration or if the VAE is missing.
    """
    model = Model({**named(networks, config, "xAR network"), **options}, vae_path)
    model.transformer = new_transformer(model.config).eval()
    return model.to(device)


def hollow(config: str | Path, *, precision: str = "float32", **options) -> Model:
    """On the meta device, of a named configuration or of a checkpoint's."""
    if isinstance(config, Path):
        with open_weights(config) as weights:
            found = config_of(weights, config)
    else:
        found = named(networks, config, "xAR network")
    return Model({**found, **options}, None, precision)


def countable(sampling: Mapping[str, object]) -> tuple[dict[str, object], str]:
    return {**sampling, "cfg": 2.0 if sampling["cfg"] > 1 else 1.0}, "flow_steps"


def load(
    path: str | Path,
    *,
    device: torch.device | str,
    precision: str = "float32",
    vae_path: str = Loading.vae_path,
    **options,
) -> Model:
    """A model from an original .pth (flat, or a trainer's: its EMA) or an own .safetensors, in eval mode.

    precision: of the autocast in which sampling and decoding run. options override the configuration's entries.
    Raises NeonError if the file is of no known xAR, if its tensors do not fit, or if the VAE is missing or another than
    the recorded one.
    """
    with open_weights(path) as weights:
        config = {**config_of(weights, path), **options}
        with recorded(weights, path, "xAR"):
            model = Model(config, vae_path, precision)
        known = weights.metadata
        if "vae_sha256" in known and known["vae_sha256"] != _vae_sha256(model):
            raise NeonError(f"{vae_path}: not the VAE that {path} was trained with")
        load_into(model.transformer, weights, path)
    return model.to(device)


def config_of(weights: Weights, path: str | Path) -> dict[str, object]:
    """The recorded configuration, or for a released file the named one of that many classes and that width."""
    if "config" in weights.metadata:
        with recorded(weights, path, "xAR"):
            found = json.loads(weights.metadata["config"])
            check_arguments(XAR, {name: value for name, value in found.items() if name != "vae"})
            return found
    shape = weights.spec("class_emb.weight")[1] if "class_emb.weight" in weights else None
    for config in networks.values():
        if shape == (config.get("classes", 1000) + 1, config["dim"]):
            return config
    raise NeonError(f"{path}: not a checkpoint of an xAR known here ({', '.join(networks)})")


def weights(model: Model) -> XAR:
    return model.transformer


def metadata(model: Model) -> dict[str, str]:
    digest = _vae_sha256(model)
    return {"config": json.dumps(model.config)} | ({"vae_sha256": digest} if digest else {})


def _vae_sha256(model: Model) -> str:
    """Digest of the VAE, '' for patches of pixels, which have no weights."""
    return values_sha256(model.vae) if model.config["vae"] else ""


def labels(model: Model, seeds: torch.Tensor) -> torch.Tensor:
    """The classes in turn: balanced over any range of seeds, and fixed for each."""
    return seeds % model.transformer.classes


@torch.no_grad()
def sample(
    model: Model, seeds: torch.Tensor, labels: torch.Tensor | None, *, cfg: float, flow_steps: int
) -> torch.Tensor:
    """uint8 (N, C, S, S); labels None: no class."""
    device = model.transformer.mask.device
    with autocast(device, network(model.precision)):
        latents = sample_latents(model.transformer, new_streams(seeds, device), labels, cfg=cfg, steps=flow_steps)
    with autocast(device, decoder(model.precision)):
        return torch.cat([to_uint8(model.vae.decode(part)) for part in latents.split(DECODED)])


def check(model: Model, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    """Raises NeonError if the model cannot be trained on images of that (C, H, W) and labels."""
    check_images(shape, labels, model.image_shape, model.transformer.classes)


class Draws(NamedTuple):
    """The random numbers of a training step of N images."""

    mirrored: torch.Tensor | None  # (N,) bool
    latent: torch.Tensor  # (N, channels, side, side) standard normal: which latent of its posterior an image gets
    context: loss_numbers.Draws


def draw(model: Model, n: int, generator: torch.Generator, *, flip: bool = False, **_) -> Draws:
    """Random numbers of a step, in the order of the fields. flip: mirror every second image, by chance."""
    net, here = model.transformer, {"generator": generator, "device": generator.device}
    mirrored = torch.rand(n, **here) < 0.5 if flip else None
    latent = torch.randn(n, net.channels, net.side, net.side, **here)
    return Draws(mirrored, latent, loss_numbers.draw(net, n, generator))


def loss(model: Model, images: torch.Tensor, labels: torch.Tensor | None, draws: Draws, **_) -> torch.Tensor:
    """Mean squared error of the velocity of the images' latents."""
    images = mirror(images, draws.mirrored)
    with torch.no_grad(), autocast(images.device, "float32"):
        latents = model.vae.encode(from_uint8(images), draws.latent.to(images.device))
    return loss_numbers.noisy_context_loss(model.transformer, latents, labels, draws.context)
