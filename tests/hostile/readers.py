"""The readers that are fuzzed: a function of a path, and files that it reads without complaint."""

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hostile import files
from neon.data import ImageSet


@dataclass(frozen=True)
class Reader:
    name: str
    suffix: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]  # read without complaint
    programs: Callable[[], list[bytes]] = list  # refused: they would write files.EXECUTED


def readers() -> list[Reader]:
    return [
        Reader("safetensors", ".safetensors", _weights, _safetensors),
        Reader("torch", ".pth", _weights, _torch_files, lambda: [files._saved({"a": files.Program()})]),
        Reader("torch, old format", ".pt", _weights, lambda: [_old(_state())], lambda: [_old({"a": files.Program()})]),
        Reader("pickle", ".pkl", _weights, _pickles, lambda: [pickle.dumps({"ema": files.Program()}, 4)]),
        Reader("index", ".index.json", _index, _indexes),
        Reader("reference", ".npz", _reference, _statistics, _objects),
        Reader("kept features", ".npz", _kept, _features),
        Reader("images in a zip", ".zip", _images, _image_zips),
        Reader("parquet", ".parquet", _images, _parquet),
        Reader("rows", ".jsonl", _rows, lambda: [2 * (json.dumps(files.ROW) + "\n").encode()]),
        Reader("a row", ".json", _row, lambda: [json.dumps(files.ROW).encode()]),
        Reader("a notebook", ".ipynb", _page, _notebooks),
        Reader("downloads", ".csv", _table, _downloads),
        Reader("a curve", ".csv", _curve, lambda: [b"w,fid,budget\n0,1.5,0\n1,1.25,64\n"]),
        Reader("params", ".yaml", _params, lambda: [PARAMS]),
        Reader("a digits extractor", ".safetensors", _digits, _extractors),
        Reader("an EDM network", ".safetensors", _edm, _networks),
    ]


def _state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2).half(), "n": torch.tensor(3)}


def _weights(path):
    from neon.weights.checkpoint import open_weights

    with open_weights(path) as weights:
        for name in weights:
            weights.spec(name)
            weights[name].sum()


def _safetensors() -> list[bytes]:
    from safetensors.torch import save

    return [save(_state(), {"format": "pt"}), save(_state())]


def _torch_files() -> list[bytes]:
    return [files._saved(_state()), files._saved({"model": _state(), "epoch": 3})]


def _old(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _index(path):
    """With its shard next to it."""
    shard = path.with_name("a.safetensors")
    shard.write_bytes(_safetensors()[0])
    try:
        _weights(path)
    finally:
        shard.unlink()


def _indexes() -> list[bytes]:
    return [json.dumps({"metadata": {}, "weight_map": dict.fromkeys(_state(), "a.safetensors")}).encode()]


def _pickles() -> list[bytes]:
    from tempfile import TemporaryDirectory

    from pickle_writer import write_persistent_pickle

    with TemporaryDirectory() as folder:
        path = Path(folder, "a.pkl")
        write_persistent_pickle(path, "Net", {"width": 3}, {"model.weight": torch.ones(2, 3)}, {"*": "Linear"})
        return [path.read_bytes()]


def _reference(path):
    from neon.measure.metrics import load_reference

    _ = load_reference(path).root


def _statistics() -> list[bytes]:
    return [files.npz(mu=np.zeros(4), sigma=np.eye(4), features=np.zeros((5, 4), "f4"))]


def _objects() -> list[bytes]:
    return [files.npz(mu=np.array([files.Program()] * 4, object), sigma=np.eye(4))]


def _kept(path):
    from neon.measure.kept import Kept

    Kept(path, logits=True).load()


def _features() -> list[bytes]:
    return [files.npz(seeds=np.arange(4), features=np.zeros((4, 3), "f4"), logits=np.zeros((4, 2), "f4"))]


def _images(path):
    images = ImageSet(path)
    images.images(range(min(len(images), 4)))


def _image_zips() -> list[bytes]:
    import zipfile

    content = {
        "a.png": files._png(),
        "b.png": files._png(),
        "dataset.json": b'{"labels": [["a.png", 1], ["b.png", 2]]}',
    }
    return [files._zip(content), files._zip(content, zipfile.ZIP_DEFLATED)]


def _parquet() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [{"bytes": files._png(), "path": None}] * 3, "label": [1, 2, 3]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return [buffer.getvalue()]


def _rows(path):
    from report.tables import rows_of, table_of

    table_of(rows_of(path, final=True))


def _row(path):
    from report.tables import rows_of, table_of

    table_of(rows_of(path))


def _page(path):
    from report.page import page

    page([path], "title")


def _notebooks() -> list[bytes]:
    import base64

    image = files.shown({"image/png": base64.b64encode(files._png()).decode(), "text/plain": "a"})
    text = {"cell_type": "markdown", "id": "b", "metadata": {}, "source": "# Title\n$a_1$ [b](a.ipynb)"}
    return [files.notebook(text, files.code(image, files.shown({"text/markdown": "|a|\n|-|\n|1|"}))).encode()]


def _table(path):
    from neon.fetch import read_table

    read_table(path)


def _downloads() -> list[bytes]:
    return [b'group,path,source,size,sha256\nbase,a/b.pkl,https://a/b.pkl,12,\nvae,"a,c",hf://a/b@c/d,,00ff\n']


def _curve(path):
    from report.metrics import curve, read_csv

    curve(read_csv(path, ["w", "fid"]))


PARAMS = b"""seeds: {selftrain: 0}
models:
  a: {family: edm, base: a, recipe: digits, synthetic: 0-9, train: {batch: 8, budget: 64}}
"""


def _params(path):
    from neon.plan import plan

    plan(path)


def _digits(path):
    from mini.features import digits

    digits(path)


def _extractors() -> list[bytes]:
    from safetensors.torch import save

    from mini.features import DigitsCNN

    metadata = {"format": "pt", "model": "DigitsCNN", "dim": "2"}
    return [save(DigitsCNN(2).state_dict(), metadata)]


def _edm(path):
    import edm.family

    edm.family.load(path, device="cpu")


def _networks() -> list[bytes]:
    from safetensors.torch import save

    import edm.family
    from neon.weights import network

    options = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    net = edm.family.create("digits", device="cpu", **options)
    return [save({k: v.contiguous() for k, v in net.state_dict().items()}, network.metadata(net))]
