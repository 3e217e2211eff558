"""Files named by a URL, from a small server on loopback."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from neon import NeonError
from neon.distributed import World
from neon.fetch import local

DATA = bytes(range(256)) * 5000


@contextmanager
def server(send):
    """Answers every request with `send`, announced as long as DATA; yields its URL and the requests seen."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(200 if send else 404)
            self.send_header("Content-Length", str(len(DATA) if send else 0))
            self.end_headers()
            self.wfile.write(send)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", seen
        http.shutdown()


def test_downloaded_once_with_its_digest(tmp_path):
    with server(DATA) as (url, seen):
        for _ in range(2):
            path = local(f"{url}/refs/stats.npz", tmp_path / "fid_stats", World())
    assert path == tmp_path / "fid_stats" / "stats.npz" and path.read_bytes() == DATA
    assert seen == ["/refs/stats.npz"]
    digest = (tmp_path / "fid_stats" / "stats.npz.sha256").read_text()
    assert digest == f"{hashlib.sha256(DATA).hexdigest()}  stats.npz\n"


@pytest.mark.parametrize("send", [DATA[:1000], b""], ids=["dropped", "missing"])
def test_a_failed_download_leaves_nothing(tmp_path, send):
    with server(send) as (url, _), pytest.raises(NeonError, match=r"cannot download .*put the file at"):
        local(f"{url}/stats.npz", tmp_path, World())
    assert not list(tmp_path.iterdir())


def test_a_path_is_taken_as_it_is(tmp_path):
    assert local("some/where.npz", tmp_path, World()).as_posix() == "some/where.npz"
