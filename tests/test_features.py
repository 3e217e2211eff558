"""Feature extractors: shapes, determinism, independence of the batch, files and their errors."""

import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from processes import forkserver
from server import serving
from sklearn.datasets import load_digits
from torch_fidelity import feature_extractor_inceptionv3

from mini.features import DigitsCNN, save_digits_cnn, train_digits_cnn
from neon import NeonError
from neon.measure.features import SPECS, inception, load_extractor


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


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server whose data are the published weights, kept in torch's folder of a user; digest: of the name."""
    with serving() as server:

        def publish(data: bytes, digest: str = "") -> Path:
            server.data = data
            name = f"weights-{digest or hashlib.sha256(data).hexdigest()[:8]}.pth"
            monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", f"{server.url}/{name}")
            monkeypatch.setenv("TORCH_HOME", str(tmp_path))
            return tmp_path / "hub" / "checkpoints" / name

        yield SimpleNamespace(server=server, publish=publish)


def test_inception_is_downloaded_once(random_inception, published):
    buffer = io.BytesIO()
    torch.save(random_inception.module.state_dict(), buffer)
    path = published.publish(buffer.getvalue())
    name = f"inception-v3-compat-{path.stem[-8:]}"
    assert inception().name == inception().name == name
    assert published.server.seen == [("GET", f"/{path.name}", 0)] and os.listdir(path.parent) == [path.name]


def test_wrong_weights_and_missing_ones(published, monkeypatch):
    """Only what has the digest of its name is kept; the error says where the weights are and what else to do."""
    path = published.publish(b"wrong", digest="0" * 8)
    url = f"{published.server.url}/{path.name}"
    with pytest.raises(NeonError, match=f"{url}: its sha256 is .*, not 00000000; nothing was kept, .* inception:PATH"):
        load_extractor("inception")
    url = f"{published.server.url}/gone-{path.name}"
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", url)
    with pytest.raises(NeonError, match=f"cannot download {url} .*{path.parent}.* or give inception:PATH"):
        load_extractor("inception")
    assert not os.listdir(path.parent)


def test_ranks_that_need_inception_at_once_download_it_once(published):
    """What they get is no weights, which each finds out for itself."""
    path = published.publish(b"not weights" * 50_000)
    published.server.pause = 0.05
    url, home = feature_extractor_inceptionv3.URL_INCEPTION_V3, os.environ["TORCH_HOME"]
    with forkserver.Pool(4, prepare, (url, home, forkserver.Barrier(4))) as pool:
        errors = pool.map(error_of_inception, range(4), chunksize=1)
    assert [" is not a file of PyTorch weights" in error for error in errors] == [True] * 4
    assert published.server.seen == [("GET", f"/{path.name}", 0)] and os.listdir(path.parent) == [path.name]


def prepare(url: str, home: str, barrier) -> None:
    global meet
    meet = barrier
    feature_extractor_inceptionv3.URL_INCEPTION_V3 = url
    os.environ["TORCH_HOME"] = home


def error_of_inception(_rank: int) -> str:
    meet.wait(60)
    with pytest.raises(NeonError) as error:
        load_extractor("inception")
    return str(error.value)


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


@pytest.mark.parametrize("spec", ["", "clip", "Inception"])
def test_unknown_extractors(spec):
    with pytest.raises(NeonError, match=re.escape(SPECS)):
        load_extractor(spec)


@pytest.mark.parametrize("spec", ["digits", "digits:"])
def test_the_digits_extractor_needs_a_file(spec):
    with pytest.raises(NeonError, match="--features digits:PATH"):
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
