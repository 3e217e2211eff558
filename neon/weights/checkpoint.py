"""Weights in files, in their native formats, read as data: nothing in a file is ever executed.

`open_weights` returns a read-only mapping from names to tensors, which loads a tensor when it is asked for.
`write_weights` writes one in the format and nesting of another, tensor by tensor.

    .safetensors                        one file, or a folder (or its *.index.json) with shards
    .pth .pt .ckpt                      torch.save of a state dict, flat or nested; torch.load(weights_only=True)
    .pkl                                EDM's and IMM's persistent pickles (neon.weights.unpickle); read only
    a folder in diffusers' format       the .safetensors of the component that is trained (neon.weights.pipeline)
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from safetensors import safe_open

from neon import NeonError
from neon.archives import check_members
from neon.files import atomic, check_room, existing, read_json, read_object, reading, regular, scratch
from neon.weights.pipeline import weights_file

# Where public checkpoints keep the weights that are sampled from, best first (EMA before raw); dots enter nested dicts.
STATE_KEYS = ("model_ema", "ema_model", "ema", "trainer.var_wo_ddp", "var_wo_ddp", "state_dict", "model")

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What is true of a base, but not of a merge made from it: how long it was trained, on what, and digests of its weights.
OF_THE_BASE = re.compile(r"(?!vae_)(neon_.*|(data_)?images|(global_)?(step|epoch)s?|.*(hash|sha256).*)")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 2**24  # bytes of a safetensors header: 100,000 tensors; ten times as many take ten seconds to parse
MAX_TIES = 16  # names that numbers may have on average, of a file that is large when each name has a copy of its own
LARGE = 2**26  # bytes

RECORD = "neon"  # the entry of a nested torch file for what safetensors files have in their metadata
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt")


class Weights(Mapping[str, torch.Tensor]):
    """Named tensors of one file, in the file's order.

    path: where they come from; format: 'safetensors', 'torch' or 'pickle'; metadata: str → str, what the file says
    of itself (safetensors), or the recorded constructor arguments (pickle). key: where they lie in a nested file, a
    dotted path ('' in a flat one). buffers: names of those that the file itself marks as buffers (pickle).
    """

    path: Path
    format: str
    metadata: dict[str, str]
    key: str = ""
    buffers: Collection[str] = ()
    _names: Collection[str]

    @property
    def origin(self) -> str:
        """The file and the key, for people."""
        return f"{self.path} ({f'key {self.key}' if self.key else 'flat'})"

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)

    def __contains__(self, name):  # Mapping's own would read the tensor
        return name in self._names

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor, without reading it where the format allows."""
        tensor = self[name]
        return tensor.dtype, tuple(tensor.shape)

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class SafetensorsWeights(Weights):
    """A .safetensors file, or the shards that an index names."""

    format = "safetensors"

    def __init__(self, path: Path):
        self.path, self.metadata = path, {}
        self.shards = _shards(path)  # file → names, or None for all
        self._names = self._spec = {}
        self._place = {}
        with ExitStack() as files:  # closes them if one of them is bad
            for path, names in self.shards.items():
                with reading(regular(path), "not a readable safetensors file"):
                    file = files.enter_context(path.open("rb"))
                    header, data_start = _safetensors_header(file)
                    with safe_open(path, framework="pt"):  # the library checks the header
                        self.metadata |= header.pop("__metadata__", None) or {}
                for name in names or header:
                    if name not in header:
                        raise NeonError(f"{path}: {name} is missing, though the index says that it is there")
                    if header[name]["dtype"] not in DTYPES:
                        raise NeonError(f"{path}: {name} is of dtype {header[name]['dtype']}, which is not supported")
                    self._spec[name] = DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
                    _check_shape(name, *self._spec[name], path)
                    self._place[name] = file, data_start + header[name]["data_offsets"][0]
            self._files = files.pop_all()

    def __getitem__(self, name):
        (dtype, shape), (file, start) = self._spec[name], self._place[name]
        tensor = torch.empty(shape, dtype=dtype)  # read, not mapped: mapped pages would stay in memory
        file.seek(start)
        if file.readinto(_bytes(tensor)) != tensor.nbytes:
            raise NeonError(f"{file.name}: truncated while it was read")
        return tensor

    def spec(self, name):
        return self._spec[name]

    def close(self):
        self._files.close()


class TorchWeights(Weights):
    """A torch.save file. tree: everything in it."""

    format = "torch"

    def __init__(self, path: Path, key: str | None = None):
        self.path, self.metadata = path, {}
        self.tree = torch_load(path)
        self.key, self._state = _find_state(self.tree, key, path)
        if self.key and isinstance(self.tree.get(RECORD), dict):
            self.metadata = {k: str(v) for k, v in self.tree[RECORD].items() if str(k).startswith("neon_")}
        self._names = self._state
        for name, tensor in self._state.items():
            _check_plain(name, tensor, path)
            _check_shape(name, tensor.dtype, tuple(tensor.shape), path)
        check_ties(self._state.values(), path)

    def __getitem__(self, name):
        return self._state[name]


class PickleWeights(Weights):
    """An EDM or IMM .pkl: the tensors of one network in it; metadata holds its recorded constructor call."""

    format = "pickle"

    def __init__(self, path: Path, key: str | None = None):
        from neon.weights.unpickle import read_pickle

        self.path, self.key = path, key or "ema"
        self.model = read_pickle(path, self.key)
        check_ties(self.model.state_dict.values(), path)
        self._names = self.model.state_dict
        self.buffers = self.model.state_dict.keys() - self.model.parameters
        self.metadata = {
            "class_name": self.model.class_name,
            "init_kwargs": json.dumps(self.model.init_kwargs, default=str),
        }

    def __getitem__(self, name):
        return self.model.state_dict[name]


def open_weights(path: str | Path, key: str | None = None) -> Weights:
    """Open a checkpoint for reading; use it as a context manager.

    key: dotted path of the state dict inside a nested .pth/.ckpt; default: the first of STATE_KEYS that is there. In a
    .pkl: the network's entry, by default 'ema'. Raises NeonError if the file is missing, damaged, of an unknown kind,
    holds anything but data, or nothing at the key.
    """
    path = weights_file(existing(path))
    if path.is_dir() or path.suffix == ".safetensors" or path.name.endswith(".index.json"):
        if key:
            raise NeonError(f"{path}: safetensors files are flat, there is no key {key!r} in one")
        return SafetensorsWeights(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchWeights(path, key)
    if path.suffix == ".pkl":
        return PickleWeights(path, key)
    raise NeonError(f"{path}: unknown kind of checkpoint (know .safetensors, .pth, .pt, .ckpt, .pkl){_advice(path)}")


def _advice(path: Path) -> str:
    return "; load the model and save it again with save_pretrained, as safetensors" if path.suffix == ".bin" else ""


def check_same_key(base: Weights, selftrained: Weights, advice: str) -> None:
    """Raises NeonError, which ends with the advice, if both are nested and taken from different keys, such as
    'model_ema' and 'model'."""
    if base.key and selftrained.key and base.key != selftrained.key:
        raise NeonError(f"the base is {base.origin}; the self-trained model is {selftrained.origin}; {advice}")


def load_weights(path: str | Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in memory."""
    with open_weights(path, key) as weights:
        return dict(weights.items())


def write_weights(
    path: str | Path,
    like: Weights,
    tensors: Iterable[tuple[str, torch.Tensor]],
    record: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write (name, tensor) pairs to `path` in the format, order, nesting and dtypes of `like`, atomically.

    One tensor at a time is in memory. Whatever else `like` holds (metadata; epoch, args and other entries around a
    nested state dict) is copied, except metadata that hold for `like` alone (OF_THE_BASE). record: joins the metadata;
    in a nested torch file it is the entry RECORD, and a flat one has no place for it. Weights from a .pkl are written
    as .safetensors, since the original format contains the source of the program that wrote it. Raises NeonError if
    the suffix does not fit the format, or if the folder for shards already exists.
    """
    path = Path(path)
    metadata = metadata_like(like, record)
    sharded = is_sharded(like)
    if like.format == "torch":
        fits, kind, write = path.suffix in TORCH_SUFFIXES, " or ".join(TORCH_SUFFIXES), _write_torch
        metadata = record
    elif sharded:
        files = (".safetensors", ".pkl", ".json", *TORCH_SUFFIXES)
        fits, kind, write = path.suffix not in files, "a folder of shards", _write_shards
    else:
        fits, kind, write = path.suffix == ".safetensors", ".safetensors", _write_file
    if not fits:
        raise NeonError(f"{path}: weights from {like.path.name} are written as {kind}")
    write(path, like, tensors, metadata)


def metadata_like(like: Weights, record: Mapping[str, str]) -> dict[str, str]:
    """`record`, and what `like` says of itself and is true of a merge made from it, too."""
    return {k: v for k, v in like.metadata.items() if not OF_THE_BASE.fullmatch(k)} | dict(record)


def is_sharded(weights: Weights) -> bool:
    """Do they lie in the files that an index names?"""
    return weights.format == "safetensors" and weights.path.suffix != ".safetensors"


def save_safetensors(
    path: str | Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a state dict as one .safetensors file, atomically, keeping its order."""
    write_safetensors(path, {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}, state.items(), metadata)


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write (name, tensor) pairs, in any order and one at a time, to a .safetensors file, atomically.

    specs: their dtypes and shapes, in the file's order. (The safetensors library writes a whole dict at once; a merge
    should not need the memory of one.) Raises NeonError if a pair is missing or not as its spec says, or if a dtype is
    not supported.
    """
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    header |= dict.fromkeys(specs)
    offsets, end = {}, 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):  # keeps data aligned
        if dtype not in DTYPE_NAMES:
            raise NeonError(f"{name}: {dtype} is not supported")
        offsets[name], start = end, end
        end += torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = dict.fromkeys(specs)
    with atomic(path, size=8 + len(text) + end) as partial, partial.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        data_start = f.tell()
        for name, tensor in tensors:
            if (tensor.dtype, tuple(tensor.shape)) != specs[name]:
                raise NeonError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {specs[name]} was expected")
            f.seek(data_start + offsets[name])
            f.write(_bytes(tensor.detach().cpu().contiguous()))
            del missing[name]
        if missing:
            raise NeonError(f"{next(iter(missing))}: expected but not given")


def _write_file(path: Path, like: Weights, tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping) -> None:
    write_safetensors(path, {name: like.spec(name) for name in like}, tensors, metadata)


def _write_shards(
    path: Path, like: SafetensorsWeights, tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping
) -> None:
    if path.exists():  # it may hold anything, which would be deleted
        raise NeonError(f"{path}: exists; remove it or choose another folder")
    with atomic(path, size=size_of(like)) as partial:
        partial.mkdir()
        fill_with_shards(partial, like, tensors, metadata)


def fill_with_shards(
    folder: Path, like: SafetensorsWeights, tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping
) -> None:
    """Write (name, tensor) pairs in the order of `like` into an existing folder: its shards and its index, by name."""
    pairs: Iterator[tuple[str, torch.Tensor]] = iter(tensors)
    index = read_json(_index_file(like.path))
    for file, names in like.shards.items():  # `like` iterates shard by shard, so the pairs come in that order
        specs = {name: like.spec(name) for name in names}
        write_safetensors(folder / file.name, specs, islice(pairs, len(names)), metadata)
    (folder / _index_file(like.path).name).write_text(json.dumps(index, indent=2))


def _write_torch(
    path: Path, like: TorchWeights, tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping
) -> None:
    # torch.save needs all tensors at once: they are kept in a memory-mapped scratch file, not in memory.
    size = size_of(like)
    check_room(path, 2 * size)
    with scratch(path) as folder, atomic(path, size=size) as partial:
        waiting = folder / "tensors"
        _write_file(waiting, like, tensors, {})
        with safe_open(waiting, framework="pt") as mapped:
            state = {name: mapped.get_tensor(name) for name in like}
            # An empty one has the address of the next: torch.save would see one storage with two dtypes.
            state = {name: tensor if tensor.numel() else tensor.clone() for name, tensor in state.items()}
            tree = _replace(like.tree, _steps(like.key), state)
            with partial.open("wb") as file:  # given a path, torch names the folder in its archive after it
                torch.save(tree | {RECORD: dict(metadata)} if like.key and metadata else tree, file)


def size_of(weights: Weights) -> int:
    """Bytes of all tensors."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in map(weights.spec, weights))


def _replace(tree, steps: list[str], state: dict):
    """A copy of `tree` with another state dict at the end of `steps`."""
    return {**tree, steps[0]: _replace(tree[steps[0]], steps[1:], state)} if steps else state


def torch_load(path: Path):
    """torch.load of data alone. Raises NeonError."""
    with reading(regular(path), "not a readable torch checkpoint"):
        if zipped := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_members(archive, path, stored=True)  # as torch.save writes them
        try:
            # Namespace: the command line, which many training scripts store; it runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it asks for {found[1]}, which is not data" if found else "its pickle is damaged or not plain data"
            raise NeonError(f"{path}: refused, {what}") from None


def _check_plain(name: str, tensor: torch.Tensor, path: Path) -> None:
    """Raises NeonError unless a tensor's numbers lie in memory, each of them in one place."""
    kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
    if tensor.device.type != "cpu" or kind != "strided" or tensor.is_conj() or tensor.is_neg():
        where = tensor.device.type if tensor.device.type != "cpu" else kind
        raise NeonError(f"{path}: {name} is a {where} tensor; save it as a dense one")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise NeonError(f"{path}: {name} {tuple(tensor.shape)} has more numbers than are stored")


def _check_shape(name: str, dtype: torch.dtype, shape: tuple[int, ...], path: Path) -> None:
    """Raises NeonError if torch cannot make such a tensor; an empty one, too, has strides."""
    if len(shape) > 64 or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
        raise NeonError(f"{path}: {name} has a shape that no tensor can have")


def check_ties(tensors: Iterable[torch.Tensor], path: Path) -> None:
    """Raises NeonError if what is written would be very much larger than what is stored: many names of few numbers."""
    tensors = list(tensors)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    written, stored = sum(t.numel() * t.itemsize for t in tensors), sum(storages.values())
    if written > max(LARGE, MAX_TIES * stored):
        raise NeonError(
            f"{path}: {len(tensors):,} names of the same numbers: {stored / 2**20:,.1f} MiB would be written as"
            f" {written / 2**20:,.1f} MiB"
        )


def _steps(key: str) -> list[str]:
    """The keys to follow from the root to a dotted key; none to ''."""
    return key.split(".") if key else []


def _find_state(tree, key: str | None, path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The key and the state dict: the given key, or '' if the tree itself is one, or the first of STATE_KEYS."""
    if not isinstance(tree, dict):
        raise NeonError(f"{path}: holds a {type(tree).__name__}, not a dict of tensors")
    for candidate in [key] if key else ["", *STATE_KEYS]:
        state = tree
        for step in _steps(candidate):
            state = state.get(step) if isinstance(state, dict) else None
        if isinstance(state, dict) and state and all(_is_weight(*item) for item in state.items()):
            return candidate, state
    where = f"no dict of tensors at {key!r}" if key else "no dict of tensors found"
    entries = ", ".join([*map(str, tree)][:8]) or "none"
    how = "choose one with --key, or --selftrained_key for θ_s"
    raise NeonError(f"{path}: {where}; it has {len(tree)} entries: {entries} ({how})")


def _is_weight(name, value) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def _index_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors.index.json"))
    if len(found) != 1:
        raise NeonError(f"{path}: {len(found)} files named *.safetensors.index.json, need one")
    return found[0]


def shard_files(index: Path) -> list[Path]:
    """The files that an index names, next to it. Raises NeonError."""
    return list(_shards(index))


def _shards(path: Path) -> dict[Path, list[str] | None]:
    if path.suffix == ".safetensors" and not path.is_dir():
        return {path: None}
    index = _index_file(path)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NeonError(f"{index}: no weight_map")
    shards: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not (isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")):
            raise NeonError(f"{index}: shard {file!r} is not the name of a .safetensors file next to it")
        shards.setdefault(index.parent / file, []).append(name)
    return shards


def _safetensors_header(file: BinaryIO) -> tuple[dict, int]:
    """The header, in the order of the file (the library's own reader sorts names), and where the data start.

    Raises ValueError or struct.error if it is too long for its file, or to be one.
    """
    (size,) = struct.unpack("<Q", file.read(8))
    if size > min(MAX_HEADER, Path(file.name).stat().st_size - 8):
        raise ValueError(f"a header of {size:,} bytes")
    return json.loads(file.read(size)), 8 + size


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def check_metadata(weights: Weights, name: str) -> dict:
    """The JSON object that the file records under a name, {} without one. Raises NeonError."""
    with reading(weights.path, f"not a checkpoint, its {name} is not a JSON object"):
        if not isinstance(found := json.loads(weights.metadata.get(name, "{}")), dict):
            raise ValueError(type(found).__name__)
    return found


def check_fits(module: torch.nn.Module, weights: Weights | Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Raises NeonError that names the first missing, extra or differently shaped tensor. module may be on 'meta'."""
    state = module.state_dict()
    shape_of = (lambda name: weights.spec(name)[1]) if isinstance(weights, Weights) else (lambda n: weights[n].shape)
    for name in [*state, *weights]:
        if name not in weights or name not in state:
            raise NeonError(f"{source}: {name} is {'missing' if name not in weights else 'not of this network'}")
        found, wanted = tuple(shape_of(name)), tuple(state[name].shape)
        if found != wanted:
            raise NeonError(f"{source}: {name} has shape {found}, this network needs {wanted}")


@torch.no_grad()
def load_into(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Copy weights into a module, cast to its dtypes. Raises NeonError if names or shapes differ, see check_fits."""
    check_fits(module, weights, source)
    state = module.state_dict()
    for name in state:
        state[name].copy_(weights[name])


def values_sha256(module: torch.nn.Module) -> str:
    """Digest of a module's values as float32: the same whatever the file's format and the names of its tensors."""
    values = (tensor.detach().float().cpu().contiguous().numpy().data for tensor in module.state_dict().values())
    return hashlib.sha256("".join(sorted(hashlib.sha256(v).hexdigest() for v in values)).encode()).hexdigest()
