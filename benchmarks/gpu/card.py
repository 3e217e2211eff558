"""All that needs CUDA, in one class, and the class that stands for it where there is none: the same methods.

No other file of this package names torch.cuda, so a rehearsal on the CPU runs the same lines as a card.
"""

import gc
import os
import platform
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from neon import NeonError


class Card:
    """The first CUDA device. Raises NeonError if there is none."""

    kind = "cuda"

    def __init__(self):
        if not torch.cuda.is_available():
            raise NeonError(
                "no CUDA device here, so nothing is measured; --rehearse runs the same measurements on the CPU, tiny"
            )
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    @property
    def count(self) -> int:
        """How many cards there are."""
        return torch.cuda.device_count()

    def facts(self) -> dict[str, object]:
        """Of the card and its driver, JSON values."""
        about = torch.cuda.get_device_properties(self.device)
        return {
            "memory_gib": round(about.total_memory / 2**30, 1),
            "capability": f"{about.major}.{about.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }

    def synchronize(self) -> None:
        """Return when all work that was queued is done."""
        torch.cuda.synchronize(self.device)

    def check(self) -> None:
        """Raise whatever the card says if it no longer computes, as after an illegal access."""
        torch.zeros(1, device=self.device).add_(1).item()

    def clear(self) -> None:
        """Give back the memory of what is no longer used, and count the peak from here."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """Largest memory of tensors since `clear`."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory that the card can copy from and to by itself."""
        return tensor.pin_memory()

    def capture(self, function: Callable[[], object]) -> tuple[object, Callable[[], None]]:
        """A CUDA graph of function(), which reads tensors that stay where they are.

        Returns its outputs and a function that computes them again, in place.
        """
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels and allocate before the capture
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
        return outputs, graph.replay

    def compile_options(self) -> dict[str, object]:
        """For torch.compile."""
        return {}


class StandIn(Card):
    """The CPU in a rehearsal."""

    kind = "cpu"

    def __init__(self):
        self.device = torch.device("cpu")

    @property
    def name(self) -> str:
        return "CPU (rehearsal)"

    @property
    def count(self) -> int:
        """Two, so that processes exchange something."""
        return 2

    def facts(self) -> dict[str, object]:
        return {"memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}

    def synchronize(self) -> None:
        pass

    def check(self) -> None:
        pass

    def clear(self) -> None:
        gc.collect()

    def peak_gib(self) -> float:
        """Of this process so far: a CPU's cannot be counted from a point in time."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def capture(self, function: Callable[[], object]) -> tuple[object, Callable[[], None]]:
        """No graph: the function runs again, and its outputs are copied to where they were."""
        outputs = function()

        def replay() -> None:
            for kept, new in zip(tree_leaves(outputs), tree_leaves(function())):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)

        return outputs, replay

    def compile_options(self) -> dict[str, object]:
        """Traced as on a card, but no code is generated, which takes minutes on one core."""
        return {"backend": "eager"}


def _driver() -> str:
    """Version of the driver as nvidia-smi prints it; '' without the program."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""


def host() -> dict[str, object]:
    """Of the machine around the card."""
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, float32 products and convolutions may use TensorFloat-32, or may not. It has no effect on a CPU."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


class Graphed:
    """A network's forward whose calls are replayed from graphs, one for every set of shapes and of other arguments.

    For networks whose output depends on their arguments alone and whose arguments keep their shapes.
    """

    def __init__(self, forward: Callable, card: Card):
        self.forward, self.card, self.graphs = forward, card, {}

    def __call__(self, *args, **kwargs):
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        if key not in self.graphs:
            self.graphs[key] = self._capture(args, kwargs)
        inputs, outputs, replay = self.graphs[key]
        for kept, new in zip(inputs, tensors):
            kept.copy_(new)
        replay()
        return tree_map_only(torch.Tensor, torch.clone, outputs)  # the next replay writes over them

    def _capture(self, args, kwargs):
        # Numbers that a caller keeps on the CPU, such as times, become inputs on the card, which a replay reads again.
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(self.card.device, copy=True), (args, kwargs))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # casts belong to the graph: a cache would be freed before a replay
        try:
            outputs, replay = self.card.capture(lambda: self.forward(*args, **kwargs))
        finally:
            torch.set_autocast_cache_enabled(cached)
        return inputs, outputs, replay
