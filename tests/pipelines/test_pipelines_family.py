"""Pipelines of every kind behind the contract of neon.family: images, losses, files, and what is refused."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from pipeline_cases import (
    TEXTS,
    shaken,
    write_dit,
    write_pixels,
    write_prompts,
    write_sd,
    write_sd3,
)

from neon import NeonError, cost
from neon.family import rows_of
from neon.weights.checkpoint import load_weights, open_weights, save_safetensors
from pipelines import family
from pipelines.lora import Adapted
from pipelines.loss import levels_of

SEEDS = torch.tensor([3, 2**32 + 1, 5, 4])
KINDS = {
    "ddpm": (write_pixels, {}),
    "ddim": (lambda folder: write_pixels(folder, "DDIMPipeline", "DDIMScheduler"), {"eta": 1.0}),
    "dit": (write_dit, {"guidance_scale": 4.0}),
    "dit-noisy": (lambda folder: write_dit(folder, "DDPMScheduler"), {"guidance_scale": 4.0}),
    "sd": (lambda folder: write_sd(folder, skip_prk_steps=True, steps_offset=1), {"guidance_scale": 4.0}),
    "sd-noisy": (lambda folder: write_sd(folder, "EulerAncestralDiscreteScheduler"), {}),
    "sd3": (write_sd3, {"guidance_scale": 4.0}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name, (write, _) in KINDS.items():
        write(root / name)
    write_prompts(root / "prompts.txt")
    return root


def loaded(folders, name, **options):
    texts = {"prompts": str(folders / "prompts.txt")} if name.startswith("sd") else {}
    return family.load(folders / name, device="cpu", **texts, **options)


def drawn(model, seeds, labels=None, **sampling):
    return family.sample(model, seeds, labels, num_inference_steps=3, **sampling)


@pytest.mark.parametrize("name", KINDS)
def test_image_i_depends_on_seed_and_label_alone(folders, name):
    """Also where the scheduler adds noise at each step, and where the pipeline does not hand its generators on."""
    model, sampling = loaded(folders, name), KINDS[name][1]
    images = drawn(model, SEEDS, **sampling)
    assert images.shape == (4, *model.image_shape) and images.dtype == torch.uint8
    torch.manual_seed(7)
    part = drawn(model, SEEDS[1:3], family.labels(model, SEEDS[1:3]), **sampling)
    assert (part.int() - images[1:3].int()).abs().max() <= 1
    assert (images[0].int() - images[1].int()).abs().float().mean() > 5
    if model.classes:
        other = drawn(model, SEEDS[:1], (family.labels(model, SEEDS[:1]) + 1) % model.classes, **sampling)
        assert not torch.equal(other, images[:1])


@pytest.mark.parametrize("name", ["ddim", "dit", "sd", "sd3"])
def test_images_are_those_of_diffusers(folders, name):
    """The same as a user of the pipeline gets with a generator of that seed."""
    import numpy as np
    from diffusers import DiffusionPipeline

    without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipe = DiffusionPipeline.from_pretrained(folders / name, **without)
    given = {"ddim": {}, "dit": {"class_labels": [3]}}.get(name, {"prompt": TEXTS[0]})
    guidance = {} if name == "ddim" else {"guidance_scale": 4.0}
    here = {"generator": torch.Generator().manual_seed(3), "num_inference_steps": 3, "output_type": "np"}
    (wanted,) = pipe(**given, **guidance, **here).images
    (found,) = drawn(loaded(folders, name), SEEDS[:1], **guidance)
    assert torch.equal(found, torch.from_numpy((wanted * 255).round().astype(np.uint8)).movedim(-1, 0))


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_near(folders, name):
    """Of network and decoder, and of the network alone."""
    exact = drawn(loaded(folders, name), SEEDS, **KINDS[name][1])
    for precision in ("bfloat16", "bfloat16+float32"):
        rough = drawn(loaded(folders, name, precision=precision), SEEDS, **KINDS[name][1])
        assert 0 < (rough.int() - exact.int()).abs().float().mean() < 8


def test_schedulers_that_draw_for_whole_batches_are_refused(folders):
    model = loaded(folders, "ddim")
    step = model.pipe.scheduler.step
    model.pipe.scheduler.step = lambda output, t, x, **_: step(output, t, x + torch.randn_like(x))
    with pytest.raises(NeonError, match="DDIMScheduler draws noise for whole batches"):
        drawn(model, SEEDS)


@pytest.mark.parametrize("name", ["ddim", "dit", "sd", "sd3"])
def test_a_step_is_divided_without_a_change(folders, name):
    """Its gradient is the mean of its parts', with classes and prompts dropped and latents drawn."""
    model = loaded(folders, name)
    labels = family.labels(model, SEEDS)
    images = torch.randint(256, (4, *model.image_shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    family.check(model, model.image_shape, labels)
    draws = family.draw(model, 4, torch.Generator().manual_seed(1), images=None, drop=0.5)
    network = family.weights(model).train().requires_grad_(True)

    def gradient(*parts):
        network.zero_grad()
        for part in parts:
            own = rows_of(draws, part.start, part.stop, 4)
            loss = family.loss(model, images[part], None if labels is None else labels[part], own, drop=0.5)
            (loss * (part.stop - part.start) / 4).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    whole = gradient(slice(0, 4))
    assert (gradient(slice(0, 1), slice(1, 4)) - whole).norm() < 1e-4 * whole.norm()
    if labels is not None:
        kept = draws._replace(dropped=torch.zeros(4, dtype=torch.bool))
        assert draws.dropped.any()
        draws = kept
        assert (gradient(slice(0, 4)) - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("predicted", ["epsilon", "sample", "v_prediction", "flow"])
def test_the_loss_of_a_network_that_knows_the_image_is_zero(folders, predicted):
    """One that says what the scheduler's own formula would turn back into the image."""
    import diffusers

    model = loaded(folders, "ddim")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if predicted != "flow":
        scheduler = diffusers.DDIMScheduler(prediction_type=predicted, clip_sample=False, set_alpha_to_one=False)
    model.pipe.scheduler = scheduler
    image = torch.full((1, 8, 8), 200, dtype=torch.uint8)
    x = image.float() / 127.5 - 1

    class Knows(torch.nn.Module):
        def forward(self, noisy, t):
            if predicted == "flow":
                said = (noisy - x) / (t / 1000).view(-1, 1, 1, 1)
            else:
                a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
                eps = (noisy - a.sqrt() * x) / (1 - a).sqrt()
                said = {"epsilon": eps, "sample": x.expand_as(eps)}.get(predicted, a.sqrt() * eps - (1 - a).sqrt() * x)
            return type("Output", (), {"sample": said})

    draws = family.draw(model, 64, torch.Generator().manual_seed(0), images=None)
    images = image.expand(64, 1, 8, 8)
    model.network = Knows()
    assert family.loss(model, images, None, draws).item() < 1e-6
    levels = levels_of(scheduler)
    assert len(levels.times) == 1000 and draws.u.min() < 0.1 < 0.9 < draws.u.max()
    if predicted != "flow":  # and one step of the sampler from there gives it back
        noise = torch.randn(1, 1, 8, 8)
        noisy = levels.signal[500] * x + levels.noise[500] * noise
        scheduler.set_timesteps(2)
        said = model.network(noisy, torch.tensor([500])).sample
        assert torch.allclose(scheduler.step(said, 500, noisy).pred_original_sample, x[None], atol=1e-4)


def test_schedulers_without_a_known_loss_are_refused(folders):
    import diffusers

    model = loaded(folders, "ddim")
    model.pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(NeonError, match="EDMEulerScheduler with prediction_type epsilon: its training"):
        family.check(model, (1, 8, 8), None)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["ddim", "dit", "sd"])
def test_a_folder_its_component_and_its_file_are_the_same_model(folders, name):
    component = "transformer" if name == "dit" else "unet"
    paths = [folders / name, folders / name / component]
    paths.append(paths[1] / "diffusion_pytorch_model.safetensors")
    texts = {"prompts": str(folders / "prompts.txt")} if name == "sd" else {}
    models = [family.load(path, device="cpu", **texts) for path in paths]
    images = [drawn(model, SEEDS[:1]) for model in models]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    states = [load_weights(path) for path in paths]
    assert all(torch.equal(t, state[key]) for state in states[1:] for key, t in states[0].items())


def test_a_file_next_to_the_original_is_read(folders, tmp_path):
    folder = shutil.copytree(folders / "ddim", tmp_path / "ddim")
    state = {key: t + 0.1 for key, t in load_weights(folder).items()}
    save_safetensors(folder / "unet" / "other.safetensors", state)
    other, base = (family.load(path, device="cpu") for path in (folder / "unet" / "other.safetensors", folder))
    assert all(torch.equal(t, state[key]) for key, t in other.network.state_dict().items())
    assert not torch.equal(drawn(other, SEEDS[:1]), drawn(base, SEEDS[:1]))


@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_a_snapshot_finds_its_pipeline(folders, name, tmp_path):
    model = loaded(folders, name)
    shaken(model.network)
    save_safetensors(tmp_path / "s.safetensors", family.weights(model).state_dict(), family.metadata(model))
    texts = {"prompts": str(folders / "prompts.txt")} if name == "sd" else {}
    again = family.load(tmp_path / "s.safetensors", device="cpu", **texts)
    assert torch.equal(drawn(again, SEEDS), drawn(model, SEEDS))
    hollow = family.hollow(tmp_path / "s.safetensors")
    assert hollow.image_shape == model.image_shape and next(hollow.network.parameters()).is_meta


def test_a_snapshot_of_other_frozen_parts_is_refused(folders, tmp_path):
    model = loaded(folders, "dit")
    save_safetensors(tmp_path / "s.safetensors", model.network.state_dict(), family.metadata(model))
    other = shutil.copytree(folders / "dit", tmp_path / "dit")
    shaken(model.vae)
    model.vae.save_pretrained(other / "vae")
    with pytest.raises(NeonError, match=r"not the pipeline that .* was trained in"):
        family.load(tmp_path / "s.safetensors", device="cpu", pipeline=str(other))


def test_what_decides_an_image_is_in_the_digest(folders, tmp_path):
    """Rows of other prompts, or of another scheduler, are other rows."""
    more = write_prompts(tmp_path / "more.txt", (*TEXTS, "a fish"))
    model, other = loaded(folders, "sd"), family.load(folders / "sd", device="cpu", prompts=str(more))
    digests = [family.metadata(m)["vae_sha256"] for m in (model, other, loaded(folders, "sd-noisy"))]
    assert len(set(digests)) == 3
    assert digests[0] == family.metadata(loaded(folders, "sd"))["vae_sha256"]
    assert family.labels(other, torch.arange(6)).tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("name", KINDS)
def test_what_a_pipeline_costs_is_counted_without_weights(folders, name):
    sampling = KINDS[name][1] | {"num_inference_steps": 4}
    guided = 2 if sampling.get("guidance_scale", 1) > 1 else 1
    steps = 5 if name == "sd" else 4  # PNDM visits its second time twice
    assert cost.sampling(family, folders / name, sampling).passes == pytest.approx(guided * steps)
    full, adapters = (cost.training(family, folders / name, family.recipes[r]).total for r in ("full", "lora4"))
    assert adapters > 0 and full > 0


# ---------------------------------------------------------------- adapters


def test_adapters_start_at_the_base_and_are_stored_as_a_whole_network(folders):
    model, base = loaded(folders, "sd", lora_rank=2), loaded(folders, "sd")
    adapted, whole = family.weights(model), {key: t.clone() for key, t in base.network.state_dict().items()}
    assert isinstance(adapted, Adapted) and list(adapted.state_dict()) == list(whole)
    assert all(torch.equal(t, whole[key]) for key, t in adapted.state_dict().items())
    trained = sum(p.numel() for p in adapted.parameters())
    assert 0 < trained < 0.2 * sum(p.numel() for p in base.network.parameters())
    assert torch.equal(drawn(model, SEEDS), drawn(base, SEEDS))

    shaken(adapted)  # what is stored is what the adapters do
    base.network.load_state_dict(adapted.state_dict())
    assert (drawn(model, SEEDS).int() - drawn(base, SEEDS).int()).abs().max() <= 1
    changed = [key for key, t in adapted.state_dict().items() if not torch.equal(t, whole[key])]
    assert changed and all(
        key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")) for key in changed
    )


def test_only_adapters_get_gradients(folders):
    model = loaded(folders, "sd3", lora_rank=2, gradient_checkpointing=True)
    adapted = family.weights(model).train().requires_grad_(True)
    assert model.network.training and model.network.is_gradient_checkpointing
    draws = family.draw(model, 2, torch.Generator().manual_seed(0), images=None)
    images = torch.zeros(2, *model.image_shape, dtype=torch.uint8)
    family.loss(model, images, family.labels(model, SEEDS[:2]), draws).backward()
    assert all(p.grad is None for p in model.network.parameters())
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())


def test_networks_without_attention_have_no_adapters():
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
    with pytest.raises(NeonError, match="an adapter needs attention layers"):
        family.create("digits", device="cpu", lora_rank=2, **blocks)


# ---------------------------------------------------------------- refused


def test_sampling_options_without_effect_are_refused(folders):
    model = loaded(folders, "ddpm")
    for option, message in (({"eta": 1.0}, "takes no eta"), ({"guidance_scale": 2.0}, "takes no guidance_scale")):
        with pytest.raises(NeonError, match=message):
            drawn(model, SEEDS, **option)
    with pytest.raises(NeonError, match="num_inference_steps must be at least 1"):
        family.sample(model, SEEDS, None, **asdict(family.Sampling()) | {"num_inference_steps": 0})
    with pytest.raises(NeonError, match="unconditional"):
        drawn(model, SEEDS, torch.zeros(4, dtype=torch.int64))


def edited(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(index))


def pickled(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


BAD = {
    "has no unet or transformer or prior": lambda folder: edited(folder, unet=[None, None]),
    "which is meant? give the folder of one": lambda folder: edited(folder, prior=["diffusers", "UNet2DModel"]),
    "its component unet is missing": lambda folder: shutil.rmtree(folder / "unet"),
    "is a pickle; save the pipeline with safe_serialization=True": pickled,
    "unknown class of pipelines 'AuraFlowPipeline'": lambda folder: edited(folder, _class_name="AuraFlowPipeline"),
    "code of its own, which is not run": lambda folder: edited(folder, _class_name=["pipeline", "Mine"]),
    "diffusers cannot load this pipeline": lambda folder: shutil.rmtree(folder / "scheduler"),
    "not JSON": lambda folder: (folder / "model_index.json").write_text("{"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_folders_are_refused(folders, tmp_path, message):
    folder = shutil.copytree(folders / "ddim", tmp_path / "ddim")
    BAD[message](folder)
    with pytest.raises(NeonError) as error:
        family.load(folder, device="cpu")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_one_of_two_components_that_is_given_is_loaded(folders, tmp_path):
    """Not what open_weights could guess: the folder says which."""
    folder = shutil.copytree(folders / "ddim", tmp_path / "ddim")
    shutil.copytree(folder / "unet", folder / "prior")
    edited(folder, prior=["diffusers", "UNet2DModel"])
    with open_weights(folder / "unet") as weights:
        assert "conv_in.weight" in weights
    with pytest.raises(NeonError, match=f"{folder}/unet or {folder}/prior"), open_weights(folder):
        pass


def test_prompts_go_with_pipelines_of_text(folders, tmp_path):
    empty = write_prompts(tmp_path / "empty.txt", ())
    for name, prompts, message in [
        ("sd", "", "give a file with one on each line, --prompts FILE"),
        ("sd", str(empty), "no prompts in it"),
        ("sd", str(folders), "not a text file"),
        ("sd", "nowhere.txt", "no such file"),
        ("ddim", str(folders / "prompts.txt"), "takes no prompts"),
    ]:
        with pytest.raises(NeonError, match=message):
            family.load(folders / name, device="cpu", prompts=prompts)


def test_files_that_say_nothing_need_a_pipeline(folders, tmp_path):
    state = load_weights(folders / "ddim")
    save_safetensors(tmp_path / "x.safetensors", state)
    with pytest.raises(NeonError, match="does not say of which pipeline"):
        family.load(tmp_path / "x.safetensors", device="cpu")
    assert family.load(tmp_path / "x.safetensors", device="cpu", pipeline=str(folders / "ddim")).component == "unet"
    with pytest.raises(NeonError, match=r"is not of this network|is missing|has shape"):
        family.load(tmp_path / "x.safetensors", device="cpu", pipeline=str(folders / "dit"))
    record = json.loads(family.metadata(loaded(folders, "ddim"))["pipeline"]) | {"folder": "gone"}
    save_safetensors(tmp_path / "y.safetensors", state, {"pipeline": json.dumps(record)})
    with pytest.raises(NeonError, match=r"gone: no model_index\.json"):
        family.load(tmp_path / "y.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "AuraFlowPipeline"}, "unknown class of pipelines"),
        ({"network": ["logging", {}]}, "cannot build"),
        ({"network": ["UNet2DModel", {"depth": 3}]}, "cannot build"),
        ({"network": ["UNet2DModel", {"in_channels": 3}]}, "has shape|is missing|is not of this network"),
        ({"scheduler": 3}, "its record of a pipeline is damaged"),
        ({"component": None}, None),
    ],
)
def test_damaged_records_are_refused(folders, tmp_path, change, message):
    model = loaded(folders, "ddim")
    record = json.loads(family.metadata(model)["pipeline"])
    assert "folder" not in record  # nothing is frozen: the file needs no folder
    text = json.dumps(record | change) if message else "{"
    save_safetensors(tmp_path / "x.safetensors", model.network.state_dict(), {"pipeline": text})
    with pytest.raises(NeonError, match=message or "its record of a pipeline is damaged"):
        family.load(tmp_path / "x.safetensors", device="cpu")
