"""What distinguishes one VAR from another. One Config describes the transformer and its VQVAE."""

from dataclasses import dataclass


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
        vocab=128,
        code_channels=4,
        image_channels=1,
        channels=8,
        multipliers=(1, 2),
        groups=4,
    ),
    # 64×64 images, for tests
    "tiny": Config((1, 2, 3, 4), 3, 64, 4, classes=10, label_drop=0.0, vocab=64, code_channels=8, channels=32),
}
