"""Files from elsewhere, through download_models.sh and from a server that does not always behave."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import BIN, ROOT, neon
from server import COMMIT, DATA, DIGEST, serving

from neon import NeonError
from neon.fetch import GROUPS, local, read_table


@pytest.fixture
def server():
    with serving() as state:
        yield state


# ---------------------------------------------------------------- a URL in place of a path


def test_downloaded_once_and_nothing_else_is_left(tmp_path, server):
    for _ in range(2):
        path = local(f"{server.url}/refs/stats.npz", tmp_path / "fid_stats")
    assert path == tmp_path / "fid_stats" / "stats.npz" and path.read_bytes() == DATA
    assert server.seen == [("GET", "/refs/stats.npz", 0)] and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path, server, ranges):
    server.breaks, server.ranges = (3 if ranges else 1), ranges
    assert local(f"{server.url}/stats.npz", tmp_path).read_bytes() == DATA
    firsts = [first for _, _, first in server.seen]
    assert firsts == ([0, 640_000, 960_000, 1_120_000] if ranges else [0, 0])
    assert [p.name for p in tmp_path.iterdir()] == ["stats.npz"]


@pytest.mark.parametrize("name", ["cut.npz", "gone.npz", "nonsense.npz"])
def test_a_failed_download_leaves_no_file_of_that_name(tmp_path, server, name):
    server.says_more = 1000
    with pytest.raises(NeonError, match=r"cannot download .*put the file at"):
        local(f"{server.url}/{name}", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {".cut.npz.partial"}


def test_a_rest_that_is_longer_than_the_file_is_thrown_away(tmp_path, server):
    (tmp_path / ".stats.npz.partial").write_bytes(DATA + b"more")
    assert local(f"{server.url}/stats.npz", tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("name", [".stats.npz.partial", ".stats.npz.lock"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "folder"])
def test_what_others_have_put_there_is_not_written_to(tmp_path, server, name, kind):
    """The names of a download that may be resumed are known to all who can write into the folder."""
    (tmp_path / "precious").write_bytes(b"precious")
    there, folder = tmp_path / "here" / name, tmp_path / "here"
    folder.mkdir()
    make = {
        "link": lambda: there.symlink_to(tmp_path / "precious"),
        "dangling link": lambda: there.symlink_to(tmp_path / "new"),
        "second name": lambda: there.hardlink_to(tmp_path / "precious"),
        "pipe": lambda: os.mkfifo(there),
        "folder": there.mkdir,
    }
    make[kind]()
    with pytest.raises(NeonError, match=rf"{re.escape(name)}: not a regular file"):
        local(f"{server.url}/stats.npz", folder)
    assert (tmp_path / "precious").read_bytes() == b"precious" and not (tmp_path / "new").exists()
    assert not (folder / "stats.npz").exists()


def test_a_part_of_another_user_is_not_resumed(tmp_path, server, monkeypatch):
    (tmp_path / ".stats.npz.partial").write_bytes(b"theirs")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(NeonError, match=r"\.stats\.npz\.partial: is another user's; remove it"):
        local(f"{server.url}/stats.npz", tmp_path)


def test_a_download_that_has_no_room_says_so_first(tmp_path, server, monkeypatch):
    monkeypatch.setattr("neon.files.free_bytes", lambda path: 1000)
    with pytest.raises(NeonError, match=rf"needs {len(DATA):,} bytes, and the disk has 1,000 bytes free"):
        local(f"{server.url}/stats.npz", tmp_path)
    assert not list(tmp_path.glob("*.npz")) and size(tmp_path / ".stats.npz.partial") == 0


def test_a_path_is_taken_as_it_is(tmp_path):
    assert local("some/where.npz", tmp_path).as_posix() == "some/where.npz"


def test_a_url_of_the_table_is_a_row_like_any(table, server, tmp_path):
    """The file has its place and its digest in the table, which the first download fills in."""
    table("stats,stats/ref.npz,{url}/ref.npz,,", "stats,stats/wrong.npz,{url}/wrong.npz,," + "0" * 64)
    assert local(f"{server.url}/ref.npz", "elsewhere") == Path("stats/ref.npz") and not Path("elsewhere").exists()
    assert [row["sha256"] for row in read_table()] == [DIGEST, "0" * 64]
    with pytest.raises(NeonError, match="nothing was kept"):
        local(f"{server.url}/wrong.npz", "stats")
    assert os.listdir("stats") == ["ref.npz"]
    Path("stats/ref.npz").write_bytes(DATA[1:])
    with pytest.raises(NeonError, match="move it away"):
        local(f"{server.url}/ref.npz", "stats")


# ---------------------------------------------------------------- several processes


def start(code: str) -> subprocess.Popen:
    """Python in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})


def fetching(server, folder) -> str:
    return f"from neon.fetch import local; local({server.url + '/a.bin'!r}, {str(folder)!r})"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_of_four_processes_one_downloads(tmp_path, server):
    server.pause = 0.05
    processes = [start(fetching(server, tmp_path)) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert server.seen == [("GET", "/a.bin", 0)]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == DATA


def test_a_killed_process_blocks_nobody(tmp_path, server):
    """The one that waits takes over and resumes what the killed one began."""
    server.data, server.pause = os.urandom(2**20) * 20, 0.02
    first = start(fetching(server, tmp_path))
    wait_for(lambda: size(tmp_path / ".a.bin.partial"))
    second = start(fetching(server, tmp_path))
    time.sleep(0.5)  # until it waits; if it does not yet, the test is weaker but does not fail
    first.kill()
    server.pause = 0
    assert first.wait(60) == -signal.SIGKILL and second.wait(60) == 0
    assert (tmp_path / "a.bin").read_bytes() == server.data and [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert [byte > 0 for _, _, byte in server.seen] == [False, True]


def test_two_downloads_at_a_time_keep_each_others_digests(table, server):
    """Both have read the table before either writes it: the server answers when both ask."""
    server.meet = threading.Barrier(2)
    table(*(f"released,{name}.bin,{{url}}/{name}.bin,," for name in "abc"))
    processes = [start(f"from neon.cli import main; main(['download', '{name}.bin'])") for name in "ac"]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [row["sha256"] for row in read_table()] == [DIGEST, "", DIGEST]
    assert sorted(os.listdir()) == ["a.bin", "c.bin", "downloads.csv"]


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


def test_the_first_download_pins_the_commit_that_the_hub_announces(table, server):
    """A branch moves; its commit, once known, is asked for from then on."""
    table("released,a.bin,hf://some/repo@main/a.bin,,", "vae,b.bin,hf://some/repo@main/sub/b.bin,,", "base,c,{url}/c,,")
    listed = [line.rsplit(", ", 1)[1] for line in neon("download", "--list", "--all").splitlines()]
    assert listed == ["not pinned"] * 3
    neon("download", "--all")
    assert [row["source"] for row in read_table()] == [
        f"hf://some/repo@{COMMIT}/a.bin",
        f"hf://some/repo@{COMMIT}/sub/b.bin",
        f"{server.url}/c",
    ]
    listed = [line.rsplit(", ", 1)[1] for line in neon("download", "--list", "--all").splitlines()]
    assert listed == ["pinned"] * 3
    assert {path for method, path, _ in server.seen if method == "GET"} == {
        f"/some/repo/resolve/{COMMIT}/a.bin",
        f"/some/repo/resolve/{COMMIT}/sub/b.bin",
        "/c",
    }
    Path("a.bin").unlink()
    server.seen.clear()
    neon("download", "a.bin")
    assert {path for _, path, _ in server.seen} == {f"/some/repo/resolve/{COMMIT}/a.bin"}


@pytest.mark.parametrize("commit", [None, "main"])
def test_a_hub_that_announces_no_commit_pins_no_revision(table, server, commit):
    server.commit = commit
    table("released,a.bin,hf://some/repo@main/a.bin,,")
    neon("download")
    assert [(row["source"], row["sha256"]) for row in read_table()] == [("hf://some/repo@main/a.bin", DIGEST)]


@pytest.mark.parametrize(
    ("revision", "digest", "pinned"),
    [("main", "", False), ("v1", "", False), (COMMIT, "", True), ("main", DIGEST, True)],
)
def test_a_commit_or_a_digest_pins_a_row(table, revision, digest, pinned):
    table(f"released,a.bin,hf://some/repo@{revision}/a.bin,,{digest}")
    assert neon("download", "--list").endswith(", pinned\n" if pinned else ", not pinned\n")


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
    assert {path for _, path, _ in server.seen} == {f"/some/repo/resolve/{at}/file.bin" for at in ("v1", COMMIT)}


def test_the_token_is_for_the_hub_alone(table, server):
    server.elsewhere = "/cdn/file.bin"
    table(f"released,a.bin,{ROWS['hub']},,", "released,b.bin,{url}/b.bin,,")
    neon("download")
    hub = {f"/some/repo/resolve/{at}/file.bin": "Bearer secret" for at in ("v1", COMMIT)}
    assert server.tokens == {**hub, "/cdn/file.bin": None, "/b.bin": None}


@pytest.mark.parametrize(
    "source",
    [
        "hf://some/repo@../../other/file.bin",
        "hf://some/repo@../file.bin",
        "hf://some/repo@v1%2F../file.bin",
        "hf://some/repo@v1/../../main/file.bin",
        "hf://some/..@v1/file.bin",
        "hf://../repo@v1/file.bin",
        "hf://some/repo@/file.bin",
        "hf://some/repo@v1/a//file.bin",
        "hf://some/repo@v1/file.bin?download=1",
        "hf://some/repo@v1/",
        "hf://some",
    ],
)
def test_a_source_does_not_lead_elsewhere_on_the_hub(table, server, capfd, source):
    table(f"released,a.bin,{source},,")
    assert f"{source}: not hf://OWNER/REPO@REVISION/FILE" in failure(capfd)[0]
    assert not server.seen and not Path("a.bin").exists()


def test_a_table_as_a_spreadsheet_writes_it(table, server):
    """With a byte-order mark, which does not come back, and line ends of Windows."""
    table("released,a.bin,{url}/a.bin,,")
    path = Path("downloads.csv")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    neon("download")
    assert Path("a.bin").read_bytes() == DATA
    assert path.read_bytes().startswith(b"group,path") and [row["sha256"] for row in read_table()] == [DIGEST]


@pytest.mark.parametrize(
    "text",
    [
        b'released,"a.bin,{url}/a.bin,,\n',
        b'released,"a"b.bin,x,,\n',
        b"released,a\xff.bin,x,,\n",
        b"released," + b"a" * 200_000 + b",x,,\n",
        b"released,a.bin,x,,,,,,\n",
        b"released,a.bin,x\n",
        b"nonsense,a.bin,x,,\n",
    ],
)
def test_a_table_that_is_none(tmp_path, monkeypatch, capfd, text):
    monkeypatch.chdir(tmp_path)
    Path("downloads.csv").write_bytes(b"group,path,source,size,sha256\n" + text)
    (line,) = failure(capfd)
    assert line.startswith("error: downloads.csv: not a table of group, path") and len(line) < 400


def test_groups_names_and_errors(table, capfd):
    table(*(f"{group},{group}/{group}.bin,{{url}}/{group}.bin,," for group in GROUPS))
    neon("download")
    assert [group for group in GROUPS if Path(group).exists()] == ["released", "stats"]
    neon("download", "--base", "vae.bin")
    assert all(Path(group, f"{group}.bin").exists() for group in GROUPS if group != "fashion")
    assert "neon download --list" in failure(capfd, "nonsense")[0]
    listed = neon("download", "--list", "--all")
    assert all(f"{group}/{group}.bin" in listed for group in GROUPS)


@pytest.mark.parametrize("kind", ROWS)
def test_offline(table, kind, capfd, monkeypatch):
    """Every file that cannot be had is named, with the place where to put it; the others are downloaded."""
    table(f"released,checkpoints/a.bin,{ROWS[kind].replace('file', 'gone')},,", "released,checkpoints/b.bin,{url}/b,,")
    found = failure(capfd)
    assert "put the file at checkpoints/a.bin" in found[0] and "1 of 2 files" in found[1]
    assert Path("checkpoints/b.bin").exists()
    table(f"released,checkpoints/a.bin,{ROWS[kind].replace('{url}', 'http://127.0.0.1:9')},,")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "put the file at checkpoints/a.bin" in failure(capfd)[0]


def test_the_script_resumes_after_a_kill(table, server, tmp_path):
    table(f"released,checkpoints/a.bin,{ROWS['hub']},,")
    shutil.copy(ROOT / "download_models.sh", tmp_path)
    server.data, server.pause = os.urandom(2**20) * 20, 0.003
    server.digest = hashlib.sha256(server.data).hexdigest()
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = {"args": ["bash", tmp_path / "download_models.sh"], "env": environment, "cwd": "/"}
    process = subprocess.Popen(**command, start_new_session=True)
    partial = tmp_path / "checkpoints" / ".a.bin.partial"
    wait_for(lambda: size(partial) >= 2**20)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < partial.stat().st_size < len(server.data)
    server.seen.clear()
    server.pause = 0
    subprocess.run(**command, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "checkpoints" / "a.bin").read_bytes() == server.data
    assert os.listdir(partial.parent) == ["a.bin"]
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
