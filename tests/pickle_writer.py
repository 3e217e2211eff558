"""Writes checkpoints in the structure of EDM's and IMM's `.pkl`, from named tensors, with Python's own pickler.

The original code pickles live modules. Here stand-ins carry the same state: one of a persistent class is pickled
as a call whose argument holds the source text, any other as an ordinary object of a class with the right name.
"""

import importlib
import pickle
import sys
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any
from unittest import mock

import torch

# Class of a module by pattern of its dotted path, the first that fits. Names without a dot are persistent classes.
EDM_CLASSES = {
    "model": "SongUNet",
    "model.enc": "torch.nn.modules.container.ModuleDict",
    "model.dec": "torch.nn.modules.container.ModuleDict",
    "model.map_*": "Linear",
    "*.affine": "Linear",
    "*norm?": "GroupNorm",
    "*_norm": "GroupNorm",
    "*conv": "Conv2d",
    "*.conv?": "Conv2d",
    "*.skip": "Conv2d",
    "*.qkv": "Conv2d",
    "*.proj": "Conv2d",
    "*": "UNetBlock",
}
IMM_CLASSES = {
    "model": "DiT_XL_2",
    "model.blocks": "torch.nn.modules.container.ModuleList",
    "model.blocks.*.attn": "timm.models.vision_transformer.Attention",
    "model.blocks.*.mlp": "timm.layers.mlp.Mlp",
    "model.x_embedder": "timm.layers.patch_embed.PatchEmbed",
    "model.x_embedder.proj": "torch.nn.modules.conv.Conv2d",
    "model.y_embedder": "LabelEmbedder",
    "model.y_embedder.embedding_table": "torch.nn.modules.sparse.Embedding",
    "model.?_embedder": "TimestepEmbedder",
    "model.final_layer": "FinalLayer",
    "*.mlp": "torch.nn.modules.container.Sequential",
    "*.adaLN_modulation": "torch.nn.modules.container.Sequential",
    "model.blocks.*.*": "torch.nn.modules.linear.Linear",
    "model.blocks.*": "DiTBlock",
    "*": "torch.nn.modules.linear.Linear",
}
SOURCE = "raise SystemExit('source text in a checkpoint was executed')\n"


def write_persistent_pickle(
    path,
    root_class: str,
    init_kwargs: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    classes: Mapping[str, str],
    buffers: Collection[str] = ("resample_filter",),
    **entries,
) -> None:
    """Write {'ema': a module tree, **entries}.

    state_dict: in the order of Module.state_dict(); a tensor's whole storage is written, so it should be its own.
    buffers: last parts of the names that are buffers.
    """
    states = {"": module_state(init_kwargs)}
    root = instance(root_class, states[""])
    for name, tensor in state_dict.items():
        *parts, leaf = name.split(".")
        for depth, part in enumerate(parts):
            parent, child = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
            if child not in states:
                states[child] = module_state({})
                class_name = next(value for pattern, value in classes.items() if fnmatchcase(child, pattern))
                states[parent]["_modules"][part] = instance(class_name, states[child])
        own = states[".".join(parts)]
        if leaf in buffers:
            own["_buffers"][leaf] = tensor
        else:
            own["_parameters"][leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    dump({"ema": root, **entries}, path)


def module_state(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The `__dict__` of an empty module that a persistent class made."""
    return {**torch.nn.Module().__dict__, "training": False, "_init_args": (), "_init_kwargs": dict(init_kwargs)}


def instance(class_name: str, state: Any) -> Any:
    """A stand-in for an object, to be pickled as one of class `class_name` with that state."""
    if "." not in class_name:
        return _Persistent(class_name, state)
    thing = object.__new__(named(class_name))
    thing.__dict__ = state
    return thing


def named(path: str) -> Any:
    """What stands for the global of that name: torch's own, or an empty class that nobody else can see."""
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] == "torch":
        return getattr(importlib.import_module(module), name)
    for end in [*(i for i, character in enumerate(module) if character == "."), len(module)]:
        _stand_ins.setdefault(module[:end], ModuleType(module[:end]))
    if not hasattr(_stand_ins[module], name):
        setattr(_stand_ins[module], name, type(name, (), {"__module__": module}))
    return getattr(_stand_ins[module], name)


def dump(content: Any, path) -> None:
    """Pickle as the original writers do: protocol 4, the stand-ins importable meanwhile."""
    with open(path, "wb") as file, mock.patch.dict(sys.modules, _stand_ins):
        pickle.dump(content, file, protocol=4)


class _Persistent:
    def __init__(self, class_name: str, state: Any):
        self.meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}
        self.reconstruct = named("torch_utils.persistence._reconstruct_persistent_obj")

    def __reduce__(self):
        return self.reconstruct, (self.meta,)


_stand_ins: dict[str, ModuleType] = {}
