"""One process or many under torchrun: the same calls."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from neon import NeonError
from neon.sampling import drawn_by


@dataclass(frozen=True)
class World:
    """This process's place among all: its rank, their number, its device, how exact float32 products are there, and the
    kind of its random streams (neon.sampling.new_streams)."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tf32: bool = False
    streams: str = "torch"

    def identity(self) -> dict[str, object]:
        """What decides numbers here: CPUs and GPUs have other random streams, TensorFloat-32 has fewer digits."""
        streams = {} if self.streams == "torch" else {"streams": self.streams}
        return {"device": self.device.type, "tf32": self.tf32} | streams

    def gather(self, value) -> list:
        """`value` of every rank, in rank order, on every rank. Any picklable object; tensors should be on the CPU."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def map(self, function: Callable, items: Sequence) -> list:
        """[function(item) for item in items] on every rank; each rank computes its share."""
        own = [function(item) for item in items[self.rank :: self.size]]
        parts = self.gather(own)
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over ranks, in place, in buckets of about 64 MB."""
        if self.size == 1:
            return
        bucket, room = [], 2**26
        for tensor in [*tensors, None]:
            if tensor is None or room <= 0:
                if bucket:
                    flat = torch.cat([t.reshape(-1) for t in bucket])
                    dist.all_reduce(flat)
                    flat /= self.size
                    for t, part in zip(bucket, flat.split([t.numel() for t in bucket])):
                        t.copy_(part.view_as(t))
                bucket, room = [], 2**26
            if tensor is not None:
                bucket.append(tensor)
                room -= tensor.numel() * tensor.element_size()

    def agree(self, problem: str | None, value=None):
        """The first rank's value, on every rank. Raises NeonError on all of them if one has a problem."""
        found = self.gather((problem, value))
        if problem := next((problem for problem, _ in found if problem), None):
            raise NeonError(problem)
        return found[0][1]

    def of_first(self, function: Callable):
        """function() of the first rank, on every rank; a NeonError or OSError that it raises, too, as NeonError."""
        value = problem = None
        if self.rank == 0:
            try:
                value = function()
            except (NeonError, OSError) as error:
                problem = str(error)
        return self.agree(problem, value)

    def in_turn(self, function: Callable):
        """function() on every rank, on those of a host one after the other; a NeonError of one of them on all."""
        place = int(os.environ.get("LOCAL_RANK", self.rank))
        value = None
        for turn in range(max(self.gather(place)) + 1):
            problem = None
            if turn == place:
                try:
                    value = function()
                except NeonError as error:
                    problem = str(error)
            self.agree(problem)
        return value

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def rank() -> int:
    """This process's rank as torchrun sets it in the environment, before any set-up."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def world(
    device: str | None = None, tf32: bool = False, streams: str = "torch", joined: bool = False
) -> Iterator[World]:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or be alone.

    device: 'cuda', 'cpu' or None for the GPU of this local rank if there is one. tf32: allow TensorFloat-32 in float32
    products and convolutions on a GPU; PyTorch allows it in convolutions by default, which moves results by about 1e-3.
    streams: the kind of random streams inside. joined: make a process group of one process, too. Raises NeonError if
    there is no GPU for this process.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        place, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= gpus:
            raise NeonError(f"{gpus} GPUs here, too few for process {place}: start fewer or choose --device cpu")
        device = f"cuda:{place}"
        torch.cuda.set_device(device)
    tf32 = tf32 and device != "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if device == "cpu":
        torch.set_flush_denormal(True)  # zero-initialised layers make denormals, which are several times slower
    size = int(os.environ.get("WORLD_SIZE", 1))
    joined = joined or size > 1
    if joined:
        alone = {} if size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", **alone)
    try:
        with drawn_by(streams):
            yield World(rank(), size, torch.device(device), tf32, streams)
        if joined:
            dist.barrier()
    finally:
        torch.set_flush_denormal(False)
        if joined:
            dist.destroy_process_group()
