"""A network that is trained through adapters of low rank (LoRA, Hu et al. 2022) on its attention, itself frozen."""

import torch
import torch.nn.functional as F
from torch import nn

from neon import NeonError

ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class LowRank(nn.Module):
    """What one linear layer's output gains: x (…, in) → x·downᵀ·upᵀ (…, out). It starts at 0."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
        self.down = nn.Parameter(down.to(layer.weight.device))
        self.up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.down), self.up)

    def product(self) -> torch.Tensor:
        """What the layer's weight gains, (out, in)."""
        return self.up @ self.down


class Adapted(nn.Module):
    """The adapters of a network, which act in it from now on. Their state dict is that of the network, with each weight
    plus its product: what is trained is small, and what is stored is a θ_s like any other."""

    def __init__(self, network: nn.Module, rank: int):
        """Raises NeonError if the network has no attention of diffusers' kind."""
        super().__init__()
        layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.endswith(ADAPTED)}
        if not layers:
            raise NeonError("an adapter needs attention layers with to_q, to_k and to_v; this network has none")
        self._network = (network.requires_grad_(False),)  # a tuple: no part of this module
        generator = torch.Generator().manual_seed(0)
        self._names = [f"{name}.weight" for name in layers]
        self.parts = nn.ModuleList(LowRank(layer, rank, generator) for layer in layers.values())
        for layer, part in zip(layers.values(), self.parts):
            layer.register_forward_hook(lambda _, inputs, output, part=part: output + part(inputs[0]))

    def train(self, mode: bool = True):
        self._network[0].train(mode)
        return super().train(mode)

    @torch.no_grad()
    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        gained = {name: part.product() for name, part in zip(self._names, self.parts)}
        state = self._network[0].state_dict(*args, **kwargs)
        return {name: tensor + gained[name] if name in gained else tensor for name, tensor in state.items()}
