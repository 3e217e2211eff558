"""VAR's transformer: predicts all codes of a scale at once from all coarser scales.

B batch, K scales of p_k² tokens, L tokens in all, C width, V codes, c code channels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.precision import autocast
from VAR.configs import Config

Cache = list[tuple[Tensor, Tensor] | None]  # keys and values of every block


class Draws(NamedTuple):
    """Uniforms in [0, 1) that decide what n images drop in training; None where nothing is dropped."""

    labels: Tensor | None  # (n,)
    branches: Tensor | None  # (n, depth, 2): of every block, attention and feed-forward


NOTHING_DROPPED = Draws(None, None)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def adaptive(width: int, vectors: int) -> nn.Sequential:
    """Condition (B, C) → (B, 1, vectors, C)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width), nn.Unflatten(1, (1, vectors, width)))


class Attention(nn.Module):
    """Multi-head attention; with l2_norm, queries and keys are unit vectors and each head learns its temperature."""

    def __init__(self, width: int, heads: int, l2_norm: bool):
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))  # log of the scale
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None):
        """x (B, n, C) attends to past and itself → (B, n, C), and the keys and values to pass on."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, d) each
        if self.l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=math.log(100)).exp()
            k = F.normalize(k, dim=-1)
            q, k = q.to(v.dtype), k.to(v.dtype)  # autocast normalises in float32 and attends in v's precision
            scale = 1.0
        else:
            scale = 0.25 / math.sqrt(q.shape[-1])
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.proj(y.transpose(1, 2).flatten(2)), (k, v)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition.

    The condition is s (B, C), or with shared AdaLN the projection (B, 1, 6, C) that all blocks share.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        self.attn = Attention(config.width, config.heads, config.l2_norm)
        self.ffn = FeedForward(config.width)
        if not config.shared_adaln:
            self.ada_lin = adaptive(config.width, 6)

    def forward(self, x: Tensor, condition: Tensor, mask=None, past=None, keep=(1, 1)):
        """keep: factors (B, 1, 1) on the two branches. Returns x and the keys and values to pass on."""
        modulation = self.ada_gss + condition if hasattr(self, "ada_gss") else self.ada_lin(condition)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        y, kv = self.attn(layer_norm(x) * (1 + scale1) + shift1, mask, past)
        x = x + (keep[0] * gate1 * y).to(y.dtype)
        y = self.ffn(layer_norm(x) * (1 + scale2) + shift2)
        x = x + (keep[1] * gate2 * y).to(y.dtype)
        return x, kv


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.width
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.tokens, width))
        scale = torch.cat([torch.full((1, side**2), k) for k, side in enumerate(config.sides)], dim=1)
        unseen = scale.unsqueeze(2) < scale.unsqueeze(1)  # a query sees its own scale and the coarser ones
        self.register_buffer("lvl_1L", scale)
        self.register_buffer("attn_bias_for_masking", torch.zeros(unseen.shape).masked_fill(unseen, -math.inf)[None])
        self.word_embed = nn.Linear(config.code_channels, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)  # the last row is "no class"
        self.lvl_embed = nn.Embedding(len(config.sides), width)
        if config.shared_adaln:
            self.shared_ada_lin = adaptive(width, 6)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = nn.ModuleDict({"ada_lin": adaptive(width, 2)})
        self.head = nn.Linear(width, config.vocab)
        self.register_load_state_dict_pre_hook(_integer_levels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None):
        """VAR's initial values. The gates of the residual branches start all but closed."""
        width, depth = self.config.width, self.config.depth

        def normal_(weight):
            nn.init.trunc_normal_(weight, std=math.sqrt(1 / (3 * width)), generator=generator)

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        normal_(self.pos_start)
        normal_(self.pos_1LC)
        self.head.weight.mul_(0.02)
        self.head_nm["ada_lin"][1].weight.mul_(0.5)
        for block in self.blocks:
            block.attn.proj.weight.div_(math.sqrt(2 * depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
            if self.config.shared_adaln:
                block.ada_gss.normal_(std=math.sqrt(1 / width), generator=generator)
                gates, rest = block.ada_gss[:, :, :2], block.ada_gss[:, :, 2:]
            else:
                gates, rest = block.ada_lin[1].weight.split([2 * width, 4 * width])
            gates.mul_(1e-5)
            rest.mul_(0.5)

    def draw(self, n: int, generator: torch.Generator) -> Draws:
        """Random numbers for n images of a training step, on the generator's device."""
        config, here = self.config, {"generator": generator, "device": generator.device}
        labels = torch.rand(n, **here) if config.label_drop else None
        branches = torch.rand(config.depth, 2, n, **here).permute(2, 0, 1) if config.drop_path else None
        return Draws(labels, branches)

    def forward(self, labels: Tensor, inputs: Tensor, draws: Draws = NOTHING_DROPPED) -> Tensor:
        """Logits (B, L, V) float32 of all scales.

        labels: (B,) int64, config.classes for "no class"; inputs: (B, L−1, c), see Quantizer.teacher_input.
        draws: in training, by which labels and branches are dropped at the config's rates.
        """
        if draws.labels is not None:
            dropped = draws.labels.to(labels.device) < self.config.label_drop
            labels = labels.masked_fill(dropped, self.config.classes)
        s = self.class_emb(labels)
        x = self.embed(s, inputs, 0)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # the residual stream too is in half precision
            x = x.to(torch.get_autocast_dtype(x.device.type))
        keep = None
        if draws.branches is not None:
            keep = self.branch_factors(draws.branches.to(x.device))
        return self.logits(x, s, mask=self.attn_bias_for_masking.to(x.dtype), keep=keep)

    def next_scale(self, s: Tensor, inputs: Tensor, scale: int, cache: Cache) -> Tensor:
        """Logits (B, p_k², V) float32 of scale k, given the scales before it in `cache`, which grows by this one.

        s: (B, C), rows of class_emb; inputs: (B, p_k², c), the tokens of f̂ so far (none, (B, 0, c), for k = 0);
        cache: [None] * depth before the first scale.
        """
        first = sum(side**2 for side in self.config.sides[:scale])
        return self.logits(self.embed(s, inputs, first), s, cache=cache)

    def embed(self, s: Tensor, inputs: Tensor, first: int) -> Tensor:
        """Float32 embeddings (B, n, C) of the n tokens from number `first` on; token 0 is s, not one of the inputs."""
        with autocast(s.device, "float32"):
            x = self.word_embed(inputs.float())
            if first == 0:
                x = torch.cat([s.unsqueeze(1) + self.pos_start, x], dim=1)
            position = self.lvl_embed(self.lvl_1L) + self.pos_1LC
            return x + position[:, first : first + x.shape[1]]

    def branch_factors(self, uniform: Tensor) -> Tensor:
        """Drop path, from uniforms (B, depth, 2): 0 or 1/(1−p) for each block and branch, (depth, 2, B, 1, 1).

        p grows linearly over the blocks, from 0 to config.drop_path.
        """
        p = torch.linspace(0, self.config.drop_path, self.config.depth, device=uniform.device)[:, None]
        factors = (uniform >= p) / (1 - p)
        return factors.permute(1, 2, 0)[..., None, None]

    def logits(self, x: Tensor, s: Tensor, mask=None, cache: Cache | None = None, keep: Tensor | None = None) -> Tensor:
        """Embeddings (B, n, C) through all blocks and the head; the condition of the head is s in either variant."""
        condition = self.shared_ada_lin(s) if self.config.shared_adaln else s
        for i, block in enumerate(self.blocks):
            past = cache[i] if cache else None
            x, kv = block(x, condition, mask, past, keep[i] if keep is not None else (1, 1))
            if cache:
                cache[i] = kv
        scale, shift = self.head_nm["ada_lin"](s).unbind(2)
        return self.head(layer_norm(x.float()) * (1 + scale) + shift).float()


def _integer_levels(module, state, prefix, *_):
    """A merged checkpoint of the original code holds lvl_1L as floats."""
    if prefix + "lvl_1L" in state:
        state[prefix + "lvl_1L"] = state[prefix + "lvl_1L"].long()
