"""Named networks, recipes and presets: paper size, 28×28 clothes, and mini size for 8×8 grey digits."""

from neon.family import Preset, Recipe

# Constructor arguments of EDMPrecond.
DDPMPP = {
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "augment_dim": 9,
    "model_channels": 128,
}
CIFAR10 = {"img_resolution": 32, "img_channels": 3, "channel_mult": [2, 2, 2], "dropout": 0.13, **DDPMPP}

NETWORKS = {
    "cifar10_cond": {**CIFAR10, "label_dim": 10},
    "cifar10_uncond": {**CIFAR10, "label_dim": 0},
    "ffhq64": {
        **DDPMPP,
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 0,
        "channel_mult": [1, 2, 2, 2],
        "dropout": 0.05,
    },
    "digits": {
        **DDPMPP,
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 10,
        "model_channels": 16,
        "channel_mult": [1, 1],
        "channel_mult_emb": 2,
        "num_blocks": 1,
        "attn_resolutions": [],
        "augment_dim": 0,
        "dropout": 0.0,
    },
}
CLOTHES = {**NETWORKS["digits"], "img_resolution": 28, "channel_mult": [1, 2, 2]}
NETWORKS |= {
    "fashion": {**CLOTHES, "channel_mult_emb": 4},
    "fashion_gpu": {
        **CLOTHES,
        "model_channels": 64,
        "channel_mult_emb": 4,
        "num_blocks": 2,
        "attn_resolutions": [14],
        "dropout": 0.1,
    },
}

# EDM's training command with its duration cut short: the ramp of 10 Mimg is the original's fixed default, so the
# nominal learning rate is never reached (the paper's runs end at 0.6 and 0.3 of it).
EDM = {"ramp": 10_000_000, "ema_halflife": 500_000, "clean_grads": True, "order": "window"}
CIFAR10_SELFTRAIN = Recipe(
    **EDM,
    batch=512,
    lr=1e-4,
    budget=6_000_000,
    snapshot=500_000,
    network={"dropout": 0.13},
    loss={"augment": 0.12},
)

RECIPES = {
    "cifar10_base": Recipe(  # the original training of both CIFAR-10 models, for bases on a part of the data
        **EDM,
        batch=512,
        lr=1e-3,
        budget=200_000_000,
        snapshot=10_000_000,
        network={"dropout": 0.13},
        loss={"augment": 0.12},
    ),
    "cifar10_cond": CIFAR10_SELFTRAIN,
    "cifar10_uncond": CIFAR10_SELFTRAIN,
    "ffhq64": Recipe(
        **EDM,
        batch=256,
        lr=4e-6,
        budget=3_000_000,
        snapshot=250_000,
        network={"dropout": 0.05},
        loss={"augment": 0.15},
    ),
    "digits_base": Recipe(
        batch=64,
        lr=8e-3,
        budget=102_400,
        snapshot=102_400,
        ramp=6_400,
        anneal="linear",
        betas=(0.9, 0.99),
        ema_decay=0.996,
    ),
    "digits": Recipe(
        batch=64,
        lr=5e-5,
        budget=19_200,
        snapshot=6_400,
        betas=(0.9, 0.99),
        ema_decay=0.99,
    ),
    "fashion_base": Recipe(
        batch=16,
        lr=4e-3,
        budget=128_000,
        snapshot=128_000,
        ramp=6_400,
        anneal="linear",
        betas=(0.9, 0.99),
        ema_decay=0.998,
    ),
    "fashion": Recipe(batch=64, lr=5e-5, budget=12_800, snapshot=6_400, betas=(0.9, 0.99), ema_decay=0.99),
    "fashion_gpu_base": Recipe(
        batch=256,
        lr=1e-3,
        budget=4_000_000,
        snapshot=4_000_000,
        ramp=100_000,
        anneal="linear",
        ema_decay=0.9995,
        network={"dropout": 0.1},
    ),
    "fashion_gpu": Recipe(batch=256, lr=5e-5, budget=102_400, snapshot=25_600, ema_decay=0.99),
}

# fmt: off
PRESETS = {  # fid: the paper's, of the base and of Neon
    "edm_cifar10_cond": Preset(
        network="cifar10_cond", base="checkpoints/edm-cifar10-32x32-cond-vp.pkl",
        released="checkpoints/Neon_EDM_conditional_CIFAR10.pkl", reference="cifar10",
        synthetic=6_000, made_with={"num_steps": 18}, recipe="cifar10_cond", micro_batch=64,
        sampling={"num_steps": 18}, batch_size=256, w="0:3:0.25", sets=3,
        fid=(1.78, 1.38), rows=("EDM-VP", "EDM + Neon"),
    ),
    "edm_cifar10_uncond": Preset(
        network="cifar10_uncond", base="checkpoints/edm-cifar10-32x32-uncond-vp.pkl",
        released="checkpoints/Neon_EDM_unconditional_CIFAR10.pkl", reference="cifar10",
        synthetic=6_000, made_with={"num_steps": 18}, recipe="cifar10_uncond", micro_batch=64,
        sampling={"num_steps": 18}, batch_size=256, w="0:3:0.25", sets=3,
        fid=(1.97, 1.38), rows=("EDM-VP", "EDM + Neon"), kind="uncond",
    ),
    "edm_ffhq64": Preset(
        network="ffhq64", base="checkpoints/edm-ffhq-64x64-uncond-vp.pkl",
        released="checkpoints/Neon_EDM_FFHQ.pkl", reference="ffhq64",
        synthetic=18_000, made_with={"num_steps": 40}, recipe="ffhq64", micro_batch=32,
        sampling={"num_steps": 40}, batch_size=256, w="0:3:0.25", sets=3,
        fid=(2.39, 1.12), rows=("EDM-VP", "EDM + Neon"), kind="uncond",
    ),
}
# fmt: on
