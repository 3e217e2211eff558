"""Image sets as folders and zips, what is refused, and the order in which training sees them."""

import io
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from neon import NeonError
from neon.data import ORDERS, ImageSet, batches, centre_crop, encode_png, epoch_order, image_name, window_order
from neon.sampling import part_of

EDM = Path(__file__).parent / "golden" / "edm"


def pictures(n, channels=3, height=4, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, height, width), generator=g, dtype=torch.uint8)


def files_of(pixels, labels=None):
    """Name → bytes of a set in EDM's convention."""
    files = {image_name(i): encode_png(image) for i, image in enumerate(pixels)}
    if labels is not None:
        files["dataset.json"] = json.dumps({"labels": [[image_name(i), y] for i, y in enumerate(labels)]}).encode()
    return files


def write(path, files):
    """As a zip if the name says so, else as a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
            for name, content in files.items():
                z.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


@pytest.fixture(params=["set", "set.zip"])
def path(request, tmp_path):
    return tmp_path / request.param


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_labels(path, channels):
    pixels, labels = pictures(5, channels), [3, 0, 9, 3, 1]
    data = ImageSet(write(path, files_of(pixels, labels)))
    assert len(data) == 5 and data.shape == (channels, 4, 6)
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == labels
    for _ in range(2):  # from the file, then from memory
        found = data.images([4, 0, 0])
        assert found.dtype == torch.uint8 and torch.equal(found, pixels[[4, 0, 0]])


def test_large_sets_are_read_from_the_file_each_time(path, monkeypatch):
    monkeypatch.setattr("neon.data.IN_MEMORY", 10)
    pixels = pictures(9)
    data = ImageSet(write(path, files_of(pixels)))
    for _ in range(2):
        assert torch.equal(data.images([8, 1, 1, 3]), pixels[[8, 1, 1, 3]])


def test_a_zip_next_to_images_is_no_part_of_the_set(tmp_path):
    """As where a data set was unpacked: only `neon generate --shard` makes sets of .zip files."""
    pixels = pictures(2)
    write(tmp_path / "set", files_of(pixels))
    write(tmp_path / "set" / "download.zip", files_of(pictures(5)))
    assert torch.equal(ImageSet(tmp_path / "set").images([0, 1]), pixels)


def test_what_is_returned_may_be_changed(path):
    pixels = pictures(2)
    data = ImageSet(write(path, files_of(pixels)))
    data.images([0, 1]).zero_()
    assert torch.equal(data.images([0, 1]), pixels)


def test_labels_belong_to_names_not_places(path):
    """Images are sorted by name; dataset.json may list them in any order and list more."""
    files = files_of(pictures(4))
    listed = [["other.png", 7], *([image_name(i), i] for i in (2, 0, 3, 1))]
    files["dataset.json"] = json.dumps({"labels": listed}).encode()
    data = ImageSet(write(path, dict(reversed(files.items()))))
    assert data.names == [image_name(i) for i in range(4)] and data.labels.tolist() == [0, 1, 2, 3]


def test_the_first_images_only(path):
    write(path, files_of(pictures(5, 1), [3, 0, 9, 3, 1]))
    whole, part = ImageSet(path), ImageSet(path, first=2)
    assert part.names == whole.names[:2] and part.labels.tolist() == whole.labels[:2].tolist()
    assert (part.images([0, 1]) == whole.images([0, 1])).all()
    with pytest.raises(NeonError, match=f"{len(whole)} images, fewer than"):
        ImageSet(path, first=len(whole) + 1)


@pytest.mark.parametrize("content", [None, '{"labels": null}'])
def test_without_labels(path, content):
    files = files_of(pictures(2)) | ({"dataset.json": content.encode()} if content else {})
    assert ImageSet(write(path, files)).labels is None


def test_hidden_and_other_files_are_not_images(path):
    files = files_of(pictures(2)) | {"__MACOSX/._img0.png": b"x", ".partial.png": b"x", "readme.txt": b"x"}
    assert len(ImageSet(write(path, files))) == 2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
def test_modes_are_grey_or_rgb(path, mode):
    image = Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = ImageSet(write(path, {"a.png": buffer.getvalue()}))
    wanted = np.atleast_3d(np.array(image if mode == "L" else image.convert("RGB")))
    assert torch.equal(data.images([0])[0], torch.from_numpy(wanted).permute(2, 0, 1))


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_png_is_lossless(height, width, channels, seed):
    image = pictures(1, channels, height, width, seed)[0]
    decoded = np.atleast_3d(np.array(Image.open(io.BytesIO(encode_png(image)))))
    assert np.array_equal(decoded, image.permute(1, 2, 0).numpy())


def test_image_name():
    assert image_name(0) == "00000/img00000000.png" and image_name(49999) == "00049/img00049999.png"
    assert image_name(12_345_678) == "12345/img12345678.png"


# ---------------------------------------------------------------- refusing


def refuse(make, match):
    with pytest.raises(NeonError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{}",
        b'{"labels": 3}',
        b'{"labels": [3]}',
        b'{"labels": [["a.png"]]}',
        b'{"labels": [["a.png", "cat"]]}',
        b'{"labels": [["a.png", "3"]]}',
        b'{"labels": [["a.png", 1.5]]}',
        b'{"labels": [["a.png", [0, 1]]]}',
        b'{"labels": [["a.png", null]]}',
        b'{"labels": [["a.png", Infinity]]}',
        b'{"labels": [[["a.png"], 3]]}',
        b'{"labels": {"a.png": 3}}',
        b'{"labels": ' + b"[" * 100_000,
    ],
)
def test_wrong_labels(tmp_path, content):
    write(tmp_path / "set", {"a.png": encode_png(pictures(1)[0]), "dataset.json": content})
    refuse(lambda: ImageSet(tmp_path / "set"), r"dataset.json is not \{\"labels\": \[\[name, integer\], …\]\}")


@pytest.mark.parametrize("labels", [[], [[image_name(0), 1], [image_name(2), 1]]])
def test_labels_for_some(path, labels):
    files = files_of(pictures(3)) | {"dataset.json": json.dumps({"labels": labels}).encode()}
    refuse(lambda: ImageSet(write(path, files)), f"no label for {image_name(1 if labels else 0)}")


def test_nothing_there(tmp_path):
    refuse(lambda: ImageSet(tmp_path / "gone"), "gone: no such file")
    refuse(lambda: ImageSet(tmp_path), "no images in it")
    (tmp_path / "x.zip").write_bytes(b"<html>")
    refuse(lambda: ImageSet(tmp_path / "x.zip"), "neither a folder nor a zip file")
    refuse(lambda: ImageSet(write(tmp_path / "y.zip", {"a.txt": b"a"})), "no images in it")


@pytest.mark.parametrize("memory", [0, 2**30])
def test_damaged_and_odd_images(path, memory, monkeypatch):
    monkeypatch.setattr("neon.data.IN_MEMORY", memory)
    good, tall, grey = pictures(1)[0], pictures(1, height=5)[0], pictures(1, channels=1)[0]
    png = encode_png(good)
    files = {"0.png": png, "1.png": png[: len(png) // 2], "2.png": b"", "3.png": b"text", "4.png": encode_png(tall)}
    data = ImageSet(write(path, files | {"5.png": encode_png(grey), "6.png": png}))
    assert torch.equal(data.images([6, 0]), torch.stack([good, good]))
    for i in (1, 2, 3):
        refuse(lambda i=i: data.images([0, i]), f"{i}.png is not a readable image")
    refuse(lambda: data.images([4]), r"4.png is \(3, 5, 6\), the first image \(3, 4, 6\)")
    refuse(lambda: data.images([5]), r"5.png is \(1, 4, 6\), the first image \(3, 4, 6\)")


def test_first_image_damaged(path):
    refuse(lambda: ImageSet(write(path, {"0.png": b"\x89PNG"})), "0.png is not a readable image")


def test_damaged_zip(tmp_path):
    path = write(tmp_path / "x.zip", files_of(pictures(2), [0, 1]))
    content = bytearray(path.read_bytes())
    content[content.index(b'{"labels"') + 3] ^= 1
    path.write_bytes(content)
    refuse(lambda: ImageSet(path), "dataset.json is not")


# ---------------------------------------------------------------- orders


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def test_window_order_is_the_original_one():
    golden = np.load(EDM / "infinite_sampler.npz")
    for case, wanted in golden.items():
        n, world, rank, seed = (int("".join(filter(str.isdigit, part))) for part in case.split("_"))
        found = take(itertools.islice(window_order(n, seed), rank, None, world), len(wanted))
        assert found == wanted.tolist(), case
    assert len(golden) == 7


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_window_order_keeps_all_and_repeats_none_soon(n, seed):
    seen = take(window_order(n, seed), 30 * n)
    assert seen == take(window_order(n, seed), 30 * n)
    assert set(seen) == set(range(n)) and {type(i) for i in seen} == {int}
    last = {}
    for t, i in enumerate(seen):
        assert t - last.get(i, -n) > n - max(np.rint(n / 2), 1)
        last[i] = t


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_window_order_repeats_itself_only_without_a_window(n):
    seen = take(window_order(n, 0), 100 * n)
    assert (seen == seen[:n] * 100) == (n < 3)


@given(st.integers(1, 50), st.integers(0, 2**63))
@settings(max_examples=30, deadline=None)
def test_epoch_order_visits_every_image_once_per_epoch(n, seed):
    seen = take(epoch_order(n, seed), 4 * n)
    assert seen == take(epoch_order(n, seed), 4 * n)
    epochs = [seen[i : i + n] for i in range(0, 4 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 9:
        assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("order", ORDERS.values())
def test_orders_differ_by_seed(order):
    assert take(order(30, 1), 30) != take(order(30, 2), 30)


# ---------------------------------------------------------------- batches


def positions(data, **place):
    """The indices in the batches of a rank; pixel [0, 0, 0] of image i is i."""
    pairs = batches(data, **place)
    out = []
    for images, labels, step in take(pairs, 6):
        out.append(images[:, 0, 0, 0].tolist())
        assert labels is None or labels.tolist() == [i % 3 for i in out[-1]]
        whole = step()[:, 0, 0, 0].tolist()
        assert len(whole) == place["batch"] and whole[place.get("part", slice(None))] == out[-1]
    pairs.close()
    return out


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    pixels = pictures(10)
    pixels[:, 0, 0, 0] = torch.arange(10)
    return ImageSet(write(tmp_path_factory.mktemp("data") / "set", files_of(pixels, [i % 3 for i in range(10)])))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_ranks_share_the_batches_of_one_process(numbered, order, world):
    def order_of_all():
        return ORDERS[order](10, 4)

    alone = positions(numbered, order=order_of_all(), batch=6)
    assert [i for batch in alone for i in batch] == take(order_of_all(), 36)
    places = [part_of(6, rank, world) for rank in range(world)]
    ranks = [positions(numbered, order=order_of_all(), batch=6, part=part) for part in places]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert {len(part) for part in parts} <= {6 // world, 6 // world + 1}
        assert [i for part in parts for i in part] == batch


def test_batches_go_on_in_the_middle(numbered):
    whole = positions(numbered, order=window_order(10, 0), batch=4)
    rest = positions(numbered, order=itertools.islice(window_order(10, 0), 8, None), batch=4)
    assert rest[:4] == whole[2:]


def test_batches_without_labels(tmp_path):
    data = ImageSet(write(tmp_path / "set", files_of(pictures(3))))
    images, labels, _ = next(batches(data, epoch_order(3, 0), 2))
    assert images.shape == (2, 3, 4, 6) and labels is None


def test_batches_say_which_image_is_damaged(tmp_path):
    files = files_of(pictures(3)) | {image_name(1): b"gone"}
    pairs = batches(ImageSet(write(tmp_path / "set", files)), iter([0, 2, 1, 0, 2, 2]), 2)
    next(pairs)
    refuse(lambda: next(pairs), image_name(1))


# ---------------------------------------------------------------- parquet, and images of many sizes


def write_parquet(path, pixels, labels=None, group=3, column="image"):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {column: [{"bytes": encode_png(x), "path": None} for x in pixels]}
    pyarrow.parquet.write_table(
        pyarrow.table(table | ({"label": labels} if labels else {})), path, row_group_size=group
    )
    return path


@pytest.mark.parametrize("column", ["image", "img"])
def test_parquet_as_the_hub_lays_it_out(tmp_path, column):
    pixels, labels = pictures(11), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    for name, part in (("train-00000-of-00002", slice(7)), ("train-00001-of-00002", slice(7, 11))):
        write_parquet(tmp_path / "data" / f"{name}.parquet", pixels[part], labels[part], column=column)
    write_parquet(tmp_path / "data" / "validation-00000.parquet", pixels[:2], labels[:2], column=column)
    data = ImageSet(tmp_path / "data" / "train-*.parquet")
    assert len(data) == 11 and data.shape == (3, 4, 6) and data.labels.tolist() == labels
    order = [10, 0, 6, 7, 3, 3]
    assert torch.equal(data.images(order), pixels[order])
    data._cache = None  # as for sets that are too large for memory
    assert torch.equal(data.images(range(11)), pixels)
    assert len(ImageSet(tmp_path / "data")) == 13
    assert len(ImageSet(tmp_path / "data" / "validation-00000.parquet")) == 2


def test_parquet_without_labels_and_no_parquet(tmp_path):
    data = ImageSet(write_parquet(tmp_path / "a.parquet", pictures(2)))
    assert data.labels is None and torch.equal(data.images([1]), pictures(2)[1:])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for name in ("b.parquet", "none-*.parquet"):
        with pytest.raises(NeonError, match=r"no parquet file|no such file"):
            ImageSet(tmp_path / name)


def test_a_torchvision_image_folder_of_photographs(tmp_path):
    """Class folders, upper-case suffixes, colour or grey, any size: cropped and scaled to one."""
    for i, (mode, shape) in enumerate([("RGB", (50, 40)), ("L", (31, 90)), ("RGB", (16, 16)), ("CMYK", (40, 33))]):
        path = tmp_path / f"n{i % 2:08d}" / f"n{i}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.new(mode, shape, 100 if mode == "L" else None).save(path, "JPEG")
    data = ImageSet(tmp_path, size=16)
    assert data.shape == (3, 16, 16) and data.images(range(4)).shape == (4, 3, 16, 16)


@given(st.integers(1, 9), st.integers(8, 60), st.integers(8, 60))
@settings(deadline=None, max_examples=30)
def test_centre_crop(size, width, height):
    """A ramp stays a ramp around the middle; a picture of the right size stays as it is."""
    side = min(width, height)
    ramp = np.linspace(0, 255, width)[None].repeat(height, 0).round().astype(np.uint8)
    found = np.array(centre_crop(Image.fromarray(ramp), size)).astype(float)
    assert found.shape == (size, size)
    assert abs(found.mean() - 127.5) < 255 / width + 1.5 + 255 * side / width / size  # a pixel of the reduced picture
    same = Image.fromarray(np.random.default_rng(0).integers(256, size=(size, size), dtype=np.uint8))
    assert np.array_equal(np.array(centre_crop(same, size)), np.array(same))
