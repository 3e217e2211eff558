"""The xAR transformer: velocities of noisy cells, each cell knowing the cells before it.

A latent map is cut into square cells in raster order; a sequence holds the positions of one cell after the
other. `to_cells` and `to_map` go back and forth; every table below is in sequence order.
Parameter and buffer names are those of the released checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon import NeonError
from neon.dropout import attention, dropout
from nets.embedding import sinusoids


def to_cells(x: Tensor, cell: int) -> Tensor:
    """Map (B, C, S, S) → sequence (B, S·S, C): cells of side `cell` in raster order, raster order inside each."""
    b, c, side, _ = x.shape
    n = side // cell
    return x.reshape(b, c, n, cell, n, cell).permute(0, 2, 4, 3, 5, 1).reshape(b, side * side, c)


def to_map(x: Tensor, cell: int) -> Tensor:
    """The inverse of `to_cells`: (B, S·S, C) → (B, C, S, S)."""
    b, positions, c = x.shape
    side = round(positions**0.5)
    n = side // cell
    return x.reshape(b, n, n, cell, cell, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, side, side)


def block_mask(cells: int, size: int) -> Tensor:
    """(N, N) float32, N = cells·size, rows are queries: 0 where the key's cell is not after the query's, else -inf."""
    cell = torch.arange(cells * size) // size
    return torch.zeros(()).where(cell[:, None] >= cell, -torch.inf)


def rms(x: Tensor) -> Tensor:
    """x over the root mean square of its last dimension, computed in float32, in x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x) * self.weight


class TimeEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(...) times in [0, 1] → (..., D). Times count in whole thousandths, rounded down."""
        return self.mlp(sinusoids((1000 * t.float()).trunc(), 256))


class Rope(nn.Module):
    """Rotary embedding in two dimensions: the row turns the first half of a head, the column the second."""

    def __init__(self, side: int, cell: int, head: int):
        super().__init__()
        freqs = 10000 ** (-torch.arange(head // 4) / (head // 4))
        row, column = torch.arange(side).expand(side, side).mT, torch.arange(side).expand(side, side)
        positions = to_cells(torch.stack([row, column])[None], cell)[0]  # (N, 2)
        angles = (positions[..., None] * freqs).flatten(1).repeat_interleave(2, 1)  # (N, head)
        self.register_buffer("freqs", freqs)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Rotate x (B, H, N, head), whose first position is number `start` of the sequence."""
        cos, sin = (table[start : start + x.shape[2]] for table in (self.freqs_cos, self.freqs_sin))
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)  # each pair by a quarter
        return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, side: int, cell: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rope = Rope(side, cell, dim // heads)

    def forward(self, x: Tensor, mask: Tensor | None, past: list[Tensor] | None) -> Tensor:
        """x (B, n, P, D), mask (N, start+N) or None, past [] or [keys, values] each (B, H, start, d) → like x.

        Appends the keys and values of all cells of x but the last to `past`.
        """
        b, n, size, _ = x.shape
        start = past[0].shape[2] if past else 0
        q, k, v = self.qkv(x).view(b, n * size, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.rope(q, start), self.rope(k, start)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if past is not None and n > 1:
            past[:] = k[:, :, :-size].clone(), v[:, :, :-size].clone()  # clones let go of the last cell's memory
        mask = None if mask is None else mask.to(q.dtype)
        y = attention(q, k, v, mask, self.dropout, self.training)
        y = self.proj(y.transpose(1, 2).reshape(x.shape))
        return dropout(y, self.dropout, self.training)


class GatedMLP(nn.Module):
    """The checkpoints' SwiGLU, whose gate is in fact GELU."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = dropout(F.gelu(self.fc1_g(x)) * self.fc1_x(x), self.dropout, self.training)
        return dropout(self.fc2(h), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, side: int = 16, cell: int = 8, dropout: float = 0.0):
        super().__init__()
        self.attn = Attention(dim, heads, side, cell, dropout)
        self.mlp = GatedMLP(dim, int(dim * 4 * 2 / 3), dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, past: list[Tensor] | None) -> Tensor:
        """x (B, n, P, D): n cells of P positions; condition (B, n, D): one vector per cell; the rest: see Attention."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(condition)[:, :, None].chunk(6, -1)
        x = x + gate1 * self.attn(rms(x) * (1 + scale1) + shift1, mask, past)
        return x + gate2 * self.mlp(rms(x) * (1 + scale2) + shift2)


class XAR(nn.Module):
    """Two stacks of blocks in a row (depth each) over the cells of a latent map.

    dim, depth, heads: see xAR.configs; dim/heads a multiple of 4. side: of the latent map; cell: of a cell, a proper
    divisor of side. channels: of the latent. classes: label `classes` means none. dropout: of attention weights,
    projections and MLPs. Raises NeonError for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 8,
        heads: int = 12,
        side: int = 16,
        cell: int = 8,
        channels: int = 16,
        classes: int = 1000,
        dropout: float = 0.1,
    ):
        super().__init__()
        if dim % (4 * heads):
            raise NeonError(f"xAR: width {dim} does not split into {heads} heads of a multiple of 4")
        if side % cell or side == cell:
            raise NeonError(f"xAR: a map of side {side} does not split into two or more cells of side {cell} each way")
        self.side, self.cell, self.channels, self.classes = side, cell, channels, classes
        self.cells, self.size = (side // cell) ** 2, cell**2  # cells in a map, positions in a cell
        positions = side**2

        self.class_emb = nn.Embedding(classes + 1, dim)
        self.time_embed = TimeEmbed(dim)
        self.z_proj = nn.Linear(channels, dim)
        self.z_proj_ln = RMSNorm(dim)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, positions, dim))
        self.encoder_blocks = nn.ModuleList(Block(dim, heads, side, cell, dropout) for _ in range(depth))
        self.encoder_norm = RMSNorm(dim)
        self.decoder_embed = nn.Linear(dim, dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, positions, dim))
        self.decoder_blocks = nn.ModuleList(Block(dim, heads, side, cell, dropout) for _ in range(depth))
        self.decoder_norm = RMSNorm(dim)
        self.pred = nn.Linear(dim, channels)
        self.register_buffer("mask", block_mask(self.cells, self.size)[None, None])

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_emb.weight, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(table, std=0.02)

    def new_cache(self) -> list[list[Tensor]]:
        """For `forward`: one empty list per block."""
        return [[] for _ in (*self.encoder_blocks, *self.decoder_blocks)]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, cache: list[list[Tensor]] | None = None) -> Tensor:
        """Velocity (noise minus data) of every position of x.

        x (B, n·size, channels) float32: n cells in sequence order; t (B, n) float: noise level of each cell, 0 is
        data and 1 is noise; labels (B,) int64 in [0, classes]. A cell sees itself and the cells before it.
        With a cache the cells of x follow those in it, which they see as well; afterwards all cells of x but the last
        have joined it. → (B, n·size, channels), in the autocast dtype if there is one.
        """
        cells = t.shape[1]
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        stop = start + x.shape[1]
        mask = self.mask[0, 0, start:stop, :stop] if cells > 1 else None  # a single cell sees all there is
        condition = self.class_emb(labels)[:, None] + self.time_embed(t)
        blocks = (*self.encoder_blocks, *self.decoder_blocks)
        pasts = cache or [None] * len(blocks)

        h = self.z_proj_ln(self.z_proj(x) + self.encoder_pos_embed_learned[:, start:stop])
        h = h.unflatten(1, (cells, self.size))
        depth = len(self.encoder_blocks)
        for block, past in zip(blocks[:depth], pasts[:depth]):
            h = block(h, condition, mask, past)
        h = self.decoder_embed(self.encoder_norm(h))
        h = h + self.decoder_pos_embed_learned[:, start:stop].unflatten(1, (cells, self.size))
        for block, past in zip(blocks[depth:], pasts[depth:]):
            h = block(h, condition, mask, past)
        return self.pred(self.decoder_norm(h)).flatten(1, 2)
