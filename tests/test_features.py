"""Feature extractors: shapes, determinism, independence of the batch, files and their errors."""

import os
import subprocess
import sys
import urllib.error

import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits

from mini.features import DigitsCNN, save_digits_cnn, train_digits_cnn
from neon import NeonError
from neon.measure.features import inception, load_extractor


def noise(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def real_digits():
    """1797 digits as (N, 3, 8, 8) uint8, labels, and a random order."""
    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(data.target)[order]


@pytest.fixture(scope="module")
def random_inception():
    return load_extractor("inception:random")


# ---- inception


def test_inception_outputs(random_inception):
    before = torch.random.get_rng_state()
    images = noise(4, 16)
    features, logits = random_inception(images)
    assert features.shape == (4, random_inception.dim) == (4, 2048)
    assert logits.shape == (4, random_inception.classes) == (4, 1008)
    assert features.dtype == logits.dtype == torch.float32 and not features.requires_grad
    assert features.std(0).mean() > 1e-3  # the random network tells images apart
    assert random_inception.name == "inception-v3-compat-random"

    alone = random_inception(images[2:3])
    for whole, part in zip((features, logits), alone):
        torch.testing.assert_close(whole[2:3], part, rtol=1e-4, atol=1e-4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_inception_from_a_file(random_inception, tmp_path):
    """A file gives the network it holds; its name tells which file; building one leaves the global stream alone."""
    state = random_inception.module.state_dict()
    state["fc.weight"] = state["fc.weight"] * 2
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    before = torch.random.get_rng_state()
    extractor = load_extractor(f"inception:{path}")
    assert torch.equal(before, torch.random.get_rng_state())

    images = noise(1, 32)
    ours, theirs = extractor(images), random_inception(images)
    torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=0)
    torch.testing.assert_close(ours.logits, 2 * theirs.logits, rtol=1e-5, atol=1e-5)
    assert extractor.name.startswith("inception-v3-compat-") and extractor.name != random_inception.name


class Payload:
    """What a hostile file would hold: a call, made when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_inception_files_are_never_executed(tmp_path):
    torch.save({"fc.weight": Payload(tmp_path / "executed")}, tmp_path / "hostile.pth")
    with pytest.raises(NeonError, match="not a file of PyTorch weights"):
        inception(tmp_path / "hostile.pth")
    assert not (tmp_path / "executed").exists()


def test_inception_files_that_do_not_fit(tmp_path):
    with pytest.raises(NeonError, match="no InceptionV3 weights at"):
        inception(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(NeonError, match="not a file of PyTorch weights"):
        inception(tmp_path / "text.pth")
    for content in ({"fc.weight": torch.zeros(3)}, torch.zeros(3), {1: torch.zeros(3)}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(NeonError, match="does not hold the weights") as error:
            inception(tmp_path / "other.pth")
        assert "\n" not in str(error.value)


def test_inception_without_network(tmp_path, monkeypatch):
    def refuse(url, path, hash_prefix):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(NeonError, match=r"no route to host.*fetch https://.*\.pth elsewhere and give inception:PATH"):
        load_extractor("inception")


def test_inception_is_downloaded_once(random_inception, tmp_path, monkeypatch):
    calls = []

    def download(url, path, hash_prefix):
        calls.append(hash_prefix)
        torch.save(random_inception.module.state_dict(), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert inception().name == inception().name
    assert calls == ["6726825d"]


# ---- digits


@pytest.fixture(scope="module")
def digits_file(real_digits, tmp_path_factory):
    images, labels = real_digits
    path = tmp_path_factory.mktemp("digits") / "cnn.safetensors"
    save_digits_cnn(train_digits_cnn(images[:1400], labels[:1400]), path)
    return path


def test_digits_accuracy_on_held_out_images(real_digits, digits_file):
    images, labels = (x[1400:] for x in real_digits)
    extractor = load_extractor(f"digits:{digits_file}")
    features, logits = extractor(images)
    assert (logits.argmax(1) == labels).float().mean() > 0.97
    assert features.shape == (397, extractor.dim) == (397, 64) and features.dtype == torch.float32
    assert logits.shape[1] == extractor.classes == 10 and not features.requires_grad
    assert torch.linalg.matrix_rank(features.double().T.cov()) == 64  # no dead dimension

    parts = [extractor(batch) for batch in images.split(50)]
    torch.testing.assert_close(torch.cat([p.features for p in parts]), features, rtol=1e-5, atol=1e-5)


def test_digits_training_is_reproducible(real_digits):
    images, labels = (x[:128] for x in real_digits)
    before = torch.random.get_rng_state()
    first, same, other = (train_digits_cnn(images, labels, seed=s, epochs=1).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_digits_round_trip(tmp_path):
    model = DigitsCNN(dim=24)
    save_digits_cnn(model, tmp_path / "new" / "cnn.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["cnn.safetensors"]
    extractor = load_extractor(f"digits:{tmp_path}/new/cnn.safetensors")
    images = noise(5, 8)
    assert extractor.dim == 24 and extractor.name.startswith("digits-")
    assert torch.equal(extractor(images).features, model(images).features)
    first = images.clone()
    first[:, 1:] = 0
    assert torch.equal(extractor(images).features, extractor(first).features)  # only the first channel is read


def test_digits_files_that_do_not_fit(tmp_path):
    state = {key: x.contiguous() for key, x in DigitsCNN(8).state_dict().items()}
    label = {"model": "DigitsCNN", "dim": "8"}
    files = {
        "empty": b"",
        "text": b"not weights, but long enough to hold a header",
        "unlabelled": safetensors.torch.save(state),
        "other": safetensors.torch.save(state, {**label, "model": "other"}),
        "dimless": safetensors.torch.save(state, {"model": "DigitsCNN"}),
        "wrong dim": safetensors.torch.save(state, {**label, "dim": "9"}),
        "incomplete": safetensors.torch.save({"head.bias": state["head.bias"]}, label),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NeonError, match="does not hold a DigitsCNN") as error:
            load_extractor(f"digits:{tmp_path / name}")
        assert "\n" not in str(error.value)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(NeonError, match="cannot read the digits extractor"):
            load_extractor(f"digits:{path}")


# ---- both


@pytest.mark.parametrize("spec", ["", "digits", "digits:", "clip", "Inception"])
def test_unknown_extractors(spec):
    with pytest.raises(NeonError, match="inception, inception:PATH, inception:random, digits:PATH"):
        load_extractor(spec)


@pytest.mark.parametrize(
    "images", [noise(2, 8).float(), noise(2, 8)[0], noise(2, 8)[:, :1], noise(2, 16)], ids=lambda x: str(tuple(x.shape))
)
def test_images_an_extractor_cannot_read(images, digits_file):
    with pytest.raises(NeonError, match="images"):
        load_extractor(f"digits:{digits_file}")(images)


def test_importing_features_and_metrics_leaves_torch_fidelity_alone():
    code = "import sys, neon.measure.features, neon.measure.metrics; sys.exit('torch_fidelity' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
