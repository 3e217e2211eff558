"""Non-leaking augmentation (Karras et al. 2022, App. F.2): random geometry, and labels of it for the network."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

# The sym6 wavelet's low-pass filter: images are warped at twice their resolution, between this filter and its mirror.
LOWPASS = [
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263748278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
]
MARGIN = len(LOWPASS) // 4  # in pixels of the image
SCALE_STD = 0.2  # of log2
ANISO_STD = 0.2  # of log2
TRANSLATE_STD = 0.125  # of the image's size


class Draws(NamedTuple):
    """All randomness of one batch of N images, in the order drawn. A transform happens where its gate is below p."""

    xflip: torch.Tensor  # (N, 1, 1, 1) 0 or 1, ungated
    xflip_gate: torch.Tensor  # (N, 1, 1, 1)
    yflip: torch.Tensor
    yflip_gate: torch.Tensor
    scale: torch.Tensor  # (N,) normal
    scale_gate: torch.Tensor  # (N,)
    rotate: torch.Tensor  # (N,) uniform in [0, 1)
    rotate_gate: torch.Tensor
    aniso: torch.Tensor  # (N,) normal
    aniso_angle: torch.Tensor  # (N,) uniform
    aniso_gate: torch.Tensor
    aniso_angle_gate: torch.Tensor  # below 1/2 keeps the angle
    translate: torch.Tensor  # (2, N) normal
    translate_gate: torch.Tensor  # (1, N)


def augment(images: torch.Tensor, generator: torch.Generator, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Randomly flipped, scaled, rotated, stretched and shifted images, and what was done to them.

    images: (N, C, H, W) float → images of that shape and their augmentation labels, (N, 9) float32.
    p: probability of each transform (horizontal flips: always 1/2). The generator's device is where draws are made.
    """
    return apply(images, draw(len(images), generator), p)


def draw(n: int, generator: torch.Generator) -> Draws:
    """The randomness for n images; the order is that of EDM's training runs."""
    options = {"generator": generator, "device": generator.device}

    def coin():
        return torch.randint(2, (n, 1, 1, 1), **options)

    def uniform(*shape):
        return torch.rand(shape, **options)

    def normal(*shape):
        return torch.randn(shape, **options)

    return Draws(
        *(coin(), uniform(n, 1, 1, 1)),
        *(coin(), uniform(n, 1, 1, 1)),
        *(normal(n), uniform(n)),
        *(uniform(n), uniform(n)),
        *(normal(n), uniform(n), uniform(n), uniform(n)),
        *(normal(2, n), uniform(1, n)),
    )


def apply(images: torch.Tensor, draws: Draws, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The augmentation that the draws describe; see `augment`."""
    chosen = plan(draws, p, images.shape[2:])
    return transform(images, chosen), chosen.labels.to(images.device)


class Plan(NamedTuple):
    """What to do with n images, a row each, on the CPU: it is a few numbers per image."""

    xflip: torch.Tensor  # (n, 1, 1, 1) bool
    yflip: torch.Tensor
    to_source: torch.Tensor  # (n, 3, 3): sends an output pixel to where it comes from, in pixels from the centre
    margins: torch.Tensor  # (n, 4) int64, pixels by which to reflect the borders: left, top, right, bottom
    labels: torch.Tensor  # (n, 9) float32, what the network is given


def plan(draws: Draws, p: float, size: Sequence[int]) -> Plan:
    """From random numbers to transforms of images of that (height, width).

    Margins are common to all images, and each image depends slightly on them: they are those of the whole step,
    however it is divided.
    """
    d = Draws(*(value.cpu() for value in draws))
    height, width = size
    n = len(d.scale)
    xflip = d.xflip * (d.xflip_gate < 1e8 * p)  # EDM asks for these 1e8 times as often as for the rest
    yflip = d.yflip * (d.yflip_gate < p)
    scale = d.scale * (d.scale_gate < p)
    angle = (2 * d.rotate - 1) * math.pi * (d.rotate_gate < p)
    aniso = d.aniso * (d.aniso_gate < p)
    aniso_angle = (2 * d.aniso_angle - 1) * math.pi * (d.aniso_angle_gate < 0.5)
    shift_x, shift_y = d.translate * (d.translate_gate < p)

    shrink = torch.exp2(-SCALE_STD * scale)
    stretch = torch.exp2(ANISO_STD * aniso)
    to_source = (
        scaling(shrink, shrink)
        @ rotation(angle)
        @ (rotation(-aniso_angle) @ scaling(1 / stretch, stretch) @ rotation(aniso_angle))
        @ translation(-TRANSLATE_STD * width * shift_x, -TRANSLATE_STD * height * shift_y)
    )
    labels = [
        *(xflip.flatten(), yflip.flatten(), scale),
        *(angle.cos() - 1, angle.sin()),
        *(aniso * aniso_angle.cos(), aniso * aniso_angle.sin()),
        *(shift_x, shift_y),
    ]
    margins = torch.tensor(reflected(to_source, height, width)).expand(n, 4)
    return Plan(xflip == 1, yflip == 1, to_source, margins, torch.stack(labels, dim=1))


def reflected(to_source: torch.Tensor, height: int, width: int) -> tuple[int, ...]:
    """Margins (left, top, right, bottom) that hold every corner's source in every image, and the filters' reach."""
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, cx, cx, -cx], [-cy, -cy, cy, cy], [1, 1, 1, 1]])
    x, y, _ = (to_source @ corners).unbind(1)
    reach = torch.stack([-x, -y, x, y]).flatten(1).amax(1).tolist()
    return tuple(math.ceil(min(max(r + 2 * MARGIN - c, 0), 2 * c)) for r, c in zip(reach, [cx, cy, cx, cy]))


def transform(images: torch.Tensor, chosen: Plan) -> torch.Tensor:
    """Flip and warp images (N, C, H, W) as planned; all but the pixels stays on the CPU."""
    images = torch.where(chosen.xflip.to(images.device), images.flip(3), images)
    images = torch.where(chosen.yflip.to(images.device), images.flip(2), images)
    return warp(images, chosen.to_source, chosen.margins[0].tolist())


def warp(images: torch.Tensor, to_source: torch.Tensor, margins: Sequence[int]) -> torch.Tensor:
    """Resample images at the places that `to_source`, (N, 3, 3) on the CPU, sends their pixels to.

    Images are reflected at their borders by these margins.
    """
    n, channels, height, width = images.shape
    left, top, right, bottom = margins
    images = F.pad(images, [left, right, top, bottom], mode="reflect")
    to_source = translation((left - right) / 2, (top - bottom) / 2) @ to_source

    # Upsample: spread the pixels out, then filter.
    taps = torch.tensor(LOWPASS, device=images.device)
    along_x, along_y = taps.view(1, 1, 1, -1), taps.view(1, 1, -1, 1)
    pad = len(LOWPASS) // 2 - 1
    images = images.flatten(0, 1).unsqueeze(1)  # every channel by itself
    images = F.conv_transpose2d(images, along_x, stride=(1, 2), padding=(0, pad))
    images = F.conv_transpose2d(images, along_y, stride=(2, 1), padding=(pad, 0))
    images = images.unflatten(0, (n, channels)).squeeze(2)
    to_source = scaling(2, 2) @ to_source @ scaling(0.5, 0.5)
    to_source = translation(-0.5, -0.5) @ to_source @ translation(0.5, 0.5)

    # Warp, onto a grid with a margin for the last filter; its coordinates run over [-1, 1].
    rows, columns = 2 * (height + 2 * MARGIN), 2 * (width + 2 * MARGIN)
    to_source = scaling(2 / images.shape[3], 2 / images.shape[2]) @ to_source @ scaling(columns / 2, rows / 2)
    theta = to_source[:, :2].to(images.device)
    grid = F.affine_grid(theta, [n, channels, rows, columns], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Downsample: filter, keep every second pixel, drop the margin.
    images = images.flatten(0, 1).unsqueeze(1)
    images = F.conv2d(images, along_x, stride=(1, 2), padding=(0, pad))[:, :, :, MARGIN:-MARGIN]
    images = F.conv2d(images, along_y, stride=(2, 1), padding=(pad, 0))[:, :, MARGIN:-MARGIN]
    return images.unflatten(0, (n, channels)).squeeze(2)


# Maps of the plane as matrices on (x, y, 1): (N, 3, 3) from N parameters, (3, 3) from numbers.


def matrix(*entries: torch.Tensor | float) -> torch.Tensor:
    entries = torch.broadcast_tensors(*(torch.as_tensor(entry, dtype=torch.float32) for entry in entries))
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def scaling(x, y) -> torch.Tensor:
    return matrix(x, 0, 0, 0, y, 0, 0, 0, 1)


def translation(x, y) -> torch.Tensor:
    return matrix(1, 0, x, 0, 1, y, 0, 0, 1)


def rotation(angle: torch.Tensor) -> torch.Tensor:
    cos, sin = angle.cos(), angle.sin()
    return matrix(cos, -sin, 0, sin, cos, 0, 0, 0, 1)
