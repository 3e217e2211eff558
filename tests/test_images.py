"""`neon evaluate --images`: what was sampled elsewhere, measured without a family."""

import json
import zipfile
from pathlib import Path

import pytest
from processes import error_of, finish, neon, ranks
from sets import write_images

from neon.data import ImageSet
from neon.images import evaluation_of, measure_images, set_sha256
from neon.measure.evaluate import METRICS
from neon.measure.metrics import load_reference

ALL = "fid,is,kid,precision,recall"


@pytest.fixture(scope="module")
def sampled(mini, tmp_path_factory):
    """Images of the base, and the row that `neon evaluate` gives them without writing any."""
    folder = tmp_path_factory.mktemp("sampled")
    neon("generate", *mini.sampling, "--model", mini.base, "--seeds", "0-47", "--out", folder / "S")
    model = ("--model", mini.base, "--seeds", "0-47")
    neon("evaluate", *mini.measuring, *model, "--metrics", ALL, "--keep_features", "--out", folder / "model.json")
    return folder


def words(mini, images, *more):
    return ["evaluate", "--images", images, "--ref", mini.ref, *mini.features, "--metrics", ALL, *more]


def test_images_on_disk_measure_as_those_in_memory(mini, sampled):
    said = neon(*words(mini, sampled / "S", "--out", sampled / "images.json"))
    row, model = (json.loads((sampled / name).read_text()) for name in ("images.json", "model.json"))
    for metric in (*ALL.split(","), "fid_se"):
        assert row[metric] == pytest.approx(model[metric], rel=1e-5), metric
    assert [row[fact] for fact in ("n", "features", "reference")] == [48, model["features"], model["reference"]]
    assert said.startswith(f"{sampled / 'S'}  FID ") and "n 48" in said
    assert row["images_sha256"] == set_sha256(sampled / "S") and "family" not in row


def test_its_features_are_kept_and_compared(mini, sampled, monkeypatch):
    neon(*words(mini, sampled / "S", "--keep_features", "--out", sampled / "kept.json"))
    kept = json.loads((sampled / "kept.json").read_text())["kept"]
    assert (sampled / "kept.features" / kept).exists()
    said = neon("compare", sampled / "kept.json", sampled / "model.json", "--ref", mini.ref)
    assert "no difference" in said and "48 seeds" in said

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr("neon.data.ImageSet.images", never)
    neon(*words(mini, sampled / "S", "--keep_features", "--out", sampled / "kept.json"))


def test_a_zip_measures_as_its_folder(mini, sampled, tmp_path):
    with zipfile.ZipFile(tmp_path / "S.zip", "w") as archive:
        for file in sorted((sampled / "S").rglob("*.png")):
            archive.write(file, file.relative_to(sampled / "S"))
    neon(*words(mini, tmp_path / "S.zip", "--out", tmp_path / "zip.json"))
    neon(*words(mini, sampled / "S", "--out", tmp_path / "folder.json"))
    zipped, folder = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("zip", "folder"))
    assert zipped["fid"] == folder["fid"] and zipped["images_sha256"] != folder["images_sha256"]


def test_the_digest_is_of_images_and_names_alone(tmp_path):
    one, other = (write_images(tmp_path / name, (1, 8, 8), 3, 2) for name in "ab")
    (one / "notes.txt").write_text("of no importance")
    assert set_sha256(one) == set_sha256(other)
    next(other.rglob("*.png")).rename(other / "renamed.png")
    assert set_sha256(one) != set_sha256(other)


def test_two_processes_measure_as_one(mini, sampled, tmp_path):
    finish(*ranks(2, *words(mini, sampled / "S", "--out", tmp_path / "row.json")))
    row, model = json.loads((tmp_path / "row.json").read_text()), json.loads((sampled / "model.json").read_text())
    assert row["world"] == 2 and row["fid"] == pytest.approx(model["fid"], rel=1e-5)


def test_in_python(mini, sampled):
    images = ImageSet(sampled / "S")
    evaluation = evaluation_of(images, mini.features[1], load_reference(mini.ref), "all")
    assert evaluation.metrics == METRICS
    row = measure_images(images, evaluation)
    model = json.loads((sampled / "model.json").read_text())
    assert row["fid"] == pytest.approx(model["fid"], rel=1e-5) and "kept" not in row


@pytest.mark.parametrize("images", ["gone", "empty", "text.zip"])
def test_bad_images_end_in_one_line(mini, tmp_path, images):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("text")
    said = {"gone": "no such file", "empty": "no images in it", "text.zip": "neither a folder nor a zip"}[images]
    assert said in error_of(*words(mini, tmp_path / images, "--out", tmp_path / "row.json"))
    assert not (tmp_path / "row.json").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (("--model", "x"), "leave out --model"),
        (("--family", "edm", "--seeds", "0-9", "-w", 1), "leave out -w, --family, --seeds"),
    ],
)
def test_options_of_a_model_do_not_go_with_images(mini, sampled, more, said):
    assert said in error_of(*words(mini, sampled / "S", *more))


def test_without_images_a_model_is_required(mini, capsys):
    with pytest.raises(SystemExit):
        neon("evaluate", "--ref", mini.ref)
    assert "required: --model/--base, --family, --seeds" in capsys.readouterr().err


def test_a_dry_run_counts_the_features_only(mini, sampled, tmp_path):
    said = neon(*words(mini, sampled / "S", "--out", tmp_path / "row.json", "--dry_run", "1"))
    assert "would measure the images" in said and "images       48, 0 network passes" in said
    assert not Path(tmp_path / "row.json").exists()
    assert float(said.split("passes and ")[1].split()[0]) > 0
