"""`neon card`: what the hub reads of a merged model, its licence, and the upload to a hub on loopback."""

import base64
import json
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from processes import ROOT, error_of, neon

from neon.card import LICENSES, card_of, metadata, readme
from neon.fetch import LICENSE, NOT_STATED, read_table, write_table
from neon.files import sha256, to_json
from neon.weights.checkpoint import save_safetensors

sys.path.append(str(ROOT))
HEAD = "group,path,source,size,sha256"
BASE = "checkpoints/base.safetensors"
FACTS = {
    "family": "edm",
    "vae_sha256": None,
    **{"num_steps": 18, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "solver": "heun"},
    "class_idx": None,
    "dtype": "float32",
    "device": "cpu",
    "n": 5000,
    "seeds": "500000-504999",
    "features": "digits-12345678",
    "reference": "f" * 64,
    "num_synthetic": 6000,
    "is": 9.5,
    "is_std": 0.1,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A working folder as after `neon final` and `neon merge`: two files of weights, their merge, and the rows."""
    from edm.family import Sampling

    monkeypatch.chdir(tmp_path)
    for name, value in (("base", 1.0), ("tuned", 1.1)):
        path = Path("checkpoints", f"{name}.safetensors")
        path.parent.mkdir(exist_ok=True)
        save_safetensors(path, {"x": torch.full((2, 3), value)})
    neon(
        "merge",
        "--base",
        BASE,
        "--selftrained",
        "checkpoints/tuned.safetensors",
        "-w",
        1.5,
        "--out",
        "neon.safetensors",
    )
    options = {name: field.default for name, field in Sampling.__dataclass_fields__.items()}
    digests = {"base": sha256(Path(BASE)), "selftrained": sha256(Path("checkpoints/tuned.safetensors"))}

    def row(role, w, fid, **more):
        trained = {"selftrained": "checkpoints/tuned.safetensors", "selftrained_sha256": digests["selftrained"]}
        trained |= {"budget": 12800}
        none = {"selftrained": None, "selftrained_sha256": None, "budget": 0}
        found = {"key": f"{role} 1", "role": role, "w": w, "base": BASE, "base_sha256": digests["base"]}
        return found | FACTS | options | (trained if w else none) | {"fid": fid, "fid_se": 0.1} | more

    rows = [row("base", 0.0, 6.0), row("selftrained", -1.0, 9.0)]
    rows += [row("neon", 1.5, 4.0, gain_base=2.0, gain_base_se=0.5, gain_selftrained=5.0, gain_selftrained_se=0.5)]
    write_rows("final.jsonl", rows)
    return rows


def write_rows(path, rows):
    Path(path).write_text("".join(to_json(row) + "\n" for row in rows))


def table(license="cc-by-nc-sa-4.0", source="hf://someone/base@main/base.safetensors", digest=""):
    Path("downloads.csv").write_text(f"{HEAD},license\nbase,{BASE},{source},,{digest},{license}\n")


ARGS = ("card", "--model", "neon.safetensors", "--final", "final.jsonl")


# ---------------------------------------------------------------- what the card says


def test_the_hub_reads_licence_base_and_results(run):
    table()
    neon(*ARGS, "--dataset", "CIFAR-10")
    data = ModelCard.load(
        "README.md"
    ).data  # huggingface_hub's own reader: it raises where the metadata is not the hub's
    assert data.license == "cc-by-nc-sa-4.0" and data.base_model == "someone/base"
    assert data.to_dict()["base_model_relation"] == "merge" and data.pipeline_tag == "unconditional-image-generation"
    assert {"neon", "edm", "arxiv:2510.03597"} <= set(data.tags) and data.model_name == "neon"
    found = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {"fid": 4.0, "is": 9.5, "fid_gain": 2.0}
    fid = found["fid"]
    assert (fid.dataset_name, fid.dataset_type, fid.metric_name) == ("CIFAR-10", "cifar-10", "FID")
    assert fid.metric_args["n"] == 5000 and fid.metric_args["features"] == "digits-12345678"
    assert fid.metric_args["interval_95"] == pytest.approx([4 - 1.96 * 0.1, 4 + 1.96 * 0.1], abs=1e-3)
    assert found["fid_gain"].metric_args["interval_95"] == pytest.approx([1.02, 2.98], abs=1e-3)
    assert "interval_95" not in found["is"].metric_args


def test_people_read_recipe_results_and_digests(run):
    table()
    neon(*ARGS)
    text = Path("README.md").read_text()
    for part in (
        "θ_neon = θ_r − w (θ_s − θ_r) with w = 1.5",
        "fine-tuned on 12,800 images of a set S of 6,000",
        "num_steps 18",
        "| base θ_r | 0 | 6 ± 0.1 |",
        "| this model | 1.5 | 4 ± 0.1 |",
        "5,000 images each, seeds 500000-504999",
        "same seeds: 2 (95 %: 1.02 to 2.98)",
        f"base: `{sha256(Path(BASE))}`",
        "not for commercial use",
    ):
        assert part in text, part
    assert "checkpoints/" not in text  # where files are on this machine


@pytest.mark.parametrize(
    "license, given, said, warned",
    [
        ("mit", None, {"license": "mit"}, ""),
        (NOT_STATED, None, {"license": "unknown"}, "states no licence"),
        (NOT_STATED, "apache-2.0", {"license": "apache-2.0"}, ""),
        (NOT_STATED, "my own terms", {"license": "other", "license_name": "my own terms"}, ""),
        ("cc-by-nc-sa-4.0", None, {"license": "cc-by-nc-sa-4.0"}, "not for commercial use"),
    ],
)
def test_the_licence_is_the_bases_unless_one_is_given(run, capsys, license, given, said, warned):
    table(license)
    neon(*ARGS, *(("--license", given) if given else ()))
    data = ModelCard.load("README.md").data.to_dict()
    assert {name: data.get(name) for name in said} == said
    assert (warned in capsys.readouterr().err) and (bool(warned) == ("**Note:**" in Path("README.md").read_text()))


def test_a_base_with_another_digest_is_another_base(run):
    table(digest="0" * 64)
    assert "the licence of the base is not known: give --license" in error_of(*ARGS)
    table(digest=sha256(Path(BASE)))
    assert card_of("neon.safetensors", "final.jsonl").license == "cc-by-nc-sa-4.0"


def test_a_base_that_is_not_on_the_hub_is_named_in_the_text(run):
    table("cc-by-nc-sa-4.0", "https://example.org/base.safetensors")
    card = card_of("neon.safetensors", "final.jsonl")
    assert "base_model" not in metadata(card).to_dict() and "https://example.org/base.safetensors" in readme(card)
    assert card_of("neon.safetensors", "final.jsonl", base_model="a/b").base_model == "a/b"


def test_a_pipeline_folder_has_its_library_and_task(run):
    Path("pipe/unet").mkdir(parents=True)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    Path("pipe/model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "CLIPTextModel"]}))
    Path("neon.safetensors").rename("pipe/unet/diffusion_pytorch_model.safetensors")
    neon("card", "--model", "pipe", "--final", "final.jsonl", "--license", "openrail++")
    data = ModelCard.load("pipe/README.md").data
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image" and data.license == "openrail++"
    text = Path("pipe/README.md").read_text()
    assert 'from_pretrained("OWNER/NAME")' in text and "w = 1.5" in text
    Path("pipe/adapter_config.json").write_text("{}")
    assert metadata(card_of("pipe", license="mit", base_model="a/b")).to_dict()["base_model_relation"] == "adapter"


def test_a_card_without_results_says_what_the_checkpoint_records(run):
    neon("card", "--model", "neon.safetensors", "--license", "mit", "--out", "card.md")
    data = ModelCard.load("card.md").data
    assert data.eval_results is None and "with w = 1.5" in Path("card.md").read_text()
    assert f"selftrained: `{sha256(Path('checkpoints/tuned.safetensors'))}`" in Path("card.md").read_text()


def test_options_that_were_searched_have_a_column(run):
    table()
    run[0]["num_steps"] = 9
    write_rows("final.jsonl", run)
    neon(*ARGS)
    text = Path("README.md").read_text()
    assert "| model | w | num_steps | FID | IS |" in text and "| base θ_r | 0 | 9 | 6 ± 0.1 | 9.5 |" in text


# ---------------------------------------------------------------- what is refused


def other_w(rows):
    rows[2]["w"] = 2.0


def other_base(rows):
    rows[2]["base_sha256"] = "0" * 64


def no_neon(rows):
    rows[2]["w"] = 0.0


@pytest.mark.parametrize(
    "change, said",
    [
        (other_w, "neon.safetensors was merged with w 1.5, the results are of 2.0"),
        (other_base, "was merged with base_sha256"),
        (no_neon, "no w > 0 was better than the base"),
        (list.pop, "not what `neon final` wrote, or not finished"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(run, change, said):
    table()
    change(run)
    write_rows("final.jsonl", run)
    assert said in error_of(*ARGS) and not Path("README.md").exists()


def test_bad_input_ends_in_one_line(run):
    table()
    assert "no such file" in error_of("card", "--model", "gone.safetensors", "--final", "final.jsonl")
    assert "no such file" in error_of("card", "--model", "neon.safetensors", "--final", "gone.jsonl")
    assert "records no merge" in error_of("card", "--model", BASE, "--license", "mit")
    assert "is not a name on the hub" in error_of(*ARGS, "--base_model", "one/two/three")
    assert "write OWNER/NAME" in error_of(*ARGS, "--push_to_hub", "name")
    assert "--out is the file of --model" in error_of(*ARGS, "--out", "./neon.safetensors", "--replace")
    Path("README.md").write_text("mine")
    assert "README.md exists" in error_of(*ARGS) and Path("README.md").read_text() == "mine"
    neon(*ARGS, "--replace")
    assert Path("README.md").read_text().startswith("---\n")


# ---------------------------------------------------------------- the upload


@contextmanager
def hub():
    """A hub on loopback that takes every file as a part of the commit; files: what was committed."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.path, self.headers.get("Authorization")))
            if refuses:
                return self.send_error(403)
            if self.path.endswith("/create"):
                asked = json.loads(body)
                self.answer({"url": f"{Handler.url}/{asked['organization']}/{asked['name']}"})
            elif "preupload" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{Handler.url}/me/neon/commit/{'a' * 40}", "commitOid": "a" * 40})
            else:
                self.answer({"errors": [], "warnings": []})

        def do_GET(self):
            self.answer({})

        def answer(self, value):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    files, seen, refuses = {}, [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        Handler.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield Handler.url, files, seen, refuses
        finally:
            http.shutdown()


@pytest.fixture
def server(monkeypatch):
    with hub() as (url, *parts):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)  # read once, when it was imported
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield parts


def test_a_checkpoint_is_uploaded_with_its_card(run, server):
    files, seen, _ = server
    table()
    said = neon(*ARGS, "--push-to-hub", "me/neon")
    assert said.splitlines()[-1].endswith("/me/neon") and set(files) == {"README.md", "neon.safetensors"}
    assert files["neon.safetensors"] == Path("neon.safetensors").read_bytes()
    assert files["README.md"] == Path("README.md").read_bytes() and {token for _, token in seen} == {"Bearer hf_secret"}


def test_a_folder_is_uploaded_without_its_hidden_files(run, server):
    files, _, _ = server
    Path("pipe/unet").mkdir(parents=True)
    Path("pipe/model_index.json").write_text("{}")
    Path("pipe/.secret").write_text("mine")
    Path("neon.safetensors").rename("pipe/unet/model.safetensors")
    neon("card", "--model", "pipe", "--license", "mit", "--push_to_hub", "me/neon")
    assert set(files) == {"README.md", "model_index.json", "unet/model.safetensors"}
    assert b'from_pretrained("me/neon")' in files["README.md"]


def test_a_dry_run_writes_and_uploads_nothing(run, server):
    files, seen, _ = server
    table()
    said = neon(*ARGS, "--push_to_hub", "me/neon", "--dry_run")
    assert "license: cc-by-nc-sa-4.0" in said and "would be me/neon/neon.safetensors" in said
    assert seen == [] and files == {} and not Path("README.md").exists()


def test_without_a_token_or_with_a_wrong_one_it_ends_in_one_line(run, server, monkeypatch):
    files, seen, refuses = server
    table()
    refuses.append(True)
    assert "cannot upload to me/neon (" in error_of(*ARGS, "--push_to_hub", "me/neon", prints=True)
    Path("README.md").unlink()
    seen.clear()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token for the hub: set HF_TOKEN" in error_of(*ARGS, "--push_to_hub", "me/neon")
    assert seen == [] and files == {} and not Path("README.md").exists()


# ---------------------------------------------------------------- licences


def test_every_file_has_a_licence_and_a_merge_has_its_bases():
    from neon.family import FAMILIES, get_family

    rows = {row["path"]: row for row in read_table(ROOT / "downloads.csv")}
    assert {row[LICENSE] for row in rows.values()} <= LICENSES | {NOT_STATED}
    for preset in (preset for name in FAMILIES for preset in get_family(name).presets.values()):
        if preset.released:
            assert rows[preset.released][LICENSE] == rows[preset.base][LICENSE], preset.released


def test_the_table_in_docs_is_that_of_the_downloads():
    from paper.docs import filled, licensed

    for path, text in licensed().items():
        document = path.read_text()
        assert "<!-- licenses:begin -->" in document
        assert filled(document, text, "licenses") == document, f"{path.name}: run python -m paper.docs"
        assert len(re.findall(r"\| not stated \|", text)) == 3


def test_a_table_without_licences_stays_as_it_is(tmp_path):
    path = tmp_path / "downloads.csv"
    path.write_text(f"{HEAD}\nbase,a.bin,https://x/a.bin,,\n")
    rows = read_table(path)
    assert rows[0].get(LICENSE) is None
    write_table(rows, path)
    assert path.read_text().splitlines()[0] == HEAD
    path.write_text(f"{HEAD},license\nbase,a.bin,https://x/a.bin,,,mit\n")
    write_table(read_table(path), path)
    assert path.read_text().endswith(",,,mit\n")
