"""Guidance by a second network: at every call out = out_r + w (out_r − out_s), Neon's formula for outputs, not weights.

With a self-trained copy as θ_s this is SIMS (arXiv 2408.16333); with an earlier checkpoint of the base it is
autoguidance (arXiv 2406.02507), whose scale is 1 + w. It takes two networks at every call of the sampler.
"""

import dataclasses

import torch
from torch import nn

from neon import NeonError
from neon.family import Family
from neon.merge import merge_tensor

NETWORKS = 2  # that sample a guided image


def check_guidable(family: Family) -> None:
    """Raises NeonError if a second network cannot guide the family's sampler."""
    if not family.guidable:
        raise NeonError(
            f"--by guidance: the sampler of {family.name} does more than call the network with a state of its own"
            " choice, so a second network cannot guide it call by call; choose --by merge"
        )


class Guide:
    """Extrapolates the outputs of a network away from those of a second one, which is called with the same arguments.

    w = 0: the outputs stay as they are, and there need be no second network. compiled: the network is, and is not
    called yet.
    """

    def __init__(self, network: nn.Module, compiled: bool = False):
        self.w, self.other = 0.0, None
        hook, self._formula = self._extrapolate, guided_output
        if compiled:  # the networks are compiled, and not again for every w
            hook = torch.compiler.disable(hook, recursive=False)
            self._formula = torch.compiler.disable(guided_output)
        network.register_forward_hook(hook, with_kwargs=True)

    def set(self, w: float, other: nn.Module | None = None) -> None:
        """other: the network to get away from; needed if w is not 0."""
        self.w, self.other = w, other

    def _extrapolate(self, network: nn.Module, args: tuple, kwargs: dict, output):
        return self._formula(output, self.other(*args, **kwargs), self.w) if self.w else output


def guided_output(output, other, w: float):
    """output + w (output − other) of every tensor in what networks return: a tensor, a tuple, a dataclass of diffusers.

    Computed in at least float32, in the dtype of `output`. Raises NeonError for anything else, and if shapes differ.
    """
    if isinstance(output, torch.Tensor):
        if output.shape != other.shape:
            raise NeonError(f"the networks' outputs differ in shape: {tuple(output.shape)} and {tuple(other.shape)}")
        return merge_tensor(output, other, w)
    if output is None:
        return None
    if dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output)]
        parts = {name: guided_output(getattr(output, name), getattr(other, name), w) for name in names}
        return dataclasses.replace(output, **parts)
    if type(output) is tuple:
        return tuple(guided_output(one, two, w) for one, two in zip(output, other, strict=True))
    raise NeonError(f"a network that returns a {type(output).__name__} cannot be guided")
