"""Recipes for pipelines, and a network of mini size: for 8×8 grey digits."""

from dataclasses import replace

from neon.family import Preset, Recipe

# Constructor arguments of UNet2DModel, and of the DDIMScheduler that a new one is trained and sampled with.
NETWORKS = {
    "digits": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
        "attention_head_dim": 16,
    },
}
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}

# What the paper's fine-tunes have in common, in numbers that suit most pipelines: a small constant lr, short. Change
# them on the command line. drop: how often an image is trained without its class or prompt, which guidance needs.
FULL = Recipe(
    batch=64,
    lr=1e-5,
    budget=200_000,
    snapshot=20_000,
    optimizer="adamw",
    weight_decay=0.01,
    clip=1.0,
    precision="bfloat16",
    loss={"drop": 0.1},
    network={"gradient_checkpointing": True},
)
DIGITS = Recipe(batch=64, lr=1e-4, budget=12_800, snapshot=6_400, betas=(0.9, 0.99), ema_decay=0.99)

RECIPES = {
    "full": FULL,
    **{f"lora{r}": replace(FULL, lr=1e-4, network={**FULL.network, "lora_rank": r}) for r in (4, 16, 64)},
    "digits_base": Recipe(
        batch=64,
        lr=4e-3,
        budget=120_000,
        snapshot=120_000,
        ramp=6_400,
        anneal="linear",
        betas=(0.9, 0.99),
        ema_decay=0.998,
    ),
    "digits": DIGITS,
    "digits_lora": replace(DIGITS, lr=2e-3, ema_decay=None, network={"lora_rank": 4}),
}

PRESETS: dict[str, Preset] = {}  # the paper has no pipelines
