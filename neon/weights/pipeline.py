"""Folders in diffusers' format: which file of one holds the weights that are trained and merged."""

from pathlib import Path

from neon import NeonError
from neon.files import existing, read_object

INDEX = "model_index.json"  # what makes a folder a pipeline
TRAINED = ("unet", "transformer", "prior")  # what its networks that denoise are called; a second one ends with _2
STEM = "diffusion_pytorch_model"


def is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).exists()


def components(folder: Path) -> list[str]:
    """The names of the parts that a pipeline has, which are folders in it. Raises NeonError."""
    index = read_object(folder / INDEX)
    names = [name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0]]
    if strange := [name for name in names if not name.isidentifier()]:
        raise NeonError(f"{folder}: its {INDEX} names a component {strange[0]!r}, which is no name of one")
    return names


def trained_component(folder: Path) -> str:
    """The name of the component that denoises, such as 'unet'. Raises NeonError if there is none, or not one only."""
    found = [name for name in components(folder) if name.partition("_")[0] in TRAINED]
    if not found:
        raise NeonError(f"{folder}: its {INDEX} has no {' or '.join(TRAINED)} that could be trained")
    if len(found) > 1:
        raise NeonError(
            f"{folder}: which is meant? give the folder of one: {' or '.join(f'{folder}/{n}' for n in found)}"
        )
    if not (folder / found[0]).is_dir():
        raise NeonError(f"{folder}: its component {found[0]} is missing")
    return found[0]


def weights_file(path: Path) -> Path:
    """The weights of a pipeline's folder, or of a component's: a .safetensors file, or the folder where it has shards.

    Any other path is returned as it is. Raises NeonError, also if the weights are a pickle.
    """
    folder = path / trained_component(path) if path.is_dir() and is_pipeline(path) else path
    if not (folder / "config.json").exists():
        return existing(folder)
    if (file := folder / f"{STEM}.safetensors").exists():
        return file
    if (folder / f"{STEM}.bin").exists() and not (folder / f"{STEM}.safetensors.index.json").exists():
        raise NeonError(f"{folder}: {STEM}.bin is a pickle; save the pipeline with safe_serialization=True")
    return folder
