"""Weights survive a trip through every format, bad files end in one clear line, and nothing is left behind."""

import argparse
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neon import NeonError
from neon.files import atomic, read_json, sha256
from neon.weights.checkpoint import (
    load_into,
    load_weights,
    open_weights,
    save_safetensors,
    write_safetensors,
    write_weights,
)

EDM = Path(__file__).parent / "golden" / "edm"


def state(seed=0):
    """Names out of order, odd sizes before wide numbers, no and zero dimensions, and one tensor of over a megabyte."""
    g = torch.Generator().manual_seed(seed)
    return {
        "z.weight": torch.randn(5, 3, generator=g),
        "a.flags": torch.tensor([True, False, True]),
        "m.bytes": torch.arange(5, dtype=torch.uint8),
        "a.double": torch.randn(3, generator=g, dtype=torch.float64),
        "m.half": torch.randn(7, generator=g).half(),
        "c.bf16": torch.randn(1, 3, generator=g).bfloat16(),
        "steps": torch.tensor(7),
        "scale": torch.tensor(-0.0),
        "none": torch.empty(0, 4),
        "c.int8": torch.tensor([[-1]], dtype=torch.int8),
        "c.int16": torch.tensor([-2], dtype=torch.int16),
        "c.int32": torch.tensor([-3], dtype=torch.int32),
        "big": torch.randn(600, 600, generator=g),
    }


def shards(folder, tensors, metadata=None):
    """A folder as the hub's libraries write it: two shards and an index."""
    folder.mkdir()
    names = list(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def args():
    return argparse.Namespace(lr=1e-4, model="xar_b", betas=[0.9, 0.95])


def inside_ema(s):
    return {"model": {name: tensor + 1 for name, tensor in s.items()}, "model_ema": s, "epoch": 3}


# How public checkpoints wrap a state dict, and how it is reached again.
NESTINGS = {
    "flat.pth": (lambda s: s, lambda tree: tree),
    "flat.ckpt": (lambda s: s, lambda tree: tree),
    "ema.pth": (inside_ema, lambda tree: tree["model_ema"]),
    "trainer.pth": (lambda s: {"trainer": {"var_wo_ddp": s, "n": [1, 2]}}, lambda tree: tree["trainer"]["var_wo_ddp"]),
    "args.pt": (lambda s: {"state_dict": s, "args": args(), "note": None}, lambda tree: tree["state_dict"]),
}
FORMATS = [*NESTINGS, "legacy.pth", "file.safetensors", "shards"]


def save(folder, form, tensors, metadata=None):
    """Write with the formats' own libraries."""
    path = folder / form
    if form == "shards":
        shards(path, tensors, metadata)
    elif form == "file.safetensors":
        save_file(tensors, path, metadata)
    elif form == "legacy.pth":
        torch.save({"model": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(NESTINGS[form][0](tensors), path)
    return path


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def copy(source, target):
    with open_weights(source) as weights:
        write_weights(target, weights, weights.items())
    return target


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("form", FORMATS)
def test_reads_what_other_libraries_write(tmp_path, form):
    with open_weights(save(tmp_path, form, state())) as weights:
        assert len(weights) == len(state()) and "big" in weights and "other" not in weights
        for name, tensor in state().items():
            assert weights.spec(name) == (tensor.dtype, tuple(tensor.shape))
        assert_same(weights, state())
        with pytest.raises(KeyError):
            weights["other"]


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip(tmp_path, form):
    source = save(tmp_path, form, state(), {"format": "pt"} if "pt" not in form else None)
    before = everything(tmp_path)
    out = copy(source, tmp_path / f"out{source.suffix}")
    with open_weights(source) as a, open_weights(out) as b:
        assert list(a) == list(b) and a.metadata == b.metadata and a.format == b.format
        assert_same(b, state())
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("form", [*NESTINGS, "legacy.pth"])
def test_torch_reads_the_copy_as_it_reads_the_source(tmp_path, form):
    source = save(tmp_path, form, state())
    out = copy(source, tmp_path / f"out{source.suffix}")
    with torch.serialization.safe_globals([argparse.Namespace] if "args" in form else []):
        old, new = (torch.load(path, weights_only=True) for path in (source, out))
    unwrap = NESTINGS[form][1] if form in NESTINGS else lambda tree: tree["model"]
    assert list(old) == list(new) and list(unwrap(new)) == list(state())
    assert_same(unwrap(new), state())
    for key in ("epoch", "args", "note"):
        assert old.get(key) == new.get(key)
    if "trainer" in old:
        assert new["trainer"]["n"] == [1, 2]
    if "model_ema" in old:
        assert_same(new["model"], old["model"])
    assert out.stat().st_size < source.stat().st_size + 10_000


def test_safetensors_keeps_order_and_alignment(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, state(), {"class": "Net", "kwargs": '{"a": "é"}'})
    assert_same(load_file(path), state())
    with open_weights(path) as weights:
        assert list(weights) == list(state())
        assert weights.metadata == {"class": "Net", "kwargs": '{"a": "é"}'}
    with path.open("rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(size))
    assert size % 8 == 0
    for name, tensor in state().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    copied = copy(path, tmp_path / "y.safetensors")
    assert path.read_bytes() == copied.read_bytes()


def test_shards_keep_file_names_and_index(tmp_path):
    source = save(tmp_path, "shards", state(), {"format": "pt"})
    for given in (source, source / "model.safetensors.index.json"):
        out = copy(given, tmp_path / f"out-w1.5-{given.name[:3]}")
        assert everything(out) == everything(source)
        index = "model.safetensors.index.json"
        assert read_json(out / index) == read_json(source / index)
        for file in source.glob("*.safetensors"):
            assert_same(load_file(out / file.name), load_file(file))


def test_tensors_may_come_in_any_order_and_from_anywhere(tmp_path):
    wide = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": wide.t(), "b": wide[:, 1], "c": torch.nn.Parameter(torch.ones(2))}
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, reversed(tensors.items()), {})
    found = load_weights(tmp_path / "x.safetensors")
    assert list(found) == ["a", "b", "c"]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


def test_pickle_is_read_and_written_as_safetensors(tmp_path):
    out = copy(EDM / "tiny_edm.pkl", tmp_path / "out.safetensors")
    with open_weights(EDM / "tiny_edm.pkl") as weights, open_weights(out) as written:
        assert list(weights) == list(written) and len(weights) > 10
        assert_same(written, weights)
        assert written.metadata == weights.metadata
        assert json.loads(written.metadata["init_kwargs"])["img_resolution"] > 0


def test_names_are_known_without_reading(tmp_path):
    """A closed file still knows its names and shapes: to ask for them costs no tensor."""
    weights = open_weights(save(tmp_path, "file.safetensors", state()))
    weights.close()
    assert "big" in weights and set(weights) == set(state())
    assert weights.spec("big") == (torch.float32, (600, 600))
    with pytest.raises(ValueError):
        weights["big"]


def test_key_chooses_the_state_dict(tmp_path):
    path = save(tmp_path, "ema.pth", state())
    assert torch.equal(load_weights(path)["z.weight"], state()["z.weight"])
    assert torch.equal(load_weights(path, "model")["z.weight"], state()["z.weight"] + 1)
    with open_weights(path, "model") as weights:
        write_weights(tmp_path / "out.pth", weights, ((name, t * 0) for name, t in weights.items()))
    tree = torch.load(tmp_path / "out.pth", weights_only=True)
    assert not tree["model"]["z.weight"].any() and tree["epoch"] == 3
    assert_same(tree["model_ema"], state())
    with pytest.raises(NeonError, match=r"no dict of tensors at 'trainer.x'; it has 3 entries: model, model_ema, ep"):
        open_weights(path, "trainer.x")


def test_output_may_replace_its_input(tmp_path):
    for form in ("file.safetensors", "flat.pth"):
        path = save(tmp_path, form, state())
        with open_weights(path) as weights:
            write_weights(path, weights, ((n, t * 2 if n == "big" else t) for n, t in weights.items()))
        assert torch.equal(load_weights(path)["big"], state()["big"] * 2)


# ---------------------------------------------------------------- bad files


def refuse(path, match=".", **options):
    """Reading all of it ends in a NeonError of one line that names the file."""
    with pytest.raises(NeonError, match=match) as caught:
        load_weights(path, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.pkl", "x.safetensors", "x.safetensors.index.json"])
def test_missing_empty_and_text_files(tmp_path, name):
    path = tmp_path / name
    assert str(path) in refuse(path, "no such file")
    for content in (b"", b"\0", b"<html>Not Found</html>\n" * 20, b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        assert str(path) in refuse(path)


@pytest.mark.parametrize("form", ["flat.pth", "legacy.pth", "file.safetensors", "shards", "tiny_edm.pkl"])
def test_truncated_files(tmp_path, form):
    if form == "tiny_edm.pkl":
        source = shutil.copy(EDM / form, tmp_path)
    else:
        source = save(tmp_path, form, state())
    victim = Path(source) / "model-2-of-2.safetensors" if form == "shards" else Path(source)
    content = victim.read_bytes()
    size = len(content)
    for cut in (1, 7, 8, 9, 100, size // 4, size // 3, size // 2, size * 9 // 10, size - 100, size - 23, size - 1):
        victim.write_bytes(content[:cut])
        assert victim.name in refuse(source)
    victim.write_bytes(content)
    load_weights(source)


@pytest.mark.parametrize("form", ["flat.pth", "legacy.pth", "file.safetensors", "tiny_edm.pkl"])
def test_flipped_bytes_end_in_data_or_in_one_line(tmp_path, form):
    source = Path(shutil.copy(EDM / form, tmp_path)) if form == "tiny_edm.pkl" else save(tmp_path, form, state())
    content = source.read_bytes()
    g = torch.Generator().manual_seed(0)
    for at in torch.randint(min(len(content), 2500), (60,), generator=g).tolist():
        source.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            load_weights(source)
        except NeonError as error:
            assert "\n" not in str(error)


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["x.pth", "x.ckpt", "x.pkl"])
def test_nothing_in_a_file_is_run(tmp_path, name):
    canary, path = tmp_path / "canary", tmp_path / name
    evil = Evil(f"touch {canary}")
    with path.open("wb") as f:
        pickle.dump({"ema": evil, "a": torch.ones(1)}, f)
    refuse(path, "refused|refers to")
    if name != "x.pkl":
        for zipped in (True, False):
            torch.save({"a": torch.ones(1), "args": evil}, path, _use_new_zipfile_serialization=zipped)
            assert "system, which is not data" in refuse(path)
    torch.load(path, weights_only=False) if name != "x.pkl" else pickle.loads(path.read_bytes())
    assert canary.exists(), "the file is harmless, so this test shows nothing"


def test_safetensors_with_a_huge_or_lying_header(tmp_path):
    path = tmp_path / "x.safetensors"
    for size in (2**63, 2**40, 101_000_000, 100):
        path.write_bytes(struct.pack("<Q", size) + b'{"a":{}}')
        refuse(path)
    for entry in (
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]},
        {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1]},
        [],
    ):
        header = json.dumps({"a": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        refuse(path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "not the name of a .safetensors file next to it"),
        ({"a": "/etc/passwd"}, "not the name of"),
        ({"a": "sub/model.safetensors"}, "not the name of"),
        ({"a": ".."}, "not the name of"),
        ({"a": ""}, "not the name of"),
        ({"a": 5}, "not the name of"),
        ({"a": "gone.safetensors"}, "gone.safetensors: no such file"),
        ({"other": "model.safetensors"}, "other is missing, though the index says"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_index_stays_in_its_folder(tmp_path, weight_map, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tmp_path / "outside.safetensors", folder / "model.safetensors"):
        save_file({"a": torch.ones(1)}, path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refuse(folder, message)
    refuse(index, message)


def test_folders_and_indices_that_are_none(tmp_path):
    refuse(tmp_path, "0 files named")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    refuse(tmp_path, "2 files named")
    index = tmp_path / "x.index.json"
    for content in ("[]", "3", "{", "[" * 100_000, "\udcff"):
        index.write_bytes(content.encode(errors="surrogateescape"))
        refuse(index, "no weight_map|not JSON")


def test_files_without_a_state_dict(tmp_path):
    path = tmp_path / "x.pth"
    for tree, message in (
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({}, "0 entries: none"),
        (
            {"epoch": 1, "model": {"a": torch.ones(1), "b": 2}},
            "2 entries: epoch, model .choose one with --key, or",
        ),
        ({0: torch.ones(1)}, "no dict of tensors"),
        (dict.fromkeys(map(str, range(5000))), "5000 entries: 0, 1, 2, 3, 4, 5, 6, 7 "),
    ):
        torch.save(tree, path)
        refuse(path, message)


def test_unknown_kinds(tmp_path):
    for name in ("x.bin", "x", "x.pth.tar", "x.zip"):
        (tmp_path / name).write_bytes(b"")
        refuse(tmp_path / name, "unknown kind of checkpoint")
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", "a is of dtype F8_E4M3, which is not supported")


def test_zip_without_a_checkpoint(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("readme.txt", "hello")
    refuse(path, "not a readable torch checkpoint")


# ---------------------------------------------------------------- writing whole or not at all


@pytest.mark.parametrize(
    ("form", "out", "kind"),
    [
        ("flat.pth", "x.safetensors", ".pth or .pt or .ckpt"),
        ("flat.pth", "x", ".pth or .pt or .ckpt"),
        ("file.safetensors", "x.pth", ".safetensors"),
        ("file.safetensors", "x", ".safetensors"),
        ("shards", "x.safetensors", "a folder of shards"),
        ("shards", "x.pth", "a folder of shards"),
    ],
)
def test_output_suffix_must_fit(tmp_path, form, out, kind):
    source = save(tmp_path, form, state())
    before = everything(tmp_path)
    with pytest.raises(NeonError, match=f"x.*: weights from {source.name} are written as {kind}"):
        copy(source, tmp_path / "new" / out)
    assert everything(tmp_path) == before
    with pytest.raises(NeonError, match=r"written as \.safetensors"):
        copy(EDM / "tiny_edm.pkl", tmp_path / "new" / "x.pkl")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("problem", [NeonError("halfway"), KeyboardInterrupt(), "wrong shape", "too few"])
def test_an_error_halfway_leaves_nothing(tmp_path, form, problem):
    source = save(tmp_path, form, state())
    out = tmp_path / f"out{source.suffix}"
    if form != "shards":
        out.write_bytes(b"old")
    before = everything(tmp_path)

    def tensors(weights):
        pairs = list(weights.items())
        yield from pairs[:-2]
        if problem == "wrong shape":
            yield pairs[-2][0], torch.ones(99)
            yield pairs[-1]
        elif problem != "too few":
            raise problem

    with open_weights(source) as weights, pytest.raises(BaseException) as caught:
        write_weights(out, weights, tensors(weights))
    assert isinstance(caught.value, NeonError | KeyboardInterrupt)
    assert everything(tmp_path) == before
    assert form == "shards" or out.read_bytes() == b"old"


def test_shards_never_replace_a_folder(tmp_path):
    source, out = save(tmp_path, "shards", state()), tmp_path / "results"
    out.mkdir()
    (out / "precious.txt").write_text("years of work")
    with pytest.raises(NeonError, match="results: exists"):
        copy(source, out)
    assert everything(out) == ["precious.txt"]


def test_dtypes_that_cannot_be_written(tmp_path):
    torch.save({"a": torch.ones(2), "freqs": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pth")
    before = everything(tmp_path)
    with pytest.raises(NeonError, match=r"freqs: torch.complex64 is not supported"):
        copy(tmp_path / "x.pth", tmp_path / "y.pth")
    assert everything(tmp_path) == before


def test_atomic(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    with atomic(path) as partial:
        partial.write_text("one")
        assert not path.exists() and partial.parent == path.parent
    with pytest.raises(ZeroDivisionError), atomic(path) as partial:
        partial.write_text("two")
        raise ZeroDivisionError
    assert path.read_text() == "one" and everything(tmp_path) == ["sub", "sub/file.txt"]

    with atomic(path) as partial:
        partial.write_text("three")
    assert path.read_text() == "three" and everything(tmp_path) == ["sub", "sub/file.txt"]

    with atomic(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
    assert everything(tmp_path / "folder") == ["a"]


def test_sha256_of_files_and_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "a" / "sub" / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    (tmp_path / "b" / "sub" / "x").rename(tmp_path / "b" / "sub" / "y")
    assert sha256(tmp_path / "a") != sha256(tmp_path / "b")


# ---------------------------------------------------------------- into a network


def test_load_into():
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    wanted = {name: torch.rand_like(t.float()).to(t.dtype) for name, t in network.state_dict().items()}
    load_into(network, {name: t.double() for name, t in wanted.items()}, "x.pth")
    assert_same(network.state_dict(), wanted)

    for change, message in (
        ({"0.weight": torch.ones(3, 3)}, r"x.pth: 0.weight has shape \(3, 3\), this network needs \(3, 2\)"),
        ({"extra": torch.ones(1)}, "x.pth: extra is not of this network"),
    ):
        with pytest.raises(NeonError, match=message):
            load_into(network, wanted | change, "x.pth")
    with pytest.raises(NeonError, match=r"x.pth: 1.running_var is missing"):
        load_into(network, {n: t for n, t in wanted.items() if n != "1.running_var"}, "x.pth")
