import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickle_writer import EDM_CLASSES, IMM_CLASSES, dump, instance, module_state, write_persistent_pickle

from neon import NeonError
from neon.weights.unpickle import Record, UnsafePickleError, read_pickle

GOLDEN = Path(__file__).parent / "golden"


def network(path, options=None, tensors=None, **entries):
    """A small checkpoint written to path."""
    tensors = tensors or {"a.weight": torch.arange(6.0).view(2, 3), "a.resample_filter": torch.ones(1)}
    write_persistent_pickle(path, "Net", options or {}, tensors, {"*": "Layer"}, **entries)
    return path


def module(**tables):
    """A module with these `_parameters`, `_buffers`, `_modules`."""
    return instance("Net", module_state({}) | {f"_{name}": table for name, table in tables.items()})


def read(path, content):
    dump({"ema": content}, path)
    return read_pickle(path)


# What the original code writes


@pytest.mark.parametrize("variant", ["edm/tiny_edm", "edm/tiny_edm_torch2", "imm/tiny_imm"])
def test_golden_checkpoint_loads_exactly(variant):
    model, stem = read_pickle(GOLDEN / f"{variant}.pkl"), variant.removesuffix("_torch2")
    expected, info = np.load(GOLDEN / f"{stem}_state.npz"), json.loads((GOLDEN / f"{stem}.json").read_text())
    assert list(model.state_dict) == list(expected) == [entry["name"] for entry in info["entries"]]
    for name, tensor in model.state_dict.items():
        assert tensor.dtype == torch.float32 and tensor.data_ptr() % 4 == 0
        np.testing.assert_array_equal(tensor.numpy(), expected[name])
    assert model.parameters == {entry["name"] for entry in info["entries"] if entry["kind"] == "param"}
    assert model.init_kwargs == info["constructor_kwargs"]
    assert model.class_name == {"edm/tiny_edm": "EDMPrecond", "imm/tiny_imm": "IMMPrecond"}[stem]


@pytest.mark.parametrize(
    ("stem", "classes"), [("edm/tiny_edm_torch2", EDM_CLASSES), ("imm/tiny_imm", IMM_CLASSES | {"model": "DiT"})]
)
def test_writer_makes_the_golden_structure(tmp_path, stem, classes):
    golden = read_pickle(GOLDEN / f"{stem}.pkl")
    write_persistent_pickle(tmp_path / "net", golden.class_name, golden.init_kwargs, golden.state_dict, classes)
    model = read_pickle(tmp_path / "net")
    assert list(model.state_dict) == list(golden.state_dict)
    assert all(torch.equal(model.state_dict[name], tensor) for name, tensor in golden.state_dict.items())
    assert (model.parameters, model.init_kwargs) == (golden.parameters, golden.init_kwargs)
    ours, theirs = (
        {(op.name, arg) for op, arg, _ in pickletools.genops(path.read_bytes()) if isinstance(arg, str)}
        for path in (tmp_path / "net", GOLDEN / f"{stem}.pkl")
    )
    assert {arg for _, arg in ours - theirs} <= {"raise SystemExit('source text in a checkpoint was executed')\n"}


def test_only_the_entry_asked_for_is_needed(tmp_path):
    loss = instance("EDMLoss", {"P_mean": -1.2, "_init_args": (), "_init_kwargs": {}})
    path = network(tmp_path / "net", loss_fn=loss, augment_pipe=None, dataset_kwargs={"path": "x.zip"})
    assert list(read_pickle(path).state_dict) == ["a.weight", "a.resample_filter"]
    with pytest.raises(NeonError, match="no entry 'net'"):
        read_pickle(path, "net")
    with pytest.raises(NeonError, match="not a module"):
        read_pickle(path, "loss_fn")
    for content in ("ema", ["ema"], None):
        dump(content, path)
        with pytest.raises(NeonError, match="no entry 'ema'"):
            read_pickle(path)


@pytest.mark.parametrize("change", [{"_init_args": (8,)}, {"_init_args": None}, {"_init_kwargs": None}])
def test_constructor_arguments_without_a_name_are_refused(tmp_path, change):
    """A network built from the rest would be another one."""
    net = instance("Net", module_state({"a": 1}) | change)
    with pytest.raises(NeonError, match="net: 'Net' does not record its constructor's arguments by name"):
        read(tmp_path / "net", net)


def test_source_text_is_not_executed(tmp_path):
    assert b"raise SystemExit" in network(tmp_path / "net").read_bytes()
    assert read_pickle(tmp_path / "net").parameters == {"a.weight"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32])
def test_dtypes(tmp_path, dtype):
    tensor = torch.arange(5).to(dtype)
    model = read(tmp_path / "net", module(buffers={"n": tensor}))
    assert model.state_dict["n"].dtype == dtype and torch.equal(model.state_dict["n"], tensor)


def test_views_of_shared_storage(tmp_path):
    base = torch.arange(24.0)
    views = {"all": base, "some": base[4:10], "turned": base.view(4, 6).t(), "steps": base[1::5], "one": base[7]}
    state = read(tmp_path / "net", module(buffers=views)).state_dict
    assert all(torch.equal(state[name], view) and state[name].stride() == view.stride() for name, view in views.items())


def test_absent_and_transient_entries_are_left_out(tmp_path):
    net = module(parameters={"bias": None}, buffers={"gone": torch.ones(2), "kept": torch.ones(1)}, modules={"m": None})
    net.meta["state"]["_non_persistent_buffers_set"] = {"gone"}
    assert list(read(tmp_path / "net", net).state_dict) == ["kept"]


def test_ambiguous_names_are_refused(tmp_path):
    one = torch.ones(1)
    for net in (
        module(parameters={"a": torch.nn.Parameter(one)}, buffers={"a": one}),
        module(buffers={"m.a": one}, modules={"m": module(buffers={"a": one})}),
    ):
        with pytest.raises(NeonError, match="not one tensor"):
            read(tmp_path / "net", net)


def test_options_become_plain(tmp_path):
    def node(value):
        return instance("omegaconf.nodes.AnyNode", {"_metadata": None, "_val": value})

    config = instance("omegaconf.listconfig.ListConfig", {"_content": [node(1), node("x")], "_parent": None})
    options = {"dtype": torch.float16, "gain": np.sqrt(0.5), "config": config, "nested": {"a": [1, (2.5, None, True)]}}
    plain = {"dtype": torch.float16, "gain": 0.5**0.5, "config": [1, "x"], "nested": {"a": [1, (2.5, None, True)]}}
    assert read_pickle(network(tmp_path / "net", options)).init_kwargs == plain
    options["format"] = instance("timm.layers.format.Format", {"deep": [{}]})
    assert isinstance(read_pickle(network(tmp_path / "net", options)).init_kwargs["format"], Record)


def test_other_files(tmp_path):
    cases = {"empty": b"", "text": b"version https://git-lfs", "html": b"<!doctype html>", "one byte": b"\x80"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NeonError, match=f"{name}: .*pickle"):
            read_pickle(tmp_path / name)
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pth")
    with pytest.raises(NeonError, match="torch zip checkpoint"):
        read_pickle(tmp_path / "model.pth")
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(NeonError, match=str(missing)):
            read_pickle(missing)


def test_truncated_anywhere(tmp_path):
    content = network(tmp_path / "net").read_bytes()
    for size in range(1, len(content), 7):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(NeonError):
            read_pickle(tmp_path / "cut")


# Hostile files: nothing is imported, nothing is run


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def places(value):
    """Pickles that hold a value wherever a checkpoint holds objects."""
    yield value
    yield {"ema": value}
    yield [value]
    yield {"ema": module(), "loss_fn": value}
    yield {"ema": module(parameters={"w": value})}
    yield {"ema": module(modules={"m": value})}
    yield {"ema": instance("Net", module_state({"option": value}))}
    yield {"ema": instance("Net", value)}
    yield {"ema": instance("torch.nn.modules.linear.Linear", {"hook": value})}
    stream = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": value}))
    yield {"ema": Call(torch.storage._load_from_bytes, stream)}


def test_calls_are_refused_by_name(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "net"
    pickle.loads(pickle.dumps(Call(os.system, f"touch {canary}")))
    canary.unlink()  # it is there: pickle runs the payloads below
    for function, *args in [
        (os.system, f"touch {canary}"),
        (eval, f"open({str(canary)!r}, 'w')"),
        (exec, f"open({str(canary)!r}, 'w')"),
        (open, str(canary), "w"),
        (subprocess.check_call, ["touch", str(canary)]),
        (getattr, torch.nn.Linear, "mro"),
        (__import__, "antigravity"),
        (torch.load, str(path)),
    ]:
        for content in places(Call(function, *args)):
            dump(content, path)
            with pytest.raises(UnsafePickleError, match=rf"net: refers to '[\w.]+\.{function.__name__}'"):
                read_pickle(path)
            assert not canary.exists()


def test_special_names_in_a_state_are_only_data(tmp_path):
    state = dict.fromkeys(("__class__", "__setstate__", "__reduce__", "__dict__", "state", "class_name"), "x")
    dump({"ema": instance("Net", module_state({}) | state)}, tmp_path / "net")
    assert read_pickle(tmp_path / "net").class_name == "Net"


@pytest.mark.parametrize(
    "name",
    ["os.system", "timm", "timm.x\n", "torch.nn.modules", "torch.nn.modulesx.Y", "torch.load", "a", "timm..x"],
)
def test_names_near_the_list_are_refused(tmp_path, name):
    left, _, right = name.rpartition(".")
    (tmp_path / "net").write_bytes(b"\x80\x04" + text(left) + text(right) + b"\x93.")
    with pytest.raises(UnsafePickleError, match="refers to"):
        read_pickle(tmp_path / "net")


def test_a_listed_class_is_never_imported(tmp_path):
    dump({"ema": module(modules={"m": instance("timm.no_such.Module", module_state({}))})}, tmp_path / "net")
    before = set(sys.modules)
    assert read_pickle(tmp_path / "net").state_dict == {}
    assert not {name for name in set(sys.modules) - before if name.startswith("timm")}


def text(value):
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


LINEAR = name("torch.nn.modules.linear", "Linear")
TENSOR, DICT = name("torch._utils", "_rebuild_tensor_v2"), name("collections", "OrderedDict")
STORAGE = name("torch.storage", "_load_from_bytes")


def legacy(count=4, written=None, data=bytes(16), kind=b"torch\nFloatStorage\n", little=True):
    """torch's old stream of a storage of four numbers, or of more lies."""
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": little}))
    described = b"(" + text("storage") + b"c" + kind + text("0") + text("cpu") + number(count) + b"NtQ"
    written = struct.pack("<q", count if written is None else written)
    return head + b"\x80\x02" + described + b"." + pickle.dumps(["0"], 2) + written + data


def number(value):
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def call(function, args):
    return function + b"(" + args + b"tR"


def blob(content):
    return b"B" + struct.pack("<I", len(content)) + content


def tensor(size=(4,), stride=(1,), offset=0, stream=None):
    storage = call(STORAGE, blob(legacy() if stream is None else stream))
    size, stride = (b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride))
    return call(TENSOR, storage + number(offset) + size + stride + b"\x89" + call(DICT, b""))


def persistent(class_name):
    meta = b"}(" + text("type") + text("class") + text("class_name") + class_name + text("state") + b"}u"
    return call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)


def scalar(code="f8", order="<", data=bytes(8)):
    dtype = call(name("numpy", "dtype"), text(code) + b"\x89\x88") + b"(K\x03" + text(order) + b"tb"
    return call(name("numpy.core.multiarray", "scalar"), dtype + blob(data))


def nested(depth):
    """A storage whose stream loads a storage whose stream loads …"""
    stream = legacy()
    for _ in range(depth):
        stream = b"\x80\x04" + call(STORAGE, blob(stream)) + b"."
    return call(STORAGE, blob(stream))


def net(parameters=b"}", modules=b"}", kwargs=b"}", other=b"N"):
    """{'ema': a module}; its class is the memo's number 1."""
    state = {"_parameters": parameters, "_buffers": b"}", "_modules": modules, "other": other}
    state |= {"_init_args": b")", "_init_kwargs": kwargs}
    state = b"}(" + b"".join(text(key) + value for key, value in state.items()) + b"u"
    return b"\x80\x04}" + text("ema") + LINEAR + b"q\x01)\x81" + state + b"bs."


def holding(value, **tables):
    """A checkpoint with a value where a parameter belongs."""
    return net(b"}" + text("w") + value + b"s", **tables)


HOSTILE = {
    "call of a result": net(other=call(call(LINEAR, b""), b"")),
    "call of a number": net(other=call(b"K\x01", b"")),
    "arguments that are no tuple": net(other=LINEAR + b"]R"),
    "state of a dict": net(other=b"}}b"),
    "state of a name": net(other=LINEAR + b"}b"),
    "items of an object": net(other=LINEAR + b")\x81" + text("a") + b"Ns"),
    "items of a list": net(other=b"](K\x00Nu"),
    "key without a value": net(other=b"}(" + text("a") + b"u"),
    "keys that are deep": net(other=b"})" + b"\x85" * 9999 + b"Ns"),
    "keys that are long": net(other=b"}X\x00\x04\x00\x00" + b"a" * 1024 + b"Ns"),
    "keys that are numbers": net(other=b"}K\x01Ns"),
    "members that are deep": net(other=b"\x8f()" + b"\x85" * 9999 + b"\x90"),
    "name that is no text": net(other=b")" + b"\x85" * 9999 + text("a") + b"\x93"),
    "GLOBAL": net(other=b"ccollections\nOrderedDict\n"),
    "INST": net(other=b"(ios\nsystem\n"),
    "OBJ": net(other=b"(" + LINEAR + b"o"),
    "NEWOBJ_EX": net(other=LINEAR + b")}\x92"),
    "EXT1": net(other=b"\x82\x01"),
    "EXT2": net(other=b"\x83\x01\x00"),
    "EXT4": net(other=b"\x84\x01\x00\x00\x00"),
    "PERSID": net(other=b"Px\n"),
    "BINPERSID": net(other=text("x") + b"Q"),
    "INT": net(other=b"I1\n"),
    "LONG4": net(other=b"\x8b\xff\xff\xff\x7f"),
    "BINBYTES8": net(other=b"\x8e" + struct.pack("<Q", 2**62)),
    "BINUNICODE8": net(other=b"\x8d" + struct.pack("<Q", 2**62)),
    "BYTEARRAY8": net(other=b"\x96" + struct.pack("<Q", 2**62)),
    "long frame": net(other=b"\x95" + struct.pack("<Q", 2**62) + b"N"),
    "long bytes": net(other=b"B\xff\xff\xff\xff"),
    "long text": net(other=b"X\xff\xff\xff\xff"),
    "broken text": net(other=b"\x8c\x01\xff"),
    "unset memo": net(other=b"h\x07"),
    "empty stack": b"\x80\x04..",
    "no mark": b"\x80\x04}u.",
    "short stack": b"\x80\x04K\x01\x86.",
    "nothing to memoise": b"\x80\x04\x94.",
    "object of no class": net(other=persistent(b"N")),
    "object of a long name": net(other=persistent(b"X\x00\x04\x00\x00" + b"a" * 1024)),
    "scalar of fewer bytes": net(other=scalar(data=bytes(4))),
    "scalar of the other byte order": net(other=scalar(order=">")),
    "scalar of objects": net(other=scalar(code="O8")),
    "parameter that is a number": holding(b"K\x01"),
    "module that is a number": net(modules=b"}" + text("m") + b"K\x01s"),
    "modules that are a list": net(modules=b"]"),
    "options that are a list": net(kwargs=b"]"),
    "options in themselves": net(kwargs=b"}q\x02" + text("a") + b"h\x02s"),
    "storage of text": net(other=call(STORAGE, text("x"))),
    "stream of a name": net(other=tensor(stream=legacy(kind=b"posix\nsystem\n"))),
    "stream that calls": net(other=tensor(stream=pickle.dumps(Call(os.system, "true"), 2))),
    "stream in a stream": net(other=nested(1500)),
    "stream of the other byte order": net(other=tensor(stream=legacy(little=False))),
    "stream without end": net(other=tensor(stream=legacy()[:30])),
    "stream of a zip": net(other=tensor(stream=b"PK\x03\x04" + bytes(99))),
    "more numbers than bytes": net(other=tensor(stream=legacy(data=bytes(12)))),
    "more bytes than numbers": net(other=tensor(stream=legacy(data=bytes(20)))),
    "a billion numbers": net(other=tensor((10**9,), stream=legacy(10**9))),
    "two counts": net(other=tensor(stream=legacy(count=10**9, written=4))),
    "negative count": net(other=tensor(stream=legacy(-4, data=b""))),
    "no numbers": net(other=call(STORAGE, blob(legacy(0, data=b"")))),
    "size beyond the storage": net(other=tensor((5,))),
    "stride beyond the storage": net(other=tensor((4,), (2,))),
    "offset beyond the storage": net(other=tensor(offset=1)),
    "negative offset": net(other=tensor((1,), offset=-1)),
    "negative stride": net(other=tensor((2,), (-1,), offset=1)),
    "negative sizes": net(other=tensor((-1, -1), (1, 1))),
    "expanded to a billion": net(other=tensor((10**9,), (0,))),
    "expanded by axes": net(other=tensor((4,) * 8, (0,) * 8)),
    "size of 2^63": net(other=tensor((2**63,), (0,))),
    "stride of 2^63": net(other=tensor((1,), (2**63,))),
    "offset of 2^63": net(other=tensor((1,), offset=2**63)),
    "size of zero": net(other=tensor((2**63, 0), (1, 1))),
    "more sizes than strides": net(other=tensor((2, 2), (1,))),
    "size that is a float": net(other=tensor((4.0,))),
    "many axes": net(other=tensor((1,) * 99, (1,) * 99)),
}


def test_the_hostile_files_are_hostile_by_one_thing(tmp_path):
    """Without it they would be read."""
    options = b"}(" + text("a") + b"(K\x01K\x02t" + text("b") + scalar() + b"u"
    content = holding(tensor((2, 2), (2, 1)), kwargs=options, other=persistent(text("X")))
    (tmp_path / "net").write_bytes(content)
    model = read_pickle(tmp_path / "net")
    assert torch.equal(model.state_dict["w"], torch.zeros(2, 2)) and model.init_kwargs == {"a": (1, 2), "b": 0.0}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(tmp_path, case):
    (tmp_path / "net").write_bytes(HOSTILE[case])
    with pytest.raises(NeonError, match="net: "):
        read_pickle(tmp_path / "net")


# Bombs: files that ask for much memory, time or depth


def cyclic():
    linear = instance("torch.nn.modules.linear.Linear", module_state({}))
    linear._modules["m"] = linear
    return linear


def laughing():
    linear = instance("torch.nn.modules.linear.Linear", module_state({}))
    for _ in range(30):
        above = instance("torch.nn.modules.linear.Linear", module_state({}))
        above._modules.update(a=linear, b=linear)
        linear = above
    return linear


def repeating():
    table = {str(i): None for i in range(3000)}
    return module(modules={str(i): module(parameters=table) for i in range(3000)})


TWICE = b"q\x02h\x02\x86" * 64  # the top of the stack becomes 2^64 of it, in 64 pairs
TABLES = b"(" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + b"}"
BOMBS = {
    "sets": net(other=b"(" + b"\x8f" * 2_000_000 + b"t"),
    "marks": net(other=b"(" * 2_000_000),
    "objects": net(other=b"(" + b"h\x01)R" * 1_000_000 + b"t"),
    "text": net(other=b"(" + (b"X" + struct.pack("<I", 2**22) + b"a" * 2**22) * 20 + b"t"),
    "streams": net(other=b"(" + STORAGE + b"q\x02" + blob(legacy()) + b"q\x03" + b"h\x02h\x03\x85R" * 99_999 + b"t"),
    "deep options": net(kwargs=b"}" + text("a") + b")" + b"\x85" * 400_000 + b"s"),
    "laughing options": net(kwargs=b"}" + text("a") + b")" + TWICE + b"s"),
    "wide options": net(kwargs=b"}" + text("a") + b")" + b"q\x02h\x02h\x02\x87" * 12 + b"s"),
    "deep modules": net(modules=b"}" + (text("m") + b"h\x01)\x81}" + TABLES) * 9_999 + b"ubs" * 9_999),
    "cyclic modules": cyclic,
    "laughing modules": laughing,
    "repeating modules": repeating,
}
HARMLESS = {
    "large index of the memo": net(other=b"Nr\xff\xff\xff\xff"),
    "deep tuples": net(other=b")" + b"\x85" * 400_000),
    "deep lists": net(other=b"]" * 400_000 + b"a" * 399_999),
    "deep objects": net(other=b"h\x01" * 200_000 + b"N" + b"\x85R" * 200_000),
    "deep states": net(other=b"h\x01)\x81" * 200_000 + b"b" * 199_999),
    "laughing values": net(other=b")" + TWICE),
    "list in itself": net(other=b"]q\x02h\x02a"),
}
READ_ALL = """
import resource, sys
from pathlib import Path
from neon import NeonError
from neon.weights.unpickle import read_pickle

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
for path in map(Path, sys.argv[1:]):
    try:
        read_pickle(path)
        print(path.name, "read", sep=": ")
    except NeonError as error:
        print(path.name, error, sep=": ")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_AS")
def test_bombs_stay_small_and_quick(tmp_path):
    """In 512 MiB, in another process: a crash of the interpreter is a failure, too."""
    for case, content in (BOMBS | HARMLESS).items():
        path = tmp_path / case
        path.write_bytes(content) if isinstance(content, bytes) else dump({"ema": content()}, path)
    paths = [str(tmp_path / case) for case in BOMBS | HARMLESS]
    command = [sys.executable, "-c", READ_ALL, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    outcome = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(outcome) == list(BOMBS | HARMLESS)
    for case in HARMLESS:
        assert outcome[case] == "read"
    for case in BOMBS:
        assert "no end" in outcome[case] or "than any checkpoint" in outcome[case], (case, outcome[case])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_files_are_read_or_refused(tmp_path_factory, data):
    """No other outcome than a model or a NeonError, whatever bytes change."""
    content = bytearray(holding(tensor((2, 2), (2, 1)), kwargs=b"}" + text("a") + b"]K\x01as", other=b"h\x01)R"))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        model = read_pickle(path)
    except NeonError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert all(tensor.isfinite().numel() <= 4 for tensor in model.state_dict.values())
