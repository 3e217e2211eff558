"""Named networks, recipes and presets: paper size, 28×28 clothes, and mini size for 8×8 grey digits."""

from neon.family import Preset, Recipe

# Constructor arguments of UNet.
NETWORKS = {
    "cifar10": {
        "dim": [3, 32, 32],
        "num_channels": 128,
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 2, 2],
        "attention_resolutions": [16],
        "num_head_channels": 64,
        "dropout": 0.1,
    },
    "digits": {
        "dim": [1, 8, 8],
        "num_channels": 16,
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_classes": 10,
    },
    "fashion": {
        "dim": [1, 28, 28],
        "num_channels": 16,
        "num_res_blocks": 1,
        "channel_mult": [1, 2, 2],
        "num_classes": 10,
    },
    "fashion_gpu": {
        "dim": [1, 28, 28],
        "num_channels": 64,
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 2],
        "attention_resolutions": [14],
        "num_classes": 10,
    },
}

# As the public checkpoints were trained, except the ramp, which a fine-tune of this length would hardly leave.
CIFAR10 = {
    "batch": 128,
    "lr": 2e-4,
    "budget": 2_000_000,
    "snapshot": 250_000,
    "clip": 1.0,
    "ema_decay": 0.9999,
}

RECIPES = {
    "cifar10_icfm": Recipe(**CIFAR10, loss={"flip": True}),
    "cifar10_otcfm": Recipe(**CIFAR10, loss={"flip": True, "coupling": "ot"}),
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
    "digits": Recipe(
        batch=64,
        lr=5e-5,
        budget=12_800,
        snapshot=6_400,
        betas=(0.9, 0.99),
        ema_decay=0.99,
    ),
    "fashion_base": Recipe(
        batch=16,
        lr=2e-3,
        budget=128_000,
        snapshot=128_000,
        ramp=6_400,
        anneal="linear",
        betas=(0.9, 0.99),
        ema_decay=0.998,
    ),
    "fashion": Recipe(batch=64, lr=5e-5, budget=12_800, snapshot=6_400, betas=(0.9, 0.99), ema_decay=0.99),
    "fashion_gpu_base": Recipe(
        batch=256, lr=1e-3, budget=4_000_000, snapshot=4_000_000, ramp=100_000, anneal="linear", ema_decay=0.9995
    ),
    "fashion_gpu": Recipe(batch=256, lr=5e-5, budget=102_400, snapshot=25_600, ema_decay=0.99),
}

# fmt: off
PRESETS = {  # fid: the paper's, of the base and of Neon
    "flow_cifar10": Preset(
        network="cifar10", base="checkpoints/otcfm_cifar10_weights_step_400000.pt", reference="cifar10",
        synthetic=25_000, made_with={"solver": "dopri5"}, recipe="cifar10_otcfm", micro_batch=16,
        sampling={"solver": "dopri5"}, batch_size=256, w="0:3:0.25",
        fid=(3.50, 2.32), rows=("Flow Matching", "Flow + Neon"), kind="uncond",
    ),
}
# fmt: on
