"""What a number depends on, and points that have no number."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from processes import error_of, neon, torchrun

import edm.family
import flow.family
from edm import calculate_fid
from neon import Diverged, NeonError
from neon.distributed import World
from neon.measure.candidates import Candidates, Point
from neon.measure.evaluate import Evaluation
from neon.measure.features import load_extractor
from neon.measure.metrics import load_reference
from neon.measure.rows import Rows, facts, key_of
from neon.sampling import to_uint8
from neon.weights.checkpoint import load_weights, save_safetensors

SAMPLING = dataclasses.asdict(edm.family.Sampling(num_steps=4))


@pytest.fixture(scope="module")
def candidates(mini):
    return Candidates(edm.family, mini.base, "cpu")


def evaluation(mini, **changes):
    extractor, reference = load_extractor(mini.features[1]), load_reference(mini.ref)
    made = Evaluation(torch.arange(20), extractor, reference, ("fid",), 10)
    return dataclasses.replace(made, **changes)


def test_a_key_holds_what_decides_a_number_and_nothing_else(mini, candidates):
    def key(sampling=None, point=Point(), class_idx=None, **changes):  # noqa: B008 - frozen
        return key_of(candidates, evaluation(mini, **changes), SAMPLING | (sampling or {}), point, class_idx=class_idx)

    first = key()
    assert first == key(batch=3) == key(world=World(1, 4))  # how the work is divided
    others = [
        key({"num_steps": 5}),
        key({"solver": "euler"}),
        key(class_idx=3),
        key(seeds=torch.arange(1, 21)),
        key(metrics=("fid", "precision")),
        key(world=World(device=torch.device("cuda"))),
        key(world=World(device=torch.device("cuda"), tf32=True)),
        key(point=Point(str(mini.snapshots[0]), 1.0)),
        key(point=Point(str(mini.snapshots[1]), 1.0)),
        key(point=Point(str(mini.snapshots[1]), 1.5)),
    ]
    assert len({first, *others}) == 1 + len(others)
    half = Candidates(edm.family, mini.base, "cpu", "bfloat16")
    assert key_of(half, evaluation(mini), SAMPLING, Point()) not in (first, *others)


def test_a_copy_of_a_checkpoint_is_the_same_checkpoint(mini, candidates, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(mini.base.read_bytes())
    other = Candidates(edm.family, copy, "cpu")
    assert facts(other, evaluation(mini), SAMPLING, Point()) == facts(candidates, evaluation(mini), SAMPLING, Point())


def test_class_device_and_tf32_are_in_the_row(mini, tmp_path, monkeypatch):
    script = ["calculate_fid.py", "--network_pkl", mini.base, "--ref", mini.ref, *mini.features, "--num_steps", 2]
    rows = []
    for out, more in (("all.json", []), ("three.json", ["--class", 3])):
        words = [*script, "--seeds", "0-15", "--metrics", "fid", "--out", tmp_path / out, *more]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        calculate_fid.main()
        rows.append(json.loads((tmp_path / out).read_text()))
    assert [row["class_idx"] for row in rows] == [None, 3] and rows[0]["fid"] != rows[1]["fid"]
    assert all((row["device"], row["tf32"], row["dtype"]) == ("cpu", False, "float32") for row in rows)


def test_float16_of_edm_is_refused_on_a_cpu(mini, tmp_path):
    """There it would run in float32 and be recorded as float16."""
    command = ["evaluate", *mini.measuring, "--model", mini.base, "--seeds", "0-9", "--metrics", "fid"]
    assert "float16 on GPUs only" in error_of(*command, "--precision", "float16")
    with pytest.raises(SystemExit) as wrong:
        neon(*command, "--precision", "float8")
    assert wrong.value.code == 2


def test_self_training_records_where_it_ran(mini, tmp_path):
    options = ["--recipe", "digits", "--budget", 64, "--snapshot", 64]
    neon("selftrain", "--family", "edm", "--base", mini.base, "--data", mini.data, *options, "--out", tmp_path / "run")
    from neon.weights.checkpoint import open_weights

    with open_weights(tmp_path / "run" / "state.safetensors") as state:
        run = json.loads(state.metadata["run"])
    assert (run["device"], run["tf32"], run["precision"]) == ("cpu", False, "float32")
    assert "processes" not in run and "micro_batch" not in run


def test_no_noise_is_drawn_to_learn_that_there_are_no_classes(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr("edm.family.start", refuse)
    monkeypatch.setattr("flow.family.start", refuse)
    assert edm.family.labels(SimpleNamespace(label_dim=0), torch.arange(3)) is None
    assert flow.family.labels(SimpleNamespace(num_classes=0), torch.arange(3)) is None


def test_labels_are_drawn_with_their_batch(mini, candidates, monkeypatch):
    """Each rank draws those of its own images only, a batch at a time."""
    asked = []
    monkeypatch.setattr(edm.family, "labels", lambda model, seeds: asked.append(seeds.tolist()) or seeds % 10)
    from neon.measure.rows import measure

    class Half(World):
        def gather(self, value):
            return [value, value]

    part = evaluation(mini, world=Half(1, 2), batch=4)
    with pytest.raises(ValueError, match="process group"):  # of the reduction, which needs the other rank
        measure(candidates, part, SAMPLING, Point())
    assert asked == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]


# ---------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nearest", [False, True])
def test_pixels_that_are_not_finite_are_counted_and_refused(dtype, value, nearest):
    images = torch.zeros(5, 3, 4, 4, dtype=dtype)
    assert (to_uint8(images, nearest) == (128 if nearest else 127)).all()
    images[1, 0, 2, 2] = images[4, 2, 0, 1] = images[4, 2, 0, 2] = value
    with pytest.raises(Diverged, match="2 of 5 images have pixels that are not finite"):
        to_uint8(images, nearest)


@pytest.fixture
def wild(mini, tmp_path):
    """A self-trained model so far away that a merge with a large w overflows in the network, not in the weights."""
    state = load_weights(mini.base)
    name = next(name for name, tensor in state.items() if tensor.ndim == 4)
    state[name] = state[name] + 1e30
    metadata = edm.family.metadata(edm.family.load(mini.base, device="cpu"))
    save_safetensors(tmp_path / "snapshot-000000064.safetensors", state, metadata)
    return tmp_path / "snapshot-000000064.safetensors"


def search(mini, wild, out, *more):
    options = ["--seeds", "0-31", "--metrics", "fid,precision", "--batch_size", 8, *more]
    return ["search", *mini.measuring, "--base", mini.base, "--selftrained", wild, *options, "--out", out]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_diverging_merge_is_a_row_and_the_search_continues(mini, wild, tmp_path, processes):
    out = tmp_path / "rows.jsonl"
    command = search(mini, wild, out, "--w=0,1,1e20,0.5")
    (done,) = torchrun(processes, "-m", "neon.cli", *command)
    rows = list(Rows(out).rows.values())
    assert [row["w"] for row in rows] == [0, 1, 1e20, 0.5]
    bad = [row for row in rows if row["fid"] == math.inf]
    assert bad and all("not finite" in row["reason"] and "precision" not in row for row in bad)
    assert rows[0]["fid"] < math.inf and "diverged: " in done.stdout and "best: w 0 " in done.stdout
    before = out.read_bytes()
    neon(*command)  # nothing is measured again
    assert out.read_bytes() == before


def test_a_base_that_diverges_ends_the_search(mini, wild, tmp_path):
    command = search(mini, wild, tmp_path / "rows.jsonl", "--w=0,1")
    command[command.index(mini.base)] = wild
    assert "not finite" in error_of(*command)
    assert not (tmp_path / "rows.jsonl").exists()


def test_two_state_dicts_of_different_kinds_are_not_merged_in_memory(tmp_path):
    """θ_r's average with θ_s's raw weights."""
    model = flow.family.create("digits", device="cpu")
    state = model.state_dict()
    torch.save({"model_ema": state}, tmp_path / "base.pt")
    torch.save({"model": state}, tmp_path / "trained.pt")
    family = SimpleNamespace(**vars(flow.family) | {"load": lambda *_, **__: model})
    candidates = Candidates(family, tmp_path / "base.pt", "cpu")
    with pytest.raises(NeonError, match=r"model_ema.*model.*neon convert"):
        candidates.load(tmp_path / "trained.pt", 1.0)


@pytest.mark.parametrize("name", ["edm", "flow", "var", "xar", "imm"])
def test_precision_of_a_command(name, capsys):
    """As given; otherwise what the released code evaluates in on a GPU, which is printed, and float32 on a CPU."""
    from neon.cli.options import precision_of
    from neon.family import get_family

    family = get_family(name)
    gpu, cpu = (World(device=torch.device(kind), tf32=kind == "cuda") for kind in ("cuda", "cpu"))
    given, default = SimpleNamespace(precision="bfloat16"), SimpleNamespace(precision=None)
    assert precision_of(given, family, gpu) == precision_of(given, family, cpu) == "bfloat16"
    assert precision_of(default, family, cpu) == "float32" and capsys.readouterr().out == ""
    released = {"edm": "float32", "flow": "float32", "var": "float16", "xar": "float16", "imm": "float32+float16"}
    assert precision_of(default, family, gpu) == released[name]
    assert capsys.readouterr().out.startswith(f"precision: {released[name]} with TensorFloat-32")
    assert family.released_tf32 == (name == "imm")
