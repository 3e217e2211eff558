"""The `neon` command. This file runs it, parser.py says what may be typed, commands.py does the work,
plan.py says what it would cost."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from neon import Missing, NeonError
from neon.stop import Terminated, attended, ended_by, leaves


def main(argv: Sequence[str] | None = None, prog: str = "neon") -> None:
    """Run a command of the `neon` program."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def run():
        from neon.cli.parser import parse

        args = parse(argv, prog)
        # Only now that the options are right: these load torch.
        if args.run == "run_plan" or isinstance(getattr(args, "dry_run", None), str):  # --dry_run DEVICE
            from neon.cli import plan as commands  # what the command would cost
        else:
            from neon.cli import commands
        from neon.cli.options import preset_line
        from neon.distributed import rank

        if getattr(args, "chosen", None) and not rank():
            print(preset_line(args), flush=True)
        with leaves(args.left.format(**vars(args))):
            getattr(commands, args.run)(args)

    command_line(run)


def command_line(run: Callable[[], None]) -> None:
    """Call `run` as a program: what the user can fix becomes one line on stderr and exit status 1.

    SIGTERM and SIGHUP become one line that says what is saved, and exit status 143 or 129.
    """
    if ended := _ended_by(run):
        _exit(*ended)


def _ended_by(run: Callable[[], None]) -> tuple[str, int] | None:
    """The line and the exit status of a run that fails or is stopped."""
    try:
        with attended(), leaves("nothing of it is kept"):
            run()
    except Missing as error:
        return f"error: {error}{_how_to_get(error.path)}", 1
    except NeonError as error:
        return f"error: {error}", 1
    except OSError as error:
        text = f"{error.filename2 or error.filename}: {error.strerror}" if error.filename else str(error)
        return f"error: {text}", 1
    except KeyboardInterrupt:
        return "", 130
    except Terminated as stopped:
        name, status = ended_by()
        return f"stopped by {name}: {stopped}", status
    return None


def _how_to_get(path: str | Path) -> str:
    """What to type for a file that is not there, if the table of downloads has one of its name."""
    from neon.fetch import listed

    row = None
    with suppress(NeonError):  # a table that cannot be read is not what the user asked about
        row = listed(Path(path).name)
    return f"; `neon download {Path(path).name}` downloads it to {row['path']}" if row else ""


def _exit(line: str, status: int) -> NoReturn:
    """One line on stderr. Of several processes the first prints it, and torchrun repeats it after its own report."""
    from neon.distributed import rank

    if rank():
        time.sleep(2)  # the same on every rank; torchrun stops the others when the first has ended
    elif line:
        line = " ".join(line.split())
        print(line, file=sys.stderr, flush=True)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    sys.exit(status)


def family_script(command: str, family: str, *defaults: str) -> None:
    """What edm/selftrain.py and its like run: `neon COMMAND --family FAMILY …`; defaults precede the user's words."""
    main([command, "--family", family, *defaults, *sys.argv[1:]])
