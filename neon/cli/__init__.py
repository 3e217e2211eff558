"""The `neon` command. This file runs it, parser.py says what may be typed, commands.py does the work,
plan.py says what it would cost."""

import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from neon import Missing, NeonError
from neon.stop import Terminated, attended, ended_by, leaves


def main(argv: Sequence[str] | None = None, prog: str = "neon") -> None:
    """Run a command of the `neon` program."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG in argv
    argv = [word for word in argv if word != DEBUG]

    def run():
        from neon.cli.options import check_paths
        from neon.cli.parser import parse

        check_words(argv)
        args = parse(argv, prog)
        check_paths(args)
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

    command_line(run, debug)


DEBUG = "--debug"  # of every command and script: show the traceback of what is not expected
UNEXPECTED = 70  # exit status; EX_SOFTWARE of sysexits.h


def command_line(run: Callable[[], None], debug: bool = False) -> None:
    """Call `run` as a program: what the user can fix becomes one line on stderr and exit status 1.

    SIGTERM and SIGHUP become one line that says what is saved, and exit status 143 or 129. Anything that is not
    expected becomes one line too, and exit status 70; its traceback is in a file, or on stderr with debug or --debug
    among the words.
    """
    if DEBUG in sys.argv[1:]:
        debug = True
        sys.argv.remove(DEBUG)
    if ended := _ended_by(run, debug):
        _exit(*ended)


def check_words(argv: Sequence[str]) -> None:
    """Raises NeonError for a word that no file's name can be part of: not UTF-8, or with a NUL in it."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise NeonError(f"{word!r} is not UTF-8") from None
        if "\0" in word:
            raise NeonError(f"{word!r} has a NUL in it")


def _ended_by(run: Callable[[], None], debug: bool = False) -> tuple[str, int] | None:
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
    except Exception as error:
        if _lost_another(error):
            return "error: another process of this run has ended; what it printed says why", 1
        return _unexpected(error, debug), UNEXPECTED
    return None


def _lost_another(error: Exception) -> bool:
    """Whether that is what gloo or NCCL raises where a process waits for one that has ended."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone or not isinstance(error, RuntimeError):
        return False
    by_name = type(error).__name__ in ("DistBackendError", "DistNetworkError")  # of torch, which is not loaded for it
    return by_name or bool(re.search(r"Connection (closed|reset) by peer|Broken pipe", str(error)))


def _unexpected(error: Exception, debug: bool) -> str:
    """The line about a fault that is ours, and its traceback: on stderr, or in a new file."""
    what = f"error: unexpected {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    text = "".join(traceback.format_exception(error))
    if debug:
        print(text, file=sys.stderr, end="", flush=True)
        return what
    try:
        with tempfile.NamedTemporaryFile("w", prefix="neon-", suffix=".txt", delete=False, errors="replace") as file:
            file.write(text)
    except OSError:
        return f"{what}; {DEBUG} shows the traceback"
    return f"{what}; the traceback is in {file.name} ({DEBUG} shows it)"


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
