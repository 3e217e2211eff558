"""The `neon` command. This file runs it, parser.py says what may be typed, commands.py does the work,
plan.py says what it would cost."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from neon import NeonError


def main(argv: Sequence[str] | None = None, prog: str = "neon") -> None:
    """Run a command of the `neon` program."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def run():
        from neon.cli.parser import parse

        args = parse(argv, prog)
        # Only now that the options are right: these load torch.
        if args.run == "run_plan" or getattr(args, "dry_run", None):
            from neon.cli import plan as commands
        else:
            from neon.cli import commands
        from neon.cli.options import preset_line
        from neon.distributed import rank

        if getattr(args, "chosen", None) and not rank():
            print(preset_line(args), flush=True)
        getattr(commands, args.run)(args)

    command_line(run)


def command_line(run: Callable[[], None]) -> None:
    """Call `run` as a program: what the user can fix becomes one line on stderr and exit status 1."""
    try:
        run()
    except NeonError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename2 or error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: str) -> NoReturn:
    """One line on stderr, exit status 1."""
    from neon.distributed import rank

    if rank():
        time.sleep(2)  # the same error on every rank: let rank 0 print it; torchrun then stops the others
    print("error:", " ".join(error.split()), file=sys.stderr)
    sys.exit(1)


def family_script(command: str, family: str, *defaults: str) -> None:
    """What edm/selftrain.py and its like run: `neon COMMAND --family FAMILY …`; defaults precede the user's words."""
    main([command, "--family", family, *defaults, *sys.argv[1:]])
