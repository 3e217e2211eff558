"""Idx files, read whole or refused; and the image sets that are made of them."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fashion.baselines import class_means
from fashion.prepare import padded, write_zip
from neon import NeonError
from neon.data import ImageSet
from neon.idx import read_idx, read_pair


def idx(values: np.ndarray, magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    shape = shape or values.shape
    return struct.pack(f">{1 + len(shape)}I", magic or 2048 + len(shape), *shape) + values.tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([7, 1], dtype=np.uint8)


def write_pair(folder: Path, name: str, images: np.ndarray, labels: np.ndarray, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        text = idx(values)
        path = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(text) if packed else text)


@pytest.mark.parametrize("packed", [False, True])
def test_images_and_labels(tmp_path, packed):
    write_pair(tmp_path, "train", IMAGES, LABELS, packed)
    images, labels = read_pair(tmp_path, "train")
    assert images.dtype == labels.dtype == np.uint8 and images.flags.writeable
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


DAMAGED = {
    "cut": (idx(IMAGES)[:-1], "cannot hold|ends 1 bytes early"),
    "more": (idx(IMAGES) + b"x", "more than the 24 values"),
    "other magic": (idx(IMAGES, magic=2050), "magic number is 2050"),
    "empty": (b"", "magic number is 0"),
    "no counts": (idx(IMAGES)[:7], "early"),
    "claims": (idx(IMAGES, shape=(2**31, 2**31, 2**31)), "claims .* and cannot hold so many"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, name, packed):
    text, message = DAMAGED[name]
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(text) if packed else text)
    with pytest.raises(NeonError, match=message) as error:
        read_idx(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


def test_a_packed_file_that_is_cut_and_pairs_that_do_not_fit(tmp_path):
    (tmp_path / "x").write_bytes(gzip.compress(idx(np.zeros((50, 28, 28), np.uint8)))[:-9])
    with pytest.raises(NeonError, match="not an idx file"):
        read_idx(tmp_path / "x")
    write_pair(tmp_path, "t10k", IMAGES, LABELS[:1])
    with pytest.raises(NeonError, match="not images and their labels"):
        read_pair(tmp_path, "t10k")
    with pytest.raises(NeonError, match="no such file"):
        read_pair(tmp_path, "train")


def test_an_image_set_of_them_is_the_same_bytes_twice(tmp_path):
    for name in ("a.zip", "b.zip"):
        write_zip(tmp_path / name, IMAGES, LABELS, 5)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    found = ImageSet(tmp_path / "a.zip")
    assert found.labels.tolist() == [7, 1] and found.shape == (1, 5, 5)
    # 3×4 in 5×5: a row above and below, a column on the right.
    np.testing.assert_array_equal(found.images([0, 1])[:, 0, 1:4, :4].numpy(), IMAGES)
    assert found.images([0, 1]).sum() == IMAGES.sum()
    with pytest.raises(NeonError, match="do not fit"):
        padded(torch.zeros(1, 3, 4), 3)
    with pytest.raises(NeonError, match="labels must lie in 0…9, there is a 10"):
        write_zip(tmp_path / "c.zip", IMAGES, LABELS + 3, 5)
    assert not (tmp_path / "c.zip").exists()


def test_class_means_take_turns():
    images = torch.tensor([0, 10, 101, 200], dtype=torch.uint8)[:, None, None].expand(-1, 2, 2)
    means, labels = class_means(images, torch.tensor([0, 0, 3, 3]), 3)
    assert labels.tolist() == [0, 3, 0] and means[:, 0, 0].tolist() == [5, 150, 5]  # 150.5 rounds to even
