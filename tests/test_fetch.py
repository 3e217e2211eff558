"""Files from elsewhere, through download_models.sh and from a small server on loopback that does not always behave."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from processes import BIN, ROOT, neon

from neon import NeonError
from neon.distributed import World
from neon.fetch import GROUPS, local, read_table

DATA = os.urandom(256) * 5000
DIGEST = hashlib.sha256(DATA).hexdigest()


class Server:
    """Serves DATA at every path; what goes wrong is set by its attributes. seen: (method, path, first byte)."""

    def __init__(self):
        self.seen, self.data, self.breaks, self.says_more, self.ranges = [], DATA, 0, 0, True
        self.digest, self.pause, self.elsewhere, self.tokens = DIGEST, 0.0, None, {}

    def answer(self, http, body):
        start = int((http.headers.get("Range") or "bytes=0-")[6:-1]) if self.ranges else 0
        self.seen.append((http.command, http.path, start))
        self.tokens[http.path] = http.headers.get("Authorization")
        if "gone" in http.path:
            return http.send_error(404)
        if self.elsewhere and "resolve" in http.path and body:
            http.send_response(302)
            http.send_header("Location", self.elsewhere)
            return http.end_headers()
        if start > len(self.data):
            return http.send_error(416)
        http.send_response(206 if start else 200)
        http.send_header("Content-Length", str(len(self.data) - start + self.says_more))
        http.send_header("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")
        http.send_header("ETag", f'"{self.digest}"')
        http.send_header("X-Repo-Commit", "a" * 40)
        http.end_headers()
        if not body:
            return
        part = self.data[start:]
        if self.breaks:
            self.breaks -= 1
            part = part[: len(part) // 2]
        with suppress(ConnectionError):  # of a client that was killed
            for i in range(0, len(part), 2**16):
                http.wfile.write(part[i : i + 2**16])
                time.sleep(self.pause)


@pytest.fixture
def server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.answer(self, True)

        def do_HEAD(self):
            state.answer(self, False)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}"
        yield state
        http.shutdown()


# ---------------------------------------------------------------- a URL in place of a path


def test_downloaded_once_with_its_digest(tmp_path, server):
    for _ in range(2):
        path = local(f"{server.url}/refs/stats.npz", tmp_path / "fid_stats", World())
    assert path == tmp_path / "fid_stats" / "stats.npz" and path.read_bytes() == DATA
    assert server.seen == [("GET", "/refs/stats.npz", 0)]
    assert (tmp_path / "fid_stats" / "stats.npz.sha256").read_text() == f"{DIGEST}  stats.npz\n"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path, server, ranges):
    server.breaks, server.ranges = (3 if ranges else 1), ranges
    assert local(f"{server.url}/stats.npz", tmp_path, World()).read_bytes() == DATA
    firsts = [first for _, _, first in server.seen]
    assert firsts == ([0, 640_000, 960_000, 1_120_000] if ranges else [0, 0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stats.npz", "stats.npz.sha256"]


@pytest.mark.parametrize("name", ["cut.npz", "gone.npz"])
def test_a_failed_download_leaves_no_file_of_that_name(tmp_path, server, name):
    server.says_more = 1000
    with pytest.raises(NeonError, match=r"cannot download .*put the file at"):
        local(f"{server.url}/{name}", tmp_path, World())
    assert not list(tmp_path.glob("*.npz"))


def test_a_rest_that_is_longer_than_the_file_is_thrown_away(tmp_path, server):
    (tmp_path / ".stats.npz.partial").write_bytes(DATA + b"more")
    assert local(f"{server.url}/stats.npz", tmp_path, World()).read_bytes() == DATA


def test_a_path_is_taken_as_it_is(tmp_path):
    assert local("some/where.npz", tmp_path, World()).as_posix() == "some/where.npz"


# ---------------------------------------------------------------- neon download, download_models.sh


ROWS = {"hub": "hf://some/repo@v1/file.bin", "plain": "{url}/file.bin"}


@pytest.fixture
def table(tmp_path, server, monkeypatch):
    """table(*rows): a checkout whose downloads.csv has these rows; the hub is the server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")

    def write(*rows):
        lines = ["group,path,source,size,sha256", *(row.format(url=server.url) for row in rows)]
        Path("downloads.csv").write_text("\n".join(lines) + "\n")

    return write


def failure(capfd, *words) -> list[str]:
    """Run a download that must fail; its lines on stderr."""
    with pytest.raises(SystemExit) as exit:
        neon("download", *words)
    assert exit.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return lines


@pytest.mark.parametrize("kind", ROWS)
def test_download_record_skip_verify(table, server, kind, capfd):
    """The first download fills in size and digest; then the file is checked, and one that differs is kept."""
    table(f"released,checkpoints/a.bin,{ROWS[kind]},,")
    path = Path("checkpoints/a.bin")
    neon("download")
    assert path.read_bytes() == DATA and [p.name for p in path.parent.iterdir()] == ["a.bin"]
    assert Path("downloads.csv").read_text().splitlines()[1].endswith(f",{len(DATA)},{DIGEST}")
    server.seen.clear()
    assert neon("download") == "checkpoints/a.bin is there and whole\n" and not server.seen
    for damaged in (DATA[:-1] + b"?", DATA[:-1]):
        path.write_bytes(damaged)
        assert "move it away" in failure(capfd)[0] and path.read_bytes() == damaged and not server.seen


def test_a_file_that_cannot_be_checked_is_kept_and_said_to_be_so(table, server):
    table("released,a.bin,{url}/a.bin,,")
    Path("a.bin").write_bytes(b"by hand")
    assert "not checked" in neon("download") and Path("a.bin").read_bytes() == b"by hand" and not server.seen
    assert Path("downloads.csv").read_text().endswith(",,\n")


@pytest.mark.parametrize("kind", ROWS)
def test_wrong_bytes_are_not_kept(table, server, kind, capfd):
    table(f"released,checkpoints/a.bin,{ROWS[kind]},{len(DATA)},{DIGEST}")
    for wrong in (DATA[:-1] + bytes([DATA[-1] ^ 1]), DATA[:-1]):
        server.data = wrong
        assert "nothing was kept" in failure(capfd)[0] and not list(Path("checkpoints").iterdir())
    server.data = DATA
    neon("download")
    assert Path("checkpoints/a.bin").read_bytes() == DATA


def test_the_hub_names_the_digest_of_a_file_that_is_not_known_yet(table, server, capfd):
    table(f"released,checkpoints/a.bin,{ROWS['hub']},,")
    server.digest = "0" * 64
    assert f"not {'0' * 64}" in failure(capfd)[0] and not list(Path("checkpoints").iterdir())
    assert {path for _, path, _ in server.seen} == {"/some/repo/resolve/v1/file.bin"}


def test_the_token_is_for_the_hub_alone(table, server):
    server.elsewhere = "/cdn/file.bin"
    table(f"released,a.bin,{ROWS['hub']},,", "released,b.bin,{url}/b.bin,,")
    neon("download")
    assert server.tokens == {"/some/repo/resolve/v1/file.bin": "Bearer secret", "/cdn/file.bin": None, "/b.bin": None}


def test_groups_names_and_errors(table, capfd):
    table(*(f"{group},{group}/{group}.bin,{{url}}/{group}.bin,," for group in GROUPS))
    neon("download")
    assert [group for group in GROUPS if Path(group).exists()] == ["released", "stats"]
    neon("download", "--base", "vae.bin")
    assert all(Path(group, f"{group}.bin").exists() for group in GROUPS)
    assert "neon download --list" in failure(capfd, "nonsense")[0]
    listed = neon("download", "--list", "--all")
    assert all(f"{group}/{group}.bin" in listed for group in GROUPS)


@pytest.mark.parametrize("kind", ROWS)
def test_offline(table, kind, capfd, monkeypatch):
    """Every file that cannot be had is named, with the place where to put it; the others are brought."""
    table(f"released,checkpoints/a.bin,{ROWS[kind].replace('file', 'gone')},,", "released,checkpoints/b.bin,{url}/b,,")
    found = failure(capfd)
    assert "put the file at checkpoints/a.bin" in found[0] and "1 of 2 files" in found[1]
    assert Path("checkpoints/b.bin").exists()
    table(f"released,checkpoints/a.bin,{ROWS[kind].replace('{url}', 'http://127.0.0.1:9')},,")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "put the file at checkpoints/a.bin" in failure(capfd)[0]


def test_the_script_goes_on_after_a_kill(table, server, tmp_path):
    table(f"released,checkpoints/a.bin,{ROWS['hub']},,")
    shutil.copy(ROOT / "download_models.sh", tmp_path)
    server.data, server.pause = os.urandom(2**20) * 20, 0.003
    server.digest = hashlib.sha256(server.data).hexdigest()
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = {"args": ["bash", tmp_path / "download_models.sh"], "env": environment, "cwd": "/"}
    process = subprocess.Popen(**command, start_new_session=True)
    partial, deadline = tmp_path / "checkpoints" / ".a.bin.partial", time.monotonic() + 60
    while (not partial.exists() or partial.stat().st_size < 2**20) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < partial.stat().st_size < len(server.data)
    server.seen.clear()
    server.pause = 0
    subprocess.run(**command, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "checkpoints" / "a.bin").read_bytes() == server.data and not partial.exists()
    assert [first > 0 for method, path, first in server.seen if method == "GET" and "resolve" in path] == [True]


def test_the_table_names_what_the_readme_and_the_commands_ask_for():
    rows = read_table(ROOT / "downloads.csv")
    paths = {row["path"] for row in rows}
    assert len(paths) == len(rows) and {row["group"] for row in rows} == set(GROUPS)
    assert sum(row["group"] == "released" for row in rows) == 8
    asked = re.findall(
        r"(?:checkpoints|fid_stats|pretrained)/[\w-]+\.(?:pth|pkl|npz|ckpt)", (ROOT / "README.md").read_text()
    )
    assert {name for name in asked if not any(path.endswith(name) for path in paths)} == set()
