"""Training objectives. Codes come from the frozen VQVAE: ids = vqvae.encode(images)."""

import torch.nn.functional as F
from torch import Tensor

from VAR.transformer import NOTHING_DROPPED, Draws, Transformer
from VAR.vqvae import VQVAE, Quantizer


def code_loss(
    transformer: Transformer,
    quantizer: Quantizer,
    ids: Tensor,
    labels: Tensor,
    draws: Draws = NOTHING_DROPPED,
) -> Tensor:
    """Mean cross-entropy over all codes of all scales; ids (B, L), labels (B,) int64 → float32 scalar."""
    logits = transformer(labels, quantizer.teacher_input(ids), draws)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def vqvae_loss(vqvae: VQVAE, images: Tensor) -> Tensor:
    """Squared reconstruction error plus the quantizer's loss; images (B, C, S, S) float in [−1, 1] → scalar."""
    reconstruction, quantizer_loss = vqvae(images)
    return F.mse_loss(reconstruction, images) + quantizer_loss
