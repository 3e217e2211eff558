"""What may be typed: the commands of `neon` and their options."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from neon import __version__
from neon.cli.help import LEFT, MERGE, Completion, Parser, epilog, negative
from neon.cli.options import (
    add_by,
    add_diagnosis,
    add_dry_run,
    add_evaluation,
    add_family,
    add_fields,
    add_file,
    add_gmo,
    add_model,
    add_pair,
    add_preset,
    add_replace,
    add_sampling,
    add_training,
    checkpoint,
    choices_of,
    count,
    group,
    natural,
    numbers,
    peek,
    rate,
    share,
    without_model,
)
from neon.family import find_preset, get_family


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The parsed command line; `run` names the function of neon.cli.commands, `chosen` holds what a preset chose.

    Raises NeonError for an unknown family or preset.
    """
    argv = negative(argv)
    return _parser(prog, *_choices(argv), measured=bool(peek("--images", argv))).parse_args(argv)


def _choices(argv: Sequence[str]):
    """The family on the command line, whose options join the parser's, or None; and what the preset there, if there is
    one, chooses for a command."""
    name, preset = (peek(option, argv) for option in ("--family", "--preset"))
    if not preset:
        return get_family(name) if name else None, lambda command: {}
    family, preset = find_preset(preset, name)
    options = {word.partition("=")[0] for word in argv}
    if {"--grid", f"--{preset.searched}"} & options:
        preset = dataclasses.replace(preset, grid="")  # the user's grid or one value in its place
    merging, stop = "--selftrained" in options, "--stop" in options

    def chosen(command: str) -> Mapping:
        choices = choices_of(preset, family.name, command, merging)
        return {name: value for name, value in choices.items() if not (stop and name == "method")}  # --stop: a grid

    return family, chosen


def _parser(prog: str, family, chosen: Callable[[str], Mapping], measured: bool) -> argparse.ArgumentParser:
    """measured: there are --images already, so `evaluate` needs no model."""
    parser = Parser(
        prog=prog,
        description="Neon, negative extrapolation from self-training: θ_neon = θ_r − w (θ_s − θ_r), w > 0.",
        epilog="From a base to its Neon: generate (S) → selftrain (θ_s) → search (w) → final (new images) → merge.\n\n"
        + epilog("neon"),
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--debug", action="store_true", help="of every command: print the traceback of an error that is not expected"
    )
    shells = ("bash", "zsh", "tcsh")
    parser.add_argument("--completion", action=Completion, choices=shells, help="print a completion script for a shell")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, help, more=""):
        sub = commands.add_parser(name, help=help, description=help + more, epilog=epilog(name))
        sub.set_defaults(run=run, left=LEFT.get(name, "nothing of it is kept"))
        return sub

    p = command("download", "run_download", "download the checkpoints and statistics listed in downloads.csv")
    p.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="file or group: released, stats, base, vae, fashion (default: the first two)",
    )
    p.add_argument("--base", action="store_true", help="the bases that the recipes need")
    p.add_argument("--vae", action="store_true", help="the autoencoders of VAR, xAR and IMM")
    p.add_argument("--all", action="store_true", help="everything")
    p.add_argument("--list", action="store_true", help="list the files (here? pinned?), download nothing")

    p = command("plan", "run_plan", "what the stages of a pipeline will cost: images, FLOPs, hours, disk")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--params", default="params.yaml", help="numbers of the paper's pipeline (default %(default)s)")
    which.add_argument("--pipeline", metavar="PATH", help="a dvc.yaml or its folder: price the `neon` commands in it")
    p.add_argument("--device", default="A100", help="A100, H100, H200, L40S, RTX4090 or cpu (default %(default)s)")
    p.add_argument("--tflops", type=rate, help="a measured rate, in place of the device's peak times the utilisation")
    p.add_argument("--utilisation", type=share, default=0.35, help="part of the peak (default %(default)s)")
    p.add_argument("--gpus", type=count, default=1, help="that share the work (default %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON")

    p = command("merge", "run_merge", "write θ_r − w (θ_s − θ_r) in the base's format", MERGE)
    add_pair(
        p, "θ_s, any of these, or a LoRA adapter that was trained on θ_r: PEFT's folder, a file of diffusers or kohya"
    )
    p.add_argument("-w", type=numbers, required=True, help="strength, or several: 0.5,1; 0 is the base, −1 is θ_s")
    p.add_argument(
        "--weights",
        type=group,
        action="append",
        default=[],
        metavar="REGEX=W",
        help="a w of their own for weights in whose name REGEX is found; of several groups the first counts",
    )
    p.add_argument("--out", required=True, help="in the base's format; of a .pkl: .safetensors; {w} stands for w")
    p.add_argument("--dry_run", action="store_true", help="print everything, write nothing")
    p.add_argument(
        "--adapter",
        choices=["peft", "diffusers", "kohya"],
        help="θ_s is an adapter: write it once more, so that at strength 1 it is θ_neon. PEFT's is a folder",
    )
    p.add_argument(
        "--key",
        help="where the state dict is in a nested base, such as trainer.var_wo_ddp (default: its EMA, if there is one)",
    )
    p.add_argument("--selftrained_key", help="the same for θ_s; if it is not the base's key, give both options")
    p.add_argument("--family", help="take what the family knows to be buffers from the base")
    p.add_argument("--buffers", metavar="REGEX", help="take tensors from the base if REGEX is found in their names")

    p = command("extract-lora", "run_extract_lora", "write θ_s − θ_r as a LoRA adapter of low rank, by singular values")
    add_pair(p, "θ_s: any of these")
    p.add_argument("--rank", type=count, required=True, help="of every layer; what it loses is printed")
    p.add_argument(
        "-w", type=float, help="write −w (θ_s − θ_r), which at strength 1 is θ_neon (default: θ_s − θ_r itself)"
    )
    p.add_argument(
        "--form", choices=["peft", "diffusers", "kohya"], default="peft", help="of its names (default %(default)s)"
    )
    p.add_argument("--out", required=True, help="a new folder for peft, else a .safetensors file")

    p = command(
        "control",
        "run_control",
        "write θ_r plus a random step: for every tensor Gaussian, as long as θ_s − θ_r is there",
        ". Search it in place of θ_s: what Neon gains and this does not is due to the direction, not to the length."
        " Tensors that are the same on both sides, and buffers, are the base's. The file says what it is.",
    )
    add_model(p, "--base")
    p.add_argument("--selftrained", type=checkpoint, required=True, help="θ_s, whose distance from θ_r is kept")
    p.add_argument("--seed", type=natural, default=0, help="of the step (default %(default)s)")
    p.add_argument("--out", required=True, help=".safetensors; named as θ_s, such as snapshot-000012800, it has its B")
    p.add_argument("--family", help="take what the family knows to be buffers from the base")
    p.add_argument("--buffers", metavar="REGEX", help="take tensors from the base if REGEX is found in their names")
    p.add_argument("--replace", action="store_true", help="replace --out if it is there")

    p = command("train", "run_train", "train a base from scratch")
    p.add_argument("--network", required=True, help="named network configuration of the family")
    add_training(p, family)

    p = command("selftrain", "run_train", "fine-tune a base briefly on its own samples: θ_r → θ_s")
    add_model(p, "--base")
    add_training(p, family)
    add_preset(p, chosen("selftrain"))

    p = command("generate", "run_generate", "write the synthetic set S: one PNG per seed and dataset.json")
    add_model(p, "--model")
    p.add_argument("--out", required=True, help="folder; an interrupted run resumes")
    p.add_argument("--shard", type=count, help="images per .zip, so that large sets are few files (default: no .zip)")
    add_replace(p)
    add_sampling(p, family)
    add_gmo(p)
    add_dry_run(p)
    add_preset(p, chosen("generate"))

    p = command("evaluate", "run_evaluate", "FID and other metrics of a model, or of a merge made in memory")
    p.add_argument("--model", "--base", dest="base", type=checkpoint, required=True, help="θ_r, or any model")
    p.add_argument("--images", help="in place of a model and its options: images that are there, see `neon reference`")
    p.add_argument("--selftrained", type=checkpoint, help="θ_s; needs -w")
    p.add_argument("-w", type=float, help="strength; 0 is the base, −1 the self-trained model")
    add_by(p)
    p.add_argument("--out", help="JSON file for the row of results")
    p.add_argument("--keep_features", action="store_true", help="next to it, for `neon compare`")
    add_sampling(p, family)
    add_evaluation(p)
    add_dry_run(p)
    add_preset(p, chosen("evaluate"))
    if measured:
        without_model(p, family)

    p = command(
        "diagnose",
        "run_diagnose",
        "will Neon help? from the loss gradients on real images and on own samples, before any self-training",
        ". Prints s, the change of the loss on real images per unit of w and learning rate, with its interval, and a"
        " verdict. docs/diagnose.md says what it means.",
    )
    add_diagnosis(p, family)
    add_preset(p, chosen("diagnose"))

    p = command(
        "search",
        "run_search",
        "choose w, snapshot and sampling options by a handful of evaluations",
        ". Each point is a merge θ_r − w (θ_s − θ_r) made in memory, sampled from the same seeds and measured: one row"
        " of --out. The surface predicts FID between the points and measures where it is lowest, until it promises no"
        " more. An interrupted search resumes; what was measured by one method serves the other. Best is the lowest FID"
        " over w >= 0; `neon final` measures it again.",
    )
    add_model(p, "--base")
    p.add_argument(
        "--selftrained", nargs="+", required=True, help="θ_s: snapshots, or training folders for all snapshots in them"
    )
    p.add_argument(
        "--method",
        choices=["surface", "grid"],
        help="(default: surface; grid with --stop, or where -w or --grid is no range but values, as 0,0.5,1)",
    )
    p.add_argument(
        "-w",
        default="0:3:0.25",
        help="range 0:3, or a grid 0:3:0.25, -1,0,0.5, whose ends are it (default %(default)s)",
    )
    p.add_argument("--w", dest="w", help=argparse.SUPPRESS)
    p.add_argument("--grid", action="append", default=[], metavar="OPTION=GRID", help="also over a sampling option")
    add_by(p)
    surface, rows = p.add_argument_group("surface"), p.add_argument_group("grid")
    surface.add_argument("--evaluations", type=count, default=12, help="at most so many points (default %(default)s)")
    surface.add_argument(
        "--first",
        type=count,
        help="images of the first evaluations; all of --seeds where w stays uncertain (default: half of them)",
    )
    rows.add_argument("--stop", type=float, help="end a row of w when FID exceeds its best by so much (default: never)")
    p.add_argument("--out", required=True, help="JSON-lines file; what it holds already is not measured again")
    add_replace(p)
    add_sampling(p, family)
    add_evaluation(p)
    add_dry_run(p)
    add_preset(p, chosen("search"))

    p = command("final", "run_final", "evaluate base, self-trained model and the best point of a search on new seeds")
    add_model(p, "--base")
    p.add_argument("--search", required=True, help="what `neon search` wrote")
    p.add_argument(
        "--other_features", action="store_true", help="--features may differ from those that the search went by"
    )
    add_by(p)
    p.add_argument("--out", required=True, help="JSON-lines file")
    add_replace(p)
    add_sampling(p, family)
    add_evaluation(p)
    add_dry_run(p)
    add_preset(p, chosen("final"))

    p = command(
        "compare",
        "run_compare",
        "is one row of results better than another? the difference of their FIDs on the same seeds, with its interval",
        ". A row is x.json of `neon evaluate`, or x.jsonl:NAME of `neon final` or `neon search`: a role, 'best', or the"
        " number of a line from 0.",
    )
    p.add_argument("one", metavar="ROW")
    p.add_argument("other", metavar="ROW")
    p.add_argument("--ref", required=True, help="the reference statistics that both were measured against")

    p = command("clean", "run_clean", "delete the features that searches and evaluations keep next to their rows")
    p.add_argument("rows", nargs="+", metavar="ROWS", help="x.jsonl or x.json: x.features is deleted")

    p = command("grid", "run_grid", "contact sheets of the models that `neon final` compared, from the same seeds")
    add_family(p, family)
    p.add_argument("--final", required=True, help="what `neon final` wrote")
    p.add_argument("--seeds", default="0-39", help="images by seed (default %(default)s)")
    p.add_argument("--columns", type=count, default=20, help="images in a line (default %(default)s)")
    p.add_argument("--batch_size", type=count, default=64, help="images per forward pass (default %(default)s)")
    p.add_argument("--out", required=True, help="folder for base.png, selftrained.png, neon.png")
    p.add_argument("--device", choices=["cpu", "cuda"])
    if family:
        add_fields(p, family.Loading)

    p = command(
        "card",
        "run_card",
        "write a model card with the hub's metadata, and upload a merged model with it",
        ". The licence is that of the base: a merge inherits it.",
    )
    p.add_argument("--model", required=True, help="what `neon merge` wrote: a checkpoint, or a folder")
    p.add_argument("--final", help="what `neon final` wrote, for the results (default: a card without results)")
    p.add_argument("--license", help="the hub's name of it (default: as downloads.csv has it for the base)")
    p.add_argument("--base_model", "--base-model", metavar="OWNER/NAME", help="the base on the hub (default: likewise)")
    p.add_argument("--dataset", default="", help="what the reference statistics are of, such as CIFAR-10")
    p.add_argument("--name", default="", help="of the model (default: the name of the file or folder)")
    p.add_argument("--out", help="(default: README.md next to the checkpoint, or in the folder)")
    p.add_argument("--replace", action="store_true", help="replace --out if it is there")
    p.add_argument("--push_to_hub", "--push-to-hub", metavar="OWNER/NAME", help="also upload the model with its card")
    p.add_argument("--private", action="store_true", help="create the repository as a private one")
    p.add_argument("--dry_run", action="store_true", help="print the card and what would be uploaded, write nothing")

    p = command("inspect", "run_inspect", "what a checkpoint holds, or how two differ; nothing in it is executed")
    add_file(p)
    p.add_argument("other", nargs="?", type=checkpoint, help="a second one: print how the two differ")
    p.add_argument("--other_key", help="where its state dict is")

    p = command("convert", "run_convert", "rewrite a checkpoint of any format as .safetensors")
    add_file(p)
    p.add_argument("out", help=".safetensors")

    p = command("reference", "run_reference", "statistics of real images, for FID, KID, precision and recall")
    p.add_argument("--images", help="folder, .zip, or .parquet files (a folder of them, or 'train-*.parquet')")
    p.add_argument("--size", type=count, help="crop the middle and scale to so many pixels, as ADM did with ImageNet")
    p.add_argument("--statistics", help=".npz with published mu and sigma to keep; the images then add features alone")
    p.add_argument("--keep", type=count, default=50_000, help="images whose features are kept (default %(default)s)")
    p.add_argument("--features", default="inception", help="feature extractor (default %(default)s)")
    p.add_argument("--out", required=True, help=".npz")
    p.add_argument("--batch_size", type=count, default=256, help="images per forward pass (default %(default)s)")
    p.add_argument("--device", choices=["cpu", "cuda"])
    return parser
