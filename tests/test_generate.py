"""The synthetic set: the same files however they were made, and no other set overwritten."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from processes import error_of, files, finish, kill_when, neon, start, torchrun

import edm.family
from neon import NeonError
from neon.data import ImageSet, image_name
from neon.distributed import World
from neon.generate import generate
from neon.weights.checkpoint import load_weights, save_safetensors

SEEDS = "990-1039"


def command(mini, out, batch_size=16, seeds=SEEDS, num_steps=4):
    options = ("--seeds", seeds, "--num_steps", num_steps, "--batch_size", batch_size)
    return ["generate", "--family", "edm", "--model", mini.base, *options, "--out", out]


@pytest.fixture(scope="module")
def unbroken(mini, tmp_path_factory):
    """The set of SEEDS, made by one process in batches of 16."""
    out = tmp_path_factory.mktemp("generated") / "S"
    neon(*command(mini, out))
    return out


def test_images_and_labels(mini, unbroken):
    seeds = torch.arange(990, 1040)
    model = edm.family.load(mini.base, device="cpu")
    labels = edm.family.labels(model, seeds)
    data = ImageSet(unbroken)
    assert data.names == [image_name(seed) for seed in range(990, 1040)]
    assert data.labels.tolist() == labels.tolist() and len(set(labels.tolist())) > 5
    assert json.loads((unbroken / "dataset.json").read_text())["labels"][3] == [
        "00000/img00000993.png",
        labels[3].item(),
    ]
    images = edm.family.sample(model, seeds, labels, num_steps=4)
    assert torch.equal(data.images(range(50)), images)
    assert {p.parent.name for p in unbroken.glob("*/*.png")} == {"00000", "00001"}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_batch_size(mini, unbroken, tmp_path, batch_size):
    neon(*command(mini, tmp_path / "S", batch_size))
    assert files(tmp_path / "S") == files(unbroken)


def test_two_processes(mini, unbroken, tmp_path):
    torchrun(2, "edm/generate_dataset.py", *command(mini, tmp_path / "S")[3:])
    assert files(tmp_path / "S") == files(unbroken)


# ---------------------------------------------------------------- as .zip files


@pytest.fixture(scope="module")
def sharded(mini, tmp_path_factory):
    """The same set, 20 images per .zip."""
    out = tmp_path_factory.mktemp("sharded") / "S"
    neon(*command(mini, out), "--shard", 20)
    return out


def test_shards_are_the_same_set(unbroken, sharded):
    assert sorted(files(sharded)) == ["00000990.zip", "00001010.zip", "00001030.zip", "dataset.json", "generate.json"]
    one, other = ImageSet(unbroken), ImageSet(sharded)
    assert one.names == other.names and torch.equal(one.labels, other.labels)
    assert torch.equal(one.images(range(50)), other.images(range(50)))
    assert len(ImageSet(sharded / "00001030.zip")) == 10  # each is a set that EDM's code reads
    with zipfile.ZipFile(sharded / "00000990.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_shards_of_two_processes(mini, sharded, tmp_path):
    torchrun(2, "edm/generate_dataset.py", *command(mini, tmp_path / "S", batch_size=7)[3:], "--shard", 20)
    assert files(tmp_path / "S") == files(sharded)


def test_shards_killed_and_started_again(mini, sharded, tmp_path):
    """Between two images; and after a .zip was written, before the last of its images was deleted."""
    out = tmp_path / "S"
    making = [*command(mini, out, batch_size=1), "--shard", 20]
    kill_when(lambda: (out / "00000990.zip").exists() and len(list(out.glob("00001/*.png"))) >= 3, start(*making))
    kept = (out / "00000990.zip").stat().st_mtime_ns
    assert not (out / "dataset.json").exists()
    with pytest.raises(NeonError, match="not finished"):
        ImageSet(out)
    (out / "00000").mkdir(exist_ok=True)
    (out / "00000" / "img00000991.png").write_bytes(b"left")
    finish(start(*making))
    assert files(out) == files(sharded) and (out / "00000990.zip").stat().st_mtime_ns == kept
    neon(*making)
    assert files(out) == files(sharded)


def test_shards_are_part_of_what_a_set_is(mini, sharded):
    assert "holds another set (shard differs)" in error_of(*command(mini, sharded))


def test_damaged_shards(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "S")
    (tmp_path / "S" / "00001010.zip").write_bytes(b"PK")
    with pytest.raises(NeonError, match=r"00001010\.zip: not a zip file"):
        ImageSet(tmp_path / "S")


# ---------------------------------------------------------------- killed


def test_killed_and_started_again(mini, unbroken, tmp_path):
    out = tmp_path / "S"

    def made():
        return {p: p.stat().st_mtime_ns for p in out.glob("*/img*.png")}

    for images in (3, 12):  # one image at a time, so that there is time to kill
        kill_when(lambda images=images: len(made()) >= images, start(*command(mini, out, batch_size=1)))
    kept = made()
    assert 12 <= len(kept) < 50 and not (out / "dataset.json").exists()
    kept[next(iter(kept))] = None
    next(iter(kept)).unlink()  # one that got lost
    finish(start(*command(mini, out)))
    assert files(out) == files(unbroken)
    assert all(made()[path] == mtime for path, mtime in kept.items() if mtime)


def test_a_finished_set_stays_as_it_is(mini, unbroken):
    before = {p: p.stat().st_mtime_ns for p in unbroken.glob("*/img*.png")}
    content = files(unbroken)
    neon(*command(mini, unbroken))
    assert {p: p.stat().st_mtime_ns for p in unbroken.glob("*/img*.png")} == before
    assert files(unbroken) == content


def test_other_sets_need_another_folder(mini, unbroken, tmp_path):
    content = files(unbroken)
    for name, other in {
        "seeds": command(mini, unbroken, seeds="990-1040"),
        "num_steps": command(mini, unbroken, num_steps=5),
        "solver": [*command(mini, unbroken), "--solver", "euler"],
        "dtype": [*command(mini, unbroken), "--precision", "bfloat16"],
        "base_sha256": [*command(mini, unbroken), "--model", mini.snapshots[0]],
    }.items():
        assert error_of(*other) == f"error: {unbroken} holds another set ({name} differs); choose another --out"
    assert files(unbroken) == content


def test_replace(mini, tmp_path):
    """Another set gives way to this one; this one goes on."""
    out = tmp_path / "S"
    neon(*command(mini, out, seeds="0-9"))
    neon(*command(mini, out, seeds="5-12"), "--replace")
    assert [p.name for p in sorted(out.glob("*/*"))] == [f"img{i:08d}.png" for i in range(5, 13)]
    (out / "00000" / "img00000005.png").unlink()
    kept = (out / "00000" / "img00000006.png").stat().st_mtime_ns
    neon(*command(mini, out, seeds="5-12"), "--replace")
    assert len(list(out.glob("*/*"))) == 8 and (out / "00000" / "img00000006.png").stat().st_mtime_ns == kept
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    assert "not empty" in error_of(*command(mini, tmp_path / "other"), "--replace")


def test_folders_that_are_taken(mini, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "generate.json").write_text("[1")
    before = files(tmp_path)
    assert "taken is not empty and not a set of generated images" in error_of(*command(mini, taken))
    assert error_of(*command(mini, tmp_path / "file")) == f"error: {tmp_path / 'file'}: Not a directory"
    assert "generate.json: not JSON" in error_of(*command(mini, tmp_path / "odd"))
    assert files(tmp_path) == before
    (tmp_path / "empty").mkdir()
    neon(*command(mini, tmp_path / "empty", seeds="1"))
    assert len(ImageSet(tmp_path / "empty")) == 1


def test_unlabelled_and_colour_images(tmp_path):
    def sample(seeds):
        return seeds.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 5)

    generate(sample, torch.tensor([7, 3]), lambda seeds: None, tmp_path / "S", identity={}, batch=1, world=World())
    data = ImageSet(tmp_path / "S")
    assert data.labels is None and json.loads((tmp_path / "S" / "dataset.json").read_text()) == {"labels": None}
    assert torch.equal(data.images([0, 1])[:, 0, 0, 0], torch.tensor([3, 7], dtype=torch.uint8))
    assert data.shape == (3, 4, 5)


def test_what_cannot_be_made(mini, tmp_path):
    state = load_weights(mini.base)
    broken = next(name for name, tensor in state.items() if tensor.is_floating_point() and tensor.ndim > 1)
    state[broken].view(-1)[1] = float("nan")
    metadata = edm.family.metadata(edm.family.load(mini.base, device="cpu"))
    save_safetensors(tmp_path / "nan.safetensors", state, metadata)
    nan = [*command(mini, tmp_path / "S"), "--model", tmp_path / "nan.safetensors"]
    assert error_of(*nan) == f"error: {tmp_path / 'nan.safetensors'}: {broken} is not finite"
    assert "every seed once" in error_of(*command(mini, tmp_path / "S", seeds="1,2,1"))
    assert "num_steps must be at least 1" in error_of(*command(mini, tmp_path / "S", num_steps=0))
    assert not list(tmp_path.glob("S/*/*"))


def test_no_image_is_half_written(tmp_path, monkeypatch):
    """The disk is full in the middle of the third image."""
    whole, left = Path.write_bytes, iter(range(2))

    def write_bytes(path, data):
        whole(path, data if next(left, None) is not None else data[:20])
        if len(path.read_bytes()) == 20:
            raise OSError(28, "No space left on device", str(path))

    def sample(seeds):
        return torch.zeros(len(seeds), 1, 2, 2, dtype=torch.uint8)

    def make():
        generate(sample, torch.arange(4), lambda seeds: None, tmp_path / "S", identity={}, batch=1, world=World())

    with monkeypatch.context() as patched, pytest.raises(NeonError, match="the disk is full"):
        patched.setattr(Path, "write_bytes", write_bytes)
        make()
    assert sorted(files(tmp_path / "S")) == ["00000/img00000000.png", "00000/img00000001.png", "generate.json"]
    make()
    assert len(ImageSet(tmp_path / "S").images(range(4))) == 4


def test_an_error_keeps_what_is_made(tmp_path):
    def sample(seeds):
        if 3 in seeds:
            raise NeonError("no more")
        return torch.zeros(len(seeds), 1, 2, 2, dtype=torch.uint8)

    with pytest.raises(NeonError, match="no more"):
        generate(sample, torch.arange(6), lambda seeds: seeds, tmp_path / "S", identity={}, batch=2, world=World())
    assert sorted(p.name for p in (tmp_path / "S").rglob("*.png")) == ["img00000000.png", "img00000001.png"]
    assert not (tmp_path / "S" / "dataset.json").exists() and not list((tmp_path / "S").rglob("*.partial"))
