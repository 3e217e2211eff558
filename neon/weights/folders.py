"""Models as folders: a diffusers pipeline, one component of it, a transformers model; also hub ids in the cache.

What is merged is one file or one set of shards in them. All other files are copied, so that from_pretrained loads what
`neon merge` writes.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from neon import Missing, NeonError
from neon.files import atomic, read_json, sha256
from neon.weights.checkpoint import (
    Weights,
    fill_with_shards,
    is_sharded,
    metadata_like,
    open_weights,
    shard_files,
    size_of,
    write_safetensors,
    write_weights,
)
from neon.weights.pipeline import components

PIPELINE, CONFIG, INDEX = "model_index.json", "config.json", ".safetensors.index.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# All kinds of weights: a copy of the base's, in another format or precision, must not lie next to the merge.
WEIGHTS = (*PICKLES, ".safetensors", INDEX, ".bin.index.json", ".msgpack", ".h5", ".onnx", ".gguf")
MAIN = ("diffusion_pytorch_model", "model")  # names of the weights without a variant, in diffusers and transformers
# Parts of pipelines that a fine-tune of the generator leaves as they are.
FROZEN = re.compile(r"(vae|vqvae|vqgan|movq|text_encoder|image_encoder|safety_checker|tokenizer|scheduler)(_\d+)?")
NOT_COPIED = ("checkpoint-*", ".git", ".cache")  # a trainer's states, a repository
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Model:
    """A model on disk.

    weights: a file or the index of shards, what open_weights reads. folder: what is copied around them, None for a
    lone file. component: what the pipeline calls the part that is merged, '' without a pipeline.
    """

    weights: Path
    folder: Path | None = None
    component: str = ""

    @property
    def kind(self) -> str:
        """The class, or a language model's type, as its config says; '' if there is no config."""
        config = self.weights.parent / CONFIG
        content = read_json(config) if self.folder and config.exists() else {}
        return str(content.get("_class_name") or content.get("model_type") or "") if isinstance(content, dict) else ""

    @property
    def sha256(self) -> str:
        """Digest of the weights: of the file, or of the folder that has the shards."""
        return sha256(self.weights.parent if self.weights.name.endswith(INDEX) else self.weights)


def located(path: str | Path) -> Path:
    """The path itself if it is there, or the folder of a hub id in the cache of Hugging Face. Downloads nothing.

    Raises Missing, or NeonError with the command that downloads what may be a hub id.
    """
    if Path(path).exists():
        return Path(path)
    if not HUB_ID.fullmatch(str(path)) or str(path).endswith((*WEIGHTS, ".pkl", ".json")):
        raise Missing(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        if "/" not in str(path):
            raise Missing(path) from None
        raise NeonError(
            f"{path}: no such file, and not in the cache of Hugging Face; if it is a hub id: hf download {path}"
        ) from None


def find_model(path: str | Path, component: str | None = None) -> Model:
    """The model that a path or a hub id in the cache names. component: which part of a pipeline; by default the only
    one that is not of a FROZEN kind.

    Raises NeonError if nothing is there, the part is not, several could be meant, or it has no safetensors.
    """
    path = located(path)
    if not path.is_dir():
        return Model(path)
    if not (path / PIPELINE).exists():
        return Model(weights_in(path), path)
    component = _component(path, component)
    return Model(weights_in(path / component), path, component)


def _component(pipeline: Path, asked: str | None) -> str:
    named = components(pipeline)
    if gone := [name for name in named if not (pipeline / name).is_dir()]:
        raise NeonError(f"{pipeline}: {gone[0]} is missing, though {PIPELINE} names it; an incomplete download?")
    with_weights = [name for name in named if _weights_of(pipeline / name)]
    if asked:
        if asked not in with_weights:
            raise NeonError(
                f"{pipeline}: no component {asked} with weights; it has {', '.join(with_weights) or 'none'}"
            )
        return asked
    found = [name for name in with_weights if not FROZEN.fullmatch(name)]
    if len(found) != 1:
        which = "which component? " + ", ".join(found) if found else f"no trained component among {with_weights}"
        raise NeonError(f"{pipeline}: {which}; choose one with --component")
    return found[0]


def weights_in(folder: Path) -> Path:
    """The file of weights, or the index of shards, in the folder of one model: the one without a variant such as fp16
    if there are several. Raises NeonError if there is none, or no telling."""
    indexes = sorted(folder.glob(f"*{INDEX}"))
    shards = {file for index in indexes for file in shard_files(index)}
    found = [*indexes, *(file for file in sorted(folder.glob("*.safetensors")) if file not in shards)]
    chosen = [file for file in found if file.name.partition(".safetensors")[0] in MAIN] or found
    if len(chosen) == 1:
        return chosen[0]
    if found:
        raise NeonError(f"{folder}: {len(found)} files of weights, need one: {', '.join(f.name for f in found[:4])}")
    if pickles := [file for file in _weights_of(folder) if file.suffix in PICKLES]:
        open_weights(pickles[0]).close()  # says how to convert a .bin
        raise NeonError(f"{folder}: no safetensors; name the file {pickles[0].name} itself")
    raise NeonError(f"{folder}: no model in this folder: 0 files named *.safetensors, need one")


def _weights_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.name.endswith(WEIGHTS))


def check_free(out: str | Path, model: Model) -> None:
    """Raises NeonError if `out` cannot be the folder of a merge with this base: it exists, or is inside of the base."""
    if Path(out).exists():
        raise NeonError(f"{out}: exists; remove it or choose another folder")
    if Path(out).name.endswith(WEIGHTS):
        raise NeonError(f"{out}: the base is a folder, and so is what is written")
    if Path(out).resolve().is_relative_to(model.folder.resolve()):
        raise NeonError(f"{out}: inside of the base {model.folder}; choose another folder")


def write_model(
    out: str | Path,
    model: Model,
    base: Weights,
    tensors: Iterable[tuple[str, torch.Tensor]],
    record: Mapping[str, str],
) -> None:
    """Write (name, tensor) pairs as `base`, the opened weights of `model`, is written: see write_weights.

    Of a folder everything else is copied, except what left_out yields; it appears whole or not at all. Raises NeonError
    as check_free does.
    """
    if not model.folder:
        return write_weights(out, base, tensors, record)
    check_free(out, model)
    part, left = Path(model.component), {file.absolute() for file in left_out(model)} | _merged(model)

    def ignore(folder: str, names: list[str]) -> set[str]:
        here = {name for name in names if Path(folder, name).absolute() in left}
        return here | shutil.ignore_patterns(*NOT_COPIED)(folder, names)

    metadata = {"format": "pt"} | metadata_like(base, record)  # older versions of transformers insist on a format
    with atomic(out, size=size_of(base)) as partial:
        shutil.copytree(model.folder, partial, ignore=ignore)
        if is_sharded(base):
            fill_with_shards(partial / part, base, tensors, metadata)
        else:
            specs = {name: base.spec(name) for name in base}
            write_safetensors(partial / part / model.weights.name, specs, tensors, metadata)


def left_out(model: Model) -> Iterator[Path]:
    """Files of the folder that are not copied, for they hold the base's weights once more."""
    folders = {model.folder, model.weights.parent} if model.folder else ()
    merged = _merged(model)
    for folder in sorted(folders):
        yield from (file for file in _weights_of(folder) if file.absolute() not in merged)


def _merged(model: Model) -> set[Path]:
    """The files of the weights that are merged."""
    shards = shard_files(model.weights) if model.weights.name.endswith(INDEX) else []
    return {file.absolute() for file in (model.weights, *shards)}


def check_same_kind(base: Model, selftrained: Model) -> None:
    """Raises NeonError if the configs of both name different networks."""
    if base.kind and selftrained.kind and base.kind != selftrained.kind:
        raise NeonError(f"{selftrained.weights}: a {selftrained.kind}, and the base is a {base.kind}")
