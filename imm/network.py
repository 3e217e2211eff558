"""The IMM network: a diffusion transformer (DiT, arXiv 2212.09748) and the preconditioner that makes a jump of it.

Time runs from t = 0 (data y) to t = 1 (noise): x_t = (1 - t) y + t n with n ~ N(0, sigma_data²). The
preconditioned network f(x, t, s) jumps from x_t to x_s at once. Tensors inside are named as in the
original checkpoints.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from neon import NeonError
from nets.embedding import sinusoids


def logsnr(t: torch.Tensor) -> torch.Tensor:
    """log(alpha²/sigma²) of time t in [0, 1]; computed in float64, returned in t's dtype."""
    t64 = t.double()
    return (2 * ((1 - t64).log() - t64.log())).to(t.dtype)


def time_to_nt(t: torch.Tensor) -> torch.Tensor:
    """Noise-to-signal ratio t / (1 - t), from [0, 1] to [0, inf]."""
    return torch.exp(-logsnr(t) / 2)


def nt_to_time(nt: torch.Tensor) -> torch.Tensor:
    """Inverse of `time_to_nt`; inf maps to 1. Computed in float64, returned in nt's dtype."""
    nt64 = nt.double()
    return (nt64 / (1 + nt64)).nan_to_num(nan=1.0).to(nt.dtype)


def timestep_embedding(t: torch.Tensor, width: int = 256) -> torch.Tensor:
    """Sinusoids of t (N,): [cos, sin], (N, width) in t's dtype, computed in float64."""
    return sinusoids(t, width, torch.float64).to(t.dtype)


def position_table(hidden: int, grid: int) -> torch.Tensor:
    """Fixed 2-D sinusoids of a grid x grid image in row-major order, (grid², hidden) float64.

    The first half of the channels is the column, the second the row; each is [sin, cos].
    """
    k = torch.arange(hidden // 4, dtype=torch.float64)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * 10000 ** (-k / (hidden // 4))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm of tokens (N, T, D) whose gain and offset are (N, D) functions of the condition."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch: int, hidden: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t):
        return self.mlp(timestep_embedding(t))


class LabelEmbedder(nn.Module):
    """One-hot rows (N, classes) → (N, hidden). An all-zero row is 'no class' and has its own, last entry."""

    def __init__(self, classes: int, hidden: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, hidden)

    def forward(self, rows):
        return self.embedding_table(torch.cat([rows, 1 - rows.sum(1, keepdim=True)], dim=1).argmax(1))


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, mlp_ratio: float):
        super().__init__()
        inner = int(hidden * mlp_ratio)
        self.attn = Attention(hidden, heads)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(hidden, inner), act=nn.GELU(approximate="tanh"), fc2=nn.Linear(inner, hidden))
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated_norm(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(hidden, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


class DiT(nn.Module):
    """Transformer over patches, conditioned on a time t, a second time s and a class.

    The position table is a parameter, as in the checkpoints, but asks for no gradient: whoever trains decides.
    """

    def __init__(
        self,
        img_resolution: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        in_channels: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        s_embed: bool = True,
    ):
        super().__init__()
        self.patch, self.grid = patch_size, img_resolution // patch_size
        table = position_table(hidden_size, self.grid).float()
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.s_embedder = TimestepEmbedder(hidden_size) if s_embed else None
        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self._initialise()

    @torch.no_grad()
    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        embedders = [self.t_embedder] if self.s_embedder is None else [self.t_embedder, self.s_embedder]
        for weight in [self.y_embedder.embedding_table.weight, *(e.mlp[i].weight for e in embedders for i in (0, 2))]:
            nn.init.normal_(weight, std=0.02)
        # Every block starts as the identity and the output as zero.
        for linear in [self.final_layer.linear, *(m.adaLN_modulation[1] for m in [*self.blocks, self.final_layer])]:
            nn.init.zeros_(linear.weight)

    def forward(self, x, t, s, class_labels):
        """x (N, C, R, R); t, s (N,) or (1,), s may be None; class_labels (N, classes) or (1, classes) → like x."""
        c = self.t_embedder(t) + self.y_embedder(class_labels)
        if self.s_embedder is not None and s is not None:
            c = c + self.s_embedder(s)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        # Each token holds its patch as (row, column, channel).
        x = x.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.grid, self.grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def euler_fm(x, out, t, s, d):
    """`out` is a velocity (in units of d): one Euler step."""
    return x - (t - s) * d * out


def identity(x, out, t, s, d):
    """`out` is the data: x_s from it and the noise that it leaves (a DDIM step)."""
    return ((1 - s) - (1 - t) * s / t) * out + s / t * x


def simple_edm(x, out, t, s, d):
    """EDM's combination of skip and output; equals x at s = t."""
    power = (1 - t) ** 2 + t**2
    return ((1 - t) * (1 - s) + t * s) * x / power - ((1 - s) * t - (1 - t) * s) * d * out / power.sqrt()


MODELS = {"DiT": {}, "DiT_XL_2": {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16}}
JUMPS = {"euler_fm": euler_fm, "identity": identity, "simple_edm": simple_edm}
# Options of the original code that its ImageNet models leave at these values; no others are implemented.
FIXED = {"noise_schedule": "fm", "qk_norm": False, "skip": False, "temb_mult": 1, "dropout": 0, "class_dropout_prob": 0}


class IMMPrecond(nn.Module):
    """f(x, t, s): jump from x at time t to time s <= t.

    `options` are those of DiT (in_channels must equal img_channels) and those of FIXED. f_type is how x and the
    network's output combine, temb_type what the second time input is: 'stride' t - s or 'identity' s.
    mixed_precision is recorded in checkpoints and has no effect: the transformer computes in the caller's autocast,
    or in float32 without one. Raises NeonError for options this implementation lacks.
    """

    inner = DiT  # takes the options

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        *,
        model_type: str = "DiT_XL_2",
        mixed_precision: object = None,
        f_type: str = "euler_fm",
        temb_type: str = "stride",
        time_scale: float = 1000,
        sigma_data: float = 0.5,
        eps: float = 0.0,
        T: float = 0.994,
        **options,
    ):
        super().__init__()
        for name, value, known in [
            ("model_type", model_type, MODELS),
            ("f_type", f_type, JUMPS),
            ("temb_type", temb_type, ("stride", "identity")),
            *((name, options.pop(name), (value,)) for name, value in FIXED.items() if name in options),
        ]:
            if value not in known:
                raise NeonError(f"IMM option {name}={value!r} is not implemented (known: {', '.join(map(str, known))})")
        options = MODELS[model_type] | options
        if options.get("in_channels", 4) != img_channels:
            raise NeonError(f"IMM with img_channels={img_channels} needs in_channels={img_channels}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.jump, self.temb_type = JUMPS[f_type], temb_type
        self.time_scale, self.sigma_data, self.eps, self.T = time_scale, sigma_data, eps, T
        self.model = DiT(img_resolution, **options)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        cfg: float | None = None,
    ) -> torch.Tensor:
        """x (N, C, R, R) at times t, jumped to times s; t and s hold one value or N.

        class_labels: (N, label_dim) one-hot rows, a zero row or None for no class. cfg: guidance scale, 1 is
        conditional; None runs one pass with the labels as they are. The network computes in float32 (or in the
        caller's autocast) whatever the dtypes given; the result has the promoted dtype of x, t, s.
        Raises NeonError for guidance without labels.
        """
        n = len(x)
        t, s = (time.reshape(-1, 1, 1, 1).expand(n, 1, 1, 1) for time in (t, s))
        if cfg is None:
            rows = torch.zeros(1, self.label_dim, device=x.device) if class_labels is None else class_labels
            out = self._transform(x, t, s, rows).to(t.dtype)
        else:
            if class_labels is None or class_labels.shape != (n, self.label_dim) or self.label_dim == 0:
                raise NeonError(f"guidance (cfg={cfg}) needs one class label per image")
            rows = torch.cat([torch.zeros_like(class_labels), class_labels])
            twice = self._transform(x.repeat(2, 1, 1, 1), t.repeat(2, 1, 1, 1), s.repeat(2, 1, 1, 1), rows)
            uncond, cond = twice.to(t.dtype).chunk(2)
            out = uncond + cfg * (cond - uncond)
        return self.jump(x, out, t, s, self.sigma_data)

    def _transform(self, x, t, s, rows):
        x, t, s = x.float(), t.float(), s.float()
        c_in = 1 / (self.sigma_data * ((1 - t) ** 2 + t**2).sqrt())
        second = t - s if self.temb_type == "stride" else s
        times = (self.time_scale * time.flatten() for time in (t, second))
        return self.model(c_in * x, *times, rows.float())
