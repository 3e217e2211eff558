"""Run a stage of the mini scale, from mini/: its `neon` commands, side by side in single-thread processes.

    python -m mini.run search demo
    python -m mini.run search demo --setting euler10 --seed 0 --dry_run    # only print what runs

It gives what typing the printed commands gives, one after the other.
"""

import argparse
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from types import ModuleType

from tqdm import tqdm

from mini import settings
from mini.plan import STAGES, Job, lines, plan
from neon import NeonError
from neon.cli import command_line


def choose(
    stage: str, name: str, setting: str | None = None, seed: int | None = None, scale: ModuleType = settings
) -> list[Job]:
    """The jobs of a stage of a chain or base: all, or of one setting or seed. Raises NeonError if there are none."""
    stages = plan(scale)
    if (stage, name) not in stages:
        raise NeonError(f"no {stage} of {name!r}; there is {listed(key for at, key in stages if at == stage)}")
    jobs = stages[stage, name]
    chosen = [job for job in jobs if setting in (None, job.setting) and seed in (None, job.seed)]
    if not chosen:
        settings, seeds = listed(job.setting for job in jobs), listed(job.seed for job in jobs)
        raise NeonError(f"{stage} {name} has settings {settings or '(none)'} and seeds {seeds}")
    return chosen


def listed(names: Iterable[object]) -> str:
    """Each once."""
    return " ".join(dict.fromkeys(map(str, names)))


def share(commands: int, cores: int) -> int:
    """How many commands to run at a time: one per core, and from the start those that would leave cores idle at the
    end. Five alike on two cores then take 2.5 times as long as one, not 3 times."""
    return min(commands, cores + commands % cores)


def run(command: list[str]) -> int:
    status = neon(command[1:]) if command[0] == "neon" else subprocess.run(command).returncode
    if status:
        print(f"failed: {shlex.join(command)}", file=sys.stderr, flush=True)
    return status


def neon(words: list[str]) -> int:
    from neon.cli import main

    try:
        main(words)
        return 0
    except SystemExit as exit:
        return int(exit.code or 0)


def side_by_side(commands: list[list[str]], title: str, jobs: int | None = None) -> int:
    """The worst exit status of the commands; jobs: how many at a time, `share` if None."""
    bar = tqdm(total=len(commands), desc=title, disable=not sys.stderr.isatty())
    # For the workers, before they load torch: one thread each, and no bars that write over each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    workers = multiprocessing.get_context("forkserver")
    workers.set_forkserver_preload(["neon.cli.commands"])  # slow imports, once for all
    worst = 0
    with bar, workers.Pool(jobs or share(len(commands), os.cpu_count())) as pool:
        for status in pool.imap_unordered(run, commands):
            worst = max(worst, status)
            bar.update()
    return worst


def main(scale: ModuleType = settings) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("chain", help="a chain in settings.py; of the stage base, a base")
    parser.add_argument("--setting", help="of this setting only")
    parser.add_argument("--seed", type=int, help="of this seed only")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, one a line, and run none")
    parser.add_argument("--jobs", type=int, help="at a time (default: one per core, and what would be left over)")
    args = parser.parse_args()
    chosen = choose(args.stage, args.chain, args.setting, args.seed, scale)
    if args.dry_run:
        print(lines(chosen), end="")
    else:
        sys.exit(side_by_side([job.command for job in chosen], f"{args.stage} {args.chain}", args.jobs))


if __name__ == "__main__":
    command_line(main)
