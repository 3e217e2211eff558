"""The `neon` commands in the stages of a pipeline, as DVC resolves them. Nothing of it runs.

Of the shell, `;`, `&&`, `||`, `|` and `for NAME in WORDS; do …; done` are understood. What a shell would compute, $(…),
stays one word; of $(echo WORDS | cut -d' ' -f-N) it is the first N words.
"""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from neon import NeonError, extra
from neon.files import existing

FIRST = re.compile(r"\$\(echo ([^|()]*)\| cut -d' ' -f-(\d+)\)")
COMPUTED = re.compile(r"\$\([^()]*\)")
BETWEEN = ";&|"  # commands


class Stage(NamedTuple):
    name: str
    folder: Path  # where its commands run
    cached: tuple[str, ...]  # outputs that DVC copies to its cache
    commands: list[list[str]]  # what follows `neon`


def stages_of(path: str | Path) -> list[Stage]:
    """Of a dvc.yaml, or of the one in a folder. Raises NeonError."""
    path = Path(path)
    file = existing(path / "dvc.yaml" if path.is_dir() else path)
    with extra("pipeline"):
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

    try:
        with Repo(str(file.parent.absolute())) as repo:
            found = repo.stage.load_all(str(file.absolute()))
            return [_stage(stage) for stage in found]
    except DvcException as error:
        raise NeonError(f"{file}: DVC cannot read it ({' '.join(str(error).split())})") from None
    except ValueError as error:
        raise NeonError(f"{file}: a command in it is no shell command ({error})") from None


def _stage(stage) -> Stage:
    lines = stage.cmd if isinstance(stage.cmd, list) else [stage.cmd or ""]
    found = [words for line in lines for command in commands(line) if (words := words_of_neon(command))]
    return Stage(stage.name, Path(stage.wdir), tuple(out.def_path for out in stage.outs if out.use_cache), found)


def commands(line: str) -> list[list[str]]:
    """The words of every command of a shell line, one for each turn of its loops. Raises ValueError."""
    line = FIRST.sub(lambda match: " ".join(match[1].split()[: int(match[2])]), line)
    lexer = shlex.shlex(COMPUTED.sub(lambda match: _one_word(match[0]), line), posix=True, punctuation_chars=BETWEEN)
    lexer.whitespace_split, lexer.commenters = True, ""
    return list(_unrolled(list(lexer)))


def _one_word(text: str) -> str:
    return re.sub(rf"[\s{BETWEEN}'\"]+", "_", text)


def _unrolled(words: list[str]) -> Iterator[list[str]]:
    """The commands among the words of a shell line."""
    command: list[str] = []
    at = 0
    while at < len(words):
        if words[at] == "for" and not command:
            at, turns = _loop(words, at)
            for turn in turns:
                yield from _unrolled(turn)
            continue
        if set(words[at]) <= set(BETWEEN):
            yield from filter(None, [command])
            command = []
        else:
            command.append(words[at])
        at += 1
    yield from filter(None, [command])


def _loop(words: list[str], at: int) -> tuple[int, list[list[str]]]:
    """The place after a loop that starts there, and the words of its body for each value."""
    start, depth = words.index("do", at), 0
    name, values = words[at + 1], [word for word in words[at + 3 : start] if word != ";"]
    for end in range(at, len(words)):
        depth += (words[end] == "for") - (words[end] == "done")
        if not depth:
            return end + 1, [_turn(words[start + 1 : end], name, value) for value in values]
    raise ValueError(f"the loop over {name} has no end")


def _turn(body: list[str], name: str, value: str) -> list[str]:
    return [re.sub(rf"\${name}\b", lambda _: value, word) for word in body]


def words_of_neon(command: list[str]) -> list[str]:
    """What follows `neon` or `-m neon.cli`; [] if the command is another."""
    while command and re.match(r"\w+=", command[0]):
        command = command[1:]
    if command and Path(command[0]).name == "neon":
        return command[1:]
    places = [i for i, pair in enumerate(pairwise(command)) if pair == ("-m", "neon.cli")]
    return command[places[0] + 2 :] if places else []
