"""What only a card can show: skipped where there is none. `python -m benchmarks.gpu` runs these tests.

With NEON_REHEARSE_CUDA=1 they run on the CPU, so that the first run on a card is not the first run.
"""

import dataclasses
import json
import os
import sys

import pytest
import torch
from processes import ROOT, neon
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(ROOT))
from benchmarks.gpu import parity
from benchmarks.gpu.card import Card, Graphed, StandIn, tf32
from benchmarks.gpu.parity import DIGITS, Case
from benchmarks.gpu.suite import REHEARSED
from benchmarks.gpu.targets import build, compute_in
from benchmarks.gpu.training import images_for
from neon.counter import Counted
from neon.distributed import World
from neon.family import FAMILIES, get_family
from neon.measure.features import load_extractor
from neon.measure.metrics import Moments, Reference, frechet
from neon.selftrain import train
from neon.weights.checkpoint import load_weights, save_safetensors

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSED in os.environ), reason="needs CUDA"),
]


@pytest.fixture
def card():
    """With TensorFloat-32 off, whatever ran before."""
    with tf32(False):
        yield Card() if torch.cuda.is_available() else StandIn()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_samples_and_has_gradients_as_on_the_cpu(card, name, precision):
    row = parity.compared(card, Case(get_family(name), "digits", DIGITS[name]), precision)
    assert row["passed"], row


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_has_a_fast_kernel(card, name, precision):
    """One that does not form all weights, for the shapes and masks of the paper's layers; else PyTorch says so."""
    (network, options, vae), *_ = parity.REDUCED[name]
    case = Case(get_family(name), network, options, vae, images=2)
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if card.device.type == "cpu":
        kernels.append(SDPBackend.MATH)
    model = case.model(card.device)
    compute_in(case.family, model, precision)
    with sdpa_kernel(kernels):
        assert len(parity.sampled(case, model, parity.Codes())) == 2


def test_counted_streams_are_those_of_the_cpu(card):
    here, there = (Counted(range(5), device) for device in ("cpu", card.device))
    assert torch.equal(there.rand((1000,)).cpu(), here.rand((1000,)))
    assert torch.equal(there.randint(10).cpu(), here.randint(10))
    for draw in ("randn", "exponential"):
        one, other = getattr(there, draw)((1000,)).cpu(), getattr(here, draw)((1000,))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Interrupted(Exception):
    pass


class Breaking:
    """A set of images that fails when `left` more batches were read; what else it has is the set's."""

    def __init__(self, images, left: int):
        self._images, self._left = images, left

    def __getattr__(self, name):
        return getattr(self._images, name)

    def __len__(self):
        return len(self._images)

    def images(self, indices):
        self._left -= 1
        if self._left < 0:
            raise Interrupted
        return self._images.images(indices)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_that_was_interrupted_resumes_to_the_same_weights(card, name, tmp_path):
    family = get_family(name)
    recipe = dataclasses.replace(family.recipes["digits"], batch=8, budget=32, snapshot=32)
    options = {"world": World(device=card.device), "micro_batch": 4, "save_every": 8}

    def model():
        return build(family, "digits", "cpu").to(card.device)

    images = images_for(family, "digits", model(), 32)
    (whole,) = train(family, model(), images, recipe, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        train(family, model(), Breaking(images, 3), recipe, tmp_path / "resumed", **options)
    (resumed,) = train(family, model(), images, recipe, tmp_path / "resumed", **options)
    lines = [json.loads(line) for line in (tmp_path / "resumed/log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 16, 24, 32]
    before = dict(family.weights(model()).named_parameters())
    one, other = load_weights(whole), load_weights(resumed)
    moved = sum(float((one[key] - p.cpu()).norm()) for key, p in before.items())
    apart = sum(float((one[key] - other[key]).norm()) for key in before)
    assert moved > 0 and apart <= 0.1 * moved  # some kernels add in any order, and Adam enlarges what is near 0


def test_float16_training_scales_its_loss(card, tmp_path):
    """On a CPU the command takes float32; on a card VAR, xAR and IMM train in float16."""
    family = get_family("xar")
    recipe = dataclasses.replace(family.recipes["digits"], batch=8, budget=24, snapshot=24, precision="float16")
    model = build(family, "digits", "cpu").to(card.device)
    train(
        family,
        model,
        images_for(family, "digits", model, 24),
        recipe,
        tmp_path / "out",
        world=World(device=card.device),
    )
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(0 < line["loss"] < 100 for line in lines)


def test_features_and_their_distance_are_those_of_the_cpu(card):
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    here, there = (load_extractor("inception:random", device)(images) for device in ("cpu", card.device))
    torch.testing.assert_close(there.features.cpu(), here.features, rtol=2e-3, atol=2e-3)
    values = []
    for device in ("cpu", card.device):
        moments = Moments(16, device)
        for part in torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).split(24):
            moments.update(part.to(device))
        real = Reference(torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64))
        values.append(frechet(moments.mean, moments.cov, real).value)
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_a_graph_reads_its_new_arguments(card):
    """Also those that a caller keeps on the CPU; and what it returned before stays."""
    scale = torch.full((3,), 2.0, device=card.device)
    graphed = Graphed(lambda x, t, bias=None: x * scale + t.to(x.device), card)
    x = torch.arange(3.0, device=card.device)
    first = graphed(x, torch.tensor(1.0))
    second = graphed(x + 1, torch.tensor(5.0))
    assert first.tolist() == [1, 3, 5] and second.tolist() == [7, 9, 11]
    scale.fill_(3.0)  # weights that were changed in place
    assert graphed(x, torch.tensor(0.0)).tolist() == [0, 3, 6]


def test_the_command_computes_on_the_card(card, tmp_path):
    """neon generate and selftrain; the same images again, and the record says the kind of device."""
    family = get_family("edm")
    net = build(family, "digits", "cpu")
    base = tmp_path / "base.safetensors"
    save_safetensors(base, net.state_dict(), family.metadata(net))
    common = ("--family", "edm", "--device", card.device.type)
    for out in ("S", "again"):
        sampling = ("--num_steps", 2, "--batch", 4, "--seeds", "0-7")
        neon("generate", *common, "--model", base, *sampling, "--out", tmp_path / out)
    files = [sorted((tmp_path / out).rglob("*.png")) for out in ("S", "again")]
    assert len(files[0]) == 8 and [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    record = json.loads((tmp_path / "S/generate.json").read_text())
    assert record["device"] == card.device.type
    recipe = ("--recipe", "digits", "--batch", 4, "--budget", 8, "--snapshot", 8)
    neon("selftrain", *common, "--base", base, "--data", tmp_path / "S", *recipe, "--out", tmp_path / "trained")
    assert (tmp_path / "trained/snapshot-000000008.safetensors").exists()
