"""VAR as the method sees it (neon.family.Family): a transformer that is trained and a frozen VQVAE."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from neon import NeonError
from neon.family import check_images, named, option
from neon.files import existing
from neon.precision import autocast, decoder, network
from neon.sampling import from_uint8, new_streams, to_uint8
from neon.weights.checkpoint import load_into, load_weights, open_weights, values_sha256
from neon.weights.network import check_arguments, recorded
from VAR import transformer
from VAR.augment import draw_corners, enlarged_crops
from VAR.configs import CONFIGS, PRESETS, RECIPES, Config
from VAR.loss import code_loss
from VAR.sampler import sample_codes
from VAR.transformer import Transformer
from VAR.vqvae import VQVAE

name = "var"
networks, recipes, presets = CONFIGS, RECIPES, PRESETS
released_precision, released_tf32 = "float16", False
guidable = False  # its calls share a cache of keys and values
PAPER = PRESETS["var_d16"].sampling
RELEASED_VQVAE = "vae_ch160v4096z32.pth"
DECODED = 2**22  # pixels that the decoder makes at once, 64 images of 256×256, which bounds its memory


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler; the defaults are those of the paper's evaluation of d16."""

    cfg: float = option(PAPER["cfg"], "guidance scale at the last scale; it grows from 0 at the first, and 0 is none")
    top_k: int = option(PAPER["top_k"], "draw from the k most likely codes; 0: from all")
    top_p: float = option(PAPER["top_p"], "draw from the most likely codes of this total probability; 0: from all")
    temperature: float = option(1.0, "logits are divided by it")
    more_smooth: bool = option(False, "average codes instead of drawing one: nicer images, worse FID")


@dataclass(frozen=True)
class Loading:
    """What load and create need besides the checkpoint."""

    vae_ckpt: str = option("", "file of the VQVAE (default: looked for near the checkpoint)")


class VAR(nn.Module):
    """The two networks, the file that the second came from, and the precision in which they sample."""

    def __init__(self, config: Config, vae_file: Path | None, precision: str = "float32"):
        """vae_file None: both networks stay on the meta device."""
        super().__init__()
        with torch.device("meta"):  # filled from files
            self.transformer, self.vqvae = Transformer(config), VQVAE(config)
        self.config, self.vae_file, self.precision = config, vae_file, precision
        if vae_file:
            self.to_empty(device="cpu")
            self.fill_vqvae(config, vae_file)
        self.eval().requires_grad_(False)

    def fill_vqvae(self, config: Config, vae_file: Path) -> None:
        statistics = "quantize.ema_vocab_hit_SV"  # never read; of another shape if made for other scales
        load_into(
            self.vqvae, load_weights(vae_file) | {statistics: torch.zeros(len(config.sides), config.vocab)}, vae_file
        )

    def compile(self, *args, **kwargs):
        """The blocks, which are alike, so that one compilation serves all of them and every scale."""
        for block in self.transformer.blocks:
            block.compile(*args, dynamic=True, **kwargs)


def is_buffer(tensor_name: str) -> bool:
    return tensor_name.rpartition(".")[2] in ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")


def create(config: str, *, device: torch.device | str, vae_ckpt: str = "", **options) -> VAR:
    """A new transformer, initialised from the global generator, with a trained VQVAE.

    Raises NeonError for an unknown configuration or if the VQVAE is not found.
    """
    config = dataclasses.replace(named(networks, config, "VAR network"), **options)
    model = VAR(config, find_vqvae(vae_ckpt))
    model.transformer = Transformer(config).eval()
    return model.to(device)


def hollow(config: str | Path, *, precision: str = "float32", **options) -> VAR:
    """On the meta device, of a named configuration or of a checkpoint's."""
    if isinstance(config, Path):
        with open_weights(config) as weights:
            found = config_of(weights, config)
    else:
        found = named(networks, config, "VAR network")
    return VAR(dataclasses.replace(found, **options), None, precision)


def countable(sampling: Mapping[str, object]) -> tuple[dict[str, object], str]:
    """A pass a scale, two with guidance: no option is a number of steps. What may be drawn costs nothing."""
    return {**sampling, "cfg": float(sampling["cfg"] != 0), "top_k": 0, "top_p": 0.0}, ""


def load(
    path: str | Path, *, device: torch.device | str, precision: str = "float32", vae_ckpt: str = "", **options
) -> VAR:
    """A model from an original .pth (flat, or a trainer's) or an own .safetensors, in eval mode.

    precision: of the autocast in which sampling and decoding run. vae_ckpt: file of the VQVAE; default: the recorded
    one, or one of the released name near the checkpoint (find_vqvae). options override fields of Config. Raises
    NeonError if the file is of no known VAR, if its tensors do not fit, or if the VQVAE is missing or another one.
    """
    with open_weights(path) as weights:
        config = dataclasses.replace(config_of(weights, path), **options)
        vae_file = find_vqvae(vae_ckpt, path, weights.metadata.get("vae", ""))
        with recorded(weights, path, "VAR"):
            model = VAR(config, vae_file, precision)
        if "config" in weights.metadata and values_sha256(model.vqvae) != weights.metadata.get("vae_sha256"):
            raise NeonError(f"{vae_file}: not the VQVAE that {path} was trained with")
        load_into(model.transformer, weights, path)
    return model.to(device)


def config_of(weights, path: str | Path) -> Config:
    """The recorded configuration, or the named one with as many tokens and as wide as a released checkpoint."""
    if text := weights.metadata.get("config"):
        with recorded(weights, path, "VAR"):
            check_arguments(Config, json.loads(text))
            return Config.from_json(text)
    shape = weights.spec("pos_1LC")[1] if "pos_1LC" in weights else None
    for config in networks.values():
        if shape == (1, config.tokens, config.width):
            return config
    raise NeonError(f"{path}: not a checkpoint of a VAR known here ({', '.join(networks)})")


def find_vqvae(given: str = "", checkpoint: str | Path | None = None, recorded: str = "") -> Path:
    """The file of the VQVAE: the given one, or the first that exists among vqvae_places. Raises NeonError."""
    if given:
        return existing(given)
    for place in vqvae_places(checkpoint, recorded):
        if place.exists():
            return place
    if recorded and Path(recorded).name != RELEASED_VQVAE:
        raise NeonError(f"{recorded}: no such file, and {checkpoint} needs this VQVAE; say where it is with --vae_ckpt")
    fetch = f"bash download_models.sh {RELEASED_VQVAE}"
    raise NeonError(f"the VQVAE is missing; get it with `{fetch}`, or say where it is with --vae_ckpt")


def vqvae_places(checkpoint: str | Path | None, recorded: str) -> Iterator[Path]:
    """Where a VQVAE may lie: as recorded, from here or from a folder above the checkpoint; then the released name."""
    above = list(Path(checkpoint).absolute().parents) if checkpoint else []
    if recorded:
        yield from (folder / recorded for folder in [Path(), *above])
    near = [above[0]] if above else []
    scripts = sorted(Path(__file__).parent.glob("*/pretrained"))
    yield from (folder / RELEASED_VQVAE for folder in [*near, *scripts, Path("checkpoints")])


def weights(model: VAR) -> Transformer:
    return model.transformer


def metadata(model: VAR) -> dict[str, str]:
    return {
        "config": json.dumps(dataclasses.asdict(model.config)),
        "vae": str(model.vae_file),
        "vae_sha256": values_sha256(model.vqvae),
    }


def labels(model: VAR, seeds: torch.Tensor) -> torch.Tensor:
    """The classes in turn: balanced over any range of seeds, and fixed for each."""
    return seeds % model.config.classes


@torch.no_grad()
def sample(model: VAR, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling) -> torch.Tensor:
    """uint8 (N, C, S, S); sampling: fields of Sampling. labels None: each image draws its class from its own stream."""
    device = model.transformer.pos_start.device
    with autocast(device, network(model.precision)):
        _, f_hat = sample_codes(model.transformer, model.vqvae.quantize, labels, new_streams(seeds, device), **sampling)
    at_once = max(DECODED // model.config.image_side**2, 1)
    with autocast(device, decoder(model.precision)):
        return torch.cat([to_uint8(model.vqvae.decode_latent(part)) for part in f_hat.split(at_once)])


def check(model: VAR, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    """Raises NeonError if the model cannot be trained on images of that (C, H, W) and labels."""
    config = model.config
    check_images(shape, labels, (config.image_channels, config.image_side, config.image_side), config.classes)


class Draws(NamedTuple):
    """The random numbers of a training step of N images."""

    corners: torch.Tensor | None  # (N, 2) int64, where crops of the enlarged images begin
    dropped: transformer.Draws


def draw(model: VAR, n: int, generator: torch.Generator, *, enlarge: float = 1.0, **_) -> Draws:
    """Random numbers of a step, in the order of the fields. enlarge: see `loss`."""
    corners = draw_corners(n, model.config.image_side, enlarge, generator) if enlarge > 1 else None
    return Draws(corners, model.transformer.draw(n, generator))


def loss(
    model: VAR, images: torch.Tensor, labels: torch.Tensor | None, draws: Draws, enlarge: float = 1.0
) -> torch.Tensor:
    """Mean cross-entropy of the images' codes. enlarge: train on random crops of images enlarged by this factor."""
    if draws.corners is not None:
        images = enlarged_crops(images, enlarge, draws.corners)
    ids = model.vqvae.encode(from_uint8(images))
    return code_loss(model.transformer, model.vqvae.quantize, ids, labels, draws.dropped)
