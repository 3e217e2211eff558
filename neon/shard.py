"""A network in shards: each process holds a part of every parameter, gradient, moment and average (PyTorch's FSDP2).

A block's parameters are gathered when it runs, while the block before it computes, and let go after it; its gradients
are summed and scattered while the block after it computes. The numbers are those of neon.whole up to the order of
floating-point sums.

The state is written by all processes at once, while they train (torch.distributed.checkpoint), as .safetensors files:
the pickles that PyTorch writes by default could run code where they are read. A file that is written last, and at once,
names the folder, so a kill at any moment leaves a whole state.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    async_save,
    load,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from neon import NeonError, state
from neon.distributed import World
from neon.family import FAMILIES, Family
from neon.files import filling, reading, reason_of, sync_folder
from neon.recompute import HELD, blocks_of, is_called, recompute_in
from neon.state import SHARDS, STATE, Run, spec_of, specs_of
from neon.weights.checkpoint import check_metadata, open_weights, write_safetensors
from neon.whole import Whole

FILE = 2**30  # bytes of a file of the state; a process makes one in memory before it is written
FOLDER = re.compile(r"state-\d{9,18}")
Spec = tuple[torch.dtype, tuple[int, ...]]


class Sharded(Whole):
    """The methods of neon.whole.Whole, for a network in shards."""

    def __init__(
        self,
        family: Family,
        make: Callable[[torch.device], torch.nn.Module],
        world: World,
        recompute: bool = False,
    ):
        """The processes of a host make the model one after the other, on the CPU, so that it is there once.

        Raises NeonError if its network is not one that can be sharded.
        """
        self.world, self.mesh = world, self.mesh_of(world)
        self.group = dist.new_group(backend="gloo")  # for what is written while training communicates
        self.writing: Thread | None = None
        self.problem = ""  # of what was written
        self.known = family.name in FAMILIES
        self.model = world.in_turn(lambda: self._made(family, make(torch.device("cpu")), recompute))
        self.network = family.weights(self.model)
        self.params = dict(self.network.named_parameters())

    def mesh_of(self, world: World) -> DeviceMesh:
        """The processes over which parameters are sharded: all."""
        return init_device_mesh(world.device.type, (world.size,))

    def _made(self, family: Family, model: torch.nn.Module, recompute: bool) -> torch.nn.Module:
        network = family.weights(model).train().requires_grad_(True)
        if not is_called(network):
            raise NeonError("--shard needs a network that is trained as a whole; adapters are small: leave it out")
        self.metadata = family.metadata(model)  # before the network's class gets another name
        self.held = sum(p.nbytes for p in network.parameters()) <= HELD  # gathered and reduced once in a step
        if recompute:
            recompute_in(network)
        shard(network, self.mesh, self.held)
        return model.to(self.world.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would hold every block in half precision, on every process
        try:
            with warnings.catch_warnings():
                if self.known:  # these networks change no output of a block in place
                    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
                yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            if self.writing:
                self.writing.join()

    def passes(self, own: int) -> int:
        return max(self.world.gather(own))  # the processes gather a block together

    def begin_pass(self, last: bool) -> None:
        if self.held:
            self.network.set_requires_gradient_sync(last)
            self.network.set_reshard_after_backward(last)

    def average(self, grads: list[torch.Tensor]) -> None:
        """Nothing is left to do after the backward pass."""

    def local(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.detach().to_local() for tensor in tensors]

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        return whole(tensor)

    def not_finite(self) -> str | None:
        bad = {name for name, p in self.params.items() if not p.detach().to_local().isfinite().all()}
        bad = set().union(*self.world.gather(bad))
        return next((name for name in self.params if name in bad), None)

    def write(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Tensor by tensor: a process never has more than one of them whole."""
        found = self.network.state_dict() | dict(tensors)
        pairs = ((name, whole(tensor)) for name, tensor in found.items())
        specs = {name: spec_of(tensor) for name, tensor in found.items()}
        problem = None
        try:
            if self.world.rank == 0:
                write_safetensors(path, specs, pairs, metadata)
        except (NeonError, OSError) as error:
            problem = str(error)
        for _ in pairs:  # takes part in what the first process gathers
            pass
        self.world.agree(problem)

    def save(self, out: Path, identity: dict, images: int, run: Run, ended: bool) -> None:
        """Returns as soon as the tensors are copied to the CPU's memory; the rest is done while training goes on."""
        self.settle()
        scaler = run.scaler.state_dict()
        if ended:
            self.world.of_first(lambda: _point(out, identity, images, scaler))
            return
        folder = out / f"state-{images:09d}"
        self.world.of_first(lambda: _make_empty(folder))
        tensors = _tensors_of(run)
        files = _files_of(tensors, self.world.size)
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        written = async_save(tensors, storage_writer=writer, process_group=self.group)
        self.writing = Thread(target=self._commit, args=(written, folder, identity, images, scaler))
        self.writing.start()

    def _commit(self, written, folder: Path, identity: dict, images: int, scaler: dict) -> None:
        """When all processes have written: the first makes this the state."""
        try:
            with filling(folder):
                _result(written)
                if self.world.rank == 0:
                    _point(folder.parent, identity, images, scaler, folder)
        except Exception as error:  # of another thread: `settle` raises it
            self.problem = str(error) if isinstance(error, NeonError) else f"{folder}: {reason_of(error)}"
            if self.world.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def settle(self) -> None:
        if self.writing:
            self.writing.join()
            self.writing = None
            self.world.agree(self.problem)

    def restore(self, out: Path, identity: dict, run: Run) -> int:
        images, folder, names, scaler = self.world.of_first(lambda: _found(out, identity, run))
        if folder:
            self._load(folder, names, run)
            run.scaler.load_state_dict(scaler)
        return images

    def _load(self, folder: Path, names: set[str], run: Run) -> None:
        """names: of the parameters that have moments."""
        steps = torch.zeros(len(run.params))
        moments = {n: [torch.zeros_like(p.detach()) for _ in range(2)] for n, p in run.params.items() if n in names}
        tensors = {f"param/{name}": p.detach() for name, p in run.params.items()}
        tensors |= {f"ema/{name}": tensor for name, tensor in (run.ema or {}).items()}
        tensors |= {f"exp_avg/{name}": pair[0] for name, pair in moments.items()}
        tensors |= {f"exp_avg_sq/{name}": pair[1] for name, pair in moments.items()}
        with reading(folder, "not a readable state"):
            load(
                tensors | {"step": steps},
                storage_reader=HuggingFaceStorageReader(str(folder)),
                process_group=self.group,
            )
        for step, (name, p) in zip(steps, run.params.items()):
            if name in moments:
                first, second = moments[name]
                step = step.clone().to(self.world.device)
                run.optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}


def shard(network: torch.nn.Module, mesh: DeviceMesh, held: bool) -> None:
    """Shard the parameters of a network over the processes of a mesh, in place, on its device.

    held: keep a block's parameters between its forward and its backward pass.
    """
    for p in network.parameters():
        p.data = p.data.contiguous()  # shards are rows; channels_last has none
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=not held)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """On every process; all of them must call."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------- the state


def _tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """Those of neon.state, with all counts of steps in one tensor: 0 for a parameter without moments."""
    tensors = state.tensors_of(run)
    steps = [tensors.pop(f"step/{name}", torch.zeros(())).float().cpu() for name in run.params]
    return {name: tensor.detach() for name, tensor in tensors.items()} | {"step": torch.stack(steps)}


def _files_of(tensors: Mapping[str, torch.Tensor], processes: int) -> dict[str, int]:
    """Tensor → the number of the file that it goes to, from 1."""
    files, filled = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + filled // FILE
        filled += tensor.nbytes // processes
    return files


def _make_empty(folder: Path) -> None:
    if folder.exists():  # a killed run left it
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _result(written) -> None:
    """Wait; raises what the first process that failed has raised."""
    try:
        written.result()
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _point(out: Path, identity: dict, images: int, scaler: dict, folder: Path | None = None) -> None:
    """From now on the state is that in `folder`, or one without tensors; other folders of states are removed."""
    more = {}
    if folder:
        sync_folder(folder)
        record = {"folder": folder.name, "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())}}
        more = {SHARDS: json.dumps(record)}
    state.save(out / STATE, identity, images, None, scaler, **more)
    _remove_others(out, folder)


def _remove_others(out: Path, folder: Path | None) -> None:
    """What cannot be removed now is, after the next state."""
    for other in out.glob("state-*"):
        if other != folder and FOLDER.fullmatch(other.name):
            shutil.rmtree(other, ignore_errors=True)


def _found(out: Path, identity: dict, run: Run) -> tuple[int, Path | None, set[str], dict]:
    """Images seen, folder of the state, parameters that have moments, state of the scaler. Raises NeonError."""
    path = out / STATE
    if not state.is_there(path, identity):
        return 0, None, set(), {}
    with open_weights(path) as pointer:
        images = state.check_images(pointer, identity)
        if len(pointer):
            raise NeonError(f"{out} holds a run without --shard; resume it without --shard")
        if (SHARDS in pointer.metadata) != (0 < images < identity["budget"]):
            raise state.damaged(path, f"{'a' if SHARDS in pointer.metadata else 'no'} folder after {images} images")
        if SHARDS not in pointer.metadata:
            return images, None, set(), {}
        state.check_scaler(pointer, run.scaler)
        folder, files = _record(check_metadata(pointer, SHARDS), path)
        scaler = check_metadata(pointer, "scaler")
    names = check_shards(folder, files, run)
    _remove_others(out, folder)
    return images, folder, names, scaler


def _record(record: Mapping, path: Path) -> tuple[Path, dict[str, int]]:
    """The folder and the sizes of its files. Raises NeonError."""
    folder, files = record.get("folder"), record.get("files")
    if not (isinstance(folder, str) and FOLDER.fullmatch(folder) and isinstance(files, dict) and files):
        raise state.damaged(path, f"its shards are {str(record)[:60]}")
    return path.parent / folder, files


def check_shards(folder: Path, files: Mapping[str, int], run: Run) -> set[str]:
    """The parameters that have moments in a state. Raises NeonError unless its files are those of the record, and hold
    all tensors of this run and nothing else, each row of them once."""
    there = {file.name: file.stat().st_size for file in folder.iterdir()} if folder.is_dir() else {}
    for name in [*files, *there]:
        if there.get(name) != files.get(name):
            raise state.damaged(folder, f"{name[:60]} has {there.get(name, 'no')} bytes, not {files.get(name, 'no')}")
    chunks: dict[str, list] = {}
    for name in files:
        for tensor, *chunk in _chunks(folder / name):
            chunks.setdefault(tensor, []).append(chunk)
    moments = {name for name in run.params if f"exp_avg/{name}" in chunks}
    wanted = _specs(run, moments)
    for name in [*wanted, *chunks]:
        if name not in chunks or name not in wanted:
            raise state.damaged(folder, f"{name} is {'missing' if name in wanted else 'not of this network'}")
        dtype, shape = wanted[name]
        if any(found != dtype for found, *_ in chunks[name]) or not _fills(shape, (rest for _, *rest in chunks[name])):
            raise state.damaged(folder, f"the parts of {name} do not make {dtype} {shape}")
    return moments


def _specs(run: Run, moments: set[str]) -> dict[str, Spec]:
    wanted = specs_of(run)
    for slot in ("exp_avg", "exp_avg_sq"):
        wanted |= {f"{slot}/{name}": spec_of(run.params[name]) for name in moments}
    return wanted | {"step": (torch.float32, (len(run.params),))}


def _chunks(path: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...]]]:
    """Name, dtype, first index and shape of each part of a tensor in a file. Raises NeonError."""
    with open_weights(path) as part:
        places = check_metadata(part, "DCP_SHARDING_INFO")  # torch.distributed.checkpoint's name for them
        for name in part:
            place, (dtype, shape) = places.get(name), part.spec(name)
            offsets = place.get("saved_offsets") if isinstance(place, dict) else None
            of_ints = isinstance(offsets, list) and all(type(n) is int for n in offsets)
            if not (of_ints and shape and len(offsets) == len(shape)):
                raise state.damaged(path, f"the place of {name} is {str(offsets)[:60]}")
            yield name, dtype, tuple(offsets), shape


def _fills(shape: tuple[int, ...], chunks: Iterable) -> bool:
    """Do parts, (first index, shape) each, follow each other along the first dimension, from its begin to its end?"""
    end = 0
    for (first, *others), (rows, *rest) in sorted(chunks):
        if first != end or any(others) or tuple(rest) != shape[1:]:
            return False
        end += rows
    return end == shape[0]
