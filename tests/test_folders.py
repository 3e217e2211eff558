"""`neon merge` on folders: pipelines, components, language models; what it writes loads with from_pretrained."""

import json
import re
import shutil
import socket

import folders
import pytest
import torch
from folders import class_in, moved
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neon.cli import main

KINDS = {"ddpm": "unet", "dit": "transformer", "stable_diffusion": "unet"}


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request, tmp_path_factory):
    """A pipeline and the same with a θ_s, in folders base and new, and the component that moved."""
    path, component = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    torch.manual_seed(0)
    pipe = getattr(folders, request.param)()
    pipe.save_pretrained(path / "base")
    pipe.register_modules(**{component: moved(getattr(pipe, component))})
    pipe.save_pretrained(path / "new")
    return path, component


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """The same for a language model with tied weights."""
    return folders.language_models(tmp_path_factory.mktemp("gpt2"))


def merge(*words):
    main(["merge", *map(str, words)])


def images(folder):
    """What a pipeline samples from one seed."""
    pipe = class_in("diffusers", "DiffusionPipeline").from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(5), "output_type": "np"}
    if "DiT" in type(pipe).__name__:
        options |= {"class_labels": [3]}
    if "Stable" in type(pipe).__name__:
        options |= {"prompt": "a b c", "height": 8, "width": 8}
    return pipe(**options).images


def logits(folder):
    model = class_in("transformers", "AutoModelForCausalLM").from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, folder, *words):
    """Run a merge that must fail with one line and write nothing. Returns the line."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        merge(*words)
    said, error = capsys.readouterr()
    assert (caught.value.code, said, error.count("\n")) == (1, "", 1), error
    assert sorted(folder.rglob("*")) == before
    return error


# ---------------------------------------------------------------- pipelines


def test_a_pipeline(pipeline, tmp_path):
    """w = 1 is 2 θ_r − θ_s and samples other images; w = 0 is the base, file by file; the rest is copied."""
    path, component = pipeline
    merge("--base", path / "base", "--selftrained", path / "new", "-w", "0,1", "--out", tmp_path / "neon-{w}")
    old, same, out = files(path / "base"), files(tmp_path / "neon-0"), files(tmp_path / "neon-1")
    weights = f"{component}/diffusion_pytorch_model.safetensors"
    assert old.keys() == same.keys() == out.keys()
    assert {name for name in old if out[name] != old[name]} == {weights}
    r, s, zero, one = (
        load_file(p / weights) for p in (path / "base", path / "new", tmp_path / "neon-0", tmp_path / "neon-1")
    )
    for name, tensor in r.items():
        assert torch.equal(zero[name], tensor)
        torch.testing.assert_close(one[name], 2 * tensor - s[name])
    before = images(path / "base")
    assert (images(tmp_path / "neon-0") == before).all()
    assert abs(images(tmp_path / "neon-1") - before).max() > 1e-3


@pytest.mark.parametrize("base", ["", "{c}"])
@pytest.mark.parametrize("new", ["{c}", "{c}/diffusion_pytorch_model.safetensors"])
def test_a_component_alone_on_either_side(pipeline, tmp_path, base, new):
    """The base's folder decides what is written: a pipeline, or the component."""
    path, component = pipeline
    base, new = (path / side / text.format(c=component) for side, text in (("base", base), ("new", new)))
    merge("--base", base, "--selftrained", new, "-w", 1, "--out", tmp_path / "out")
    merge("--base", path / "base", "--selftrained", path / "new", "-w", 1, "--out", tmp_path / "both")
    assert files(tmp_path / "out").keys() == files(base).keys()
    whole, part = tmp_path / "both" / component, tmp_path / "out" / ("" if base.name == component else component)
    one, other = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = json.loads((part / "config.json").read_text())
    class_in("diffusers", config["_class_name"]).from_pretrained(part)


def test_other_weights_of_the_base_are_not_copied(tmp_path, capsys):
    """A variant next to the merge would be loaded as the base."""
    pipe = folders.ddpm()
    pipe.save_pretrained(tmp_path / "base")
    pipe.unet.half().save_pretrained(tmp_path / "base/unet", variant="fp16")
    (tmp_path / "base/all-in-one.ckpt").touch()
    (tmp_path / "base/unet/notes.txt").touch()
    moved(folders.unet2d()).save_pretrained(tmp_path / "new")
    merge("--base", tmp_path / "base", "--selftrained", tmp_path / "new", "-w", 1, "--out", tmp_path / "out")
    gone = {"all-in-one.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert files(tmp_path / "base").keys() - files(tmp_path / "out").keys() == gone
    said = capsys.readouterr().out
    assert "not copied     all-in-one.ckpt, diffusion_pytorch_model.fp16.safetensors" in said


def test_a_hub_id_in_the_cache(pipeline, tmp_path, monkeypatch, capsys):
    """The cache has links to blobs; the copy has files. A model that is not there is not downloaded."""
    path, _ = pipeline
    cache = tmp_path / "hub/models--some--model"
    snapshot = cache / "snapshots/a"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("a")
    (cache / "blobs").mkdir()
    for i, (name, content) in enumerate(files(path / "base").items()):
        (cache / f"blobs/{i}").write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(cache / f"blobs/{i}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a download"))
    merge("--base", "some/model", "--selftrained", path / "new", "-w", 1, "--out", tmp_path / "out")
    assert files(tmp_path / "out").keys() == files(path / "base").keys()
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    capsys.readouterr()
    assert fails(capsys, tmp_path, "--base", "no/model.pkl", "--selftrained", path / "new", "-w", 1, "--out", "x") == (
        "error: no/model.pkl: no such file\n"
    )
    error = fails(capsys, tmp_path, "--base", "no/model", "--selftrained", path / "new", "-w", 1, "--out", "x")
    assert error == (
        "error: no/model: no such file, and not in the cache of Hugging Face; if it is a hub id: hf download no/model\n"
    )


# ---------------------------------------------------------------- language models


def test_a_language_model_with_tied_weights(language, tmp_path):
    merge("--base", language / "base", "--selftrained", language / "new", "-w", "0,1", "--out", tmp_path / "{w}")
    before = logits(language / "base")
    assert torch.equal(logits(tmp_path / "0"), before) and not torch.allclose(logits(tmp_path / "1"), before, atol=1e-3)
    assert files(tmp_path / "1").keys() == files(language / "base").keys()


@pytest.mark.parametrize("side", ["base", "new"])
def test_a_tied_weight_that_one_side_also_has(language, tmp_path, capsys, side):
    """`lm_head` is the embedding once more: a trainer's own torch.save keeps both names, save_pretrained one."""
    shutil.copytree(language, tmp_path / "both")
    file = tmp_path / "both" / side / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["transformer.wte.weight"].clone()}, file, {"format": "pt"})
    folder = tmp_path / "both"
    merge("--base", folder / "base", "--selftrained", folder / "new", "-w", 1, "--out", tmp_path / "out")
    where = "the base, where" if side == "base" else "θ_s, where"
    assert f"lm_head.weight: only in {where} it is tied to transformer.wte.weight" in capsys.readouterr().out
    merge("--base", language / "base", "--selftrained", language / "new", "-w", 1, "--out", tmp_path / "wanted")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "wanted"))
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) == (side == "base")


def test_the_metadata_say_the_format(language, tmp_path):
    """Also where the base's do not: transformers of version 4 refuses such a file."""
    shutil.copytree(language / "base", tmp_path / "base")
    save_file(load_file(tmp_path / "base/model.safetensors"), tmp_path / "base/model.safetensors")
    merge("--base", tmp_path / "base", "--selftrained", language / "new", "-w", 1, "--out", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and file.metadata()["neon_w"] == "1.0"


def test_equal_constants_are_not_tied(tmp_path, capsys):
    """New layers are often zeros: two of one shape are equal, and yet two."""
    base = {"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(3)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(base | {"c.weight": torch.zeros(2, 2)}, tmp_path / "new.safetensors")
    words = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "new.safetensors", "-w", 1)
    error = fails(capsys, tmp_path, *words, "--out", tmp_path / "out.safetensors")
    assert "c.weight: missing in the base" in error


def test_an_untied_weight_is_not_dropped(language, tmp_path, capsys):
    shutil.copytree(language, tmp_path / "both")
    file = tmp_path / "both/new/model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["transformer.wte.weight"] + 1}, file, {"format": "pt"})
    words = ("--base", language / "base", "--selftrained", file.parent, "-w", 1, "--out", tmp_path / "out")
    assert "lm_head.weight: missing in the base" in fails(capsys, tmp_path, *words)


@pytest.mark.parametrize("sharded", ["base", "new"])
def test_shards(language, tmp_path, sharded):
    """They stay shards, with an index that is right; θ_s may have others."""
    model = class_in("transformers", "AutoModelForCausalLM").from_pretrained(language / sharded)
    model.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    sides = {"base": language / "base", "new": language / "new", sharded: tmp_path / "shards"}
    merge("--base", sides["base"], "--selftrained", sides["new"], "-w", 1, "--out", tmp_path / "out")
    merge("--base", language / "base", "--selftrained", language / "new", "-w", 1, "--out", tmp_path / "wanted")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "wanted"))
    assert files(tmp_path / "out").keys() == files(sides["base"]).keys()


# ---------------------------------------------------------------- names, half precision


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("side", ["base", "new"])
def test_a_prefix_on_one_side_is_matched_and_said(tmp_path, capsys, prefix, side):
    state = {"a.weight": torch.randn(3, 2), "model.b": torch.randn(4)}
    new = {name: tensor + 1 for name, tensor in state.items()}
    changed = {"base": state, "new": new}
    changed[side] = {prefix + name: tensor for name, tensor in changed[side].items()}
    for name, tensors in changed.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    sides = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "new.safetensors")
    merge(*sides, "-w", 1, "--out", tmp_path / "out.safetensors")
    who = "the base" if side == "base" else "θ_s"
    assert f"names matched: those of {who} begin with {prefix}\n" in capsys.readouterr().out
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == changed["base"].keys()
    for name, tensor in changed["base"].items():
        torch.testing.assert_close(found[name], tensor - 1)


def half_pair(tmp_path, dtypes, step):
    """Weights near 1 on both sides, `step` apart."""
    base = 1 + torch.rand(1000, generator=torch.Generator().manual_seed(0)) / 2
    for name, tensor, dtype in (("base", base, dtypes[0]), ("new", base.to(dtypes[0]).float() + step, dtypes[1])):
        save_file({"weight": tensor.to(dtype)}, tmp_path / f"{name}.safetensors")
    return ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "new.safetensors")


def test_steps_lost_in_half_precision_are_said(tmp_path, capsys):
    """bfloat16 has steps of 2^-7 from 1 to 2: of 1e-3 nothing is left, in θ_s or in the merge."""
    merge(*half_pair(tmp_path, (torch.float32, torch.bfloat16), 0.0), "-w", 1, "--out", tmp_path / "a.safetensors")
    assert capsys.readouterr().err == ""  # a base in float32 shows by itself what was rounded
    files = half_pair(tmp_path, (torch.bfloat16, torch.float32), 1e-3)
    merge(*files, "-w", 1, "--out", tmp_path / "b.safetensors")
    said, warning = capsys.readouterr()
    assert "rounded  100 % of the steps are lost" in said
    assert warning == "warning: 100 % of the steps are lost in the base's bfloat16: merge into a base in float32\n"
    merge(*files, "-w", 8, "--out", tmp_path / "c.safetensors")
    assert capsys.readouterr().err == ""  # 8e-3 is above the spacing


def test_a_theta_s_in_half_precision_that_hardly_moved(tmp_path, capsys):
    base = torch.ones(1000).bfloat16()
    save_file({"weight": base}, tmp_path / "base.safetensors")
    save_file({"weight": torch.where(torch.arange(1000) < 250, 2, 1).bfloat16()}, tmp_path / "new.safetensors")
    sides = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "new.safetensors")
    merge(*sides, "-w", 1, "--out", tmp_path / "out.safetensors")
    said, warning = capsys.readouterr()
    assert "unmoved  75 % of the weights" in said
    assert warning.startswith("warning: 75 % of the weights of θ_s, which is in bfloat16, are exactly θ_r's")
    assert warning.count("\n") == 1 and "save θ_s in float32" in warning


# ---------------------------------------------------------------- groups


def test_groups_have_a_w_of_their_own(language, tmp_path, capsys):
    """The first regex that is found counts; -w is that of the rest. The file says so."""
    words = ("--base", language / "base", "--selftrained", language / "new", "-w", 0.5, "--out", tmp_path / "out")
    merge(*words, "--weights", r"h\.0\.attn=2", "--weights", r"attn=0", "--weights", "ln=-1")
    r, s, out = (load_file(p / "model.safetensors") for p in (language / "base", language / "new", tmp_path / "out"))
    seen = set()
    for name, tensor in r.items():
        w = 2 if "h.0.attn" in name else 0 if "attn" in name else -1 if "ln" in name else 0.5
        seen.add(w)
        torch.testing.assert_close(out[name], (1 + w) * tensor - w * s[name])
        assert w or torch.equal(out[name], tensor)
    assert seen == {2, 0, -1, 0.5}
    capsys.readouterr()
    main(["inspect", str(tmp_path / "out/model.safetensors")])
    assert 'neon_weights  {"h\\\\.0\\\\.attn": 2.0, "attn": 0.0, "ln": -1.0}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("nothing=1", "'nothing' of the weights is found in no name"), ("(=1", "is not a regular expression")],
)
def test_groups_that_are_none(language, tmp_path, capsys, text, message):
    words = ("--base", language / "base", "--selftrained", language / "new", "-w", 1, "--out", tmp_path / "out")
    assert message in fails(capsys, tmp_path, *words, "--weights", text)


# ---------------------------------------------------------------- bad input


@pytest.fixture
def bad(tmp_path):
    """A DDPM pipeline, its θ_s, and things that are not."""
    torch.manual_seed(0)
    pipe = folders.ddpm()
    pipe.save_pretrained(tmp_path / "base")
    moved(pipe.unet).save_pretrained(tmp_path / "new")
    for name in ("two", "gone", "pickled", "full"):
        shutil.copytree(tmp_path / "base", tmp_path / name)
    shutil.copytree(tmp_path / "base/unet", tmp_path / "two/unet_2")
    index = json.loads((tmp_path / "two/model_index.json").read_text())
    (tmp_path / "two/model_index.json").write_text(json.dumps(index | {"unet_2": index["unet"]}))
    shutil.rmtree(tmp_path / "gone/scheduler")
    (tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "pickled/unet/diffusion_pytorch_model.bin").touch()
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "new", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"_class_name": "UNet1DModel"}))
    shutil.copytree(tmp_path / "new", tmp_path / "fewer")
    file = tmp_path / "fewer/diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "conv_out" not in k}, file)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--component": "prior"}, r"base: no component prior with weights; it has unet$"),
        ({"--base": "two"}, r"two: which component\? unet, unet_2; choose one with --component$"),
        ({"--base": "gone"}, r"gone: scheduler is missing, though model_index.json names it"),
        ({"--selftrained": "other"}, r"a UNet1DModel, and the base is a UNet2DModel$"),
        ({"--selftrained": "fewer"}, r"conv_out.bias and 1 more: missing in the self-trained model$"),
        ({"--selftrained": "pickled/unet"}, r"model.bin: unknown kind .* save_pretrained, as safetensors$"),
        ({"--base": "pickled", "--component": "unet"}, r"model.bin: unknown kind .* save_pretrained, as safetensors$"),
        ({"--selftrained": "empty"}, r"empty: no model in this folder"),
        ({"--out": "full"}, r"full: exists; remove it or choose another folder$"),
        ({"--out": "base/inside"}, r"inside: inside of the base"),
        ({"--out": "out.safetensors"}, r"out.safetensors: the base is a folder, and so is what is written$"),
        ({"--out": "base"}, r"base: --out is the file of --base"),
        ({"-w": "nan"}, r"w must be finite"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_bad_input(bad, capsys, change, message, dry):
    files = {"--base": "base", "--selftrained": "new", "--out": "out", "-w": "1"} | change
    words = [part for k, v in files.items() for part in (k, v if k in ("-w", "--component") else bad / v)]
    error = fails(capsys, bad, *words, *["--dry_run"] * dry)
    assert re.search(message, error.rstrip("\n")), error


def test_an_error_in_the_last_tensor_leaves_no_folder(bad, capsys):
    file = bad / "new/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    last = list(load_file(bad / "base/unet/diffusion_pytorch_model.safetensors"))[-1]
    save_file(state | {last: state[last] * float("nan")}, file)
    words = ("--base", bad / "base", "--selftrained", bad / "new", "-w", 1, "--out", bad / "out")
    assert "not finite in the self-trained model" in fails(capsys, bad, *words)
