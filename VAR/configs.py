"""Named networks, recipes and presets. One Config describes a transformer and its VQVAE."""

import json
from dataclasses import dataclass

from neon.family import Preset, Recipe


@dataclass(frozen=True)
class Config:
    """sides[k] is the side of the square code map of scale k; the last is the side of the latent."""

    sides: tuple[int, ...]
    depth: int
    width: int
    heads: int
    classes: int = 1000
    shared_adaln: bool = False
    l2_norm: bool = True
    drop_path: float = 0.0
    label_drop: float = 0.1
    # the VQVAE
    vocab: int = 4096
    code_channels: int = 32
    image_channels: int = 3
    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    groups: int = 32

    @classmethod
    def from_json(cls, text: str) -> "Config":
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(text).items()})

    @property
    def tokens(self) -> int:
        return sum(side**2 for side in self.sides)

    @property
    def image_side(self) -> int:
        return self.sides[-1] * 2 ** (len(self.multipliers) - 1)


def _of_depth(depth: int, sides: tuple[int, ...], **options) -> Config:
    """The released models' scaling rule."""
    return Config(sides, depth, width=64 * depth, heads=depth, drop_path=0.1 * depth / 24, **options)


CONFIGS = {
    "d16_256": _of_depth(16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "d36_512": _of_depth(36, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), shared_adaln=True),
    # 8×8 grey digits
    "digits": Config(
        (1, 2, 4),
        depth=4,
        width=64,
        heads=4,
        classes=10,
        drop_path=0.1,
        vocab=128,
        code_channels=4,
        image_channels=1,
        channels=8,
        multipliers=(1, 2),
        groups=4,
    ),
    # 28×28 grey clothes
    "fashion": Config(
        (1, 2, 4, 7),
        depth=4,
        width=128,
        heads=4,
        classes=10,
        drop_path=0.1,
        vocab=256,
        code_channels=8,
        image_channels=1,
        channels=16,
        multipliers=(1, 2, 2),
        groups=4,
    ),
    "fashion_gpu": Config(
        (1, 2, 3, 5, 7),
        depth=8,
        width=384,
        heads=6,
        classes=10,
        drop_path=0.1,
        vocab=1024,
        code_channels=8,
        image_channels=1,
        channels=32,
        multipliers=(1, 2, 4),
        groups=8,
    ),
    # 64×64 images, for tests
    "tiny": Config((1, 2, 3, 4), 3, 64, 4, classes=10, label_drop=0.0, vocab=64, code_channels=8, channels=32),
}

# The learning rate rises over the whole run and never reaches a plateau. No weight decay (--twd of the original has no
# effect), no average.
FINETUNE = {
    "optimizer": "adamw",
    "betas": (0.9, 0.95),
    "clip": 2.0,
    "precision": "float16",
    "tf32": True,
    "loss": {"enlarge": 1.125},
}

TUNED = {"optimizer": "adamw", "betas": (0.9, 0.95), "clip": 2.0}
CLOTHES = {**TUNED, "anneal": "linear", "weight_decay": 0.05}

RECIPES = {
    "d16_256": Recipe(**FINETUNE, batch=768, lr=1e-5, budget=7_500_000, snapshot=250_000, ramp=7_500_000),
    "d36_512": Recipe(**FINETUNE, batch=24, lr=1e-6, budget=3_001_000, snapshot=200_000, ramp=3_001_000),
    "digits_base": Recipe(
        batch=64,
        lr=2e-3,
        budget=38_400,
        snapshot=38_400,
        ramp=6_400,
        anneal="linear",
        optimizer="adamw",
        betas=(0.9, 0.95),
        weight_decay=0.05,
        clip=2.0,
    ),
    "digits": Recipe(
        batch=64,
        lr=5e-5,
        budget=6_400,
        snapshot=6_400,
        ramp=6_400,
        optimizer="adamw",
        betas=(0.9, 0.95),
        clip=2.0,
    ),
    "fashion_base": Recipe(**CLOTHES, batch=64, lr=1e-3, budget=150_016, snapshot=150_016, ramp=12_800),
    "fashion": Recipe(**TUNED, batch=64, lr=5e-5, budget=12_800, snapshot=6_400, ramp=6_400),
    "fashion_gpu_base": Recipe(**CLOTHES, batch=256, lr=5e-4, budget=4_000_000, snapshot=4_000_000, ramp=200_000),
    "fashion_gpu": Recipe(**TUNED, batch=256, lr=2e-5, budget=102_400, snapshot=25_600, ramp=25_600),
}

# The released generator of S uses no autocast, its evaluation does.
COMMON = {"vae": "checkpoints/vae_ch160v4096z32.pth", "precision": "float32"}
# fmt: off
PRESETS = {  # fid: the paper's, of the base and of Neon
    "var_d16": Preset(
        **COMMON, network="d16_256", base="checkpoints/var_d16.pth",
        released="checkpoints/Neon_VARd16_imagenet256.pth", reference="imagenet256",
        synthetic=750_000, made_with={"cfg": 1.25}, recipe="d16_256", micro_batch=32,
        sampling={"cfg": 2.9, "top_k": 900, "top_p": 0.95}, batch_size=64,
        w="0,0.1,0.4,0.7,1,1.3,1.6,2", grid="cfg=1.25,1.35,1.5,2,2.5,2.7,2.9,3.1,3.5,4",
        snapshot=1_000_000, fid=(3.30, 2.01), best_w=1.0, rows=("VAR-d16", "VAR-d16 + Neon"),
    ),
    "var_d36": Preset(
        **COMMON, network="d36_512", base="checkpoints/var_d36.pth",
        released="checkpoints/Neon_VARd36_imagenet512.pth", reference="imagenet512",
        synthetic=90_000, made_with={"cfg": 2.0}, recipe="d36_512", micro_batch=3,
        sampling={"cfg": 3.2, "top_k": 900, "top_p": 0.95}, batch_size=32, w="0:2:0.2",
        grid="cfg=2,2.4,2.8,3.2,3.6,4,4.4,4.5", snapshot=600_000,
        fid=(2.63, 1.70), best_w=0.6, rows=("VAR-d36-s", "VAR-d36-s + Neon"),
    ),
}
# fmt: on
