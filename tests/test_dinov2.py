"""DINOv2 features: against transformers' network, preprocessing and table of positions by hand, files and errors."""

import hashlib
import math

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from neon import NeonError
from neon.measure.dinov2 import DINOv2, prepared
from neon.measure.evaluate import Evaluation, parse_metrics, title
from neon.measure.features import load_extractor
from neon.measure.metrics import Reference

# In Dinov2Model: ours → theirs; of a block: ours → theirs.
NAMES = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
IN_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls2.gamma": "layer_scale2.lambda1",
}


def images(n=3, height=20, width=20):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def weights(grid=37, width=128, depth=2):
    """Random ones of a small network, of order one."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DINOv2(width, depth, grid).state_dict().items()}
    return {
        name: torch.randn(shape, generator=generator) / math.prod(shape[1:] or (1,)) ** 0.5
        for name, shape in shapes.items()
    }


def saved(path, state):
    torch.save(state, path)
    return f"dinov2:{path}"


def theirs(state, depth, grid):
    config = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=depth,
        num_attention_heads=2,
        image_size=14 * grid,
        patch_size=14,
        attn_implementation="eager",
    )
    model, named = Dinov2Model(config).eval(), {}
    pairs = list(NAMES.items())
    for i in range(depth):
        pairs += [(f"blocks.{i}.{our}", f"encoder.layer.{i}.{their}") for our, their in IN_BLOCK.items()]
    for our, their in pairs:
        found = {name: tensor for name, tensor in state.items() if name == our or name.startswith(our + ".")}
        named |= {their + name.removeprefix(our): tensor for name, tensor in found.items()}
    for i in range(depth):
        for kind in ("weight", "bias"):
            for part, tensor in zip("qkv", state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)):
                named[f"encoder.layer.{i}.attention.{part}_proj.{kind}"] = tensor
    model.load_state_dict(named)
    return model


def test_features_are_those_of_transformers(tmp_path):
    """With a table of positions of the images' size, for transformers resizes a larger one in another way."""
    state = weights(grid=16)
    extractor = load_extractor(saved(tmp_path / "tiny.pth", state))
    found = extractor(images())
    with torch.no_grad():
        expected = theirs(state, 2, 16)(prepared(images())).pooler_output
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-5)
    assert found.features.shape == (3, extractor.dim) == (3, 128) and found.logits is None
    assert found.features.dtype == torch.float32 and not found.features.requires_grad
    assert expected.std(0).mean() > 1e-2  # the images are told apart


def cubic(x):
    """Keys' kernel with a = -0.75, as PyTorch has it without antialiasing."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0


def test_the_table_of_positions_is_resized_as_dinov2_does(tmp_path):
    """Samples 37 / 16.1 entries apart, not 37 / 16; borders are repeated; the class token's entry is kept."""
    state = weights(depth=1)
    matrix = np.zeros((16, 37))
    for i in range(16):
        center = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            matrix[i, min(max(j, 0), 36)] += cubic(center - j)
    table = state["pos_embed"][0, 1:].numpy().reshape(37, 37, 128)
    expected = np.einsum("ia,jb,abc->ijc", matrix, matrix, table).reshape(256, 128)
    module = load_extractor(saved(tmp_path / "tiny.pth", state)).module
    found = module.positions()[0].detach().numpy()
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)
    np.testing.assert_array_equal(found[0], state["pos_embed"][0, 0])


def test_images_are_prepared_as_edm2_does():
    """Antialiasing averages; values between and beyond those of uint8 are kept; channels have ImageNet's statistics."""
    black, white = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    for image, value in ((black, 0), (white, 1)):
        expected = [(value - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        found = prepared(image)
        assert found.shape == (1, 3, 224, 224) and found.dtype == torch.float32
        torch.testing.assert_close(found.amax((0, 2, 3)), torch.tensor(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.amin((0, 2, 3)), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    stripes = torch.zeros(1, 3, 896, 896, dtype=torch.uint8)
    stripes[..., ::2] = 255  # without antialiasing all samples would fall on the same kind of stripe
    middle = prepared(stripes)[0, 0, :, 20:-20] * 0.229 + 0.485
    torch.testing.assert_close(middle, torch.full_like(middle, 0.5), rtol=0, atol=0.02)
    edge = torch.cat([black[..., :32], white[..., :32]], dim=3)
    x = prepared(edge)[0, 0] * 0.229 + 0.485
    assert x.max() > 1.02 and x.min() < -0.02  # overshoots, which uint8 would cut


def test_the_published_size():
    """ViT-L/14, not allocated: 304.4 million weights."""
    with torch.device("meta"):
        state = DINOv2().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 304_368_640
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["pos_embed"] == (1, 1370, 1024) and shapes["patch_embed.proj.weight"] == (1024, 3, 14, 14)
    assert shapes["blocks.23.attn.qkv.bias"] == (3072,) and shapes["blocks.0.mlp.fc1.weight"] == (4096, 1024)
    assert shapes["blocks.23.ls2.gamma"] == shapes["norm.bias"] == (1024,) and "blocks.24.norm1.weight" not in shapes
    assert len(state) == 6 + 24 * 14 + 1


def test_any_batch_and_the_name(tmp_path):
    spec = saved(tmp_path / "tiny.pth", weights())
    before = torch.random.get_rng_state()
    extractor = load_extractor(spec)
    assert torch.equal(before, torch.random.get_rng_state())
    digest = hashlib.sha256((tmp_path / "tiny.pth").read_bytes()).hexdigest()
    assert (extractor.name, extractor.classes) == (f"dinov2-{digest[:8]}", None)
    whole = extractor(images(4, 30, 17)).features
    torch.testing.assert_close(whole[1:2], extractor(images(4, 30, 17)[1:2]).features, rtol=1e-4, atol=1e-4)


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(NeonError, match=r"a file: --features dinov2:PATH, .*dinov2_vitl14_pretrain\.pth"):
        load_extractor("dinov2")
    with pytest.raises(NeonError, match="no DINOv2 weights at"):
        load_extractor(f"dinov2:{tmp_path / 'absent.pth'}")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(NeonError, match="is not a file of PyTorch weights"):
        load_extractor(f"dinov2:{tmp_path / 'text.pth'}")
    state = weights(grid=4, depth=1)
    without = {name: tensor for name, tensor in state.items() if name != "blocks.0.ls1.gamma"}
    patches = {**state, "patch_embed.proj.weight": torch.zeros(128, 3, 16, 16)}
    wrong = {"registers": {**state, "register_tokens": torch.zeros(1, 4, 128)}, "missing": without, "patches": patches}
    wrong |= {"other": {"fc.weight": torch.zeros(3)}, "tensor": torch.zeros(3), "numbers": {1: torch.zeros(3)}}
    wrong |= {"heads": weights(grid=4, depth=1, width=96), "table": {**state, "pos_embed": torch.zeros(1, 4, 128)}}
    for name, content in wrong.items():
        with pytest.raises(NeonError, match="does not hold the weights of a DINOv2") as error:
            load_extractor(saved(tmp_path / f"{name}.pth", content))
        assert "\n" not in str(error.value), name


def test_its_distance_is_not_called_fid(tmp_path):
    """And there is no inception score, neither by default nor of all metrics; asking for it is an error."""
    extractor = load_extractor(saved(tmp_path / "tiny.pth", weights(grid=4, depth=1)))
    reference = Reference(torch.zeros(128), torch.eye(128))
    assert title("fid", extractor.name) == "FD (DINOv2)" and title("fid", "inception-v3-compat-0a1b2c3d") == "FID"
    assert parse_metrics("auto", extractor, reference) == parse_metrics("all", extractor, reference) == ("fid",)
    with pytest.raises(NeonError, match=f"score needs classes, which {extractor.name} does not have"):
        Evaluation(torch.arange(20), extractor, reference, ("fid", "is"))
    found = Evaluation(torch.arange(20), extractor, reference, ("fid",))(lambda seeds: images(len(seeds)))
    assert math.isfinite(found["fid"])
