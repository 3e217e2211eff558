"""Command-line options that several commands and scripts share, and how their values are read."""

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

from neon import NeonError
from neon.cli.help import PATHS
from neon.family import FAMILIES, Preset
from neon.precision import DTYPES

OWN = "path/to/file.py or package.module"  # see docs/own-family.md


def peek(option: str, argv: Sequence[str] | None = None) -> str | None:
    """The value of an option on the command line, for a parser that depends on it; None if it is not given."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument(option, dest="value")
    return p.parse_known_args(argv)[0].value


def add_family(p: argparse.ArgumentParser, family) -> None:
    """--family; the help's last lines say how to see the options of a family, if none is named yet."""
    names = ", ".join(FAMILIES)
    p.add_argument("--family", required=True, help=f"{names}; or your own, {OWN}")
    if not family:
        more = f"families: {names}. `%(prog)s --family NAME --help` also shows the options of that family."
        p.epilog = f"{p.epilog}\n\n{more}" if p.epilog else more


def add_model(p: argparse.ArgumentParser, name: str) -> None:
    """The option that names θ_r."""
    text = "θ_r: a checkpoint, or a training folder for its last snapshot"
    p.add_argument(name, type=checkpoint, required=True, help=text)


def add_pair(p: argparse.ArgumentParser, selftrained: str) -> None:
    """The options that name θ_r and θ_s. selftrained: help about θ_s."""
    p.add_argument(
        "--base",
        type=checkpoint,
        required=True,
        help="θ_r: .safetensors, .pth, .pt, .ckpt, .pkl; a folder of a diffusers pipeline, of one component, of a"
        " transformers model; a hub id that is in the cache",
    )
    p.add_argument("--selftrained", type=checkpoint, required=True, help=selftrained)
    p.add_argument(
        "--component", help="which part of a pipeline (default: the only one that is no encoder, such as unet)"
    )


def add_file(p: argparse.ArgumentParser) -> None:
    """A checkpoint of any format to read."""
    p.add_argument("file", type=checkpoint, help="a checkpoint, or a training folder for its last snapshot")
    p.add_argument("--key", help="where the state dict is in a nested file (default: its EMA, if there is one)")


def add_preset(p: argparse.ArgumentParser, chosen: Mapping[str, str | list[str]]) -> None:
    """The option that names a model of the paper. chosen: what it chooses, defaults for options that p has already."""
    p.add_argument("--preset", help="model of the paper, such as xar_l: it chooses the options that are not given")
    p.set_defaults(**chosen, chosen=chosen)
    for action in p._actions:
        action.required = action.required and action.dest not in chosen


OF_A_MODEL = ("base", "selftrained", "w", "family", "seeds", "preset")


def option_of(name: str) -> str:
    """'base' → '--model', as `neon evaluate` shows it."""
    return {"base": "--model", "w": "-w"}.get(name, f"--{name}")


def without_model(p: argparse.ArgumentParser, family) -> None:
    """The options of a model are not required; those of the device are there also without a family."""
    if not family:
        add_device(p)
    for action in p._actions:
        action.required = action.required and action.dest not in OF_A_MODEL


def choices_of(preset: Preset, family: str, command: str, merging: bool = False) -> dict[str, str | list[str]]:
    """What a preset chooses for a command: option → its words.

    merging: the command is given a θ_s, so that the model to evaluate is the base, not the released one.
    """
    model = {"base": preset.base}
    if command == "evaluate" and not merging:
        model = {"base": preset.released or preset.base}
    searched = {"method": "surface", "w": preset.w, "grid": [preset.grid] if preset.grid else []}
    batch = {"batch_size": preset.batch_size}
    precision = {"precision": preset.precision} if preset.precision else {}
    kept = {"snapshot": preset.snapshot} if preset.snapshot else {}
    chosen = {
        "generate": {"model": preset.base, **preset.made_with, **precision, "seeds": preset.seeds, **batch},
        "selftrain": {**model, "recipe": preset.recipe, "micro_batch": preset.micro_batch, **kept},
        "diagnose": {
            **{"base": preset.base, "recipe": preset.recipe, "micro_batch": preset.micro_batch},
            **{**preset.made_with, **batch},
        },
        "evaluate": {**model, **preset.sampling, **batch},
        "search": {**model, **preset.fixed, **searched, **batch},
        "final": {**model, **preset.fixed, **batch},
    }[command]
    return {"family": family} | {k: v if isinstance(v, list) else str(v) for k, v in chosen.items()}


def preset_line(args) -> str:
    """One line: the options that the preset chose, without those that the user gave another value."""
    kept = {name: words for name, words in args.chosen.items() if str(getattr(args, name)) == str(words)}
    texts = {name: " ".join(words) if isinstance(words, list) else words for name, words in kept.items()}
    return f"preset {args.preset}: " + " ".join(f"--{name} {text}" for name, text in texts.items() if text)


def add_by(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--by",
        choices=["merge", "guidance"],
        default="merge",
        help="what w extrapolates: the weights; or at every call of the network its output, θ_r + w (θ_r − θ_s), by two"
        " networks: SIMS with a self-trained θ_s, autoguidance with an earlier checkpoint (default %(default)s)",
    )


def add_replace(p: argparse.ArgumentParser) -> None:
    p.add_argument("--replace", action="store_true", help="what --out holds of a run with other options is deleted")


def add_dry_run(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--dry_run",
        nargs="?",
        const="A100",
        metavar="DEVICE",
        help="print what the command would do and cost on a device of `neon plan`, or at so many measured TFLOP/s"
        " (default %(const)s), and stop: nothing is written, no weights are read",
    )


def add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    p.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="TensorFloat-32 in float32 products on a GPU (default: as the released code)",
    )
    p.add_argument(
        "--streams",
        choices=["torch", "counter"],
        default="torch",
        help="random numbers of an image, and of its dropout: torch, a generator for each, as in EDM's released code;"
        " counter, one computation for a batch, the same numbers on CPUs and GPUs (default %(default)s)",
    )


def add_inference(p: argparse.ArgumentParser, family) -> None:
    """Where and how exactly to compute, and the family's sampling options."""
    add_device(p)
    p.add_argument(
        "--precision",
        type=precision,
        metavar="PRECISION",
        help=f"{', '.join(DTYPES)}, or NETWORK+DECODER "
        f"(default: on a GPU as released, {family.released_precision}; on a CPU float32)",
    )
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    add_fields(p.add_argument_group(f"sampling options of {family.name}"), family.Sampling)
    add_fields(p, family.Loading)


def add_fields(p, options: type) -> None:
    """One option per field of a dataclass."""
    for field in dataclasses.fields(options):
        choices = typing.get_args(field.type) or None
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": str if choices else field.type, "choices": choices}
        text = field.metadata.get("help", "").replace("%", "%%")
        default = "" if field.default == "" else " (default %(default)s)"
        p.add_argument(f"--{field.name}", **how, default=field.default, help=text + default)


def add_metrics(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--features",
        default="inception",
        help="inception[:PATH], inception:random, dinov2:PATH, lite0[:PATH], digits:PATH, cnn:PATH",
    )
    p.add_argument(
        "--metrics",
        default="auto",
        help="of fid, is, kid, precision, recall, density, coverage, authpct, mind, say fid,kid; auto (the default):"
        " fid, is where the features have classes, kid where the reference holds features; all: what the reference and"
        " the features allow",
    )


def say_metrics(args, metrics: Sequence[str], here) -> None:
    """Print on the first rank which metrics were chosen for the user."""
    if args.metrics in ("auto", "all") and here.rank == 0:
        print(f"metrics: {', '.join(metrics)}", flush=True)


def add_training(p: argparse.ArgumentParser, family) -> None:
    add_family(p, family)
    add_device(p)
    p.add_argument(
        "--recipe", required=True, help=", ".join(family.recipes) if family else "named recipe of the family"
    )
    p.add_argument("--data", required=True, help="image set: folder or .zip with dataset.json")
    p.add_argument("--max_images", type=count, help="train on the first so many of them (default: all)")
    p.add_argument("--out", required=True, help="folder for snapshots and state; an interrupted run resumes")
    p.add_argument("--seed", type=natural, default=0, help="of the order of images and all random numbers (default 0)")
    add_replace(p)
    add_dry_run(p)
    p.add_argument("--micro_batch", type=count, help="images per forward pass and process")
    p.add_argument("--save_every", type=count, help="images between saved states (default: at snapshots)")
    p.add_argument("--raw", action="store_true", help="next to snapshots of an average, also write the raw weights")
    p.add_argument("--save_minutes", type=rate, metavar="M", help="also save the state every M minutes")
    p.add_argument("--tensorboard", metavar="DIR", help="also write the numbers of log.jsonl for TensorBoard to DIR")
    memory = p.add_argument_group("less memory, for large networks: docs/sharding.md. The weights are the same")
    memory.add_argument(
        "--shard",
        action="store_true",
        help="each process of torchrun holds a part of the network, its gradients, moments and average (FSDP2); the"
        " state is a folder, and any number of processes resumes it",
    )
    memory.add_argument(
        "--recompute", action="store_true", help="keep less for the backward pass, which computes each block again"
    )
    if family:
        add_fields(p, family.Loading)
    changes = p.add_argument_group("changes to the recipe")
    for name, kind in (("batch", count), ("lr", rate), ("budget", count), ("snapshot", count), ("ramp", natural)):
        changes.add_argument(f"--{name}", type=kind)
    changes.add_argument("--precision", choices=DTYPES, help="(default: on a GPU the recipe's, on a CPU float32)")


def add_diagnosis(p: argparse.ArgumentParser, family) -> None:
    add_family(p, family)
    add_model(p, "--base")
    p.add_argument("--recipe", required=True, help="of the self-training: its loss, optimizer and batch")
    p.add_argument("--real", required=True, help="image set: real images, best those that the base was not trained on")
    p.add_argument("--synthetic", help="image set S of `neon generate` (default: sampled in memory, see --seeds)")
    p.add_argument("--selftrained", nargs="+", default=[], help="θ_s, where there is one: snapshots or training folders"
                   " for all in them; also predict the best w of each")  # fmt: skip
    p.add_argument("--out", help="JSON file for all numbers")
    p.add_argument("--batches", type=count, default=16, help="of each set, at least 4 (default %(default)s)")
    p.add_argument("--images", type=count, help="of each set (default: all, up to --batches of the recipe's)")
    p.add_argument("--repeats", type=count, default=4, help="visits to each image with new noise (default %(default)s)")
    p.add_argument("--micro_batch", type=count, help="images per forward and backward pass; changes nothing but memory")
    p.add_argument("--seed", type=natural, default=0, help="of the choice of images and all random numbers (default 0)")
    add_device(p)
    own = p.add_argument_group("S in memory, where --synthetic is not given")
    own.add_argument("--seeds", help="images by seed (default: from 0, as many as it takes)")
    own.add_argument("--batch_size", type=count, default=64, help="images sampled at a time (default %(default)s)")
    if family:
        add_fields(p.add_argument_group(f"sampling options of {family.name}"), family.Sampling)
        add_fields(p, family.Loading)


def add_sampling(p: argparse.ArgumentParser, family) -> None:
    add_family(p, family)
    p.add_argument("--seeds", required=True, help="images by seed: 0-49999 or 1,5-9")
    p.add_argument("--batch_size", type=count, default=64, help="per process; changes nothing but speed")
    if family:
        add_inference(p, family)


def add_gmo(p: argparse.ArgumentParser) -> None:
    """A modification of the samples; defaults are those of neon.gmo."""
    gmo = p.add_argument_group("a stronger S (GMO, docs/gmo.md), of edm, flow and imm")
    gmo.add_argument("--gmo", type=float, metavar="ALPHA", help="modify the samples; the paper: 0.05 to 0.2")
    gmo.add_argument("--gmo_iterations", type=count, metavar="N", help="of the power iteration (default: 20)")
    gmo.add_argument("--gmo_probes", type=count, metavar="N", help="of the energy's estimate (default: 20)")
    gmo.add_argument(
        "--gmo_control", choices=["noise"], help="in its place Gaussian noise of the same RMS per image, a control"
    )


def add_evaluation(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ref", required=True, help="reference statistics, .npz with mu and sigma")
    add_metrics(p)


def precision(text: str) -> str:
    """'float16', 'float32+float16'. Raises ValueError, as argparse expects."""
    parts = text.split("+")
    if len(parts) > 2 or not set(parts) <= set(DTYPES):
        raise ValueError
    return text


def processes(args, family):
    """neon.distributed.world for sampling: TensorFloat-32 as asked for, else as the family was released."""
    from neon.distributed import world  # here, for it loads torch

    return world(args.device, family.released_tf32 if args.tf32 is None else args.tf32, args.streams)


def precision_of(args, family, here) -> str:
    """As asked for; by default float32 on a CPU, and on a GPU as the family was released, which is printed."""
    if args.precision or here.device.type == "cpu":
        return args.precision or "float32"
    if here.rank == 0:
        exact = "with TensorFloat-32" if here.tf32 else "without TensorFloat-32"
        print(f"precision: {family.released_precision} {exact}, as in the released evaluation", flush=True)
    return family.released_precision


def natural(text: str) -> int:
    """'6M', '500k', '50176', '0' → int. Raises ValueError, as argparse expects."""
    factor = {"k": 1000, "M": 1_000_000}.get(text[-1:], 1)
    number = float(text if factor == 1 else text[:-1]) * factor
    if not 0 <= number < 2**63:
        raise ValueError
    return round(number)


def count(text: str) -> int:
    """The same, but not 0."""
    if number := natural(text):
        return number
    raise ValueError


def rate(text: str) -> float:
    """A finite number > 0."""
    if 0 < (number := float(text)) < float("inf"):
        return number
    raise ValueError


def share(text: str) -> float:
    """A number in (0, 1]."""
    if (number := rate(text)) <= 1:
        return number
    raise ValueError


def numbers(text: str) -> tuple[float, ...]:
    """'0.5,1' → (0.5, 1.0). Raises ValueError, as argparse expects."""
    return tuple(float(part) for part in text.split(","))


def group(text: str) -> tuple[str, float]:
    """'attn=1.5' → ('attn', 1.5). Raises ValueError, as argparse expects."""
    regex, _, w = text.rpartition("=")
    return regex, float(w)


def checkpoint(text: str) -> Path:
    """A file, or a training folder, which stands for its last snapshot. Raises ValueError, as argparse expects."""
    from neon.selftrain import snapshots

    if not text:
        raise ValueError
    return snapshots(text)[-1]


def check_paths(args: argparse.Namespace) -> None:
    """Raises NeonError for a path that is '', and for an --out that does not end with a name: . or /."""
    from neon.files import named

    given = {name: getattr(args, name, None) for name in PATHS if name != "pipeline"}  # '' is the family's default
    if empty := [name for name, value in given.items() if value == "" or value == [""]]:
        raise NeonError(f"{option_of(empty[0])} is empty: give the name of a file or a folder")
    if given["out"]:
        named(given["out"])


def sampling_options(args, family) -> dict:
    """The family's sampling options among the arguments."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(family.Sampling)}


def method_of(args) -> str:
    """How to search: as asked for; else by a grid where an early stop is set or values are listed, not a range."""
    texts = [args.w, *(text.partition("=")[2] for text in args.grid)]
    listed = args.stop is not None or not all(":" in text for text in texts)
    return args.method or ("grid" if listed else "surface")


def loading(args, family) -> dict:
    """The family's options of load and create among the arguments."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(family.Loading)}
