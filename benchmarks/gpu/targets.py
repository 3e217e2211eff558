"""Which networks are measured, at which sizes, and how they are made: with random weights, without any file."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from neon.family import FAMILIES, Family, get_family
from neon.precision import network as of_network
from neon.weights import network as recorded


class Target(NamedTuple):
    """A network with the options that the project runs it with."""

    name: str  # of the preset
    family: Family
    network: str
    batch: int  # images per forward pass in sampling
    sampling: Mapping[str, object]  # all options of the sampler
    recipe: str
    micro_batch: int  # images per forward pass in training


def presets() -> list[Target]:
    """A target for every network of the presets; of a family without presets, its network for digits."""
    found = []
    for family in map(get_family, FAMILIES):
        rows = {}
        for name, row in family.presets.items():
            rows.setdefault(row.network, (name, row))
        found += [
            Target(
                name, family, row.network, row.batch_size, options_of(family, row.sampling), row.recipe, row.micro_batch
            )
            for name, row in rows.values()
        ]
        if not rows:
            found.append(_digits(family, 64, {}))
    return found


# Options of a rehearsal that are not the family's defaults: few steps.
FEW = {
    "edm": {"num_steps": 2},
    "flow": {"solver": "euler", "num_steps": 2},
    "var": {"top_k": 20, "top_p": 0.9},
    "xar": {"flow_steps": 2},
    "imm": {"num_steps": 1},
    "diffusers": {"num_inference_steps": 2},
}


LONGER = {"edm": {"num_steps": 5}, "flow": {"solver": "dopri5"}}  # whose steps are not all timed


def rehearsed() -> list[Target]:
    """The network for digits of every family, two images at a time."""
    return [_digits(family, 2, (FEW | LONGER)[family.name]) for family in map(get_family, FAMILIES)]


def _digits(family: Family, batch: int, sampling: Mapping[str, object]) -> Target:
    micro_batch = 4 if batch == 2 else batch  # a group of IMM's loss
    return Target(f"{family.name}_digits", family, "digits", batch, options_of(family, sampling), "digits", micro_batch)


def options_of(family: Family, given: Mapping[str, object]) -> dict[str, object]:
    """All fields of Sampling: the given ones and defaults."""
    return {field.name: field.default for field in dataclasses.fields(family.Sampling)} | dict(given)


def build(family: Family, network: str, device: torch.device | str, vae: Mapping = {}, **options) -> nn.Module:
    """A model of random weights, the same at each call on one kind of device, in eval mode, its autoencoder included.

    vae: constructor options of the autoencoder that are changed. options: as of family.create. It is made on the
    device, for the largest networks take a minute on a CPU; not pipelines, whose schedulers stay on the CPU.
    """
    torch.manual_seed(0)
    with torch.device("cpu" if family.name == "diffusers" else device):
        if family.name in AROUND:
            model = family.hollow(network, **options)
            AROUND[family.name](family, model, vae)
        else:
            model = family.create(network, device=device, **options)
    return model.to(device).eval().requires_grad_(False)


def _var(family: Family, model: nn.Module, vae: Mapping) -> None:
    model.config = dataclasses.replace(model.config, **vae)
    model.transformer, model.vqvae = type(model.transformer)(model.config), type(model.vqvae)(model.config)


def _xar(family: Family, model: nn.Module, vae: Mapping) -> None:
    model.transformer = family.new_transformer(model.config)
    made = model.config["vae"]
    model.vae = type(model.vae)(model.transformer.channels, **({**made, **vae} if made else {}))


def _imm(family: Family, model: nn.Module, vae: Mapping) -> None:
    from imm.autoencoder import RELEASED

    model.net = recorded.build(type(model.net), model.net.init_kwargs)
    if model.vae:
        model.vae.kl = type(model.vae.kl)(**{**RELEASED, **vae})


AROUND = {"var": _var, "xar": _xar, "imm": _imm}  # whose `create` reads the file of an autoencoder


def compute_in(family: Family, model: nn.Module, precision: str) -> None:
    """As the family's `load` with that precision."""
    if family.name == "edm":
        model.dtype = getattr(torch, of_network(precision))
    else:
        model.precision = precision
