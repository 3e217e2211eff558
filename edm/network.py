"""The EDM denoiser: a DDPM++ U-Net (Song et al. 2021) behind the preconditioning of Karras et al. 2022.

Tensor names, shapes and order equal those of the public CIFAR-10 and FFHQ checkpoints.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from neon import NeonError
from neon.dropout import dropout

# What the public checkpoints leave alone and this network does not vary.
FIXED_OPTIONS = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
    "channel_mult_noise": 1,
    "label_dropout": 0,
}


class EDMPrecond(nn.Module):
    """The denoiser D(x; σ): E[image | x], where x = image + σ·noise (Karras et al. 2022, Table 1 and Eq. 7).

    The arguments are those stored in the public checkpoints; `model_kwargs` go to `SongUNet`.
    `dtype` is the U-Net's compute dtype and may be assigned: float16 takes effect on CUDA only (use_fp16
    selects it), bfloat16 anywhere. Parameters, preconditioning and embeddings stay in float32.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "SongUNet",
        **model_kwargs,
    ):
        super().__init__()
        if model_type != "SongUNet":
            raise NeonError(f"EDM network {model_type!r} is not supported, only 'SongUNet'")
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.dtype = torch.float16 if use_fp16 else torch.float32
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data
        self.model = SongUNet(img_resolution, img_channels, img_channels, label_dim, **model_kwargs)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
    ) -> torch.Tensor:
        """The denoised images, (N, C, H, W) float32.

        x: (N, C, H, W), any float dtype. sigma: scalar, or N values in any shape; a scalar is embedded once
        for the whole batch. class_labels: (N, label_dim) one-hot; without them, zeros. augment_labels: (N, 9).
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).view(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = x.new_zeros(1, self.label_dim)
        else:
            class_labels = class_labels.float().view(-1, self.label_dim)
        dtype = torch.float32 if force_fp32 or (self.dtype == torch.float16 and not x.is_cuda) else self.dtype

        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        c_noise = sigma.flatten().log() / 4
        out = self.model((c_in * x).to(dtype), c_noise, class_labels, augment_labels)
        return torch.addcmul(c_skip * x, c_out, out.float())


class SongUNet(nn.Module):
    """DDPM++ U-Net. Each level of the encoder halves the resolution; the decoder mirrors it.

    attn_resolutions: the resolutions whose blocks attend; the deepest level always does once.
    augment_dim: width of the augmentation labels, 0 for none. Raises NeonError for options it does not vary.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        **fixed,
    ):
        super().__init__()
        for name, value in fixed.items():
            value = list(value) if isinstance(value, tuple) else value
            if name not in FIXED_OPTIONS:
                raise NeonError(f"SongUNet has no option {name!r}")
            if value != FIXED_OPTIONS[name]:
                raise NeonError(f"SongUNet with {name}={value!r} is not supported, only {FIXED_OPTIONS[name]!r}")

        self.model_channels = model_channels
        emb_channels = model_channels * channel_mult_emb
        self.map_label = nn.Linear(label_dim, model_channels) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        def block(cin, cout, **options):
            return UNetBlock(cin, cout, emb_channels, dropout=dropout, **options)

        self.enc = nn.ModuleDict()
        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        channels = model_channels
        skips = []  # channels of every encoder output
        for level, (res, cout) in enumerate(levels):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, channels, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, down=True)
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(channels, cout, attention=res in attn_resolutions)
                channels = cout
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (res, cout) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(channels + skips.pop(), cout, attention=attention)
                channels = cout
        self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(channels)
        self.dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, out_channels, 3)

        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                # Layers that end a residual branch start near zero, so that each block starts near the identity.
                ends_branch = name.endswith(("conv1", "proj", "aux_conv"))
                gain = 1e-5 if ends_branch else math.sqrt(0.2) if name.endswith("qkv") else 1.0
                nn.init.xavier_uniform_(layer.weight, gain)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: (N, C, H, W), whose dtype is computed in and returned; noise_labels: (N,) or (1,); labels: (N, dim)."""
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        *blocks, (_, norm), (_, conv) = self.dec.items()
        for name, block in blocks:
            if "block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return conv(F.silu(norm(x)))

    def embed(self, noise_labels, class_labels=None, augment_labels=None) -> torch.Tensor:
        """What blocks know of noise level, class and augmentation: (N, emb_channels) float32; one row if all agree."""
        emb = positional_embedding(noise_labels, self.model_channels)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(class_labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class UNetBlock(nn.Module):
    """Two convolutions around a shift by the embedding, then optionally one-head self-attention; both residual."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        dropout: float = 0,
    ):
        super().__init__()
        self.dropout = dropout
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        resized = in_channels != out_channels or up or down
        self.skip = Conv2d(in_channels, out_channels, 1, up=up, down=down) if resized else None
        self.norm2 = GroupNorm(out_channels) if attention else None
        self.qkv = Conv2d(out_channels, 3 * out_channels, 1) if attention else None
        self.proj = Conv2d(out_channels, out_channels, 1) if attention else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x: (N, C, H, W); emb: (N or 1, emb_channels) float32. In place only on what no gradient needs again."""
        h = self.conv0(F.silu(self.norm0(x), inplace=True))
        h.add_(self.affine(emb).to(x.dtype)[:, :, None, None])
        h = dropout(F.silu(self.norm1(h), inplace=True), self.dropout, self.training)
        h = self.conv1(h).add_(x if self.skip is None else self.skip(x)).mul_(math.sqrt(0.5))
        if self.norm2 is not None:
            h = (h + self.proj(self.attend(self.norm2(h)))).mul_(math.sqrt(0.5))
        return h

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Softmax(QᵀK/√C) V over the H·W positions, (N, C, H, W). Scores and softmax accumulate in float32."""
        # The checkpoints interleave q, k, v along the output channels (3c + j). Regrouping the small weights
        # makes each of them contiguous per position in channels_last, as fast attention kernels need.
        weight, bias = (
            p.to(x.dtype).unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1) for p in (self.qkv.weight, self.qkv.bias)
        )
        q, k, v = F.conv2d(x, weight, bias).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=3)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class Conv2d(nn.Conv2d):
    """Same-size convolution of odd kernel, after doubling (nearest neighbour) or halving (2x2 mean) the resolution.

    These are what the stored filter [1, 1] amounts to; the filter is kept as the buffer the checkpoints have.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, up: bool = False, down: bool = False):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.up, self.down = up, down
        if up or down:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pointwise = self.kernel_size == (1, 1)
        if self.down:
            x = F.avg_pool2d(x, 2)
        if self.up and not pointwise:
            x = double(x)
        x = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)
        # A pointwise kernel gives the same on repeated pixels, so the repetition can wait.
        return double(x) if self.up and pointwise else x


def double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class GroupNorm(nn.GroupNorm):
    """Groups of at least 4 channels, at most 32 groups."""

    def __init__(self, channels: int):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def positional_embedding(values: torch.Tensor, channels: int) -> torch.Tensor:
    """[sin, cos] of the values at geometric frequencies from 1 to 1e-4; (N,) float32 → (N, channels)."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device) / (half - 1)
    phases = values[:, None] * (1e-4**steps)
    return torch.cat([phases.sin(), phases.cos()], dim=1)


EDMPrecond.inner = SongUNet  # takes what a checkpoint records as model_kwargs
