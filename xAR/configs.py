"""Named networks, recipes and presets."""

from neon.family import Preset, Recipe

KL16 = {"width": 128, "multipliers": [1, 1, 2, 2, 4], "groups": 32}

# Sizes of the transformer (xAR.network.XAR), and of the VAE: None for patches of pixels (xAR.vae).
NETWORKS = {
    "xar_base": {"dim": 768, "depth": 8, "heads": 12, "vae": KL16},
    "xar_large": {"dim": 1024, "depth": 16, "heads": 16, "vae": KL16},
    # 8×8 grey digits
    "digits": {
        "dim": 64,
        "depth": 2,
        "heads": 4,
        "side": 4,
        "cell": 2,
        "channels": 4,
        "classes": 10,
        "dropout": 0.0,
        "vae": None,
    },
    # 8×8 images, for tests
    "tiny": {
        "dim": 32,
        "depth": 1,
        "heads": 2,
        "side": 4,
        "cell": 2,
        "channels": 8,
        "classes": 10,
        "vae": {"width": 8, "multipliers": [1, 2], "groups": 4},
    },
}

WARMUP = 250 * 117 * 256  # epochs × steps × batch: the learning rate rises over the whole run
FINETUNE = Recipe(
    batch=256,
    lr=1e-6,
    budget=WARMUP,
    snapshot=250_000,
    ramp=WARMUP,
    optimizer="adamw",
    betas=(0.9, 0.96),
    weight_decay=0.02,
    ema_decay=0.9999,
    clip=1.0,
    precision="float16",
    tf32=True,
    loss={"flip": True},
)

RECIPES = {
    "xar_base": FINETUNE,
    "xar_large": FINETUNE,
    "digits_base": Recipe(
        batch=64,
        lr=2e-3,
        budget=51_200,
        snapshot=51_200,
        ramp=6_400,
        anneal="linear",
        optimizer="adamw",
        betas=(0.9, 0.96),
        weight_decay=0.02,
        clip=1.0,
    ),
    "digits": Recipe(
        batch=64,
        lr=2e-4,
        budget=9_600,
        snapshot=9_600,
        ramp=9_600,
        optimizer="adamw",
        betas=(0.9, 0.96),
        weight_decay=0.02,
        ema_decay=0.99,
        clip=1.0,
    ),
}

# fmt: off
IMAGENET256 = {
    "reference": "imagenet256", "vae": "xAR/pretrained/kl16.ckpt", "synthetic": 750_000, "snapshot": 1_000_000,
}
PRESETS = {  # fid: the paper's, of the base and of Neon. readme: the bases' best values, steps of B and L swapped
    "xar_b": Preset(
        **IMAGENET256, network="xar_base", base="checkpoints/xAR-B.pth",
        released="checkpoints/Neon_xARB_imagenet256.pth",
        made_with={"cfg": 2.7, "flow_steps": 40}, recipe="xar_base", micro_batch=32,
        sampling={"cfg": 3.8, "flow_steps": 40}, batch_size=64, readme={"cfg": 2.7, "flow_steps": 50},
        w="0,1,1.2,1.4,1.6,1.8,2,2.2,2.4,2.6,2.8,3", grid="cfg=2.7,3,3.2,3.4,3.6,3.8,4,4.2,4.4,4.6,5",
        fid=(1.72, 1.31), best_w=1.4, rows=("xAR-B", "xAR-B + Neon"),
    ),
    "xar_l": Preset(
        **IMAGENET256, network="xar_large", base="checkpoints/xAR-L.pth",
        released="checkpoints/Neon_xARL_imagenet256.pth",
        made_with={"cfg": 2.3, "flow_steps": 50}, recipe="xar_large", micro_batch=32,
        sampling={"cfg": 2.7, "flow_steps": 50}, batch_size=64, readme={"cfg": 2.3, "flow_steps": 40},
        w="0,0.8,1,1.2,1.4,1.6,1.8,2,2.2,2.4,2.6,2.8,3", grid="cfg=2.3,2.5,2.7,2.9,3.1,3.3,3.6,5",
        fid=(1.28, 1.02), best_w=1.6, rows=("xAR-L", "xAR-L + Neon"),
    ),
}
# fmt: on
