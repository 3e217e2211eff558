"""The clock that the benchmarks share."""

import time

import torch


def seconds(run, device: torch.device) -> float:
    """Wall-clock time of run(), including work that it left queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
