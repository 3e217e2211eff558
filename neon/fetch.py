"""Files from elsewhere: by URL, downloaded once, or by name from the table of all that the recipes need."""

import csv
import gzip
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from neon import Missing, NeonError
from neon.files import atomic, check_room, filling, progress, put, reading, regular, sha256
from neon.lock import locked, own_file

TABLE = "downloads.csv"
COLUMNS = ["group", "path", "source", "size", "sha256"]
LICENSE = "license"  # a further column that older tables lack: the hub's name of it, or NOT_STATED
NOT_STATED = "not stated"
GROUPS = ("released", "stats", "base", "vae", "fashion")
# Where packages of a system put files of a group, if they are installed: here Debian's dataset-fashion-mnist.
INSTALLED = {"fashion": Path("/usr/share/datasets/fashion-mnist")}


def local(path_or_url: str, folder: str | Path) -> Path:
    """A local path as it is; for an http(s) URL its file, downloaded if missing.

    The file is the one of that name in `folder`; if TABLE lists the URL, the row's, checked as fetch_row does. Raises
    NeonError.
    """
    url = urlparse(path_or_url)
    if url.scheme not in ("http", "https"):
        return Path(path_or_url)
    for row in read_table() if Path(TABLE).exists() else []:
        if row["source"] == path_or_url:
            fetch_row(row)
            return Path(row["path"])
    target = Path(folder) / Path(url.path).name
    fetch(path_or_url, target)
    return target


def fetch(
    source: str,
    target: Path,
    size: str = "",
    digest: str = "",
    record: Callable[[dict[str, str]], None] = lambda found: None,
) -> bool:
    """Make sure that `target` is there; True if this call has downloaded it. One that is there is not checked.

    Of several processes one downloads, while the others wait and then find the file. source: an http(s) URL or
    hf://OWNER/REPO@REVISION/FILE. size, digest: what the new file must have, '' where unknown; the first digits of the
    sha256 are enough. Without a digest, the one that the hub announces counts. record: given the source (at the hub's
    commit), size and sha256 found, before the file gets its name. A source NAME.gz of a target that is no .gz is
    unpacked; size and digest are then of the unpacked file, and the size must be known. Raises NeonError.
    """
    if target.exists():
        return False
    try:
        with locked(target):
            if target.exists():
                return False
            remote = _on_hub(source) if source.startswith("hf://") else Remote(source, source)
            new = download(remote.url, target, remote.token)
            if source.endswith(".gz") and target.suffix != ".gz":
                packed = new
                try:
                    new = unpacked(packed, target, int(size))
                finally:
                    packed.unlink()
            found = {"source": remote.source, **_facts(new)}
            _check_new(new, source, found, size, digest or remote.digest)
            record(found)
            put(new, target)
    except (OSError, ValueError, HTTPException) as error:
        raise NeonError(_offline(source, target, error)) from None
    return True


def _check_new(new: Path, source: str | Path, found: Mapping[str, str], size: str, digest: str) -> None:
    """Delete a new file that is not what it must be. Raises NeonError."""
    if problem := _differs(found, size, digest):
        new.unlink()
        raise NeonError(f"{source}: {problem}; nothing was kept")


def download(url: str, target: Path, token: str | None = None) -> Path:
    """GET into a hidden sibling of `target`, which is returned; a broken download, whose bytes are there, is resumed.

    token: shown to the server of `url`, not to those it points to. Tries again as long as each connection adds bytes.
    Raises OSError (of which HTTPError is one), ValueError or HTTPException.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with progress(0, "B", target.name) as bar:
        while True:
            before = _size_of(partial)
            try:
                total = _continue(url, partial, before, bar, token)
            except urllib.error.HTTPError as error:
                if error.code != 416 or not before:
                    raise
                partial.unlink()  # of another file, or more than there is
                continue
            except (OSError, HTTPException):
                if _size_of(partial) <= before:
                    raise
                continue
            size = _size_of(partial)
            if total is None or size == total:
                return partial
            if size <= before:
                raise OSError(f"got {size} of {total} bytes")


def unpacked(packed: Path, target: Path, size: int) -> Path:
    """Unpack a .gz into a hidden sibling of `target`, which is returned: of what it holds, at most a byte above `size`.

    Raises OSError or NeonError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.unpacked")
    check_room(new, size)
    with filling(new, size), own_file(new) as f, reading(packed, "not a whole gzip file"), gzip.open(packed) as source:
        f.truncate(0)
        f.write(source.read(size + 1))
    return new


def _size_of(partial: Path) -> int:
    """Bytes of an earlier download; its name is known, so others may have put something there. Raises NeonError."""
    if not os.path.lexists(partial):
        return 0
    with own_file(partial) as file:
        found = os.fstat(file.fileno())
    if found.st_uid != os.geteuid():
        raise NeonError(f"{partial}: is another user's; remove it")
    return found.st_size


def _continue(url: str, partial: Path, start: int, bar, token: str | None) -> int | None:
    """Append what follows byte `start`; the size of the whole as the server gives it. A server may start again at 0."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=60) as response:
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        bar.total, bar.n, bar.initial = total, start, bar.initial + start - bar.n  # what was there has no speed
        check_room(partial, (total or start) - start)
        with filling(partial), own_file(partial) as f:
            f.truncate(start)
            f.seek(start)
            while block := response.read(2**20):
                f.write(block)
                bar.update(len(block))
    return total


def read_table(path: str | Path = TABLE) -> list[dict[str, str]]:
    """Rows of COLUMNS, and LICENSE if it is there. size and sha256 are empty where they are not known yet.

    A byte-order mark, as spreadsheets write it, is skipped. Raises NeonError.
    """
    try:
        wrong = f"not a table of {', '.join(COLUMNS)}"
        with regular(path).open(newline="", encoding="utf-8-sig") as f, reading(path, wrong):
            rows = list(csv.DictReader(f, strict=True))
    except Missing:
        raise NeonError(f"{path}: no such file; run this in the root of the repository") from None
    for row in rows:
        whole = list(row) in (COLUMNS, [*COLUMNS, LICENSE]) and None not in row.values()
        if not whole or row["group"] not in GROUPS or not (row["size"].isdigit() or not row["size"]):
            raise NeonError(f"{path}: not a table of {', '.join(COLUMNS)} ({str(row)[:200]})")
    return rows


def listed(name: str) -> dict[str, str] | None:
    """The row of the table here for a file of that name."""
    rows = read_table() if Path(TABLE).exists() else []
    return next((row for row in rows if Path(row["path"]).name == name), None)


def write_table(rows: list[dict[str, str]], path: str | Path = TABLE) -> None:
    """Write what read_table reads, with the columns that it had, whole or not at all."""
    with atomic(path) as partial, partial.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]) if rows else COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def choose(rows: list[dict[str, str]], wanted: Iterable[str]) -> list[dict[str, str]]:
    """The rows of the groups, paths or file names in `wanted`. Raises NeonError if one names nothing."""
    chosen = []
    for word in wanted:
        found = [row for row in rows if word in (row["group"], row["path"], Path(row["path"]).name)]
        if not found and word not in GROUPS:
            raise NeonError(f"nothing to download is called {word!r}; `neon download --list` shows what there is")
        chosen += [row for row in found if row not in chosen]
    return chosen


def fetch_row(row: Mapping[str, str]) -> str:
    """Make sure that the file of a row is there and whole; a word on what was done.

    A file that is there is checked against size and sha256, where known, and never replaced. A new one is checked too;
    what the row does not know yet is then filled in in TABLE: size, sha256, and the hub's commit as the revision.
    One that a package of the system has installed is unpacked from there. Raises NeonError.
    """
    target = Path(row["path"])
    if not target.exists() and (copy := installed(row)):
        with locked(target):
            new = unpacked(copy, target, int(row["size"]))
            _check_new(new, copy, _facts(new), row["size"], row["sha256"])
            put(new, target)
        return f"unpacked from {copy} and whole"
    if fetch(row["source"], target, row["size"], row["sha256"], lambda found: _record(row["path"], found)):
        return "downloaded and whole" if row["sha256"] else f"downloaded; its digest is now in {TABLE}"
    known = _row_now(row)
    if not known["sha256"]:
        return "is there; its digest is not known yet, so it was not checked"
    if problem := _differs(_facts(target), known["size"], known["sha256"]):
        raise NeonError(f"{target}: {problem}; move it away to download it again")
    return "is there and whole"


def installed(row: Mapping[str, str]) -> Path | None:
    """The packed file of a row where a package of the system has put it."""
    copy = INSTALLED.get(row["group"], Path(os.devnull)) / Path(urlparse(row["source"]).path).name
    return copy if copy.is_file() else None


def _row_now(row: Mapping[str, str]) -> Mapping[str, str]:
    """The row as it stands in the table: who downloaded the file while we waited has filled it in."""
    return next((now for now in read_table() if now["path"] == row["path"]), row)


def _record(path: str, found: Mapping[str, str]) -> None:
    """Fill in the row of `path`, in the table as it is now."""
    with locked(TABLE):
        rows = read_table()
        if any(row | found != row for row in rows if row["path"] == path):
            write_table([row | found if row["path"] == path else row for row in rows])


def pinned(row: Mapping[str, str]) -> bool:
    """Does the row name its file for good: by its sha256 or by a commit of the hub? Branches and tags can move."""
    return bool(row["sha256"]) or _is_commit(_revision(row["source"]))


def _revision(source: str) -> str:
    """hf://OWNER/REPO@REVISION/FILE → REVISION; '' if there is none."""
    return source.partition("@")[2].partition("/")[0] if source.startswith("hf://") else ""


def _is_commit(revision: str | None) -> bool:
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))


def _facts(path: Path) -> dict[str, str]:
    return {"size": str(path.stat().st_size), "sha256": sha256(path)}


def _differs(found: Mapping[str, str], size: str, digest: str) -> str | None:
    """How the facts found differ from those known; None if they do not."""
    if size and found["size"] != size:
        return f"it has {found['size']} bytes, not {size}"
    if not found["sha256"].startswith(digest):
        return f"its sha256 is {found['sha256']}, not {digest}"
    return None


class Remote(NamedTuple):
    """Where a file is: its source at a fixed revision if there is one, its URL, the user's token, the hub's sha256."""

    source: str
    url: str
    token: str | None = None
    digest: str = ""


HUB = re.compile(r"hf://([\w.-]+)/([\w.-]+)(?:@([\w.-]+))?/([^?#%\\\s]+)", re.ASCII)


def _named(source: str) -> tuple[str, str, str, str]:
    """OWNER, REPO, REVISION or '', and FILE of a source on the hub. Raises NeonError if they lead elsewhere on it."""
    match = HUB.fullmatch(source)
    parts = [part for group in match.groups() if group for part in group.split("/")] if match else [""]
    if any(part in ("", ".", "..") for part in parts):
        raise NeonError(f"{source}: not hf://OWNER/REPO@REVISION/FILE")
    return match[1], match[2], match[3] or "", match[4]


def _on_hub(source: str) -> Remote:
    """Look hf://OWNER/REPO@REVISION/FILE up on the hub, which announces its commit and, for a large file, its sha256.

    Reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. The `hf` command is not used: it starts a download again from 0
    after it was killed. Raises OSError, NeonError.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    owner, name, revision, file = _named(source)

    def url(revision: str) -> str:
        return hf_hub_url(f"{owner}/{name}", file, revision=revision or None, endpoint=os.environ.get("HF_ENDPOINT"))

    try:
        metadata = get_hf_file_metadata(url(revision))
    except Exception as error:  # the hub's and those of its HTTP library: many kinds
        raise OSError(str(error).strip() or type(error).__name__) from None
    if _is_commit(metadata.commit_hash):
        revision = metadata.commit_hash
        source = f"hf://{owner}/{name}@{revision}/{file}"
    etag = metadata.etag or ""
    return Remote(source, url(revision), get_token(), etag if len(etag) == 64 else "")


def _offline(source: str, target: Path, error: Exception) -> str:
    reason = " ".join(str(getattr(error, "reason", None) or error).split())
    return f"cannot download {source} ({reason}); put the file at {target} to work offline"
