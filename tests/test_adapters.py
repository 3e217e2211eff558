"""LoRA adapters as θ_s: fused at −w they are what diffusers and PEFT make of them; negated, strength 1 is θ_neon."""

import json
import re
import shutil

import folders
import pytest
import torch
from folders import class_in, moved, with_adapter
from safetensors.torch import load_file, save_file

from neon.cli import main

ATTENTION = ["to_q", "to_k", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_shortcut"]  # 3 × 3 and 1 × 1
UNET = "unet/diffusion_pytorch_model.safetensors"


def neon(command, *words):
    main([command, *map(str, words)])


def fails(capsys, folder, *words):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        neon(*words)
    said, error = capsys.readouterr()
    assert (caught.value.code, said, error.count("\n")) == (1, "", 1), error
    assert sorted(folder.rglob("*")) == before
    return error


def close(one, other):
    """Equal to float32 rounding."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


def different(one, other):
    return sum(not torch.allclose(one[name], other[name], atol=1e-4) for name in one)


# ---------------------------------------------------------------- Stable Diffusion


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A pipeline; a LoRA of its U-Net as diffusers saves it, and the same in PEFT's folder."""
    path = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    pipe = folders.stable_diffusion()
    pipe.save_pretrained(path / "base")
    trained = with_adapter(pipe.unet, ATTENTION + CONVOLUTIONS, rank_pattern={"to_k": 4}, alpha_pattern={"to_q": 7})
    trained.save_pretrained(path / "peft")
    peft = class_in("peft", "get_peft_model_state_dict")
    config = trained.peft_config["default"].to_dict()
    class_in("diffusers", "StableDiffusionPipeline").save_lora_weights(
        path / "diffusers",
        unet_lora_layers={name.removeprefix("base_model.model."): t for name, t in peft(trained).items()},
        unet_lora_adapter_metadata=config,
    )
    return path


def loaded(path, weights, scale):
    """The U-Net after diffusers has loaded an adapter and fused it."""
    pipe = class_in("diffusers", "StableDiffusionPipeline").from_pretrained(path / "base")
    pipe.load_lora_weights(weights)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return pipe.unet.state_dict()


@pytest.mark.parametrize("w", [0.75, 2.0, -1.0])
@pytest.mark.parametrize("kind", ["diffusers", "peft"])
def test_fused_as_diffusers_fuses_it(diffusion, tmp_path, capsys, w, kind):
    neon("merge", "--base", diffusion / "base", "--selftrained", diffusion / kind, "-w", w, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert re.search(r"\(adapter, \d+ layers, rank 2/4", said)
    wanted = loaded(diffusion, diffusion / "diffusers", -w)
    close(load_file(tmp_path / "out" / UNET), wanted)
    assert different(wanted, load_file(diffusion / "base" / UNET)) > 8


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_negated_it_is_loaded_at_strength_1(diffusion, tmp_path, form):
    """diffusers reads its own names, and kohya's."""
    words = ("--base", diffusion / "base", "--selftrained", diffusion / "peft", "-w", 1.5)
    neon("merge", *words, "--adapter", form, "--out", tmp_path / "negated.safetensors")
    wanted = loaded(diffusion, diffusion / "diffusers", -1.5)
    close(loaded(diffusion, tmp_path / "negated.safetensors", 1.0), wanted)
    again = ("--base", diffusion / "base", "--selftrained", tmp_path / "negated.safetensors", "-w", -1)
    neon("merge", *again, "--out", tmp_path / "out")  # and we read it ourselves
    close(load_file(tmp_path / "out" / UNET), wanted)


def test_negated_for_peft(diffusion, tmp_path):
    words = ("--base", diffusion / "base/unet", "--selftrained", diffusion / "diffusers", "-w", 1.5)
    neon("merge", *words, "--adapter", "peft", "--out", tmp_path / "negated")
    unet = class_in("diffusers", "UNet2DConditionModel").from_pretrained(diffusion / "base/unet")
    fused = class_in("peft", "PeftModel").from_pretrained(unet, tmp_path / "negated").merge_and_unload()
    close(fused.state_dict(), loaded(diffusion, diffusion / "diffusers", -1.5))


def test_groups_of_an_adapter(diffusion, tmp_path):
    """A w per group, fused or negated: layers without one stay."""
    words = ("--base", diffusion / "base", "--selftrained", diffusion / "peft", "-w", 0, "--weights", "to_q=2")
    neon("merge", *words, "--out", tmp_path / "out")
    neon("merge", *words, "--adapter", "diffusers", "--out", tmp_path / "negated.safetensors")
    found, base = load_file(tmp_path / "out" / UNET), load_file(diffusion / "base" / UNET)
    wanted = loaded(diffusion, diffusion / "diffusers", -2)
    close(found, {name: wanted[name] if "to_q" in name else base[name] for name in base})
    close(found, loaded(diffusion, tmp_path / "negated.safetensors", 1.0))


def test_kohya_by_its_formula(diffusion, tmp_path):
    """W − w · alpha / rank · up · down; without alpha, alpha is the rank."""
    g, name = torch.Generator().manual_seed(0), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    base = load_file(diffusion / "base" / UNET)
    out, width = base[name].shape
    up, down = torch.randn(out, 3, generator=g), torch.randn(3, width, generator=g)
    key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
    for alpha, scale in ((torch.tensor(6.0), 2), (None, 1)):
        state = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        save_file(state | ({} if alpha is None else {f"{key}.alpha": alpha}), tmp_path / "kohya.safetensors")
        words = ("--base", diffusion / "base", "--selftrained", tmp_path / "kohya.safetensors", "-w", 0.5)
        neon("merge", *words, "--out", tmp_path / f"out{scale}")
        found = load_file(tmp_path / f"out{scale}" / UNET)
        close(found, base | {name: base[name] - 0.5 * scale * up @ down})


def test_kohya_with_names_of_a_single_checkpoint(tmp_path):
    """Stable Diffusion's own names: the base's have a prefix that the adapter's have not."""
    name, g = "input_blocks.4.1.proj_in", torch.Generator().manual_seed(0)
    base = {f"model.diffusion_model.{name}.weight": torch.randn(4, 5, 1, 1, generator=g), "first.weight": torch.ones(1)}
    up, down = torch.randn(4, 2, 1, 1, generator=g), torch.randn(2, 5, 1, 1, generator=g)
    key = f"lora_unet_{name.replace('.', '_')}"
    save_file(base, tmp_path / "base.safetensors")
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, tmp_path / "lora.safetensors")
    words = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "lora.safetensors", "-w", 2)
    neon("merge", *words, "--out", tmp_path / "out.safetensors")
    first, *_ = base
    step = (up[:, :, 0, 0] @ down[:, :, 0, 0])[:, :, None, None]
    close(load_file(tmp_path / "out.safetensors"), base | {first: base[first] - 2 * step})


def test_parameters_named_alpha_are_no_adapter(tmp_path):
    """As activations have them."""
    for name in ("base", "new"):
        save_file({"snake.alpha": torch.full((3,), len(name) / 1.0)}, tmp_path / f"{name}.safetensors")
    words = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "new.safetensors", "-w", 1)
    neon("merge", *words, "--out", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["snake.alpha"].tolist() == [5, 5, 5]


def test_in_half_precision_the_step_is_not_rounded_before_it_is_scaled(diffusion, tmp_path):
    """θ_s itself in bfloat16 would lose steps that w makes large enough."""
    base = load_file(diffusion / "base" / UNET)
    save_file({name: t.bfloat16() for name, t in base.items()}, tmp_path / "half.safetensors")
    words = ("--base", tmp_path / "half.safetensors", "--selftrained", diffusion / "peft", "-w", 3)
    neon("merge", *words, "--out", tmp_path / "out.safetensors")
    full = loaded(diffusion, diffusion / "diffusers", -3)
    for name, found in load_file(tmp_path / "out.safetensors").items():
        wanted = base[name].bfloat16().float() + (full[name] - base[name])
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-5)


# ---------------------------------------------------------------- a language model


@pytest.fixture(scope="module", params=[{}, {"use_rslora": True}], ids=["plain", "rslora"])
def language(request, tmp_path_factory):
    """Its layers are stored as (in, out), one of them square; its embedding is adapted as well."""
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = folders.gpt2()
    model.save_pretrained(path / "base")
    trained = with_adapter(model, ["c_attn", "c_proj", "wte"], fan_in_fan_out=True, **request.param)
    trained.save_pretrained(path / "peft")
    return path


def fused(path, adapter, factor):
    """The state dict after PEFT has merged an adapter with its scale times `factor`."""
    model = class_in("transformers", "AutoModelForCausalLM").from_pretrained(path / "base")
    model = class_in("peft", "PeftModel").from_pretrained(model, adapter)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: factor * scale for name, scale in module.scaling.items()}
    return model.merge_and_unload().state_dict()


def test_fused_as_peft_merges_it(language, tmp_path):
    neon("merge", "--base", language / "base", "--selftrained", language / "peft", "-w", 1.5, "--out", tmp_path / "out")
    model = class_in("transformers", "AutoModelForCausalLM").from_pretrained(tmp_path / "out")
    wanted = fused(language, language / "peft", -1.5)
    close(model.state_dict(), wanted)
    assert different(wanted, fused(language, language / "peft", 0)) >= 5


def test_negated_for_peft_with_transposed_layers(language, tmp_path):
    words = ("--base", language / "base", "--selftrained", language / "peft", "-w", 1.5, "--adapter", "peft")
    neon("merge", *words, "--out", tmp_path / "negated")
    close(fused(language, tmp_path / "negated", 1), fused(language, language / "peft", -1.5))


# ---------------------------------------------------------------- extracted


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_all_of_a_low_rank_step_is_extracted(diffusion, tmp_path, capsys, form):
    """θ_s is the base with a LoRA of rank 4 at most: rank 4 has all of it, and w negates it."""
    words = ("--base", diffusion / "base", "--selftrained")
    neon("merge", *words, diffusion / "peft", "-w", -1, "--out", tmp_path / "tuned")
    capsys.readouterr()
    out = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    neon("extract-lora", *words, tmp_path / "tuned", "--rank", 4, "-w", 2, "--form", form, "--out", out)
    assert "energy   100 % of ‖θ_s − θ_r‖² is kept" in capsys.readouterr().out
    neon("merge", *words, out, "-w", -1, "--out", tmp_path / "out")
    close(load_file(tmp_path / "out" / UNET), loaded(diffusion, diffusion / "diffusers", -2))


def test_the_energy_that_a_lower_rank_keeps(tmp_path, capsys):
    """Singular values 2, 1 in a matrix, 3 in a convolution, a bias that moved by 1: rank 1 keeps 4 + 9 of 15."""
    base = {"a.weight": torch.zeros(3, 2), "b.weight": torch.zeros(2, 3, 2, 2), "b.bias": torch.zeros(1)}
    new = {name: tensor.clone() for name, tensor in base.items()}
    new["a.weight"][0, 0], new["a.weight"][2, 1], new["b.weight"][1, 2, 0, 1], new["b.bias"][0] = 2, 1, 3, 1
    for name, state in (("base", base), ("new", new)):
        save_file(state, tmp_path / f"{name}.safetensors")
    sides = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "new.safetensors")
    neon("extract-lora", *sides, "--rank", 1, "--out", tmp_path / "lora")
    said = capsys.readouterr().out
    assert f"energy   {100 * 13 / 15:.4g} % of" in said and "least    80 % in a.weight" in said
    assert f"outside  {100 / 15:.4g} % is in biases" in said
    neon("merge", *sides[:2], "--selftrained", tmp_path / "lora", "-w", -1, "--out", tmp_path / "out.safetensors")
    new["a.weight"][2, 1] = new["b.bias"][0] = 0
    close(load_file(tmp_path / "out.safetensors"), new)


def test_extracted_from_transposed_layers(tmp_path):
    """GPT-2's: PEFT makes θ_s of the adapter again, except embeddings, norms and biases."""
    model = folders.gpt2()
    model.save_pretrained(tmp_path / "base")
    moved(model).save_pretrained(tmp_path / "new")
    sides = ("--base", tmp_path / "base", "--selftrained", tmp_path / "new")
    neon("extract-lora", *sides, "--rank", 8, "--out", tmp_path / "lora")
    base, new = (load_file(tmp_path / side / "model.safetensors") for side in ("base", "new"))
    found = fused(tmp_path, tmp_path / "lora", 1)
    layers = [name for name in new if re.search(r"c_(attn|proj|fc)\.weight", name)]
    assert len(layers) == 8
    for name in new:
        torch.testing.assert_close(found[name], new[name] if name in layers else base[name], rtol=1e-4, atol=1e-5)
    neon("merge", *sides[:2], "--selftrained", tmp_path / "lora", "-w", -1, "--out", tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")
    close(ours, {name: found[name] for name in ours})


# ---------------------------------------------------------------- bad input


def changed(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def settings(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def bad(diffusion, tmp_path):
    for name in ("wider", "renamed", "half", "dora", "bias", "scaleless", "text"):
        shutil.copytree(diffusion / "peft", tmp_path / name)
    changed(tmp_path / "wider", lambda s: {k: torch.cat([t, t], 1) if "lora_A" in k else t for k, t in s.items()})
    changed(tmp_path / "renamed", lambda s: {k.replace("mid_block", "middle"): t for k, t in s.items()})
    changed(tmp_path / "half", lambda s: dict(list(s.items())[1:]))
    settings(tmp_path / "dora", use_dora=True)
    changed(tmp_path / "bias", lambda s: s | {"base_model.model.conv_in.bias": torch.ones(8)})
    (tmp_path / "scaleless/adapter_config.json").unlink()
    changed(tmp_path / "text", lambda s: {f"text_encoder.{k}": t for k, t in s.items()})
    shutil.copytree(diffusion / "base", tmp_path / "base")
    shutil.copytree(diffusion / "peft", tmp_path / "peft")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/adapter_model.bin").touch()
    (tmp_path / "pickle/adapter_config.json").write_text("{}")
    save_file({"x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("base", "new", "message", "more"),
    [
        ("peft", "peft", "adapters on both sides: --base is the model .* factors are not merged", ()),
        ("peft", "base", "peft is an adapter: --base is the model that was trained with the adapter$", ()),
        (
            "base",
            "wider",
            r"an adapter of another base: .* is \(\d+, .*\), not \(\d+, .*\), in .*, and \d+ more$",
            (),
        ),
        ("base", "renamed", "an adapter of another base: .*middle.* is not in .*safetensors, and", ()),
        ("base", "half", "has one factor of two$", ()),
        ("base", "dora", "use_dora is set, which is not a plain LoRA$", ()),
        ("base", "bias", "conv_in.bias is no factor of a LoRA", ()),
        ("base", "loha.safetensors", "x.hada_w1_a is no factor of a LoRA", ()),
        ("base", "text", "is of a text encoder, and only one component is merged$", ()),
        ("base", "scaleless/adapter_model.safetensors", "its scale is in adapter_config.json, which is not next", ()),
        ("base", "pickle", "adapter_model.bin: a pickle or nothing", ()),
        ("base", "base", "--adapter: .*base is none; `neon extract-lora` makes one$", ("--adapter", "peft")),
        ("base", "peft", "out: an adapter in the form of kohya is a .safetensors file$", ("--adapter", "kohya")),
        ("base", "peft", "w must be finite, not nan", ("--adapter", "peft", "-w", "nan")),
        ("base", "peft", "w must be finite, not nan", ("-w", "nan")),
        ("base/unet/diffusion_pytorch_model.safetensors", "peft", "out: weights from .* are written as", ()),
    ],
)
def test_bad_input(bad, capsys, base, new, message, more):
    words = ("--base", bad / base, "--selftrained", bad / new, "-w", 1, "--out", bad / "out", *more)
    error = fails(capsys, bad, "merge", *words)
    assert re.search(message, error.rstrip("\n")), error


def test_no_adapter_can_be_extracted(bad, capsys):
    words = ("--base", bad / "base", "--rank", 2, "--out", bad / "out")
    assert "an adapter already" in fails(capsys, bad, "extract-lora", *words, "--selftrained", bad / "peft")
    same = fails(capsys, bad, "extract-lora", *words, "--selftrained", bad / "base")
    assert "no matrix or convolution differs" in same
    other = ("--base", bad / "narrow.safetensors", "--selftrained", bad / "wide.safetensors", *words[2:])
    for name, width in (("narrow", 1), ("wide", 3)):
        save_file({"a.weight": torch.ones(2, width)}, bad / f"{name}.safetensors")
    assert "a.weight: shape (2, 1) in the base, (2, 3) in θ_s" in fails(capsys, bad, "extract-lora", *other)
    lone = bad / "base" / UNET
    words = ("--base", lone, "--selftrained", lone, "--rank", 2, "--form", "kohya", "--out", bad / "x.safetensors")
    assert "give --component unet or transformer" in fails(capsys, bad, "extract-lora", *words)
