"""Files named by a URL: downloaded once, then local."""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

from neon import NeonError
from neon.distributed import World
from neon.io import atomic, progress


def local(path_or_url: str, folder: str | Path, world: World) -> Path:
    """A local path as it is; for an http(s) URL the file of that name in `folder`, downloaded if missing.

    Beside a downloaded file lies its sha256, as sha256sum writes it. Raises NeonError if the download fails.
    """
    url = urlparse(path_or_url)
    if url.scheme not in ("http", "https"):
        return Path(path_or_url)
    target = Path(folder) / Path(url.path).name
    failed = None
    if world.rank == 0 and not target.exists():
        try:
            _download(path_or_url, target)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            failed = f"cannot download {path_or_url} ({reason}); put the file at {target} to work offline"
    failed = world.gather(failed)[0]
    if failed:
        raise NeonError(failed)
    return target


def _download(url: str, target: Path) -> None:
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as response, atomic(target) as partial, partial.open("wb") as f:
        expected = response.headers.get("Content-Length")
        with progress(int(expected or 0), "B", target.name) as bar:
            while block := response.read(2**20):
                f.write(block)
                digest.update(block)
                bar.update(len(block))
        if expected is not None and f.tell() != int(expected):
            raise OSError(f"got {f.tell()} of {expected} bytes")
    with atomic(target.with_name(target.name + ".sha256")) as partial:
        partial.write_text(f"{digest.hexdigest()}  {target.name}\n")
