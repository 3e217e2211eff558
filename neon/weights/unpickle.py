"""The `.pkl` checkpoints of EDM and IMM, read as data: nothing they name is imported, nothing they hold is run.

Such a file pickles whole modules together with their source text, which the original reader executes. A pickle
is a program for a small stack machine. `_Machine` below is another machine for it, with only the opcodes that a
checkpoint needs. (`pickle.Unpickler` imports, calls, recurses and allocates as the file says.) In it

- a global is a name on the lists below and stays a name (`Global`); any other name is an error;
- a call of one returns a dict, a number, a place in the file or a `Record`: data, never a live object;
- a tensor is a place in the file (`Blob`, `Storage`, `View`), checked against the size of the file, and read after
  the whole pickle: memory is bounded, except for the tensors that are asked for;
- the file cannot choose a depth of recursion; opcodes, text, names and the module tree have limits.
"""

import itertools
import math
import os
import pickle  # only for the names of its opcodes
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from neon import NeonError
from neon.files import regular

# Names that a file may contain and that do nothing: a call of one makes a Record. Names that do something: _CALLS.
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_TYPES = {f"builtins.{name}" for name in ("bool", "int", "float", "str", "list", "dict")}
_INERT = {"numpy.dtype", "typing.Any", *_DTYPES, *_TYPES}
_INERT_CLASSES = re.compile(r"(torch\.nn\.modules|timm|omegaconf)(\.\w+)+")

# The only names that the stream of a storage may contain; the numpy scalars that occur.
_STORAGES = {
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
}  # fmt: skip
_SCALARS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i"}

# Opcodes: the format of the operand after it; the value that it pushes; the container that it makes or fills, from
# that number of items of the stack or from all above the mark. `_Machine.run` has the others.
_OPERANDS = {
    pickle.PROTO: "<B", pickle.FRAME: "<Q",
    pickle.BINGET: "<B", pickle.LONG_BINGET: "<I", pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I",
    pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BININT: "<i", pickle.LONG1: "<B", pickle.BINFLOAT: ">d",
    pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I", pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I",
}  # fmt: skip
_VALUES = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
_EMPTY = {pickle.EMPTY_LIST: list, pickle.EMPTY_DICT: dict, pickle.EMPTY_SET: set}
_FILL = {
    pickle.TUPLE1: (tuple, 1), pickle.TUPLE2: (tuple, 2), pickle.TUPLE3: (tuple, 3), pickle.TUPLE: (tuple, "mark"),
    pickle.APPEND: (list, 1), pickle.APPENDS: (list, "mark"), pickle.ADDITEMS: (set, "mark"),
    pickle.SETITEM: (dict, 2), pickle.SETITEMS: (dict, "mark"),
}  # fmt: skip

_BUDGET = 2**26  # bytes of text in a file
_OPCODE = 64  # bytes of the budget for each opcode: a million opcodes, ten times what the largest network has
_MAX_KEY = 256  # characters of a dictionary's key
_MAX_NAME = 1024  # characters of a tensor's name: bounds the depth of the module tree
_MAX_NODES = 100_000  # entries of the module tree; values in the constructor's options
_MAX_DEPTH = 16  # nesting of the constructor's options


class UnsafePickleError(NeonError):
    """The file asks for something that no checkpoint needs."""


@dataclass(frozen=True)
class Global:
    """A name in the file. It is never looked up."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """An object of the file. Compared by identity and printed by name: its content may have no end."""

    class_name: str
    args: tuple = field(repr=False)
    state: Any = field(repr=False, default=None)


@dataclass(frozen=True)
class Blob:
    """Bytes start … start + size of the file; they exist."""

    start: int
    size: int


@dataclass(frozen=True)
class Storage:
    """`count` numbers from byte `start` of the file; they exist."""

    start: int
    count: int
    dtype: torch.dtype


@dataclass(frozen=True)
class View:
    """A strided part of a storage, counted in elements; all of it is inside."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PickledModel:
    """A module tree. Options are plain values and torch dtypes; anything else in them stays a Record or a Global."""

    class_name: str
    init_kwargs: dict[str, Any]
    state_dict: dict[str, torch.Tensor] = field(repr=False)  # names and order of the original's state_dict()
    parameters: frozenset[str] = field(repr=False)  # those of state_dict that are parameters; the rest are buffers


def read_pickle(path: str | Path, entry: str = "ema") -> PickledModel:
    """The module `entry` of an EDM or IMM checkpoint; tensors on the CPU, with the dtypes and shapes of the file.

    Raises UnsafePickleError if the file names or does anything that is not listed, or exceeds a limit; NeonError if it
    cannot be read, is damaged or has no such module.
    """
    path = regular(path)
    try:
        with path.open("rb") as file:
            root = _Machine(file).run_file()
            if not isinstance(root, dict) or entry not in root:
                raise NeonError(f"this pickle has no entry {entry!r}")
            module, (views, parameters) = root[entry], _views(root[entry])
            storages = dict.fromkeys(view.storage for view in views.values())  # one that is shared is read once
            data = {storage: _read(file, storage) for storage in storages}
        kwargs = _options(module.state.get("_init_kwargs"))
        if module.state.get("_init_args") != () or not isinstance(kwargs, dict):
            raise NeonError(f"{module.class_name!r} does not record its constructor's arguments by name")
    except OSError as error:
        raise NeonError(f"{path}: {error.strerror}") from None
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        # an empty stack, an unset memo, broken text, a key without a value, a size that is none
        raise NeonError(f"{path}: damaged pickle") from None
    except NeonError as error:
        raise type(error)(f"{path}: {error}") from None
    state = {name: data[view.storage].as_strided(view.size, view.stride, view.offset) for name, view in views.items()}
    return PickledModel(module.class_name, kwargs, state, parameters)


def _views(root: Any) -> tuple[dict[str, View], frozenset[str]]:
    """The tensors of a module tree by name, in the order of Module.state_dict(), and which names are parameters."""
    views, learned, nodes, pending = {}, set(), 0, [("", root)]
    while pending:
        prefix, module = pending.pop()
        state = module.state if isinstance(module, Record) and isinstance(module.state, dict) else {}
        parameters, buffers, children = (state.get(key) for key in ("_parameters", "_buffers", "_modules"))
        transient = state.get("_non_persistent_buffers_set", set())
        if not (type(parameters) is type(buffers) is type(children) is dict and type(transient) is set):
            raise NeonError(f"{prefix[:-1] or 'the entry'!r} is not a module")
        nodes += 1 + len(parameters) + len(buffers) + len(children)
        if nodes > _MAX_NODES or len(prefix) > _MAX_NAME:  # a cycle, or one module in very many places
            raise UnsafePickleError("the tree of modules has no end")
        own = [*parameters.items(), *((key, view) for key, view in buffers.items() if key not in transient)]
        for key, view in own:
            if view is None:  # an absent bias, say
                continue
            if not isinstance(view, View) or prefix + key in views:
                raise NeonError(f"{prefix + key!r} is not one tensor")
            views[prefix + key] = view
        learned |= {prefix + key for key in parameters}
        pending += [(f"{prefix}{key}.", child) for key, child in reversed(children.items()) if child is not None]
    return views, frozenset(learned & views.keys())


def _options(value: Any, depth: int = 0, nodes: itertools.count | None = None) -> Any:
    """A copy with torch's dtypes and without omegaconf's wrappers; other Records and Globals stay as they are."""
    nodes = nodes or itertools.count()
    if depth > _MAX_DEPTH or next(nodes) > _MAX_NODES:  # a cycle, or one value in very many places
        raise UnsafePickleError("the constructor options have no end")
    match value:
        case Global(name) if name in _DTYPES:
            return _DTYPES[name]
        case Record(name, state={"_content": inner} | {"_val": inner}) if name.startswith("omegaconf."):
            return _options(inner, depth + 1, nodes)
        case dict():
            return {key: _options(inner, depth + 1, nodes) for key, inner in value.items()}
        case list() | tuple():
            return type(value)(_options(inner, depth + 1, nodes) for inner in value)
    return value


def _read(file: BinaryIO, storage: Storage) -> torch.Tensor:
    """The numbers of a storage, (count,)."""
    data = torch.empty(storage.count, dtype=storage.dtype)
    file.seek(storage.start)
    if file.readinto(data.view(torch.uint8).numpy()) != data.nbytes:
        raise NeonError("the file changed while it was read")
    return data


class _Machine:
    """Runs the pickles in a file under one budget for all of them."""

    def __init__(self, file: BinaryIO):
        self.file, self.budget = file, _BUDGET
        self.size = os.fstat(file.fileno()).st_size

    def run_file(self) -> Any:
        """What the pickle at the start of the file makes."""
        start = self.file.read(2)
        if start == b"PK":
            raise NeonError("a torch zip checkpoint (.pth), not a pickle of modules")
        if start[:1] != pickle.PROTO:
            raise NeonError("not a pickle")
        self.file.seek(0)
        return self.run()

    def run(self, in_storage: bool = False) -> Any:
        """What the pickle at the file's position makes; in_storage: it is one of the five that describe a storage."""
        stack, below, memo = [], [], {}  # below: the stacks under each mark
        while True:
            self.budget -= _OPCODE
            op = self.take(1)
            n = self.number(_OPERANDS[op]) if op in _OPERANDS else None
            match op:
                case _ if op in _VALUES:
                    stack.append(_VALUES[op])
                case _ if op in _EMPTY:
                    stack.append(_EMPTY[op]())
                case pickle.BININT1 | pickle.BININT2 | pickle.BININT | pickle.BINFLOAT:
                    stack.append(n)
                case pickle.LONG1:
                    stack.append(int.from_bytes(self.take(n), "little", signed=True))
                case pickle.SHORT_BINUNICODE | pickle.BINUNICODE:
                    stack.append(self.take(n).decode())
                case pickle.SHORT_BINBYTES | pickle.BINBYTES:
                    stack.append(Blob(self.file.tell(), n))
                    self.file.seek(self.require(n), os.SEEK_CUR)
                case pickle.BINGET | pickle.LONG_BINGET:
                    stack.append(memo[n])
                case pickle.MEMOIZE:
                    memo[len(memo)] = stack[-1]
                case pickle.BINPUT | pickle.LONG_BINPUT:
                    memo[n] = stack[-1]  # in a dict, where a large n costs nothing
                case pickle.MARK:
                    below.append(stack)
                    stack = []
                case _ if op in _FILL:
                    kind, count = _FILL[op]
                    if count == "mark":
                        items, stack = stack, below.pop()
                    else:
                        items = [stack.pop() for _ in range(count)][::-1]
                    if kind is tuple:
                        stack.append(tuple(items))
                    else:
                        _fill(stack[-1], kind, items)
                case pickle.STACK_GLOBAL:
                    name, module = stack.pop(), stack.pop()
                    stack.append(_listed(module, name, in_storage))
                case pickle.GLOBAL if in_storage:
                    module, name = (self.file.readline(_MAX_KEY).decode().rstrip("\n") for _ in range(2))
                    stack.append(_listed(module, name, in_storage))
                case pickle.REDUCE | pickle.NEWOBJ:
                    args, callee = stack.pop(), stack.pop()
                    stack.append(self.call(callee, args))
                case pickle.BUILD:
                    state = stack.pop()
                    if not isinstance(stack[-1], Record):
                        raise UnsafePickleError("gives a state to something that is not an object")
                    stack[-1].state = state  # kept as data: no __setstate__, no attributes
                case pickle.BINPERSID if in_storage:
                    pass  # the description of a storage stands for the storage
                case pickle.FRAME:
                    self.require(n)
                case pickle.PROTO:
                    pass
                case pickle.STOP:
                    return stack.pop()
                case _:
                    raise UnsafePickleError(f"uses opcode {op!r}, which no checkpoint needs")

    def take(self, size: int) -> bytes:
        """The next bytes of the file, which count against the budget."""
        self.budget -= size
        if self.budget < 0:
            raise UnsafePickleError("holds more objects or text than any checkpoint")
        data = self.file.read(size)
        if len(data) < size:
            raise NeonError("truncated pickle")
        return data

    def number(self, format: str) -> int | float:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def require(self, size: int) -> int:
        """size, if so many bytes are left in the file."""
        if size > self.size - self.file.tell():
            raise NeonError("truncated pickle")
        return size

    def call(self, callee: Any, args: Any) -> Any:
        """The result of a call in the file: a Record, or what the function in _CALLS returns."""
        if not (isinstance(callee, Global) and isinstance(args, tuple)):
            raise UnsafePickleError("calls something that is not a listed name")
        if callee.name not in _CALLS:
            return Record(callee.name, args)
        here = self.file.tell()
        if (result := _CALLS[callee.name](self, args)) is None:
            raise UnsafePickleError(f"calls {callee.name} with arguments that no checkpoint has")
        self.file.seek(here)
        return result


def _listed(module: Any, name: Any, in_storage: bool) -> Global:
    """The name, if it is on the list."""
    full = f"{module}.{name}" if type(module) is type(name) is str else "something that is not a name"
    if in_storage:
        known = full in _STORAGES
    else:
        known = full in _CALLS or full in _INERT or (len(full) <= _MAX_KEY and _INERT_CLASSES.fullmatch(full))
    if not known:
        raise UnsafePickleError(f"refers to {full[:_MAX_KEY]!r}, which no checkpoint needs")
    return Global(full)


def _fill(target: Any, kind: type, items: list) -> None:
    """Add items to a list or set, or alternating keys and values to a dict."""
    if type(target) is not kind:
        raise UnsafePickleError(f"adds to something that is not a {kind.__name__}")
    if kind is list:
        return target.extend(items)
    keys = items[::2] if kind is dict else items
    if not all(type(key) is str and len(key) <= _MAX_KEY for key in keys):  # hashing these is cheap
        raise UnsafePickleError("uses a key that is not a short text")
    target.update(zip(keys, items[1::2], strict=True) if kind is dict else keys)


def _mapping(machine: _Machine, args: tuple) -> dict | None:
    match args:  # a defaultdict is called with the type of its values
        case () | (Global(),):
            return {}


def _persistent(machine: _Machine, args: tuple) -> Record | None:
    match args:  # "module_src", the source text, is also there: it is not read
        case ({"type": "class", "class_name": str() as name, "state": state},) if len(name) <= _MAX_KEY:
            return Record(name, (), state)


def _scalar(machine: _Machine, args: tuple) -> int | float | None:
    match args:
        case (Record("numpy.dtype", (str() as code, *_), (_, "<", *_)), Blob(start, size)) if code in _SCALARS:
            machine.file.seek(start)
            return machine.number(_SCALARS[code]) if size == struct.calcsize(_SCALARS[code]) else None


def _storage(machine: _Machine, args: tuple) -> Storage | None:
    """torch's old format: five pickles (magic number, version, platform, description, keys), the count, the numbers."""
    match args:
        case (Blob(blob, size),):
            machine.file.seek(blob)
            head = [machine.run(in_storage=True) for _ in range(5)]
            written, start = machine.number("<q"), machine.file.tell()
        case _:
            return None
    match head:
        case [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, ("storage", Global(kind), _, _, count, *_), _]:
            if not written == count > 0 or start + written * _STORAGES[kind].itemsize != blob + size:
                raise NeonError("a tensor has more or fewer numbers than it says")
            return Storage(start, written, _STORAGES[kind])


def _tensor(machine: _Machine, args: tuple) -> View | None:
    match args:
        case (Storage(count=count) as storage, offset, tuple() as size, tuple() as stride, bool(), dict(), *_):
            if not len(size) == len(stride) < 9 or not all(type(n) is int for n in (offset, *size, *stride)):
                return None
            # Inside its storage, not empty, and not larger than the storage (as an expanded tensor would be).
            last = offset + sum((n - 1) * step for n, step in zip(size, stride))
            inside = offset >= 0 and last < count and all(0 <= step <= count for step in stride)
            if not (inside and all(n > 0 for n in size) and math.prod(size) <= count):
                raise NeonError("a tensor reaches beyond its storage")
            return View(storage, offset, size, stride)


def _parameter(machine: _Machine, args: tuple) -> View | None:
    match args:
        case (View() as view, bool(), dict()):
            return view


# Names that do something: what a call of one returns, or None if no checkpoint has such arguments.
_CALLS: dict[str, Callable[[_Machine, tuple], Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "dnnlib.util.EasyDict": _mapping,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
