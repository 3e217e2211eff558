"""The training loop: what a step does, and that a run that was killed ends as if it had not been."""

import json
import math
import random
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import torch
from processes import error_of, files, finish, kill_when, neon, ranks, start, torchrun
from torch.testing import assert_close

import edm.family
from neon import NeonError
from neon.data import ImageSet
from neon.distributed import World
from neon.dropout import dropout
from neon.family import Recipe
from neon.selftrain import make_optimizer, train
from neon.weights.checkpoint import load_weights, open_weights

ALONE = World()


def selftrain(mini, out, **options):
    changes = {"recipe": "digits", "budget": 512, "snapshot": 128, "lr": 1e-3, **options}
    words = [word for name, value in changes.items() for word in (f"--{name}", value)]
    return ["selftrain", "--family", "edm", "--base", mini.base, "--data", mini.data, *words, "--out", out]


def images_in(state):
    with open_weights(state) as weights:
        return int(weights.metadata["images"])


# ---------------------------------------------------------------- one step, on a network one can follow


class Numbers:
    """A data set whose 'images' are the numbers 0 … n − 1."""

    labels, shape = None, ()

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def images(self, indices):
        return torch.tensor(list(indices)).view(-1, 1, 1, 1)


def toy(loss, **parameters):
    """A family and a model with these parameters, whose loss is loss(model, images)."""
    model = torch.nn.Module()
    for name, value in parameters.items():
        model.register_parameter(name, torch.nn.Parameter(torch.tensor(value)))
    family = SimpleNamespace(
        check=lambda model, shape, labels: None,
        draw=lambda model, n, generator, *, images: torch.rand(n, generator=generator),
        loss=lambda model, images, labels, draws: loss(model, images.float()),
        weights=lambda model: model,
        metadata=lambda model: {},
    )
    return family, model


def line(model, images):
    """Mean squared error of a line through (x, x² − 3)."""
    x = images.flatten() / 8
    return (model.a * x + model.b - x**2 + 3).square().mean()


PLAIN = Recipe(batch=8, lr=0.1, budget=64, snapshot=64)


def test_micro_batches_add_up(tmp_path):
    ends = []
    for micro_batch in (None, 8, 3, 1):
        family, model = toy(line, a=1.0, b=0.0)
        train(family, model, Numbers(16), PLAIN, tmp_path / str(micro_batch), world=ALONE, micro_batch=micro_batch)
        ends.append(torch.stack([model.a, model.b]))
    assert (ends[0] - torch.tensor([1.0, 0.0])).abs().min() > 0.1
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=0, atol=1e-6)


def test_every_image_is_seen_once_per_epoch(tmp_path):
    seen = []
    family, model = toy(lambda model, images: seen.extend(images.flatten().tolist()) or model.a**2, a=1.0)
    train(family, model, Numbers(16), replace(PLAIN, budget=32), tmp_path, world=ALONE)
    assert sorted(seen[:16]) == sorted(seen[16:]) == list(range(16)) and seen[:16] != seen[16:]


class Pretended(World):
    """One of several processes, whose others never answer."""

    def average(self, tensors):
        pass

    def barrier(self):
        pass

    def gather(self, value):
        return [value]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_images_and_each_image_keeps_its_noise(tmp_path, processes):
    """Image, random number of the loss and dropout mask: the same triples for any number of processes."""

    def triples(processes, micro_batch):
        seen, globally = set(), []

        def loss(model, images, labels, draws):
            masks = dropout(torch.ones(len(images), 16), 0.5)
            seen.update(zip(images.flatten().tolist(), draws.tolist(), map(tuple, masks.tolist()), strict=True))
            globally.append(torch.rand(()).item())
            return model.a**2

        for rank in range(processes):
            family, model = toy(None, a=1.0)
            family.loss = loss
            out = tmp_path / f"{processes}-{rank}-{micro_batch}"
            options = {"world": Pretended(rank, processes), "micro_batch": micro_batch}
            train(family, model, Numbers(16), replace(PLAIN, budget=16), out, **options)
        assert len(set(globally)) == len(globally)  # a network's own random numbers never repeat
        return seen

    whole = triples(1, None)
    assert len(whole) == 16 and len({image for image, _, _ in whole}) == 16 == len({draw for _, draw, _ in whole})
    assert triples(processes, None) == triples(processes, 1) == whole


def test_clipping_and_what_the_log_says(tmp_path):
    """With eps = 1 the first step of Adam is −lr g / (|g| + 1), so the norm of g shows."""
    family, model = toy(lambda model, images: 30 * model.a + 40 * model.b, a=0.0, b=0.0)
    recipe = replace(PLAIN, budget=8, eps=1.0, clip=5.0)
    began = time.monotonic()
    train(family, model, Numbers(16), recipe, tmp_path, world=ALONE)
    assert [model.a.item(), model.b.item()] == pytest.approx([-0.1 * 3 / 4, -0.1 * 4 / 5], rel=1e-5)
    (row,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    taken, when = row.pop("images_per_second"), datetime.fromisoformat(row.pop("time"))
    assert row == {"images": 8, "loss": 0.0, "grad_norm": pytest.approx(50.0), "lr": 0.1}
    assert 8 / (time.monotonic() - began) <= taken < math.inf
    assert abs((datetime.now(UTC) - when).total_seconds()) < 10


def test_long_runs_log_a_hundred_means(tmp_path):
    losses = []

    def loss(model, images):
        losses.append(images.mean().item())
        return model.a * 0 + losses[-1]

    family, model = toy(loss, a=1.0)
    train(family, model, Numbers(16), replace(PLAIN, budget=8 * 400, snapshot=8 * 400), tmp_path, world=ALONE)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in log] == list(range(32, 3201, 32))
    assert [row["loss"] for row in log] == pytest.approx(torch.tensor(losses).view(100, 4).mean(1).tolist())


def test_cleaned_gradients(tmp_path):
    """NaN → 0, ∞ → 1e5: Adam with eps = 1e5 moves the one by nothing and the other by half of lr."""

    def loss(model, images):
        return model.a.sqrt() + (model.b * 0).sqrt() - model.c.sqrt() + model.d

    recipe = replace(PLAIN, budget=8, snapshot=8, eps=1e5, clean_grads=True)
    family, model = toy(loss, a=0.0, b=1.0, c=0.0, d=0.0)
    train(family, model, Numbers(16), recipe, tmp_path / "cleaned", world=ALONE)
    assert [p.item() for p in model.parameters()] == pytest.approx([-0.05, 1.0, 0.05, -1e-6], rel=1e-4)

    family, model = toy(loss, a=0.0, b=1.0, c=0.0, d=0.0)
    with pytest.raises(NeonError, match=r"^a is not finite after 8 images; there is no snapshot yet$"):
        train(family, model, Numbers(16), replace(recipe, clean_grads=False), tmp_path / "raw", world=ALONE)


def test_weight_decay_is_for_matrices():
    params = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(params, replace(PLAIN, optimizer="adamw", weight_decay=0.5))
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (params["matrix"] == 1 - 0.1 * 0.5).all() and (params["bias"] == 1).all()


def test_average_and_raw_weights(tmp_path):
    """Snapshots hold the average if there is one; the raw weights are next to it if somebody asked for them."""
    path = [1.0]

    def loss(model, images):
        path.append(model.a.item())
        return model.a

    family, model = toy(loss, a=1.0)
    recipe = replace(PLAIN, budget=24, snapshot=8, ema_decay=0.75)
    ema, raw = 1.0, []
    for k, snapshot in enumerate(train(family, model, Numbers(16), recipe, tmp_path, world=ALONE, raw=True), 1):
        raw.append(load_weights(tmp_path / f"raw-{8 * k:09d}.safetensors")["a"].item())
        ema = raw[-1] + 0.75 * (ema - raw[-1])
        assert load_weights(snapshot)["a"].item() == pytest.approx(ema, rel=1e-6)
    assert raw == pytest.approx([0.9, 0.8, 0.7], rel=1e-5)

    family, model = toy(loss, a=1.0)
    train(family, model, Numbers(16), replace(recipe, ema_decay=None), tmp_path / "plain", world=ALONE, raw=True)
    assert not list((tmp_path / "plain").glob("raw-*"))
    assert load_weights(tmp_path / "plain" / "snapshot-000000024.safetensors")["a"].item() == raw[-1]


def test_buffers_and_half_done_budgets(tmp_path):
    """Buffers are stored as they are; a budget that is no multiple of the batch ends with the step that reaches it."""
    family, model = toy(lambda model, images: model.a, a=1.0)
    model.register_buffer("count", torch.tensor([3, 4]))
    snapshots = train(family, model, Numbers(16), replace(PLAIN, budget=20, snapshot=10), tmp_path, world=ALONE)
    assert [path.name for path in snapshots] == [f"snapshot-{n:09d}.safetensors" for n in (16, 24)]
    assert load_weights(snapshots[0])["count"].tolist() == [3, 4]


# ---------------------------------------------------------------- killed and gone on


class Killed(Exception):
    pass


def dying_after(steps):
    """The EDM family, but its loss ends the run after so many steps."""
    left = iter(range(steps))

    def loss(*args, **options):
        if next(left, None) is None:
            raise Killed
        return edm.family.loss(*args, **options)

    return SimpleNamespace(**vars(edm.family) | {"loss": loss})


@pytest.mark.parametrize(
    "changes",
    [
        {"network": {"dropout": 0.3}},
        {"precision": "bfloat16", "order": "window", "optimizer": "adamw", "weight_decay": 0.1, "ema_decay": None},
    ],
    ids=["dropout", "other"],
)
def test_interruption_changes_nothing(mini, tmp_path, changes):
    recipe = replace(
        edm.family.recipes["digits"], budget=640, snapshot=320, ramp=128, anneal="linear", lr=1e-3, **changes
    )
    data = ImageSet(mini.data)

    def run(family, out, seed=3):
        model = edm.family.load(mini.base, device="cpu", **recipe.network)
        torch.manual_seed(time.time_ns())  # what else was drawn before must not matter
        train(family, model, data, recipe, tmp_path / out, world=ALONE, seed=seed, save_every=128)

    run(edm.family, "whole")
    for steps, saved in ((1, 0), (3, 128), (4, 384), (2, 512)):  # a state is saved every second step
        with pytest.raises(Killed):
            run(dying_after(steps), "broken")
        assert images_in(tmp_path / "broken" / "state.safetensors") == saved
    run(edm.family, "broken")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")

    run(edm.family, "other", seed=4)
    last = "snapshot-000000640.safetensors"
    assert files(tmp_path / "other")[last] != files(tmp_path / "whole")[last]
    if "network" in changes:
        recipe = replace(recipe, network={})
        run(edm.family, "without")
        with open_weights(tmp_path / "whole" / last) as whole, open_weights(tmp_path / "without" / last) as without:
            assert any(not torch.equal(whole[name], without[name]) for name in whole)  # dropout was at work


def test_loss_scale_goes_on(tmp_path):
    """A half-precision gradient of 30 overflows until the scale, 2^16, is halved five times; those steps are none."""
    recipe = replace(PLAIN, precision="float16")

    def run(out, steps=None):
        calls = iter(range(steps or 99))

        def loss(model, images):
            if next(calls, None) is None:
                raise Killed
            return 30 * model.a.half().float()

        family, model = toy(loss, a=2.0)
        train(family, model, Numbers(16), recipe, tmp_path / out, world=ALONE, save_every=8)
        assert model.a.item() == pytest.approx(2 - 3 * 0.1)

    run("whole")
    for steps in (3, 4):
        with pytest.raises(Killed):
            run("broken", steps)
    run("broken")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_sigkill_at_any_moment(mini, tmp_path):
    command = {"budget": 2048, "snapshot": 256, "save_every": 64}
    finish(start(*selftrain(mini, tmp_path / "whole", **command)))
    out, moments = tmp_path / "broken", random.Random(0)
    state = out / "state.safetensors"
    kill_when(state.exists, start(*selftrain(mini, out, **command)))
    for images in (128, 384, 640):
        process = start(*selftrain(mini, out, **command))
        kill_when(lambda n=images: images_in(state) >= n, process, delay=moments.uniform(0, 0.02))
    kill_when(
        lambda: any(out.glob(".state.safetensors.*.partial")), start(*selftrain(mini, out, **command))
    )  # while the state is written
    assert 640 <= images_in(state) < 2048
    finish(start(*selftrain(mini, out, **command)))
    whole, broken = files(tmp_path / "whole"), files(out)
    assert len([name for name in whole if name.startswith("snapshot-")]) == 8
    assert broken == whole


def test_two_processes(mini, tmp_path):
    """A run of two processes can be killed too, and one process alone can resume it."""
    command = {"budget": 1024, "snapshot": 256, "save_every": 64}
    torchrun(2, "edm/selftrain.py", *selftrain(mini, tmp_path / "whole", **command)[3:])
    out = tmp_path / "broken"
    state = out / "state.safetensors"
    kill_when(lambda: state.exists() and images_in(state) >= 320, *ranks(2, *selftrain(mini, out, **command)))
    assert images_in(state) < 1024
    torchrun(2, "-m", "neon.cli", *selftrain(mini, out, **command))
    assert files(out) == files(tmp_path / "whole")

    mixed = tmp_path / "mixed"
    state = mixed / "state.safetensors"
    kill_when(lambda: state.exists() and images_in(state) >= 320, *ranks(2, *selftrain(mini, mixed, **command)))
    neon(*selftrain(mini, mixed, **command), "--micro_batch", 10)
    base, last = load_weights(mini.base), "snapshot-000001024.safetensors"
    whole, other = load_weights(tmp_path / "whole" / last), load_weights(mixed / last)
    far = sum((whole[name] - base[name]).double().square().sum() for name in whole) ** 0.5
    off = sum((whole[name] - other[name]).double().square().sum() for name in whole) ** 0.5
    assert far > 0.01 and off < 0.02 * far  # sums in another order, seen through Adam


@pytest.mark.parametrize("batch", [2, 8])
def test_a_batch_need_not_divide_over_the_processes(mini, tmp_path, batch):
    """Two or eight images over three processes: what one process does, and no process without an image hangs."""
    command = {"budget": 2 * batch, "snapshot": batch, "batch": batch}
    neon(*selftrain(mini, tmp_path / "one", **command))
    finish(*ranks(3, *selftrain(mini, tmp_path / "three", **command)))
    base = load_weights(mini.base)
    for images in (batch, 2 * batch):
        name = f"snapshot-{images:09d}.safetensors"
        one, three = load_weights(tmp_path / "one" / name), load_weights(tmp_path / "three" / name)
        far = sum((one[name] - base[name]).double().square().sum() for name in one) ** 0.5
        off = sum((one[name] - three[name]).double().square().sum() for name in one) ** 0.5
        assert far > 1e-3 and off < 0.02 * far  # sums in another order, seen through Adam


# ---------------------------------------------------------------- what must not happen


def test_poisoned_learning_rate(mini, tmp_path):
    """The first step has learning rate 0, the second one that no weight survives."""
    out = tmp_path / "run"
    error = error_of(*selftrain(mini, out, lr=1e39, ramp=64, snapshot=64))
    good = out / "snapshot-000000064.safetensors"
    assert error.endswith(f"is not finite after 128 images; the last good snapshot is {good}")
    assert [p.name for p in out.glob("snapshot-*")] == [good.name]
    base, kept = load_weights(mini.base), load_weights(good)
    assert all(torch.equal(kept[name], base[name]) for name in base)
    before = files(out)
    assert error_of(*selftrain(mini, out, lr=1e39, ramp=64, snapshot=64)) == error  # the state is good too
    assert files(out) == before

    error = error_of(*selftrain(mini, tmp_path / "none", lr=1e30, snapshot=512))
    assert error == "error: the loss is not finite after 128 images; there is no snapshot yet"
    assert not list((tmp_path / "none").glob("snapshot-*"))


def test_other_settings_need_another_folder(mini, tmp_path):
    out = tmp_path / "run"
    neon(*selftrain(mini, out, budget=128))
    before = files(out)
    neon(*selftrain(mini, out, budget=128))  # finished: nothing to do
    assert files(out) == before
    with open_weights(out / "state.safetensors") as state:
        assert not len(state)  # nor anything to go on from
    for name, value in {"lr": 2e-3, "seed": 1, "batch": 32, "ramp": 64, "precision": "bfloat16", "budget": 256}.items():
        error = error_of(*selftrain(mini, out, **{"budget": 128, name: value}))
        assert error.startswith(f"error: {out} holds another run ({name} is ") and error.count("\n") == 0
    other_base = selftrain(mini, out, budget=128)
    other_base[other_base.index(mini.base)] = mini.snapshots[0]
    assert f"{out} holds another run (base is " in error_of(*other_base)
    assert files(out) == before


def test_replace(mini, tmp_path):
    """Another run gives way to this one, which ends as if it were the first; a finished one is left alone."""
    neon(*selftrain(mini, tmp_path / "new", budget=128, lr=2e-3))
    neon(*selftrain(mini, tmp_path / "old", budget=256))
    for _ in range(2):
        neon(*selftrain(mini, tmp_path / "old", budget=128, lr=2e-3), "--replace")
        assert files(tmp_path / "old") == files(tmp_path / "new")


def test_other_samples_need_another_folder(mini, tmp_path):
    """Two sets of as many images are told apart by how they were made."""
    for seeds in ("0-63", "64-127"):
        neon("generate", *mini.sampling, "--model", mini.base, "--seeds", seeds, "--out", tmp_path / seeds)
    command = selftrain(mini, tmp_path / "run", budget=128)
    command[command.index(mini.data)] = tmp_path / "0-63"
    neon(*command)
    command[command.index(tmp_path / "0-63")] = tmp_path / "64-127"
    assert "holds another run (data is " in error_of(*command)


def test_folders_that_are_taken(mini, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "state.safetensors").write_bytes(mini.base.read_bytes())
    before = files(tmp_path)
    assert error_of(*selftrain(mini, tmp_path / "notes")) == (
        f"error: {tmp_path / 'notes'} is not empty and not a training folder; choose another --out"
    )
    assert "is not the state of a training run" in error_of(*selftrain(mini, tmp_path / "weights"))
    assert error_of(*selftrain(mini, tmp_path / "file")) == f"error: {tmp_path / 'file'}: File exists"
    assert error_of(*selftrain(mini, tmp_path / "file" / "run")).startswith(f"error: {tmp_path / 'file' / 'run'}")
    assert files(tmp_path) == before


def test_raw_weights_only_for_who_asks(mini, tmp_path):
    for out, words in (("plain", []), ("asked", ["--raw"])):
        neon(*selftrain(mini, tmp_path / out, budget=128), *words)
    plain, asked = files(tmp_path / "plain"), files(tmp_path / "asked")
    assert {name: asked.pop(name) for name in [*asked] if name.startswith("raw-")}.keys() == {
        "raw-000000128.safetensors"
    }
    assert plain == asked


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_the_log(tmp_path):
    """Every number of the log under the images seen; what an interrupted run wrote after its state is hidden."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(steps=None):
        calls = iter(range(steps or 99))

        def loss(model, images):
            if next(calls, None) is None:
                raise Killed
            return line(model, images)

        family, model = toy(loss, a=1.0, b=0.0)
        options = {"world": ALONE, "save_every": 24, "tensorboard": tmp_path / "board"}
        train(family, model, Numbers(16), PLAIN, tmp_path / "run", **options)

    with pytest.raises(Killed):
        run(steps=5)
    run()
    shown = EventAccumulator(str(tmp_path / "board")).Reload()
    log = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in log] == list(range(8, 65, 8))
    for name in ("loss", "grad_norm", "lr", "images_per_second"):
        events = [(event.step, event.value) for event in shown.Scalars(name)]
        assert events == [(row["images"], pytest.approx(row[name], rel=1e-6)) for row in log]


def test_tensorboard_is_an_extra(mini, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    error = error_of(*selftrain(mini, tmp_path / "run", budget=128), "--tensorboard", tmp_path / "board")
    assert "this needs tensorboard, of the extra tensorboard: pip install '.[tensorboard]'" in error
