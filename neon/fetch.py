"""Files from elsewhere: by URL, downloaded once, or by name from the table of all that the recipes need."""

import csv
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlparse

from neon import NeonError
from neon.files import atomic, progress, sha256

TABLE = "downloads.csv"
COLUMNS = ["group", "path", "source", "size", "sha256"]
GROUPS = ("released", "stats", "base", "vae")


def local(path_or_url: str, folder: str | Path, world) -> Path:
    """A local path as it is; for an http(s) URL the file of that name in `folder`, downloaded if missing.

    Beside a downloaded file lies its sha256, as sha256sum writes it. Raises NeonError if the download fails. world:
    neon.distributed.World; rank 0 downloads.
    """
    url = urlparse(path_or_url)
    if url.scheme not in ("http", "https"):
        return Path(path_or_url)
    target = Path(folder) / Path(url.path).name
    failed = None
    if world.rank == 0 and not target.exists():
        try:
            os.replace(download(path_or_url, target), target)
            with atomic(target.with_name(target.name + ".sha256")) as partial:
                partial.write_text(f"{sha256(target)}  {target.name}\n")
        except (OSError, ValueError) as error:
            failed = _offline(path_or_url, target, error)
    failed = world.gather(failed)[0]
    if failed:
        raise NeonError(failed)
    return target


def download(url: str, target: Path, token: str | None = None) -> Path:
    """GET into a hidden sibling of `target`, which is returned; what a broken download left there is continued.

    token: shown to the server of `url`, not to those it points to. Tries again as long as each connection brings
    something. Raises OSError (of which HTTPError is one) or ValueError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with progress(0, "B", target.name) as bar:
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            try:
                total = _continue(url, partial, before, bar, token)
            except urllib.error.HTTPError as error:
                if error.code != 416 or not before:
                    raise
                partial.unlink()  # of another file, or more than there is
                continue
            except OSError:
                if not partial.exists() or partial.stat().st_size <= before:
                    raise
                continue
            size = partial.stat().st_size
            if total is None or size == total:
                return partial
            if size <= before:
                raise OSError(f"got {size} of {total} bytes")


def _continue(url: str, partial: Path, start: int, bar, token: str | None) -> int | None:
    """Append what follows byte `start`; the size of the whole as the server tells it. A server may begin anew."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=60) as response:
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        bar.total, bar.n = total, start
        with partial.open("r+b" if partial.exists() else "wb") as f:
            f.truncate(start)
            f.seek(start)
            while block := response.read(2**20):
                f.write(block)
                bar.update(len(block))
    return total


def read_table(path: str | Path = TABLE) -> list[dict[str, str]]:
    """Rows of COLUMNS. size and sha256 are empty where they are not known yet. Raises NeonError."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
    except FileNotFoundError:
        raise NeonError(f"{path}: no such file; run this in the root of the repository") from None
    for row in rows:
        if list(row) != COLUMNS or row["group"] not in GROUPS or not (row["size"].isdigit() or not row["size"]):
            raise NeonError(f"{path}: not a table of {', '.join(COLUMNS)} ({row})")
    return rows


def write_table(rows: list[dict[str, str]], path: str | Path = TABLE) -> None:
    """Write what read_table reads, whole or not at all."""
    with atomic(path) as partial, partial.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
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


def bring(row: dict[str, str], record: Callable[[], None] = lambda: None) -> str:
    """Make sure that the file of a row is there and whole; a word on what was done.

    A file that is there is checked against size and sha256, where known, and never replaced. A new one is checked
    before it gets its name: against these, or, if they are not known, against the digest that the hub announces; then
    they are filled in and `record` is called. Raises NeonError.
    """
    target = Path(row["path"])
    if target.exists():
        if not row["sha256"]:
            return "is there; its digest is not known yet, so it was not checked"
        if problem := _differs(target, row):
            raise NeonError(f"{target}: {problem}; move it away to download it again")
        return "is there and whole"
    try:
        hub = row["source"].startswith("hf://")
        url, token, announced = _on_hub(row["source"]) if hub else (row["source"], None, "")
        new = download(url, target, token)
    except (OSError, ValueError) as error:
        raise NeonError(_offline(row["source"], target, error)) from None
    problem = _differs(new, row if row["sha256"] else row | {"sha256": announced})
    if problem:
        new.unlink()
        raise NeonError(f"{row['source']}: {problem}; nothing was kept")
    os.replace(new, target)
    if not row["sha256"]:
        row |= {"size": str(target.stat().st_size), "sha256": sha256(target)}
        record()
        return f"downloaded; its digest is now in {TABLE}"
    return "downloaded and whole"


def _differs(path: Path, row: dict[str, str]) -> str | None:
    if row["size"] and path.stat().st_size != int(row["size"]):
        return f"it has {path.stat().st_size} bytes, not {row['size']}"
    if row["sha256"] and (found := sha256(path)) != row["sha256"]:
        return f"its sha256 is {found}, not {row['sha256']}"
    return None


def _on_hub(source: str) -> tuple[str, str | None, str]:
    """hf://OWNER/REPO@REVISION/FILE → its URL, the user's token if there is one, and the hub's sha256 of it or ''.

    Heeds HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. The `hf` command is not used because it begins a download anew when
    it was killed. Raises OSError.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    owner, repo, file = source.removeprefix("hf://").split("/", 2)
    repo, _, revision = repo.partition("@")
    url = hf_hub_url(f"{owner}/{repo}", file, revision=revision or None, endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        etag = get_hf_file_metadata(url).etag or ""
    except Exception as error:  # the hub's and those of its HTTP library: many kinds
        raise OSError(str(error).strip() or type(error).__name__) from None
    return url, get_token(), etag if len(etag) == 64 else ""


def _offline(source: str, target: Path, error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return f"cannot download {source} ({reason}); put the file at {target} to work offline"
