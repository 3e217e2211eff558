"""Run one `neon` command for many seeds and settings, side by side in single-thread processes.

    python -m mini.each --each seed=0-3 --each setting=euler10,heun18 --settings params.yaml:edm.settings \\
        neon generate --family edm --model base/{seed}.safetensors {setting.sampling} --out S/{setting}/{seed}

Names in braces are replaced; {setting.sampling} is an entry of the setting's table in the YAML file. Equivalent to
typing the commands one after the other.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import shlex
import sys

import yaml
from tqdm import tqdm

NAME = r"\{([\w.]+)\}"


def expand(template: list[str], values: dict[str, str], tables: dict) -> list[str]:
    """The command with its {names} filled in; a word that is only one {name} may become several words."""

    def fill(match):
        name, _, entry = match[1].partition(".")
        if entry:  # may hold further names
            return re.sub(NAME, fill, str(tables[values[name]][entry]))
        return values[name]

    words = []
    for word in template:
        filled = re.sub(NAME, fill, word)
        words += shlex.split(filled) if re.fullmatch(NAME, word) else [filled]
    return words


def values_of(text: str) -> tuple[str, list[str]]:
    """'seed=0-3' or 'setting=a,b' → name and values."""
    name, _, listed = text.partition("=")
    if span := re.fullmatch(r"(\d+)-(\d+)", listed):
        return name, [str(i) for i in range(int(span[1]), int(span[2]) + 1)]
    return name, listed.split(",")


def share(commands: int, cores: int) -> int:
    """How many commands to run at a time: one per core, and from the start those that would leave cores idle at the
    end. Five alike on two cores then take 2.5 times as long as one, not 3 times."""
    return min(commands, cores + commands % cores)


def run(command: list[str]) -> int:
    from neon.cli import main

    try:
        main(command[1:])
        return 0
    except SystemExit as exit:
        print(f"failed: {shlex.join(command)}", file=sys.stderr, flush=True)
        return int(exit.code or 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", action="append", default=[], metavar="NAME=VALUES", type=values_of)
    parser.add_argument("--settings", metavar="FILE:KEYS", help="YAML table of the settings")
    parser.add_argument("--jobs", type=int, help="at a time (default: one per core, and what would be left over)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="neon …")
    args = parser.parse_args()
    if args.command[:1] != ["neon"]:
        parser.error("the command must be a neon command")
    tables = {}
    if args.settings:
        file, _, keys = args.settings.partition(":")
        with open(file) as f:
            tables = yaml.safe_load(f)
        for key in filter(None, keys.split(".")):
            tables = tables[key]
    names = [name for name, _ in args.each]
    commands = [
        expand(args.command, dict(zip(names, combination)), tables)
        for combination in itertools.product(*(values for _, values in args.each))
    ]
    bar = tqdm(total=len(commands), desc=" ".join(args.command[:2]), disable=not sys.stderr.isatty())
    # For the workers, before they load torch: one thread each, and no bars that write over each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    workers = multiprocessing.get_context("forkserver")
    workers.set_forkserver_preload(["neon.cli.commands"])  # slow imports, once for all
    worst = 0
    with bar, workers.Pool(args.jobs or share(len(commands), os.cpu_count())) as pool:
        for status in pool.imap_unordered(run, commands):
            worst = max(worst, status)
            bar.update()
    return worst


if __name__ == "__main__":
    sys.exit(main())
