"""Work next to sampling: on a GPU, features of one batch are computed while the next one is sampled."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Aside:
    """A second queue of a GPU; on other devices all is done at once, in the same order."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after(self, *read: torch.Tensor) -> Iterator[None]:
        """What is queued inside runs after all that was queued before, and later work does not wait for it.

        read: tensors of before, which are not freed until it is done with them.
        """
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield
        for tensor in read:
            tensor.record_stream(self.stream)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the host's memory, whose values are there after `wait`. Called inside of `after`."""
        if self.stream is None:
            return tensor.cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Until all of it is done."""
        if self.stream is not None:
            self.stream.synchronize()
