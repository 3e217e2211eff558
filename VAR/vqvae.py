"""VAR's tokenizer: an image becomes K square maps of codes, each a correction to the sum of the coarser ones."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.precision import autocast
from nets.autoencoder import Decoder, Encoder
from VAR.configs import Config

PHIS = 4


def phi_table(scales: int) -> list[int]:
    """Which of the four φ each scale uses: the nearest of four ticks in [0, 1].

    Ties (scales 2 and 7 of ten) are decided by float64 rounding; the released weights depend on it.
    """
    ticks = np.linspace(1 / 12, 11 / 12, PHIS)
    return [int(np.abs(ticks - k / max(scales - 1, 1)).argmin()) for k in range(scales)]


class Quantizer(nn.Module):
    """Residual quantization over scales. Sides p_0 … p_{K−1} = P; latents f, f̂ are (B, c, P, P) float32.

    Codes travel as ids (B, L) int64: the scales one after another, each map row by row.
    """

    def __init__(self, sides: Sequence[int], vocab: int, channels: int):
        super().__init__()
        self.sides, self.table = tuple(sides), phi_table(len(sides))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(sides), vocab))  # training statistics, never read
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(PHIS)]
        self.quant_resi = nn.ModuleDict({"qresi_ls": nn.ModuleList(convolutions)})
        self.embedding = nn.Embedding(vocab, channels)
        nn.init.uniform_(self.embedding.weight, -1 / vocab, 1 / vocab)  # small: a wide start leaves codes unused

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the code closest to each vector; (…, c) → (…) int64."""
        codes = self.embedding.weight
        return (codes.square().sum(1) - 2 * z @ codes.T).argmin(-1)  # ‖z‖² is the same for every code

    def refine(self, vectors: Tensor, scale: int) -> Tensor:
        """The correction that code vectors (B, p_k², c) of one scale make to f̂; (B, c, P, P)."""
        side, full = self.sides[scale], self.sides[-1]
        h = vectors.mT.unflatten(2, (side, side))
        h = F.interpolate(h, size=(full, full), mode="bicubic")
        return 0.5 * h + 0.5 * self.quant_resi["qresi_ls"][self.table[scale]](h)

    def tokens(self, f: Tensor, scale: int) -> Tensor:
        """f averaged down to the positions of one scale; (B, p_k², c). Windows overlap where sides do not divide."""
        return F.adaptive_avg_pool2d(f, self.sides[scale]).flatten(2).mT

    def stages(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Quantize f: after each scale k its ids (B, p_k²) and f̂ so far. f̂ has gradients to codes and φ, not to f."""
        rest, f_hat = f.detach(), torch.zeros_like(f)
        for k in range(len(self.sides)):
            ids = self.nearest(self.tokens(rest, k))
            h = self.refine(self.embedding(ids), k)
            f_hat, rest = f_hat + h, rest - h.detach()
            yield ids, f_hat

    def partial_sums(self, ids: Tensor) -> Iterator[Tensor]:
        """f̂ after each scale, from the ids of all scales."""
        f_hat = 0
        for k, codes in enumerate(ids.split([side**2 for side in self.sides], dim=1)):
            f_hat = f_hat + self.refine(self.embedding(codes), k)
            yield f_hat

    @torch.no_grad()
    def teacher_input(self, ids: Tensor) -> Tensor:
        """What the transformer sees when the ids are known: for each scale but the first, f̂ of the scales before it.

        (B, L−1, c) float32.
        """
        with autocast(ids.device, "float32"):
            sums = zip(range(1, len(self.sides)), self.partial_sums(ids))
            return torch.cat([self.tokens(f_hat, k) for k, f_hat in sums], dim=1)


class VQVAE(nn.Module):
    """Images (B, C, S, S) float in [−1, 1] ↔ code ids (B, L); S = P · 2^(levels − 1).

    Initial weights are PyTorch's own, from the global generator.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = config.code_channels
        shape = (config.channels, config.multipliers, config.groups)
        self.encoder = Encoder(config.image_channels, c, *shape)
        self.decoder = Decoder(c, config.image_channels, *shape)
        self.quantize = Quantizer(config.sides, config.vocab, c)
        self.quant_conv = nn.Conv2d(c, c, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(c, c, 3, padding=1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, L) int64. In float32 whatever the autocast: half precision would change codes."""
        with autocast(images.device, "float32"):
            f = self.quant_conv(self.encoder(images))
            return torch.cat([ids for ids, _ in self.quantize.stages(f)], dim=1)

    def decode_latent(self, f_hat: Tensor) -> Tensor:
        """Unclamped image of f̂."""
        return self.decoder(self.post_quant_conv(f_hat))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Image in [−1, 1] of the ids of all scales."""
        *_, f_hat = self.quantize.partial_sums(ids)
        return self.decode_latent(f_hat).clamp(-1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """For training: unclamped reconstruction, and the quantizer's loss (a scalar, averaged over the scales).

        The codes move to the features and, at a quarter of the weight, the features to the codes (van den Oord et
        al. 2017); the decoder's gradient passes straight through the quantizer.
        """
        f = self.quant_conv(self.encoder(images))
        f_hats = [f_hat for _, f_hat in self.quantize.stages(f)]
        losses = [F.mse_loss(f_hat, f.detach()) + 0.25 * F.mse_loss(f, f_hat.detach()) for f_hat in f_hats]
        return self.decode_latent(f + (f_hats[-1] - f).detach()), torch.stack(losses).mean()
