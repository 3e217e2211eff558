"""Where a network lies while it is trained: whole, on every process, which average their gradients.

neon.shard has the other way, with the same methods. All processes call all of them.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from neon import state
from neon.distributed import World
from neon.family import Family
from neon.recompute import recompute_in
from neon.state import STATE, Run
from neon.weights.checkpoint import save_safetensors


class Whole:
    """A model, the part of it that is trained, and that part's parameters by name."""

    def __init__(
        self,
        family: Family,
        make: Callable[[torch.device], torch.nn.Module],
        world: World,
        recompute: bool = False,
    ):
        """make(device): the model. recompute: do not keep what the backward pass needs of a block, compute it twice."""
        self.world = world
        self.model = make(world.device)
        self.network = family.weights(self.model).train().requires_grad_(True)
        self.metadata = family.metadata(self.model)
        if recompute:
            recompute_in(self.network)
        self.params = dict(self.network.named_parameters())

    def running(self) -> AbstractContextManager:
        """Around a run."""
        return nullcontext()

    def passes(self, own: int) -> int:
        """How often a process that has `own` micro-batches must run the network in a step."""
        return own

    def begin_pass(self, last: bool) -> None:
        """Before each of them."""

    def average(self, grads: list[torch.Tensor]) -> None:
        """Replace gradients by their means over processes, in place."""
        self.world.average(grads)

    def local(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What this process has of them, to change in place, number by number."""
        return tensors

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """A number that was computed of tensors which lie as the network does, on every process."""
        return tensor

    def not_finite(self) -> str | None:
        """The name of a parameter with a number that is not finite; None if there is none."""
        return next((name for name, p in self.params.items() if not p.isfinite().all()), None)

    def write(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """One .safetensors file of a state dict with some tensors replaced, and of any buffers, atomically."""
        if self.world.rank == 0:
            save_safetensors(path, self.network.state_dict() | dict(tensors), metadata)

    def restore(self, out: Path, identity: dict, run: Run) -> int:
        """Load the state in `out` in place; returns the images seen so far, 0 without a state. Raises NeonError."""
        return state.restore(out / STATE, identity, run)

    def save(self, out: Path, identity: dict, images: int, run: Run, ended: bool) -> None:
        """Write the state after so many images; ended: nothing will resume from it, so it needs no tensors."""
        if self.world.rank == 0:
            tensors = None if ended else state.tensors_of(run)
            state.save(out / STATE, identity, images, tensors, run.scaler.state_dict())

    def settle(self) -> None:
        """Return when what was saved is on the disk. Raises NeonError if it could not be written."""
