"""How the parser reads and speaks: negative numbers, examples in every help, completion in shells."""

import argparse
import re
from collections.abc import Sequence

from neon import extra
from neon.family import FAMILIES

BASE = "--base checkpoints/base.pkl"
REF = "--ref fid_stats/cifar10-32x32.npz"
TRAINED = "--selftrained runs/cond"
# Command lines that work as they are typed, but for the files in them; a \ continues a line.
EXAMPLES = {
    "neon": [
        "neon search --help",
        "neon selftrain --family edm --help   # with the options of that family",
        "neon --completion bash > ~/.local/share/bash-completion/completions/neon",
    ],
    "download": ["neon download --list", "neon download Neon_EDM_FFHQ.pkl stats", "neon download fashion"],
    "merge": [
        "neon merge --base base.safetensors --selftrained tuned.safetensors -w 1 --out neon.safetensors",
        "neon merge --base base.pth --selftrained tuned.pth -w 0.5,1,1.5 --out 'neon-{w}.pth'",
        "neon merge --base base.pth --selftrained tuned.pth -w 1 --out neon.pth --dry_run",
        "neon merge --base pipeline --selftrained tuned/unet -w 1 --out neon",
        "neon merge --base pipeline --selftrained lora -w 1 --adapter peft --out negated",
    ],
    "extract-lora": ["neon extract-lora --base pipeline --selftrained tuned/unet --rank 16 --out lora"],
    "control": [
        "neon control --base runs/base --selftrained runs/cond/snapshot-000012800.safetensors --seed 0 \\\n"
        "      --out runs/random/snapshot-000012800.safetensors"
    ],
    "train": ["neon train --family edm --network digits --recipe digits_base --data runs/data/train --out runs/base"],
    "selftrain": [
        f"neon selftrain --family edm {BASE} --recipe cifar10_cond --data S --out runs/cond",
        "neon selftrain --preset edm_cifar10_cond --data S --out runs/cond --save_minutes 30",
        "torchrun --standalone --nproc_per_node=8 -m neon.cli selftrain --preset var_d16 --data S --out runs/var",
        "torchrun --standalone --nproc_per_node=8 -m neon.cli selftrain --preset var_d36 --data S --out runs/d36 \\\n"
        "      --shard --recompute",
    ],
    "generate": [
        "neon generate --family edm --model checkpoints/base.pkl --seeds 0-5999 --out S",
        "neon generate --preset edm_cifar10_cond --out S",
        "neon generate --family imm --model base.pkl --num_steps 1 --gmo 0.1 --seeds 0-5999 --out S",
    ],
    "diagnose": [
        f"neon diagnose --family edm {BASE} --recipe cifar10_cond --real heldout --synthetic S",
        f"neon diagnose --family edm {BASE} --recipe cifar10_cond --real heldout \\\n"
        "      --num_steps 18 --seeds 0-9999 --out diagnosis.json",
        f"neon diagnose --family edm {BASE} --recipe cifar10_cond --real heldout --synthetic S \\\n      {TRAINED}",
    ],
    "evaluate": [
        f"neon evaluate --family edm --model checkpoints/base.pkl --seeds 0-49999 {REF}",
        f"neon evaluate --family edm {BASE} {TRAINED} -w 1 \\\n      --seeds 0-49999 {REF} --out row.json",
        f"neon evaluate --images samples {REF} --metrics fid,kid --out row.json",
    ],
    "search": [
        f"neon search --family edm {BASE} {TRAINED} -w 0:3 \\\n      --seeds 100000-109999 {REF} --out search.jsonl",
        f"neon search --family edm {BASE} {TRAINED} -w -1,0,1 --grid num_steps=9,18 \\\n"
        f"      --seeds 100000-109999 {REF} --out search.jsonl",
    ],
    "plan": ["neon plan --device H100 --gpus 8", "neon plan --json", "neon plan --pipeline paper/controls"],
    "compare": [
        "neon compare final.jsonl:neon final.jsonl:base --ref fid_stats/cifar10-32x32.npz",
        "neon compare mine.json theirs.json --ref fid_stats/cifar10-32x32.npz",
    ],
    "clean": ["neon clean search.jsonl"],
    "final": [
        f"neon final --family edm {BASE} --search search.jsonl \\\n      --seeds 500000-549999 {REF} --out final.jsonl"
    ],
    "grid": ["neon grid --family edm --final final.jsonl --seeds 0-39 --out sheets"],
    "card": [
        "neon card --model neon.safetensors --final final.jsonl --dataset CIFAR-10",
        "neon card --model neon.safetensors --final final.jsonl --push_to_hub OWNER/NAME --dry_run",
    ],
    "inspect": ["neon inspect checkpoints/Neon_EDM_FFHQ.pkl", "neon inspect base.safetensors neon.safetensors"],
    "convert": ["neon convert base.pkl base.safetensors", "neon convert trainer.pth base.safetensors --key model"],
    "reference": [
        "neon reference --images cifar10.zip --out fid_stats/cifar10.npz",
        "neon reference --images 'imagenet/train-*.parquet' --size 256 --out fid_stats/imagenet256.npz",
    ],
}
MERGE = (
    ". Of a folder everything else is copied, so that from_pretrained loads what is written. It holds one network: of a"
    " pipeline, the part that is not an encoder, or --component."
)
RESUMES = "the same command resumes"
# What a command that SIGTERM or SIGHUP stops leaves, with the names of options in braces.
LEFT = {
    "download": f"what was downloaded is kept; {RESUMES}",
    "train": f"what was saved so far is in {{out}}; {RESUMES}",
    "selftrain": f"what was saved so far is in {{out}}; {RESUMES}",
    "generate": f"the images made so far are in {{out}}; {RESUMES}",
    "search": f"the rows measured so far are in {{out}}; {RESUMES}",
    "final": f"the rows measured so far are in {{out}}; {RESUMES}",
}
LOG = (
    "The folder --out gets snapshots, the state from which the same command resumes, and log.jsonl, which has a line"
    " per hundredth of the budget, snapshot and state: images, loss (the mean since the last line), grad_norm (before"
    " clipping), lr, images_per_second (of all processes) and time (UTC). SIGTERM saves the state; torchrun waits 30 s"
    " for that."
)
MORE = {"train": LOG, "selftrain": LOG}
PATHS = ("base", "selftrained", "data", "out", "ref", "model", "file", "other", "search", "final", "images")
PATHS += ("statistics", "tensorboard", "real", "synthetic", "pipeline")


class Parser(argparse.ArgumentParser):
    """argparse's, whose help keeps examples as they are typed, and which says what --family is for."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"formatter_class": _Help} | options)

    def error(self, message: str):
        if "required:" in message and "--family" in message:
            message += f" (--family is one of {', '.join(FAMILIES)}; each has sampling options of its own)"
        super().error(message)


class _Help(argparse.HelpFormatter):
    """Fills paragraphs, except those with indented lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in text.split("\n\n"))


def epilog(name: str) -> str:
    """What ends the help of a command: more about it, and examples."""
    lines = "\n".join(f"  {line}" for line in EXAMPLES.get(name, []))
    return "\n\n".join([*filter(None, [MORE.get(name)]), f"examples:\n{lines}"])


def negative(argv: Sequence[str]) -> list[str]:
    """The words, with `-w -1,0,1` written as `-w=-1,0,1`: argparse takes a word such as -1,0,1 for an option."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in ("-w", "--w") and re.match(r"-[\d.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


class Completion(argparse.Action):
    """Print a script that lets a shell complete commands, options and paths."""

    def __call__(self, parser, namespace, shell, option_string=None):
        with extra("terminal"):
            import shtab
        _complete_paths(parser, shtab.FILE)
        print(shtab.complete(parser, shell))
        parser.exit()


def _complete_paths(parser: argparse.ArgumentParser, files) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_paths(sub, files)
        elif action.dest in PATHS:
            action.complete = files
