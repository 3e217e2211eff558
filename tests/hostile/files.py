"""Files that lie about themselves, one for each way that a reader could be fooled: `cases()`.

A case is written by `make`, given a path, and read by a command. All are deterministic and quick to write; no file is
as large as what it claims.
"""

import csv
import io
import json
import os
import pickle
import socket
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image

REFUSED, READ = "refused", "read"  # what must happen: one line of error and nothing written, or no error


@dataclass(frozen=True)
class Case:
    """A hostile input. command(world, path, out): the words of a command of neon, or of a script (`report.page`), that
    reads `path`; world: what the fixture `mini` of the tests has. make(path, world): writes it."""

    id: str
    name: str  # of the file, for its suffix counts
    command: Callable[[SimpleNamespace, Path, Path], list]
    make: Callable[[Path, SimpleNamespace], object]
    expectation: str = REFUSED


def cases() -> Iterator[Case]:
    """All of them, in one order."""
    for part in (
        safetensors,
        torch_files,
        pickles,
        indexes,
        references,
        kept_features,
        image_sets,
        parquet_files,
        recorded_arguments,
        rows,
        states,
        notebooks,
        tables,
        adapters,
        not_regular,
        words,
    ):
        yield from part()


def written(data: bytes | str | Callable[[], bytes]) -> Callable:
    """Writes these bytes, or what a function returns, which is called only then."""
    data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    return lambda path, world: path.write_bytes(data() if callable(data) else data)


# ---------------------------------------------------------------- checkpoints


def inspect(world, path, out):
    return ["inspect", path]


def convert(world, path, out):
    return ["convert", path, out.with_suffix(".safetensors")]


def header(content, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file. content: JSON value or bytes; size: what is said of its length."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def safetensors() -> Iterator[Case]:
    eight = bytes(8)
    files = {
        "empty": b"",
        "seven bytes": bytes(7),
        "length 2^63": header({"a": entry()}, eight, 2**63),
        "length 2^64-1": header({"a": entry()}, eight, 2**64 - 1),
        "length past the end": header({"a": entry()}, eight, 4096),
        "header no JSON": header(b"{'a'"),
        "header a list": header([1, 2]),
        "header a number": header(3),
        "header deep": header(b"[" * 100_000),
        "header not UTF-8": header(b'{"\xff": 1}'),
        "metadata a number": header({"__metadata__": 3, "a": entry()}, eight),
        "metadata of numbers": header({"__metadata__": {"a": 3}, "a": entry()}, eight),
        "strides overflow": header({"a": entry((0, 2**62, 2**62), (0, 0))}),
        "strides overflow 2": header({"a": entry((2**63, 0, 2**63), (0, 0))}),
        "many sides": header({"a": entry((1,) * 70 + (2,))}, eight),
        "shape 2^40": header({"a": entry((2**40, 2**40))}, eight),
        "shape 2^64": header({"a": entry((2**64,))}, eight),
        "shape negative": header({"a": entry((-2,))}, eight),
        "shape of floats": header({"a": entry((2.0,))}, eight),
        "shape of text": header({"a": entry(("2",))}, eight),
        "shape null": header({"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 8]}}, eight),
        "offsets reversed": header({"a": entry(offsets=(8, 0))}, eight),
        "offsets past the end": header({"a": entry(offsets=(8, 16))}, eight),
        "offsets missing": header({"a": {"dtype": "F32", "shape": [2]}}, eight),
        "offsets overlap": header({"a": entry(), "b": entry()}, eight),
        "a hole": header({"a": entry(offsets=(8, 16))}, bytes(16)),
        "more data": header({"a": entry()}, bytes(64)),
        "dtype unknown": header({"a": entry(dtype="F128")}, eight),
        "dtype not known here": header({"a": entry((8,), dtype="F8_E4M3")}, eight),
        "dtype a number": header({"a": entry(dtype=4)}, eight),
        "entry a number": header({"a": 3}, eight),
        "entry null": header({"a": None}, eight),
    }
    for name, data in files.items():
        yield Case(f"safetensors {name}", "a.safetensors", convert, written(data))
    yield Case("safetensors 99 MB of header", "a.safetensors", inspect, _long_header)
    null = header({"__metadata__": None, "a": entry()}, eight)
    yield Case("safetensors metadata null", "a.safetensors", convert, written(null), READ)


def _long_header(path, world):
    """Spaces before a header, in a file without blocks of its own."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b"{")
        file.truncate(99_000_108)


class _Storage:
    def __init__(self, count: int, kind=torch.FloatStorage, key: str = "0"):
        self.description = ("storage", kind, key, "cpu", count)


class _Tensor:
    def __init__(self, storage: _Storage, size: tuple, stride: tuple, offset: int = 0):
        self.args = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.description if isinstance(value, _Storage) else None


def torch_zip(state, blob: bytes = bytes(16), pickled: bytes | None = None, method=zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with one storage, and a pickle that says what it likes of it."""
    buffer, packed = io.BytesIO(), io.BytesIO()
    _Pickler(buffer, protocol=2).dump(state)
    with zipfile.ZipFile(packed, "w", method) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue() if pickled is None else pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", blob)
        archive.writestr("archive/version", "3\n")
    return packed.getvalue()


def _saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


EXECUTED = "neon-was-executed"  # the file that a Program writes, in the current folder


class Program:
    """Executed by pickle.load; no reader may do it."""

    def __reduce__(self):
        return os.system, (f"touch {EXECUTED}",)


def flagged(data: bytes, name: str, flags: int = 0, method: int | None = None, size: int | None = None) -> bytes:
    """A zip file with other flags, method or size of the member of that name, in both of its headers."""
    data = bytearray(data)
    for magic, at, length in ((b"PK\x03\x04", 6, 30), (b"PK\x01\x02", 8, 46)):
        start = data.find(magic)
        while start >= 0:
            if data[start + length : start + length + len(name)] == name.encode():
                struct.pack_into("<H", data, start + at, flags)
                if method is not None:
                    struct.pack_into("<H", data, start + at + 2, method)
                if size is not None:
                    struct.pack_into("<I", data, start + at + 16, size)
            start = data.find(magic, start + 4)
    return bytes(data)


def torch_files() -> Iterator[Case]:
    four, good = _Storage(4), {"a": _Tensor(_Storage(4), (4,), (1,))}
    with torch.device("meta"):
        meta = torch.empty(4)
    matrix = torch.eye(3)
    zipped = torch_zip(good)
    files = {
        "empty": b"",
        "text": b"<html>",
        "half": zipped[: len(zipped) // 2],
        "a program": _saved({"a": Program()}),
        "a list": _saved([torch.ones(2)]),
        "a number": _saved(3),
        "nothing": _saved({}),
        "numbers": _saved({"a": 3}),
        "old format cut": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "sparse": _saved({"a": matrix.to_sparse()}),
        "csr": lambda: _saved({"a": matrix.to_sparse_csr()}),
        "meta": _saved({"a": meta}),
        "quantized": lambda: _saved({"a": torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8)}),
        "expanded": _saved({"a": torch.ones(1).expand(10**6, 10**6)}),
        "beyond its storage": torch_zip({"a": _Tensor(four, (10**6,), (1,))}),
        "10^12 numbers": torch_zip({"a": _Tensor(four, (10**12,), (1,))}),
        "a storage of 10^12": torch_zip({"a": _Tensor(_Storage(10**12), (10**12,), (1,))}),
        "a storage of 2^62": torch_zip({"a": _Tensor(_Storage(2**62), (2**62,), (1,))}),
        "negative": torch_zip({"a": _Tensor(four, (-4,), (1,))}),
        "negative stride": torch_zip({"a": _Tensor(four, (4,), (-1,))}),
        "negative offset": torch_zip({"a": _Tensor(four, (4,), (1,), -4)}),
        "negative storage": torch_zip({"a": _Tensor(_Storage(-4), (4,), (1,))}),
        "strides overflow": torch_zip({"a": _Tensor(four, (0, 2**62, 2**62), (1, 1, 1))}),
        "no such storage": torch_zip({"a": _Tensor(_Storage(4, key="7"), (4,), (1,))}),
        "a storage elsewhere": torch_zip({"a": _Tensor(_Storage(4, key="../version"), (4,), (1,))}),
        "pickle cut": torch_zip(good, pickled=b"\x80\x02}"),
        "pickle empty": torch_zip(good, pickled=b""),
        "no pickle": _zip({"archive/data/0": bytes(16)}),
        "no torch": _zip({"a.txt": b"text"}),
        "packed": torch_zip(good, method=zipfile.ZIP_DEFLATED),
        "encrypted": flagged(zipped, "archive/data/0", flags=1),
        "method 12": flagged(zipped, "archive/data/0", method=12),
        "method 99": flagged(zipped, "archive/data/0", method=99),
        "size 4 GB": flagged(zipped, "archive/data/0", size=2**32 - 2),
        "a bomb": lambda: torch_zip(
            {"a": _Tensor(_Storage(2**25), (2**25,), (1,))}, bytes(2**27), method=zipfile.ZIP_DEFLATED
        ),
    }
    for name, data in files.items():
        yield Case(f"torch {name}", "a.pth", convert, written(data))
    for name in ("sparse", "a storage of 10^12", "a bomb", "meta"):
        yield Case(f"torch {name}, inspected", "a.pth", inspect, written(files[name]))
    yield Case("torch 10^4 names of one storage", "a.pth", convert, _one_storage)
    yield Case("torch 10^4 names of one storage, inspected", "a.ckpt", inspect, _one_storage)


def _one_storage(path, world):
    tensor = torch.zeros(2**16)
    torch.save({f"layer{i}": tensor for i in range(10**4)}, path)  # 2.6 GB if it is written


def _zip(files: Mapping[str, bytes], method=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def pickles() -> Iterator[Case]:
    files = {
        "empty": b"",
        "text": b"text",
        "a program": pickle.dumps({"ema": Program()}, 4),
        "a number": pickle.dumps(3, 4),
        "a dict": pickle.dumps({"ema": 3}, 4),
        "cut": pickle.dumps({"ema": "x" * 100}, 4)[:40],
        "an empty stack": b"\x80\x04\x95\x01\x00\x00\x00\x00\x00\x00\x00.",
        "a memo that is not there": b"\x80\x04h\x07.",
        "4 GB of text": b"\x80\x04X\xff\xff\xff\xff",
        "a mark without an end": b"\x80\x04" + b"(" * 1000,
        "a tuple without a mark": b"\x80\x04t.",
        "a list in itself": b"\x80\x04]\x94h\x00a.",
    }
    for name, data in files.items():
        yield Case(f"pickle {name}", "a.pkl", inspect, written(data))


def indexes() -> Iterator[Case]:
    values = {
        "a list": [],
        "null": None,
        "no weight_map": {"metadata": {}},
        "weight_map a list": {"weight_map": ["a"]},
        "weight_map empty": {"weight_map": {}},
        "a shard elsewhere": {"weight_map": {"a": "../a.safetensors"}},
        "a shard a number": {"weight_map": {"a": 3}},
        "a shard gone": {"weight_map": {"a": "gone.safetensors"}},
        "a shard with NUL": {"weight_map": {"a": "\0.safetensors"}},
        "a shard of a long name": {"weight_map": {"a": "a" * 5000 + ".safetensors"}},
    }
    for name, value in values.items():
        yield Case(f"index {name}", "a.safetensors.index.json", inspect, written(json.dumps(value)))
    yield Case("index no JSON", "a.safetensors.index.json", inspect, written("{"))
    yield Case("index deep", "a.safetensors.index.json", inspect, written("[" * 100_000))
    for name, value in {
        "a list": [],
        "a number": 3,
        "parts elsewhere": {"../unet": ["diffusers", "UNet2DModel"]},
        "an absolute part": {"/etc": ["diffusers", "UNet2DModel"]},
        "no part": {"_class_name": "DDPMPipeline"},
        "a part gone": {"unet": ["diffusers", "UNet2DModel"]},
    }.items():
        yield Case(f"pipeline {name}", "pipeline", _merge, _folder({"model_index.json": json.dumps(value).encode()}))
        yield Case(f"pipeline {name}, inspected", "pipeline", inspect, _folder({"model_index.json": json.dumps(value)}))


def _merge(world, path, out):
    return ["merge", "--base", path, "--selftrained", world.base, "-w", 1, "--out", out]


def _folder(files: Mapping[str, bytes | str]) -> Callable:
    def make(path, world):
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return make


# ---------------------------------------------------------------- arrays and images


def array(shape, descr="<f8", data: bytes = b"", magic=b"\x93NUMPY\x01\x00", text: str | None = None) -> bytes:
    """A .npy file with a header that says what it likes."""
    text = text or f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"
    return magic + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data


def npz(method=zipfile.ZIP_STORED, **arrays) -> bytes:
    files = {}
    for name, value in arrays.items():
        buffer = io.BytesIO()
        if not isinstance(value, bytes):
            np.save(buffer, value, allow_pickle=True)
        files[f"{name}.npy"] = value if isinstance(value, bytes) else buffer.getvalue()
    return _zip(files, method)


def _evaluate(world, path, out):
    return ["evaluate", *world.sampling, "--model", world.base, "--seeds", "0-3", "--ref", path, *world.features]


def references() -> Iterator[Case]:
    eye, mu = np.eye(16), np.zeros(16)
    good = npz(mu=mu, sigma=eye)
    files = {
        "empty": b"",
        "text": b"<html>",
        "half": good[: len(good) // 2],
        "no array": _zip({"mu": b"0", "sigma": b"0"}),
        "members that are no arrays": npz(mu=b"text", sigma=b"text"),
        "an empty member": npz(mu=b"", sigma=eye),
        "10^10 numbers": npz(mu=array("(10000000000,)"), sigma=eye),
        "2^64 numbers": npz(mu=array("(18446744073709551616,)"), sigma=eye),
        "2^32 squared": npz(mu=mu, sigma=array("(4294967296, 4294967296)")),
        "a negative side": npz(mu=array("(-1,)"), sigma=eye),
        "a side of text": npz(mu=array("('a',)"), sigma=eye),
        "no shape": npz(mu=array("", text="{'descr': '<f8'}"), sigma=eye),
        "a header that is no dict": npz(mu=array("", text="3"), sigma=eye),
        "a header with a call": npz(mu=array("", text="{'descr': exit(), 'shape': (1,)}"), sigma=eye),
        "a deep header": npz(mu=array("", text="(" * 5000), sigma=eye),
        "version 9": npz(mu=array("(16,)", magic=b"\x93NUMPY\x09\x00"), sigma=eye),
        "objects": npz(mu=np.array([Program()] * 16, object), sigma=eye),
        "text in an array": npz(mu=np.array(["a"] * 16), sigma=eye),
        "complex": npz(mu=mu + 1j, sigma=eye),
        "times": npz(mu=np.zeros(16, "M8[s]"), sigma=eye),
        "records": npz(mu=np.zeros(16, [("a", "f4")]), sigma=eye),
        "not finite": npz(mu=mu + np.nan, sigma=eye),
        "a scalar": npz(mu=np.float64(0), sigma=eye),
        "no numbers": npz(mu=np.zeros(0), sigma=np.zeros((0, 0))),
        "sides that differ": npz(mu=mu, sigma=np.eye(15)),
        "lzma": npz(zipfile.ZIP_LZMA, mu=mu, sigma=eye),
        "lzma that is none": flagged(good, "mu.npy", method=14),
        "bzip2": npz(zipfile.ZIP_BZIP2, mu=mu, sigma=eye),
        "deflate that is none": flagged(good, "mu.npy", method=8),
        "method 99": flagged(good, "mu.npy", method=99),
        "encrypted": flagged(good, "mu.npy", flags=1),
        "patched data": flagged(good, "mu.npy", flags=0x20),
        "size 4 GB": flagged(good, "mu.npy", size=2**32 - 2),
        "a bomb": lambda: npz(zipfile.ZIP_DEFLATED, mu=mu, sigma=array("(16, 1048576)", data=bytes(2**27))),
        "huge numbers": npz(mu=mu, sigma=eye * 1e308),
    }
    for name, data in files.items():
        yield Case(f"reference {name}", "ref.npz", _evaluate, written(data))


def kept_features() -> Iterator[Case]:
    good = {"seeds": np.arange(4), "features": np.zeros((4, 16), "f4")}
    for name, change in {
        "no seeds": {"seeds": np.zeros((0, 2))},
        "seeds of floats": {"seeds": np.zeros(4)},
        "more rows": {"features": np.zeros((5, 16), "f4")},
        "a line": {"features": np.zeros(4, "f4")},
        "of float64": {"features": np.zeros((4, 16))},
        "objects": {"features": np.array([Program()] * 4, object)},
        "10^10 rows": {"features": array("(10000000000, 16)", "<f4")},
        "no array": {"seeds": b"text"},
    }.items():
        yield Case(f"kept {name}", "a.jsonl", _compare, _with_features(npz(**good | change)))
    for name, data in {"empty": b"", "text": b"x"}.items():
        yield Case(f"kept {name}", "a.jsonl", _compare, _with_features(data))


def _compare(world, path, out):
    return ["compare", f"{path}:0", f"{path}:0", "--ref", world.ref]


def _with_features(data: bytes) -> Callable:
    def make(path, world):
        from neon.files import sha256

        row = {**ROW, "reference": sha256(world.ref), "kept": "a.npz"}
        path.write_text(json.dumps(row) + "\n")
        path.with_suffix(".features").mkdir()
        (path.with_suffix(".features") / "a.npz").write_bytes(data)

    return make


def _png(mode: str = "L", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def _reference(world, path, out):
    return ["reference", "--images", path, *world.features, "--out", out.with_suffix(".npz")]


def image_sets() -> Iterator[Case]:
    png = _png()
    huge = bytearray(png)
    struct.pack_into(">II", huge, 16, 60_000, 60_000)
    struct.pack_into(">I", huge, 29, zlib.crc32(bytes(huge[12:29])))
    label_files = {
        "2^63": '{"labels": [["a.png", 9223372036854775808]]}',
        "10^400": f'{{"labels": [["a.png", 1{"0" * 400}]]}}',
        "10^5000": f'{{"labels": [["a.png", 1{"0" * 5000}]]}}',
        "negative": '{"labels": [["a.png", -1]]}',
        "text": '{"labels": [["a.png", "1"]]}',
        "a float": '{"labels": [["a.png", 1.0]]}',
        "null": '{"labels": [["a.png", null]]}',
        "twice": '{"labels": [["a.png", 1], ["a.png", 2]]}',
        "of another": '{"labels": [["b.png", 1]]}',
        "none": '{"labels": []}',
        "a dict": '{"labels": {"a.png": 1}}',
        "a number": '{"labels": 1}',
        "names of lists": '{"labels": [[[], 1]]}',
        "three in a pair": '{"labels": [["a.png", 1, 2]]}',
        "a list": "[]",
        "null file": "null",
        "no JSON": "{",
        "deep": '{"labels":' + "[" * 100_000,
        "not UTF-8": b"\xff\xfe",
        "empty": b"",
    }
    for name, data in label_files.items():
        yield Case(f"labels {name}", "set", _reference, _folder({"a.png": png, "dataset.json": data}))
        packed = _zip({"a.png": png, "dataset.json": data.encode() if isinstance(data, str) else data})
        if name in ("2^63", "deep", "twice"):
            yield Case(f"labels {name}, in a zip", "set.zip", _reference, written(packed))
    zipped = _zip({"a.png": png, "dataset.json": b'{"labels": null}'})
    zips = {
        "empty": b"",
        "text": b"<html>",
        "half": zipped[: len(zipped) // 2],
        "no images": _zip({"a.txt": b"a"}),
        "lzma": _zip({"a.png": png}, zipfile.ZIP_LZMA),
        "bzip2": _zip({"a.png": png}, zipfile.ZIP_BZIP2),
        "lzma that is none": flagged(zipped, "a.png", method=14),
        "lzma labels that are none": flagged(zipped, "dataset.json", method=14),
        "labels encrypted": flagged(zipped, "dataset.json", flags=1),
        "method 99": flagged(zipped, "a.png", method=99),
        "encrypted": flagged(zipped, "a.png", flags=1),
        "strong encryption": flagged(zipped, "a.png", flags=0x40),
        "size 4 GB": flagged(zipped, "a.png", size=2**32 - 2),
        "a bomb": lambda: _zip({"a.png": bytes(2**27)}, zipfile.ZIP_DEFLATED),
        "a bomb of labels": lambda: _zip({"a.png": png, "dataset.json": b" " * 2**27}, zipfile.ZIP_DEFLATED),
        "60,000² pixels": _zip({"a.png": bytes(huge)}),
        "a torn image": _zip({"a.png": png[:40]}),
        "an image of text": _zip({"a.png": b"text"}),
    }
    for name, data in zips.items():
        yield Case(f"zip {name}", "set.zip", _reference, written(data))
    yield Case("images a pipe among them", "set", _reference, _pipe_among(png))
    yield Case("images a torn one", "set", _reference, _folder({"a.png": png[:40]}))
    yield Case("images 60,000² pixels", "set", _reference, _folder({"a.png": bytes(huge)}))
    torn = {"generate.json": "{}", "0.zip": zipped[:40], "dataset.json": "{}"}
    yield Case("images a shard cut", "set", _reference, _folder(torn))


def _pipe_among(png: bytes) -> Callable:
    def make(path, world):
        path.mkdir()
        (path / "b.png").write_bytes(png)
        os.mkfifo(path / "a.png")

    return make


def parquet_files() -> Iterator[Case]:
    image = [{"bytes": _png(), "path": None}]
    tables = {
        "labels of text": {"image": image, "label": ["a"]},
        "labels of floats": {"image": image, "label": [1.0]},
        "labels of lists": {"image": image, "label": [[1]]},
        "labels missing": {"image": image * 2, "label": [1, None]},
        "labels negative": {"image": image, "label": [-1]},
        "images of numbers": {"image": [1]},
        "images of text": {"image": ["a"]},
        "images missing": {"image": [None, {"bytes": None, "path": None}]},
        "images of other fields": {"image": [{"a": 1}]},
    }
    for name, table in tables.items():
        yield Case(f"parquet {name}", "a.parquet", _reference, _parquet(table))
    yield Case("parquet no columns", "a.parquet", _reference, _parquet({}))
    yield Case("parquet labels doubled", "a.parquet", _reference, _doubled)
    yield Case("parquet a column of another kind", "a.parquet", _reference, _required)
    for name, data in {"empty": b"", "text": b"text", "ends only": b"PAR1PAR1", "cut": b"PAR1" + bytes(40)}.items():
        yield Case(f"parquet {name}", "a.parquet", _reference, written(data))


def _parquet(table: dict) -> Callable:
    def make(path, world):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(table), path)

    return make


def _doubled(path, world):
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.array([{"bytes": _png(), "path": None}])
    table = pyarrow.Table.from_arrays([image, pyarrow.array([1]), pyarrow.array([2])], ["image", "label", "label"])
    pyarrow.parquet.write_table(table, path)


def _required(path, world):
    """The bytes of images may not be missing, says the schema, and the column's histogram does not go with that."""
    _parquet({"image": [{"bytes": _png(), "path": None}]})(path, world)
    optional, required = b"\x25\x02\x18\x05bytes", b"\x25\x00\x18\x05bytes"
    data = path.read_bytes()
    assert data.count(optional) == 1
    path.write_bytes(data.replace(optional, required))


# ---------------------------------------------------------------- records


def _generate(world, path, out):
    return ["generate", *world.sampling, "--model", path, "--seeds", "0-3", "--out", out]


def recorded_arguments() -> Iterator[Case]:
    changes = {
        "sigma_data text": {"sigma_data": "x"},
        "sigma_data a list": {"sigma_data": [0.5]},
        "sigma_min null": {"sigma_min": None},
        "sigma_max text": {"sigma_max": "x"},
        "num_blocks 10^6": {"num_blocks": 10**6},
        "num_blocks 10^9": {"num_blocks": 10**9},
        "num_blocks negative": {"num_blocks": -1},
        "num_blocks a float": {"num_blocks": 1.5},
        "model_channels 10^6": {"model_channels": 10**6},
        "model_channels 2^70": {"model_channels": 2**70},
        "model_channels 0": {"model_channels": 0},
        "channel_mult text": {"channel_mult": "12"},
        "channel_mult a number": {"channel_mult": 2},
        "channel_mult long": {"channel_mult": [1] * 10**5},
        "channel_mult of text": {"channel_mult": ["1"]},
        "dropout text": {"dropout": "x"},
        "img_resolution text": {"img_resolution": "8"},
        "img_resolution true": {"img_resolution": True},
        "img_channels 10^6": {"img_channels": 10**6},
        "label_dim 10^6": {"label_dim": 10**6},
        "label_dim a dict": {"label_dim": {}},
        "use_fp16 text": {"use_fp16": "yes"},
        "attn_resolutions a number": {"attn_resolutions": 8},
        "model_type another": {"model_type": "DhariwalUNet"},
        "one unknown": {"colour": 3},
    }
    for name, change in changes.items():
        yield Case(f"arguments {name}", "a.safetensors", _generate, _recording(change))
    for name, text in {"a list": "[]", "a number": "3", "no JSON": "{", "deep": "[" * 100_000, "NaN": "NaN"}.items():
        yield Case(f"arguments {name}", "a.safetensors", _generate, _recording(text))


def _recording(change: dict | str) -> Callable:
    """A base that records other arguments."""

    def make(path, world):
        from neon.weights.checkpoint import open_weights, save_safetensors

        with open_weights(world.base) as base:
            kwargs = json.loads(base.metadata["init_kwargs"])
            text = change if isinstance(change, str) else json.dumps(kwargs | change)
            save_safetensors(path, dict(base.items()), base.metadata | {"init_kwargs": text})

    return make


# A row as `neon final` and `neon search` write them.
ROW = {
    "key": "0",
    **{"role": "neon", "family": "edm", "base": "base.safetensors", "base_sha256": "0" * 64, "vae_sha256": None},
    **{"num_steps": 4, "solver": "heun", "class_idx": None, "dtype": "float32", "device": "cpu", "tf32": False},
    **{"w": 1.0, "selftrained": "s.safetensors", "selftrained_sha256": "1" * 64, "n": 4, "seeds": "0-3"},
    **{"features": "digits-0", "reference": "2" * 64, "metrics": ["fid"], "budget": 64, "num_synthetic": 9, "world": 1},
    **{"fid": 1.5, "fid_se": 0.1, "seconds": 1.0},
}
READERS_OF_ROWS = {
    "final": lambda w, path, out: (
        ["final", *w.measuring, "--base", w.base, "--seeds", "0-3", "--search", path, "--out", out]
    ),
    "metrics": lambda w, path, out: ["report.metrics", "metrics", path, out],
    "curve": lambda w, path, out: ["report.metrics", "curve", path, out],
    "grid": lambda w, path, out: ["grid", "--family", "edm", "--final", path, "--out", out],
    "compare": lambda w, path, out: ["compare", f"{path}:0", f"{path}:0", "--ref", w.ref],
    "search": lambda w, path, out: (
        [
            "search",
            *w.measuring,
            "--base",
            w.base,
            "--selftrained",
            w.snapshots[0],
            "-w",
            "0,1",
            "--seeds",
            "0-3",
            "--metrics",
            "fid",
            "--out",
            path,
        ]
    ),
    "card": lambda w, path, out: ["card", "--model", w.base, "--final", path, "--license", "mit", "--out", out],
}


def rows() -> Iterator[Case]:
    values = {"text": "x", "null": None, "a list": [], "a dict": {}, "true": True, "2^70": 2**70}
    for field in ("w", "fid", "num_steps", "selftrained"):
        for name, value in values.items():
            if (field, name) in (("selftrained", "text"), ("selftrained", "null")):
                continue
            for reader in ("final", "search") if field == "num_steps" else ("final", "metrics", "compare", "search"):
                if field == "num_steps" and reader == "search" and not isinstance(value, list | dict | int):
                    continue  # a plain value of an option: a row of another search
                if field == "num_steps" and name == "true" and reader == "search":
                    continue
                line = json.dumps({**ROW, field: value})
                yield Case(f"rows {field} {name}, {reader}", "a.jsonl", READERS_OF_ROWS[reader], written(line + "\n"))
    texts = {
        "a list": "[]\n",
        "a number": "3\n",
        "no key": '{"w": 1}\n',
        "no w": '{"key": "0"}\n',
        "no fid": json.dumps({k: v for k, v in ROW.items() if k != "fid"}) + "\n",
        "no family": json.dumps({k: v for k, v in ROW.items() if k != "family"}) + "\n",
        "a list for a key": json.dumps({**ROW, "key": []}) + "\n",
        "n negative": json.dumps({**ROW, "n": -4}) + "\n",
        "w NaN": json.dumps({**ROW, "w": "NaN"}) + "\n",
        "deep": "[" * 100_000 + "\n",
        "not UTF-8": b"\xff\xfe\n",
        "NUL": b"\0" * 100 + b"\n",
        "torn": "no row",
        "a large number": '{"key": "0", "w": 1' + "0" * 5000 + "}\n",
    }
    for name, text in texts.items():
        for reader in ("final", "metrics", "grid", "card"):
            yield Case(f"rows {name}, {reader}", "a.jsonl", READERS_OF_ROWS[reader], written(text))
    for name, value in {"a list": [], "no w": {"family": "edm"}, "w text": {**ROW, "w": "x"}, "null": None}.items():
        for reader in ("metrics", "compare"):
            yield Case(f"row {name}, {reader}", "a.json", READERS_OF_ROWS[reader], written(json.dumps(value)))
    elsewhere = json.dumps({**ROW, "kept": "../../a.npz"}) + "\n"
    yield Case("rows features elsewhere", "a.jsonl", READERS_OF_ROWS["compare"], written(elsewhere))


def _train(world, path, out):
    recipe = ["--recipe", "digits", "--budget", 64, "--batch", 16, "--snapshot", 64, "--save_every", 16]
    return ["selftrain", "--family", "edm", "--base", world.base, "--data", world.data, *recipe, "--out", path]


def states() -> Iterator[Case]:
    def tensors(change) -> Callable:
        return _state(lambda state, metadata: (change(state), metadata))

    def said(**changes) -> Callable:
        return _state(lambda state, metadata: (state, metadata | changes))

    def first(state, slot):
        return next(name for name in state if name.startswith(slot) and state[name].ndim > 1)

    def shaped(slot):
        return lambda state: state | {first(state, slot): torch.zeros(2, 2)}

    changes = {
        **{f"a {slot} of another shape": tensors(shaped(slot)) for slot in ("param", "ema", "exp_avg/", "exp_avg_sq")},
        "a moment that broadcasts": tensors(lambda s: s | {(n := first(s, "exp_avg/")): s[n][:1].clone()}),
        "a moment of a scalar": tensors(lambda s: s | {first(s, "exp_avg/"): torch.zeros(())}),
        "a step of many": tensors(lambda s: s | {next(n for n in s if n.startswith("step")): torch.zeros(4)}),
        "a step of float64": tensors(
            lambda s: s | {next(n for n in s if n.startswith("step")): torch.zeros(()).double()}
        ),
        "a param of float16": tensors(lambda s: s | {(n := first(s, "param")): s[n].half()}),
        "a param missing": tensors(lambda s: {n: t for n, t in s.items() if n != first(s, "param")}),
        "a moment missing": tensors(lambda s: {n: t for n, t in s.items() if n != first(s, "exp_avg_sq")}),
        "a tensor more": tensors(lambda s: s | {"param/more": torch.zeros(2)}),
        "another slot": tensors(lambda s: s | {"max_exp_avg/a": torch.zeros(2)}),
        "one tensor": tensors(lambda s: {"a": torch.zeros(2)}),
        "no tensors": tensors(lambda s: {}),
        "images text": said(images="x"),
        "images negative": said(images="-16"),
        "images 10^30": said(images="1" + "0" * 30),
        "images a part of a batch": said(images="17"),
        "images 0": said(images="0"),
        "images past the end": said(images="6400"),
        "run no JSON": said(run="{"),
        "run a list": said(run="[]"),
        "run a number": said(run="3"),
        "scaler a list": said(scaler="[]"),
        "scaler no JSON": said(scaler="{"),
        "scaler of text": said(scaler='{"scale": "x"}'),
    }
    for name, make in changes.items():
        yield Case(f"state {name}", "run", _train, make)
    for name, line in {
        "a list": "[]",
        "a number": "3",
        "images text": '{"images": "16"}',
        "images null": '{"images": null}',
        "images a list": '{"images": [16]}',
        "no images": '{"loss": 1.0}',
    }.items():
        yield Case(f"log {name}", "run", _train, _state(log=line + "\n"))


def _state(change: Callable | None = None, log: str = "") -> Callable:
    """A training folder, interrupted after 16 images, whose state was changed."""

    def make(path, world):
        from neon.weights.checkpoint import open_weights, save_safetensors

        path.mkdir()
        with open_weights(interrupted(world) / "state.safetensors") as state:
            found, metadata = dict(state.items()), dict(state.metadata)
        found, metadata = change(found, metadata) if change else (found, metadata)
        save_safetensors(path / "state.safetensors", found, metadata)
        (path / "log.jsonl").write_text(log)

    return make


def interrupted(world) -> Path:
    """A run of _train that ended after one step, made once."""
    folder = world.path / "interrupted"
    if not folder.exists():
        from processes import words

        from neon.cli import main
        from neon.selftrain import _Requests

        stop = mock.patch.object(_Requests, "at_step", lambda self: (True, True))
        with stop, redirect_stderr(io.StringIO()), suppress(SystemExit):
            main(words(_train(world, folder, None)))
    return folder


# ---------------------------------------------------------------- text files


def _page(world, path, out):
    return ["report.page", path, "--out", out.with_suffix(".html")]


def notebook(*cells) -> str:
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def code(*outputs) -> dict:
    return {
        "cell_type": "code",
        "source": "",
        "metadata": {},
        "execution_count": 1,
        "outputs": list(outputs),
        "id": "a",
    }


def shown(data) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def notebooks() -> Iterator[Case]:
    files = {
        "empty": "",
        "a list": "[]",
        "null": "null",
        "no cells": '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}',
        "cells a number": '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 3}',
        "a cell null": notebook(None),
        "a cell a number": notebook(3),
        "a cell of no kind": notebook({"source": ""}),
        "a source a number": notebook({"cell_type": "markdown", "source": 3, "metadata": {}}),
        "a source null": notebook({"cell_type": "markdown", "source": None, "metadata": {}}),
        "outputs a number": notebook({**code(), "outputs": 3}),
        "an output a number": notebook(code(3)),
        "an output null": notebook(code(None)),
        "data a list": notebook(code(shown([]))),
        "data null": notebook(code(shown(None))),
        "an image a number": notebook(code(shown({"image/png": 3}))),
        "an image no base64": notebook(code(shown({"image/png": "a"}))),
        "an image that is none": notebook(code(shown({"image/png": "dGV4dA=="}))),
        "Markdown a number": notebook(code(shown({"text/markdown": 3}))),
        "a stream of numbers": notebook(code({"output_type": "stream", "name": "stdout", "text": 3})),
        "a format of text": '{"nbformat": "x", "metadata": {}, "cells": []}',
        "a deep one": "[" * 100_000,
        "not UTF-8": "\udcff\udcfe",
    }
    for name, text in files.items():
        yield Case(f"notebook {name}", "a.ipynb", _page, written(text))


def tables() -> Iterator[Case]:
    def plan(world, path, out):
        return ["plan", "--params", path]

    for name, text in {
        "empty": "",
        "a list": "[]",
        "no YAML": "a: [",
        "a tab": "\t- a: b",
        "no models": "a: 3",
        "models a number": "models: 3",
        "models of numbers": "models: {a: 3}",
        "models null": "models: {a: null}",
        "an object": "models: !!python/object/apply:os.system ['true']",
        "deep": "[" * 3000,
        "not UTF-8": "\udcff",
        "a NUL": "a: \0",
        "a date that is none": "models: {a: 2020-13-45}",
    }.items():
        yield Case(f"params {name}", "params.yaml", plan, written(text))

    def download(world, path, out):
        return ["download", "--list"]

    head = "group,path,source,size,sha256\n"
    long = io.StringIO()
    csv.writer(long).writerow(["base", "a" * 200_000, "b", "3", ""])
    for name, text in {
        "empty cells": head + "base\n",
        "more cells": head + "base,a,b,3,,mit,more\n",
        "another head": "a,b\n1,2\n",
        "bad quotes": head + 'base,"a,b\n',
        "a size of text": head + "base,a,b,x,\n",
        "another group": head + "other,a,b,3,\n",
        "not UTF-8": head + "base,\udcff,b,3,\n",
        "a field of 200 kB": head + long.getvalue(),
    }.items():
        yield Case(f"downloads {name}", "downloads.csv", download, written(text))

    def curve(world, path, out):
        return ["report.metrics", "curve", path, out]

    for name, text in {
        "empty": "",
        "no columns": "a,b\n1,2\n",
        "text": "w,fid\nx,y\n",
        "a NUL": "w,fid\n\0,1\n",
        "not UTF-8": "w,fid\n\udcff,1\n",
        "torn quotes": 'w,fid\n"1,2\n',
    }.items():
        yield Case(f"curve {name}", "a.csv", curve, written(text))


def adapters() -> Iterator[Case]:
    def merge(world, path, out):
        return ["merge", "--base", world.base, "--selftrained", path, "-w", 1, "--out", out.with_suffix(".safetensors")]

    good = {"r": 1, "lora_alpha": 1, "peft_type": "LORA"}
    for name, config in {
        "a list": [],
        "null": None,
        "alpha text": good | {"lora_alpha": "x"},
        "alpha null": good | {"lora_alpha": None},
        "alpha a list": good | {"lora_alpha": [1]},
        "patterns a list": good | {"alpha_pattern": [1]},
        "a pattern that is none": good | {"alpha_pattern": {"(": 1}},
        "a slow pattern": good | {"alpha_pattern": {"(a+)+b": 1, "(.*)*x": 2}},
        "another kind": good | {"peft_type": "IA3"},
        "a kind of numbers": good | {"peft_type": 3},
    }.items():
        yield Case(f"adapter {name}", "lora", merge, _adapter(json.dumps(config)))
    yield Case("adapter no JSON", "lora", merge, _adapter("{"))
    ones = torch.ones(2, 2)
    for name, state in {
        "rank 0": {"a.lora_A.weight": torch.ones(0, 2), "a.lora_B.weight": torch.ones(2, 0)},
        "one factor": {"a.lora_A.weight": ones},
        "scalars": {"a.lora_A.weight": torch.ones(()), "a.lora_B.weight": torch.ones(())},
        "factors of other ranks": {"a.lora_A.weight": torch.ones(3, 2), "a.lora_B.weight": ones},
        "an alpha of many": {"a.lora_A.weight": ones, "a.lora_B.weight": ones, "a.alpha": ones},
    }.items():
        yield Case(f"adapter {name}", "lora", merge, _adapter(json.dumps(good), state))


def _adapter(config: str, state: Mapping | None = None) -> Callable:
    def make(path, world):
        from neon.weights.checkpoint import save_safetensors

        path.mkdir()
        (path / "adapter_config.json").write_text(config)
        name = "base_model.model.a.lora_{}.weight"
        own = {f"base_model.model.{name}": tensor for name, tensor in (state or {}).items()}
        own = own or {name.format("A"): torch.ones(1, 2), name.format("B"): torch.ones(2, 1)}
        save_safetensors(path / "adapter_model.safetensors", own)

    return make


# ---------------------------------------------------------------- what is no file, and words


def not_regular() -> Iterator[Case]:
    kinds = {"a pipe": lambda path, world: os.mkfifo(path), "a socket": _socket, "a device": _device}
    readers = {
        "a.safetensors": inspect,
        "a.pth": inspect,
        "a.pkl": inspect,
        "a.safetensors.index.json": inspect,
        "ref.npz": _evaluate,
        "set.zip": _reference,
        "set.parquet": _reference,
        "a.jsonl": READERS_OF_ROWS["metrics"],
        "b.jsonl": READERS_OF_ROWS["search"],
        "a.json": READERS_OF_ROWS["metrics"],
        "a.csv": READERS_OF_ROWS["curve"],
        "a.ipynb": _page,
        "params.yaml": lambda world, path, out: ["plan", "--params", path],
        "downloads.csv": lambda world, path, out: ["download", "--list"],
        "digits.safetensors": lambda world, path, out: (
            ["reference", "--images", world.data, "--features", f"digits:{path}", "--out", out]
        ),
        "inception.pth": lambda world, path, out: (
            ["reference", "--images", world.data, "--features", f"inception:{path}", "--out", out]
        ),
    }
    for file, command in readers.items():
        for kind, make in kinds.items():
            if kind == "a pipe" or file in ("a.pth", "ref.npz"):
                yield Case(f"{kind} for {file}", file, command, make)
        yield Case(f"a folder for {file}", file, command, lambda path, world: path.mkdir())
        yield Case(f"a circle of links for {file}", file, command, lambda path, world: path.symlink_to(path))


def _socket(path, world):
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _device(path, world):
    path.symlink_to("/dev/zero")


def words() -> Iterator[Case]:
    def none(path, world):
        pass

    def out_of(word):
        return {
            "merge": lambda w, path, out: ["merge", "--base", w.base, "--selftrained", w.base, "-w", 1, "--out", word],
            "generate": lambda w, path, out: [
                "generate",
                *w.sampling,
                "--model",
                w.base,
                "--seeds",
                "0",
                "--out",
                word,
            ],
            "reference": lambda w, path, out: ["reference", "--images", w.data, *w.features, "--out", word],
        }

    for name, word in {"nothing": "", "a dot": ".", "the root": "/", "two dots": "..", "a NUL": "a\0b"}.items():
        for command, make in out_of(word).items():
            yield Case(f"--out {name}, {command}", "a", make, none)
    yield Case("a name that is not UTF-8", "a", lambda w, path, out: ["inspect", "\udcff.safetensors"], none)
    yield Case("a name with a NUL", "a", lambda w, path, out: ["inspect", "\0.safetensors"], none)
    yield Case("a name of 5,000 letters", "a", lambda w, path, out: ["inspect", "a" * 5000 + ".pth"], none)
    yield Case("no name", "a", lambda w, path, out: ["inspect", ""], none)
    for option, values in {
        "--seed": ("1e300", "-1", "nan", "1e400", "x", "9" * 5000),
        "--budget": ("1e300", "0"),
    }.items():
        for value in values:
            yield Case(
                f"{option} {value[:9]}",
                "a",
                lambda w, path, out, words=(option, value): [*_train(w, path, out), *words],
                none,
            )
