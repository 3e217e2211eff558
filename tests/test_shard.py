"""Training in shards: the weights of a run without, on any number of processes; its state; what must not happen."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import error_of, files, finish, job, kill_when, neon, ranks, torchrun
from test_family import OWN, SMALL
from test_selftrain import images_in, selftrain

from neon import NeonError
from neon.distributed import World, world
from neon.dropout import masks_of
from neon.family import Recipe, get_family
from neon.recompute import recompute_in
from neon.selftrain import train
from neon.weights.checkpoint import load_weights, open_weights, save_safetensors
from neon.whole import Whole

sys.path.append(str(Path(__file__).parent / "var"))
# Everything at once: decay, average, clipping at work (with this eps it shows in Adam's steps), a rate that rises.
ALL = {"ramp": 32, "optimizer": "adamw", "weight_decay": 0.1, "eps": 1e-4, "clip": 0.02, "ema_decay": 0.5}
RECIPE = Recipe(batch=16, lr=1e-3, budget=48, snapshot=32, **ALL)


class Images:
    """Random images with labels, in place of an ImageSet."""

    def __init__(self, name):
        self.shape = (3, 64, 64) if name == "var" else (1, 8, 8)
        drawn = torch.Generator().manual_seed(1)
        self.pixels = torch.randint(256, (32, *self.shape), generator=drawn, dtype=torch.uint8)
        self.labels = torch.randint(10, (32,), generator=drawn)

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        return self.pixels[list(indices)]


def small(name, folder):
    """A family, and a function that makes its small model, the same at each call."""
    config, options, _ = SMALL[name]
    loading = {"vae_ckpt": str(folder / "vae_ch160v4096z32.pth")} if name == "var" else {}

    def make(device):
        torch.manual_seed(0)
        made = get_family(name).create(config, device=device, **loading, **options)
        with torch.no_grad():  # initial zeros would hide what is behind them
            for p in get_family(name).weights(made).parameters():
                p.add_(0.05 * torch.randn_like(p))
        return made

    return get_family(name), make


def run(name, folder, out, here, place, recipe=RECIPE, micro_batch=4, recompute=False, large=False):
    family, make = small(name, folder)
    if large:
        from neon import shard

        shard.HELD = 0
    placed = place(family, make, here, recompute)
    recipe = replace(recipe, loss=SMALL[name][2])
    train(family, placed.model, Images(name), recipe, out, world=here, place=placed, micro_batch=micro_batch)
    return placed


def alone(folder, names, **options):
    for name in names:
        run(name, folder, folder / "alone" / Path(name).stem, World(), Whole, **options)


def averaged(folder, name, options):
    with world("cpu") as here:
        run(name, folder, folder / "averaged" / name, here, Whole, **options)


def sharded(folder, names, out, options):
    """All families in the processes of one job."""
    from neon.shard import Sharded

    with world("cpu", joined=True) as here:
        for name in names:
            placed = run(name, folder, folder / out / Path(name).stem, here, Sharded, **options)
            held = sum(t.nbytes for t in placed.local([*placed.params.values()]))
            all_of_it = sum(p.nbytes for p in placed.params.values())
            (folder / out / f"{Path(name).stem}-{here.rank}.json").write_text(json.dumps([held, all_of_it]))


def write_vqvae(folder):
    from var_cases import TINY, write_pair

    write_pair(folder, TINY)
    return folder


def check_alike(one, other, start, tolerance=1e-4):
    """Two runs from the same weights ended alike, compared with how far they went; and logged alike."""
    names = [sorted(path.name for path in folder.glob("snapshot-*")) for folder in (one, other)]
    assert names[0] == names[1] and "snapshot-000000048.safetensors" in names[0]
    for name in names[0]:
        a, b = load_weights(one / name), load_weights(other / name)
        assert [*a] == [*b]
        trained = [key for key in a if not torch.equal(a[key], start[key])]
        assert all(torch.equal(a[key], b[key]) for key in a if key not in trained)
        far = sum((a[key] - start[key]).double().square().sum() for key in trained) ** 0.5
        off = sum((a[key] - b[key]).double().square().sum() for key in trained) ** 0.5
        assert far > 1e-3 and off < tolerance * far, (other, name, off / far)
        with open_weights(one / name) as x, open_weights(other / name) as y:
            assert x.metadata == y.metadata
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert a["grad_norm"] > 2 * RECIPE.clip  # so that clipping matters


def log_of(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: row[key] for key in ("images", "loss", "grad_norm", "lr")} for row in rows]


def start_of(name, folder):
    family, make = small(name, folder)
    return {key: t.clone() for key, t in family.weights(make("cpu")).state_dict().items()}


def check_families(folder, names, n, **options):
    """Weights, averages, norms and losses of one process without shards; and an n-th of the memory."""
    job(n, sharded, folder, names, str(n), options)
    for stem, name in ((Path(name).stem, name) for name in names):
        check_alike(folder / "alone" / stem, folder / str(n) / stem, start_of(name, folder))
        held = [json.loads((folder / str(n) / f"{stem}-{rank}.json").read_text()) for rank in range(n)]
        assert sum(own for own, _ in held) == held[0][1] and max(own for own, _ in held) < 1.3 / n * held[0][1]


def test_every_family_on_two_processes(tmp_path):
    write_vqvae(tmp_path)
    names = [name for name in SMALL if name != "diffusers"]  # takes seconds to import
    alone(tmp_path, names)
    check_families(tmp_path, names, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "batch"), [(1, 16), (3, 24), (4, 16)])
def test_every_family_on_other_numbers_of_processes(tmp_path, n, batch):
    write_vqvae(tmp_path)
    recipe = replace(RECIPE, batch=batch)
    alone(tmp_path, SMALL, recipe=recipe)
    check_families(tmp_path, [*SMALL], n, recipe=recipe, recompute=True)


def test_processes_with_different_numbers_of_micro_batches(tmp_path):
    """16 images over three processes are 5, 5 and 6: in fives, one pass, one and two. And a network that is large:
    gathered block by block, its gradients reduced after every micro-batch."""
    alone(tmp_path, ["edm"])
    check_families(tmp_path, ["edm"], 3, micro_batch=5, large=True)


def test_loss_scaling(tmp_path):
    """Half-precision gradients that overflow on one process make all of them skip the step and halve the scale."""
    half = {"recipe": replace(RECIPE, precision="float16", clip=None, budget=128, snapshot=128)}
    job(2, averaged, tmp_path, "edm", half)
    job(2, sharded, tmp_path, ["edm"], "two", half)
    one, two = (tmp_path / place / "edm" for place in ("averaged", "two"))
    scales = [json.loads(open_weights(folder / "state.safetensors").metadata["scaler"]) for folder in (one, two)]
    assert scales[0] == scales[1] and scales[0]["scale"] < 2**16
    last = "snapshot-000000128.safetensors"
    a, b, start = load_weights(one / last), load_weights(two / last), start_of("edm", tmp_path)
    far = sum((a[key] - start[key]).double().square().sum() for key in a) ** 0.5
    assert far > 1e-3 and sum((a[key] - b[key]).double().square().sum() for key in a) ** 0.5 < 0.02 * far


def test_recomputing_changes_nothing(tmp_path):
    """Dropout masks too are those of the first time; and blocks are in fact computed twice."""
    write_vqvae(tmp_path)
    for name in SMALL:
        found = []
        for twice in (False, True):
            family, make = small(name, tmp_path)
            model, data, passes = make("cpu"), Images(name), []
            network = family.weights(model).train().requires_grad_(True)
            names = [*network.state_dict()]
            if twice:
                recompute_in(network)
            for module in network.modules():  # linear layers and convolutions, which have no blocks in them
                if not [*module.children()] and [*module.parameters()]:
                    module.register_forward_hook(lambda *_, passes=passes: passes.append(1))
            generator = torch.Generator().manual_seed(0)
            draws = family.draw(model, 8, generator, images=lambda data=data: data.images(range(8)), **SMALL[name][2])
            with masks_of(torch.arange(8), "cpu"):
                loss = family.loss(model, data.images(range(8)), data.labels[:8], draws, **SMALL[name][2])
            loss.backward()
            assert [*network.state_dict()] == names
            found.append(([p.grad for p in network.parameters()], len(passes)))
        (kept, once), (again, more) = found
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(kept, again, strict=True)), name
        assert more > 1.2 * once or name == OWN, name  # which is no larger than a block


# ---------------------------------------------------------------- the state


COMMAND = {"budget": 256, "snapshot": 128, "save_every": 64}


@pytest.fixture(scope="module")
def killed(mini, tmp_path_factory):
    """A run of two processes that were killed after a state, and the same run in one go."""
    out = tmp_path_factory.mktemp("shards")
    finish(*ranks(2, *selftrain(mini, out / "whole", **COMMAND), "--shard"))
    state = out / "killed" / "state.safetensors"
    both = ranks(2, *selftrain(mini, out / "killed", **COMMAND), "--shard")
    kill_when(lambda: state.exists() and images_in(state) >= 128, *both, timeout=250)
    assert 128 <= images_in(state) < COMMAND["budget"]
    for left in (out / "killed").glob(".*.partial"):  # a run that removes it says so
        left.unlink()
    return out


def test_a_killed_run_resumes(killed, mini, tmp_path):
    """To the same bytes; on one process, to the same weights."""
    for out in ("two", "one"):
        shutil.copytree(killed / "killed", tmp_path / out)
    finish(*ranks(2, *selftrain(mini, tmp_path / "two", **COMMAND), "--shard"))
    assert files(tmp_path / "two") == files(killed / "whole")
    neon(*selftrain(mini, tmp_path / "one", **COMMAND), "--shard")
    assert files(tmp_path / "one").keys() == files(killed / "whole").keys()
    check_near(killed / "whole", tmp_path / "one", mini)
    neon(*selftrain(mini, tmp_path / "plain", **COMMAND))
    check_near(tmp_path / "plain", tmp_path / "one", mini)


def check_near(one, other, mini):
    last = "snapshot-000000256.safetensors"
    base, a, b = load_weights(mini.base), load_weights(one / last), load_weights(other / last)
    far = sum((a[key] - base[key]).double().square().sum() for key in a) ** 0.5
    assert far > 0.01 and sum((a[key] - b[key]).double().square().sum() for key in a) ** 0.5 < 0.01 * far


def test_snapshots_are_checkpoints_as_any_other(killed, mini, tmp_path):
    last = killed / "whole" / "snapshot-000000256.safetensors"
    with open_weights(last) as weights, open_weights(mini.snapshots[-1]) as other:
        assert [*weights] == [*other] and weights.metadata.keys() == other.metadata.keys()
        assert weights.metadata["class_name"] == "EDMPrecond"
    assert "EDMPrecond" in neon("inspect", last)
    neon("merge", "--base", mini.base, "--selftrained", last, "-w", 1, "--out", tmp_path / "neon.safetensors")
    assert get_family("edm").load(tmp_path / "neon.safetensors", device="cpu").label_dim == 10


def edited(pattern, text):
    """Change the header of a file without moving anything in it."""

    def edit(path):
        data = path.read_bytes()
        found = re.search(pattern, data)
        assert found and len(found[0]) == len(text)
        path.write_bytes(data.replace(found[0], text, 1))

    return edit


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def shards_of(out):
    (folder,) = [out / json.loads(open_weights(out / "state.safetensors").metadata["shards"])["folder"]]
    return folder, sorted(folder.iterdir())


DAMAGES = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-8]), r"shard-0\S+ has \d+ bytes, not \d+"),
    "missing": (lambda f: f.unlink(), r"shard-0\S+ has no bytes, not \d+"),
    "moved": (edited(rb'saved_offsets\\": \[16,', rb"saved_offsets\": [15,"), "the parts of .* do not make"),
    "renamed": (edited(rb"exp_avg/", rb"exp_abc/"), "is not of this network|no tensor|saved_offsets|place of"),
    "noise": (lambda f: f.write_bytes(b"\xff" * f.stat().st_size), "not a readable safetensors file"),
    "pickle": (
        lambda f: (f.parent / ".metadata").write_bytes(pickle.dumps(Bomb())),
        r"\.metadata has \d+ bytes, not no",
    ),
    "more": (lambda f: shutil.copy(f, f.with_name("more.safetensors")), "more.safetensors has"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(killed, mini, tmp_path, monkeypatch, damage):
    """By one line, on every process; nothing is changed, and nothing of it is run."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    shutil.copytree(killed / "killed", out)
    change, said = DAMAGES[damage]
    change(shards_of(out)[1][-1])
    before = files(out)
    error = error_of(*selftrain(mini, out, **COMMAND), "--shard")
    assert re.search(said, error), error
    assert files(out) == before and not Path("exploded").exists()


def test_a_record_of_shards_that_is_none(killed, mini, tmp_path):
    with open_weights(killed / "killed" / "state.safetensors") as pointer:
        metadata = pointer.metadata
    folder = json.loads(metadata["shards"])["folder"]
    for name, changes in {
        "outside": {"shards": json.dumps({"folder": f"../{folder}", "files": {"a.safetensors": 1}})},
        "list": {"shards": "[]"},
        "no files": {"shards": json.dumps({"folder": folder, "files": {}})},
        "none": {"shards": None},
        "images": {"images": "100"},
        "late": {"images": "256"},
        "scaler": {"scaler": json.dumps({"scale": "x"})},
    }.items():
        out = tmp_path / name
        shutil.copytree(killed / "killed", out)
        changed = {key: text for key, text in (metadata | changes).items() if text is not None}
        save_safetensors(out / "state.safetensors", {}, changed)
        assert str(out / "state.safetensors") in error_of(*selftrain(mini, out, **COMMAND), "--shard"), name


def test_other_runs_are_refused(killed, mini, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(killed / "killed", out)
    before = files(out)
    error = error_of(*selftrain(mini, out, **COMMAND | {"lr": 2e-3}), "--shard")
    assert error.startswith(f"error: {out} holds another run (lr is 0.001 there, 0.002 here)")
    error = error_of(*selftrain(mini, out, **COMMAND))
    assert error == f"error: {out} holds a run with --shard; resume it with --shard"
    assert files(out) == before
    with open_weights(out / "state.safetensors") as pointer:
        plain = {key: text for key, text in pointer.metadata.items() if key != "shards"}
    save_safetensors(out / "state.safetensors", {"param/x": torch.zeros(1)}, plain)
    error = error_of(*selftrain(mini, out, **COMMAND), "--shard")
    assert error == f"error: {out} holds a run without --shard; resume it without --shard"


def test_one_process_of_two_finds_the_damage(killed, mini, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(killed / "killed", out)
    shards_of(out)[1][-1].unlink()
    for process in ranks(2, *selftrain(mini, out, **COMMAND), "--shard"):
        process.join(60)
        assert process.exitcode == 1


def test_sigterm_saves_first(mini, tmp_path):
    out = tmp_path / "stopped"
    both = ranks(2, *selftrain(mini, out, budget=64_000, snapshot=64_000), "--shard")
    deadline = time.monotonic() + 200
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert all(process.is_alive() for process in both) and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(both[1].pid, signal.SIGTERM)
    for process in both:
        process.join(120)
        assert process.exitcode == 143
    images = images_in(out / "state.safetensors")
    folder, found = shards_of(out)
    assert images >= 640 and folder.name == f"state-{images:09d}" and len(found) == 2
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", folder.name, "state.safetensors"]


def saving(out, write, steps=4):
    """A run in this process, of which write(steps begun, write now) writes the states, one every two steps."""
    from neon import shard

    seen = []

    class Writer(shard.HuggingFaceStorageWriter):
        def write_data(self, plan, planner):
            return write(seen, lambda: super(Writer, self).write_data(plan, planner))

    family, make = small("edm", None)

    def loss(*args, **options):
        seen.append(1)
        return family.loss(*args, **options)

    watched = SimpleNamespace(**vars(family) | {"loss": loss})
    recipe = replace(RECIPE, budget=16 * steps)
    with pytest.MonkeyPatch.context() as patch, world("cpu", joined=True) as here:
        patch.setattr(shard, "HuggingFaceStorageWriter", Writer)
        placed = shard.Sharded(watched, make, here)
        train(watched, placed.model, Images("edm"), recipe, out, world=here, place=placed, save_every=32)
    return seen


def test_training_goes_on_while_the_state_is_written(tmp_path):
    """And what is written is of the step after which it was begun: the average is that of the snapshot then."""
    waited, states = [], []

    def write(seen, now):
        if states:
            return now()
        deadline = time.monotonic() + 60
        while len(seen) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        waited.append(len(seen))
        done = now()
        (file,) = tmp_path.glob("state-*/*")
        states.append(load_weights(file))
        return done

    saving(tmp_path, write, steps=6)
    assert waited[0] == 4  # the fourth step, while the state after the second was waiting to be written
    then = load_weights(tmp_path / "snapshot-000000032.safetensors")
    later = load_weights(tmp_path / "snapshot-000000064.safetensors")
    average = {name.removeprefix("ema/"): t for name, t in states[0].items() if name.startswith("ema/")}
    assert all(torch.equal(tensor, then[name]) for name, tensor in average.items())
    assert any(not torch.equal(tensor, later[name]) for name, tensor in average.items())


def test_a_disk_that_is_full(tmp_path):
    """One line, and the state before stays."""

    written = []

    def write(seen, now):
        written.append(1)
        if len(written) == 1:
            return now()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NeonError, match=r"state-000000064: the disk is full"):
        saving(tmp_path, write, steps=8)
    assert images_in(tmp_path / "state.safetensors") == 32
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-000000032"]


def test_what_cannot_be_sharded_is_refused():
    """Adapters act in a network that is not theirs: they have no forward of their own."""
    from neon.shard import Sharded

    adapters = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    family = SimpleNamespace(name="x", weights=lambda model: adapters, metadata=lambda model: {})
    with world("cpu", joined=True) as here, pytest.raises(NeonError, match="--shard needs a network that is trained"):
        Sharded(family, lambda device: torch.nn.Linear(4, 4), here)


def test_a_dry_run_says_how_much_memory_a_process_needs(mini, tmp_path, monkeypatch):
    """Weights, gradients, two moments and the average in float32, and a copy in half precision; shares of them."""
    weights = sum(t.nbytes for name, t in load_weights(mini.base).items() if "resample" not in name) / 1e9
    command = (*selftrain(mini, tmp_path / "out"), "--precision", "bfloat16", "--dry_run")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for options, held, more in (([], 5, 0.5), (["--shard"], 5 / 4, 2.5), (["--shard", "--recompute"], 5 / 4, None)):
        line = re.search(r"memory .*", neon(*command, *options))[0]
        found, added = map(float, re.findall(r"([\d.e-]+) GB", line))
        assert found == pytest.approx(held * weights, rel=1e-2) and "a process of 4" in line
        assert added == pytest.approx(more * weights, rel=1e-2) if more else 2 * weights < added < 2.5 * weights
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_elastic(killed, mini, tmp_path):
    """Two processes, then four, then one."""
    out = tmp_path / "run"
    shutil.copytree(killed / "killed", out)
    state = out / "state.safetensors"
    images = images_in(state) + 64
    four = ranks(4, *selftrain(mini, out, **COMMAND), "--shard")
    kill_when(lambda: images_in(state) >= images, *four, timeout=250)
    if images_in(state) < COMMAND["budget"]:
        assert len(shards_of(out)[1]) == 4
    neon(*selftrain(mini, out, **COMMAND), "--shard")
    check_near(killed / "whole", out, mini)


@pytest.mark.slow
def test_killed_while_the_state_is_written(mini, tmp_path):
    command = {"budget": 1024, "snapshot": 256, "save_every": 64}
    finish(*ranks(2, *selftrain(mini, tmp_path / "whole", **command), "--shard"))
    out, moments = tmp_path / "broken", random.Random(0)
    state = out / "state.safetensors"
    for least in (128, 256, 384, 512):
        both = ranks(2, *selftrain(mini, out, **command), "--shard")
        newer = lambda n=least: state.exists() and any(int(p.name[6:]) >= n for p in out.glob("state-*"))  # noqa: E731
        kill_when(newer, *both, delay=moments.uniform(0, 0.01))
        assert images_in(state) >= least - 128
    finish(*ranks(2, *selftrain(mini, out, **command), "--shard"))
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.slow
def test_under_torchrun(mini, tmp_path):
    """As users type it; with a launcher per host, the model is made in turns on each."""
    for nodes in (1, 2):
        out = tmp_path / str(nodes)
        torchrun(2, "edm/selftrain.py", *selftrain(mini, out, **COMMAND)[3:], "--shard", "--recompute", nodes=nodes)
    neon(*selftrain(mini, tmp_path / "plain", **COMMAND))
    for nodes in (1, 2):
        check_near(tmp_path / "plain", tmp_path / str(nodes), mini)
