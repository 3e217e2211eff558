"""Tiny random models as their libraries write them: pipelines of diffusers, a language model, adapters."""

import copy
import importlib

import pytest
import torch


def library(name):
    """A library, or a skipped test."""
    return pytest.importorskip(name)


def unet2d():
    return library("diffusers").UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


def ddpm():
    diffusers = library("diffusers")
    return diffusers.DDPMPipeline(unet2d(), diffusers.DDPMScheduler(num_train_timesteps=10))


def vae():
    return library("diffusers").AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def dit():
    diffusers = library("diffusers")
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,  # DiTPipeline's class of no class is 1000
        norm_num_groups=4,
    )
    return diffusers.DiTPipeline(network, vae(), diffusers.DDIMScheduler(num_train_timesteps=10))


def unet_with_text():
    return library("diffusers").UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def stable_diffusion():
    """With a tokenizer of three letters."""
    diffusers, transformers = library("diffusers"), library("transformers")
    words = ["<|startoftext|>", "<|endoftext|>", *"abc", *(f"{letter}</w>" for letter in "abc")]
    vocabulary = {word: i for i, word in enumerate(words)}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text,
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8),
        unet=unet_with_text(),
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=10, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def gpt2():
    transformers = library("transformers")
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def moved(model, scale=0.1, seed=1):
    """The same model after training: every weight moved at random."""
    g, new = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for tensor in new.parameters():
            tensor.add_(scale * torch.randn(tensor.shape, generator=g).to(tensor))
    return new


def with_adapter(model, targets, rank=2, seed=3, **options):
    """A PEFT model around a copy, with random factors in both places, as after training."""
    peft, g = library("peft"), torch.Generator().manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=targets, **options)
    new = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, tensor in new.named_parameters():
            if "lora_" in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=g))
    return new


def class_in(path, name):
    return getattr(importlib.import_module(path), name)


def language_models(path):
    """A small language model with tied weights as path/base, and the same moved a little as path/new."""
    torch.manual_seed(0)
    model = gpt2()
    model.save_pretrained(path / "base")
    moved(model).save_pretrained(path / "new")
    return path
