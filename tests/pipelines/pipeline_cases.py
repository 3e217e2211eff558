"""Tiny pipelines of random weights, saved in diffusers' format, and images for them."""

import json
from pathlib import Path

import torch

TEXTS = ("a red bird", "a cat", "two dogs and a cat")


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Without the zeros that some layers start with, which would hide what is behind them."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def unet():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    net = UNet2DModel(8, 1, 1, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, **blocks)
    return shaken(net)


def vae(**options):
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKL(scaling_factor=0.5, **shape, **blocks, **options)


def write_pixels(folder: Path, pipeline: str = "DDPMPipeline", scheduler: str = "DDPMScheduler", **options) -> Path:
    import diffusers

    getattr(diffusers, pipeline)(unet(), getattr(diffusers, scheduler)(**options)).save_pretrained(folder)
    return folder


def write_dit(folder: Path, scheduler: str = "DDIMScheduler") -> Path:
    import diffusers

    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, norm_num_groups=4,
    )  # fmt: skip
    diffusers.DiTPipeline(shaken(net), vae(), getattr(diffusers, scheduler)()).save_pretrained(folder)
    return folder


def tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    letters = [chr(i) for i in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def text_encoder(projected: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return shaken((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def write_sd(folder: Path, scheduler: str = "PNDMScheduler", **options) -> Path:
    import diffusers

    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        4, 4, 4, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae(), text_encoder(), tokenizer(folder / "words"), shaken(net), getattr(diffusers, scheduler)(**options),
        None, None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_sd3(folder: Path, **options) -> Path:
    import diffusers

    torch.manual_seed(0)
    net = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    words = tokenizer(folder / "words")
    diffusers.StableDiffusion3Pipeline(
        shaken(net), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **options), vae(shift_factor=0.1),
        text_encoder(True), words, text_encoder(True), words, None, None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_prompts(path: Path, texts=TEXTS) -> Path:
    path.write_text("\n".join(texts) + "\n\n")
    return path
