"""Named networks, recipes and presets: paper size, 28×28 clothes and 8×8 digits, whose grey pixels need no VAE."""

from neon.family import Preset, Recipe

# Constructor arguments of IMMPrecond.
NETWORKS = {
    "imagenet256": {
        "img_resolution": 32,
        "img_channels": 4,
        "label_dim": 1000,
        "model_type": "DiT_XL_2",
        "s_embed": True,
        "noise_schedule": "fm",
        "f_type": "euler_fm",
        "temb_type": "stride",
        "time_scale": 1000,
        "sigma_data": 0.5,
        "eps": 0.0,
        "T": 0.994,
    },
    # The whole image is one token: at 8×8 pixels that learns fastest for its cost.
    "digits": {
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 10,
        "model_type": "DiT",
        "in_channels": 1,
        "num_classes": 10,
        "patch_size": 8,
        "hidden_size": 192,
        "depth": 2,
        "num_heads": 4,
        "f_type": "simple_edm",
        "time_scale": 100,
    },
}
CLOTHES = {**NETWORKS["digits"], "img_resolution": 28, "patch_size": 4}
NETWORKS |= {
    "fashion": {**CLOTHES, "hidden_size": 128, "depth": 4},
    "fashion_gpu": {**CLOTHES, "hidden_size": 384, "depth": 8, "num_heads": 6},
}

# The jump's target lies further ahead (k) and late times count more (a) than for ImageNet, so that minutes suffice.
DIGITS = {"batch": 64, "betas": (0.9, 0.99), "ema_decay": 0.99, "loss": {"k": 8, "a": 1}}

RECIPES = {
    # 59 ticks of 200 steps; the original begins a sixtieth and stops after its first step.
    "imagenet256": Recipe(
        batch=512,
        lr=1e-6,
        budget=59 * 102_400,
        snapshot=102_400,
        optimizer="adamw",
        ema_decay=0.9999,
        precision="float16",
    ),
    "digits_base": Recipe(**DIGITS, lr=2e-3, budget=96_000, snapshot=96_000, ramp=6_400, anneal="linear"),
    "digits": Recipe(**DIGITS, lr=1e-4, budget=12_800, snapshot=3_200),
    "fashion_base": Recipe(**DIGITS, lr=1e-3, budget=200_000, snapshot=200_000, ramp=12_800, anneal="linear"),
    "fashion": Recipe(**DIGITS, lr=5e-5, budget=12_800, snapshot=6_400),
    "fashion_gpu_base": Recipe(
        **DIGITS | {"batch": 512},
        lr=5e-4,
        budget=8_000_000,
        snapshot=8_000_000,
        ramp=200_000,
        anneal="linear",
    ),
    "fashion_gpu": Recipe(**DIGITS | {"batch": 512}, lr=2e-5, budget=102_400, snapshot=25_600),
}

# fmt: off
IMAGENET256 = {  # S and θ_s are one for all numbers of steps
    "trained_as": "imm", "network": "imagenet256", "base": "checkpoints/imagenet256_ts_a2.pkl",
    "vae": "checkpoints/sd-vae-ft-ema", "reference": "imagenet256",
    "synthetic": 30_000, "made_with": {"num_steps": 8, "cfg_scale": 1.5}, "recipe": "imagenet256", "micro_batch": 16,
    "batch_size": 64, "w": "0:5.2:0.4", "snapshot": 8 * 102_400,
    "grid": "cfg_scale=1,1.3,1.4,1.5,1.6,1.7,1.8,1.9,2,2.1,2.2,2.3,2.4,2.5,2.6,3",
}
PRESETS = {  # fid: the paper's, of the base and of Neon
    "imm_t8": Preset(
        **IMAGENET256, sampling={"num_steps": 8, "cfg_scale": 1.8}, released="checkpoints/Neon_imm_imagenet256.pkl",
        fid=(1.99, 1.46), best_w=3.6, rows=("IMM (T=8)", "IMM (T=8) + Neon"),
    ),
    "imm_t4": Preset(**IMAGENET256, sampling={"num_steps": 4}, fid=(None, 1.69), rows=(None, "IMM (T=4) + Neon")),
    "imm_t2": Preset(**IMAGENET256, sampling={"num_steps": 2}, fid=(None, 2.89), rows=(None, "IMM (T=2) + Neon")),
    "imm_t1": Preset(
        **IMAGENET256, sampling={"num_steps": 1}, fid=(7.77, 6.67), rows=("IMM (T=1)", "IMM (T=1) + Neon"),
    ),
}
# fmt: on
