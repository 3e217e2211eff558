"""LoRA adapters as θ_s: the step θ_s − θ_r of a layer is scale · up · down, with low rank.

Neon is the adapter at strength −w. It can be fused into a base, or written once more with the step −w (θ_s − θ_r), so
that other programs load θ_neon at strength 1. Known names: PEFT's (a folder with its config), those of diffusers'
save_lora_weights, and kohya's. Factors of two adapters are never merged: (1 + w) B_r A_r − w B_s A_s is a merge of
products, and the product of merged factors differs from it by (w + w²) ΔB ΔA.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from neon import NeonError
from neon.files import atomic, read_object, reading, to_json
from neon.merge import is_finite
from neon.weights.checkpoint import check_metadata, load_weights, open_weights, save_safetensors
from neon.weights.folders import CONFIG, PIPELINE
from neon.weights.match import PREFIXES, shapes

PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)
PEFT_PREFIX = "base_model.model."
DOWN = ("lora_A", "lora_down", "lora.down", "lora_embedding_A")
UP = ("lora_B", "lora_up", "lora.up", "lora_embedding_B")
FACTOR = re.compile(rf"(?P<layer>.+?)\.(?P<part>{'|'.join(map(re.escape, (*DOWN, *UP)))}|alpha)(\.default)?(\.weight)?")
KOHYA = re.compile(r"lora_(?P<part>unet|transformer|prior|te\d?|model)_(?P<layer>.+)")
OTHERS = re.compile(r".*\.(hada_\w+|lokr_\w+|dora_scale|lora_magnitude\w*|lora_mid|oft_\w+)(\.\w+)*")
PARTS = ("", "unet.", "transformer.", "prior.", *PREFIXES)  # what may precede the names of a base's layers
WRAPPED = (*PREFIXES, "transformer.", "model.diffusion_model.")
TEXT = re.compile(r"(text_encoder(_\d)?\.|lora_te\d?_).*")
SLOW = re.compile(r"\)\s*[*+?{]|([*+{].*){4}")  # patterns with which a search could take for ever
FORMS = ("peft", "diffusers", "kohya")
# Names of tables, whose rows are looked up: PEFT adapts them in another way, and extract leaves them out.
TABLE = re.compile(r"(^|\.)(wte|wpe|shared|embed_tokens|embed_positions|embed|\w*embeddings?|embedding_table)\.weight$")
CONV1D = ("gpt2", "openai-gpt", "ctrl", "imagegpt", "decision_transformer")  # stores the weights of layers transposed


class Layer(NamedTuple):
    """The step of one weight, θ_s − θ_r = scale · up · down.

    down: (rank, in) or a convolution's (rank, in, height, width); up: (out, rank), also with sides of 1.
    swapped: the weight is stored as (in, out). table: of an embedding, which PEFT gives names of its own.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0
    swapped: bool = False
    table: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes, without regard to sides of 1."""
        sides = (self.up.shape[0], *self.down.shape[1:])
        return sides[::-1] if self.swapped else sides

    def step(self) -> torch.Tensor:
        """scale · up · down, float32."""
        product = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))
        return product.T if self.swapped else product.reshape(self.shape)


@dataclass(frozen=True)
class Adapter:
    """A LoRA as it lies in a file. layers: by the file's names of them; trained_on: the base, as the file says."""

    path: Path
    layers: Mapping[str, Layer]
    trained_on: str = ""


# ---------------------------------------------------------------- reading


def is_adapter(path: str | Path) -> bool:
    """Is it a folder or a .safetensors file of an adapter of any kind, known or not?"""
    path = Path(path)
    if path.is_dir():
        own = (path / CONFIG).exists() or (path / PIPELINE).exists()
        return (path / PEFT_CONFIG).exists() or ((path / DIFFUSERS_WEIGHTS).exists() and not own)
    if path.suffix != ".safetensors" or not path.exists():
        return False
    with open_weights(path) as weights:
        return any(map(_is_factor, weights))


def _is_factor(name: str) -> bool:
    """Of any kind of adapter. `alpha` alone is none: networks have parameters of that name."""
    found = FACTOR.fullmatch(name)
    return bool((found and found["part"] != "alpha") or OTHERS.fullmatch(name))


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT folder, or a file with the names of diffusers or kohya.

    Raises NeonError if it is damaged, holds something other than LoRA factors, or does not say its scale.
    """
    path = Path(path)
    file = _file(path)
    state, config = load_weights(file), _config(file)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if name.endswith(".base_layer.weight"):
            continue  # PEFT keeps the base's own embedding next to its factors
        found = FACTOR.fullmatch(name)
        if not found or OTHERS.fullmatch(name):
            raise NeonError(
                f"{file}: {name} is no factor of a LoRA (DoRA, LoHa, LoKr and trained biases are not known)"
            )
        parts.setdefault(found["layer"], {})[found["part"]] = tensor
    with reading(file, "not a LoRA adapter"):
        layers = {name: _layer(name, found, config, file) for name, found in parts.items()}
    return Adapter(path, layers, str(config.get("base_model_name_or_path") or ""))


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
        if (path / name).exists():
            return path / name
    pickle = path / "adapter_model.bin"
    raise NeonError(f"{pickle if pickle.exists() else path}: a pickle or nothing; an adapter is a {PEFT_WEIGHTS}")


def _config(file: Path) -> Mapping:
    """PEFT's settings: of the file next to it, or of the metadata that diffusers writes."""
    beside = file.with_name(PEFT_CONFIG)
    if beside.exists() and file.name != DIFFUSERS_WEIGHTS:
        config = read_object(beside)
        for name in ("use_dora", "modules_to_save", "layer_replication", "trainable_token_indices", "lora_bias"):
            if config.get(name):
                raise NeonError(f"{beside}: {name} is set, which is not a plain LoRA")
        if config.get("peft_type", "LORA") != "LORA":
            raise NeonError(f"{beside}: a {config['peft_type']}, not a LoRA")
        return config
    with open_weights(file) as weights:
        stored = check_metadata(weights, "lora_adapter_metadata")
    return {key.rpartition(".")[2]: value for key, value in stored.items()}


def _layer(name: str, parts: Mapping[str, torch.Tensor], config: Mapping, file: Path) -> Layer:
    down = next((parts[part] for part in DOWN if part in parts), None)
    up = next((parts[part] for part in UP if part in parts), None)
    if down is None or up is None:
        raise NeonError(f"{file}: {name} has one factor of two")
    rank = down.shape[0]
    if min(down.ndim, up.ndim) < 2 or up[0].numel() != rank:
        raise NeonError(f"{file}: {name}: factors of shapes {tuple(up.shape)} and {tuple(down.shape)} have no product")
    table = "lora_embedding_A" in parts
    swapped = table or bool(config.get("fan_in_fan_out"))
    return Layer(down, up, _scale(name, parts, config, rank, file), swapped, table)


def _scale(name: str, parts: Mapping, config: Mapping, rank: int, file: Path) -> float:
    if not rank:
        raise NeonError(f"{file}: {name} is of rank 0")
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    if "lora_alpha" in config:
        patterns = config.get("alpha_pattern") or {}
        layer = name.removeprefix(PEFT_PREFIX)
        if slow := [key for key in patterns if len(key) > 1000 or SLOW.search(key)]:
            raise NeonError(f"{file}: {slow[0][:60]!r} in its alpha_pattern is no pattern of a layer's name")
        alpha = next((a for key, a in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
        alpha = config["lora_alpha"] if alpha is None else alpha
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if name.startswith(PEFT_PREFIX):
        raise NeonError(f"{file}: its scale is in {PEFT_CONFIG}, which is not next to it")
    return 1.0  # files of diffusers and kohya without alpha: alpha is the rank


# ---------------------------------------------------------------- with a base


def placed(adapter: Adapter, base: Mapping[str, torch.Tensor], source: str | Path) -> dict[str, Layer]:
    """The layers by the names of the base's weights that they change. source: the base, for people.

    Raises NeonError if a layer is not in the base or of another shape: it is an adapter of another base.
    """
    weights = dict(shapes(base))
    flat: dict[str, list[str]] = {}
    for name in weights:
        flat.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)
    found, strange = {}, []
    for name, layer in adapter.layers.items():
        if TEXT.fullmatch(name):
            raise NeonError(f"{adapter.path}: {name} is of a text encoder, and only one component is merged")
        weight = _weight(name, weights, flat)
        fitting = weight and _fitting(layer, weights[weight])
        if fitting:
            found[weight] = fitting
        else:
            strange.append(f"{name} is {f'{layer.shape}, not {weights[weight]},' if weight else 'not'} in {source}")
    if strange:
        more = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise NeonError(f"{adapter.path}: an adapter of another base: {strange[0]}{more}")
    return found


def _weight(name: str, weights: Iterable[str], flat: Mapping[str, list[str]]) -> str | None:
    """The base's weight that a layer of an adapter changes."""
    if kohya := KOHYA.fullmatch(name):
        wrapped = ("", *(prefix.replace(".", "_") for prefix in WRAPPED))
        found = [weight for prefix in wrapped for weight in flat.get(prefix + kohya["layer"], [])]
        return found[0] if len(found) == 1 else None
    name = name.removeprefix(PEFT_PREFIX)
    rests = [name.removeprefix(part) for part in PARTS if name.startswith(part)]
    candidates = [f"{prefix}{rest}.weight" for rest in rests for prefix in ("", *WRAPPED)]
    return next((candidate for candidate in candidates if candidate in weights), None)


def _fitting(layer: Layer, shape: tuple[int, ...]) -> Layer | None:
    """The layer, stored as the weight is: (out, in), or (in, out) if it may be; None if neither has the shape."""
    sides = [replaced for replaced in (layer, layer._replace(swapped=False)) if _same(replaced.shape, shape)]
    return sides[0] if sides else None


def _same(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Shapes that differ at most in trailing sides of 1."""
    long, short = sorted((tuple(one), tuple(other)), key=len, reverse=True)
    return long[: len(short)] == short and set(long[len(short) :]) <= {1}


class Adapted(Mapping[str, torch.Tensor]):
    """θ_s: the base with the steps of an adapter, computed when asked for, in at least float32."""

    def __init__(self, base: Mapping[str, torch.Tensor], layers: Mapping[str, Layer]):
        self.base, self.layers = base, layers

    def __getitem__(self, name):
        tensor = self.base[name]
        if name not in self.layers:
            return tensor
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return wide + self.layers[name].step().reshape(wide.shape).to(wide)

    def __iter__(self):
        return iter(self.base)

    def __len__(self):
        return len(self.base)

    def __contains__(self, name):
        return name in self.base


# ---------------------------------------------------------------- writing


def scaled(layers: Mapping[str, Layer], factor: float) -> dict[str, Layer]:
    """The layers with `factor` times their steps, and scale 1: all of it is in `up`, in its own dtype.

    Raises NeonError if the factor is not finite.
    """
    if not math.isfinite(factor):
        raise NeonError(f"w must be finite, not {-factor}")
    found = {n: x._replace(up=(x.up.double() * (factor * x.scale)).to(x.up), scale=1.0) for n, x in layers.items()}
    for name, layer in found.items():
        if not (is_finite(layer.up) and is_finite(layer.down)):
            raise NeonError(f"{name}: not finite in the adapter with w = {-factor}")
    return found


def check_form(out: str | Path, form: str) -> None:
    """Raises NeonError unless `out` is a new folder for PEFT's form, a .safetensors file for the others."""
    if form == "peft" and (Path(out).exists() or Path(out).suffix == ".safetensors"):
        raise NeonError(f"{out}: an adapter of PEFT is a folder, which must be new")
    if form != "peft" and Path(out).suffix != ".safetensors":
        raise NeonError(f"{out}: an adapter in the form of {form} is a .safetensors file")


def write_adapter(
    out: str | Path, layers: Mapping[str, Layer], form: str, part: str, record: Mapping[str, str], base: str = ""
) -> None:
    """Write layers of scale 1, by the base's names, atomically.

    form: one of FORMS. part: 'unet' or 'transformer', what the names of diffusers and kohya begin with. record: joins
    the metadata. base: for PEFT's config. Raises NeonError as check_form does.
    """
    check_form(out, form)
    metadata = {"format": "pt"} | dict(record)
    if form == "peft":
        factors = dict(_peft(layers, PEFT_PREFIX))
        with atomic(out, size=sum(factor.nbytes for factor in factors.values())) as partial:
            partial.mkdir()
            save_safetensors(partial / PEFT_WEIGHTS, factors, metadata)
            (partial / PEFT_CONFIG).write_text(to_json(_peft_config(layers, base), indent=2) + "\n")
    elif form == "diffusers":
        save_safetensors(out, dict(_peft(layers, f"{part}.")), metadata)
    else:
        save_safetensors(out, dict(_kohya(layers, f"lora_{part}_")), metadata)


def _peft(layers: Mapping[str, Layer], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layer in layers.items():
        names = ("lora_embedding_A", "lora_embedding_B") if layer.table else ("lora_A.weight", "lora_B.weight")
        for part, factor in zip(names, (layer.down, layer.up)):
            yield f"{prefix}{name.removesuffix('.weight')}.{part}", factor


def _kohya(layers: Mapping[str, Layer], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """One alpha in all layers: diffusers loads a file whose layers have several with wrong scales."""
    alpha = max((layer.rank for layer in layers.values()), default=1)
    for name, layer in layers.items():
        if layer.table:
            raise NeonError(f"{name}: kohya's files have no embeddings")
        key = prefix + name.removesuffix(".weight").replace(".", "_")
        yield f"{key}.lora_down.weight", layer.down
        yield f"{key}.lora_up.weight", layer.up * (layer.rank / alpha)
        yield f"{key}.alpha", torch.tensor(float(alpha))


def _peft_config(layers: Mapping[str, Layer], base: str) -> dict:
    """Settings with which PEFT makes these layers, of scale 1. Its patterns match ends of names: longest first."""
    ranks = {name.removesuffix(".weight"): x.rank for name, x in sorted(layers.items(), key=lambda item: -len(item[0]))}
    usual = max(ranks.values(), default=1)
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(x.swapped and not x.table for x in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }


# ---------------------------------------------------------------- extracting


@dataclass
class Energy:
    """Of steps θ_s − θ_r, squared: all of it, what the layers of an adapter kept, what no layer can hold, and the layer
    that kept the smallest share."""

    total: float = 0.0
    kept: float = 0.0
    outside: float = 0.0
    worst: float = 1.0
    worst_name: str = ""

    def add(self, name: str, values: torch.Tensor, rank: int) -> None:
        """Singular values of a layer, of which the first `rank` are kept."""
        squares = values.double().square()
        total, kept = float(squares.sum()), float(squares[:rank].sum())
        self.total, self.kept = self.total + total, self.kept + kept
        if kept < self.worst * total:
            self.worst, self.worst_name = kept / total, name

    def lines(self) -> Iterator[str]:
        yield f"energy   {100 * self.kept / self.total if self.total else 100:.4g} % of ‖θ_s − θ_r‖² is kept"
        if self.worst_name:
            yield f"least    {100 * self.worst:.4g} % in {self.worst_name}"
        if self.outside:
            yield f"outside  {100 * self.outside / self.total:.4g} % is in biases, norms, embeddings: no layer has it"


@torch.no_grad()
def extract(
    base: Mapping[str, torch.Tensor], selftrained: Mapping[str, torch.Tensor], rank: int, swapped: bool = False
) -> tuple[dict[str, Layer], Energy]:
    """The best adapter of a rank for θ_s − θ_r, by singular values, float32, and the energy that it keeps.

    Matrices and convolutions that moved become layers. swapped: matrices are stored as (in, out), see CONV1D. Both
    mappings have the same names. Raises NeonError if a step is not finite or shapes differ.
    """
    layers, energy = {}, Energy()
    for name in base:
        old, new = base[name], selftrained[name]
        if old.shape != new.shape:
            raise NeonError(f"{name}: shape {tuple(old.shape)} in the base, {tuple(new.shape)} in θ_s")
        if not old.is_floating_point():
            continue
        step = new.double() - old.double()
        norm = float(step.norm())
        if not math.isfinite(norm):
            raise NeonError(f"{name}: θ_s − θ_r is not finite")
        if not norm:
            continue
        if step.ndim not in (2, 4) or not name.endswith(".weight") or TABLE.search(name):
            energy.total, energy.outside = energy.total + norm**2, energy.outside + norm**2
            continue
        turned = swapped and step.ndim == 2
        left, values, right = torch.linalg.svd((step.T if turned else step.flatten(1)).float(), full_matrices=False)
        energy.add(name, values, rank)
        layers[name] = _factors(left, values, right, rank, step.shape, turned)
    return layers, energy


def _factors(left, values, right, rank: int, shape: torch.Size, swapped: bool) -> Layer:
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    if len(shape) == 4:
        up, down = up[:, :, None, None], down.reshape(-1, *shape[1:])
    return Layer(down.contiguous(), up.contiguous(), swapped=swapped)


def is_swapped(kind: str) -> bool:
    """Does a model of this type store the weights of its layers as (in, out)?"""
    return kind in CONV1D


def part_of(component: str, kind: str) -> str:
    """What the names of diffusers and kohya call the network: its component, or what its class is.

    Raises NeonError if neither says it.
    """
    if component or "UNet" in kind or "Transformer2D" in kind or "Transformer3D" in kind:
        return component or ("unet" if "UNet" in kind else "transformer")
    raise NeonError("names of diffusers and kohya begin with the component: give --component unet or transformer")
