"""A generator of your own for `neon`: flow matching with a small MLP on 8×8 grey digits. See docs/own-family.md."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from neon import NeonError
from neon.family import Recipe, check_images, named, option
from neon.sampling import from_uint8, start, to_uint8
from neon.weights import network as recorded

networks = {"digits": {"shape": [1, 8, 8], "width": 128, "classes": 10}}
recipes = {
    "base": Recipe(batch=64, lr=2e-3, budget=64_000, snapshot=64_000, anneal="linear", ema_decay=0.99),
    "tune": Recipe(batch=64, lr=1e-4, budget=6_400, snapshot=3_200, ema_decay=0.9),
}


class Velocity(nn.Module):
    """v(x, t, label): where an image moves at time t, from noise (t = 0) to data (t = 1)."""

    def __init__(self, shape, width, classes):
        super().__init__()
        self.shape, self.classes, inputs = tuple(shape), classes, math.prod(shape) + 1
        self.label = nn.Embedding(classes, inputs)
        layers = nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, inputs - 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t, labels):
        return self.layers(torch.cat([x.flatten(1), t[:, None]], dim=1) + self.label(labels)).reshape(x.shape)


@dataclass(frozen=True)
class Sampling:
    """Each field is an option on the command line, and can be searched: --grid num_steps=2:8."""

    num_steps: int = option(4, "Euler steps from noise to image")


def create(config: str, *, device, **options):
    return recorded.build(Velocity, {**named(networks, config, "network"), **options}).to(device).eval()


def load(path, *, device, precision: str = "float32", **options):
    if precision != "float32":
        raise NeonError(f"my_family samples in float32, not in {precision}")
    return recorded.load(path, Velocity, "my_family", device, **options)[0]


def metadata(model) -> dict[str, str]:
    return recorded.metadata(model)  # the constructor's arguments, which load reads from the checkpoint


def labels(model, seeds):
    return start(seeds, model.shape, model.classes)[1]  # one per seed, from the seed's own random numbers


def sample(model, seeds, labels, *, num_steps: int):
    x, labels, _ = start(seeds, model.shape, model.classes, labels, next(model.parameters()).device)
    for step in range(num_steps):
        x = x + model(x, x.new_full((len(x),), step / num_steps), labels) / num_steps
    return to_uint8(x)


def check(model, shape, labels):
    check_images(shape, labels, model.shape, model.classes)


def draw(model, n: int, generator, *, images):
    here = {"generator": generator, "device": generator.device}
    return torch.randn(n, *model.shape, **here), torch.rand(n, **here)


def loss(model, images, labels, draws):
    x, noise, t = from_uint8(images), *(part.to(images.device) for part in draws)
    along = t[:, None, None, None]
    return (model(noise + along * (x - noise), t, labels) - (x - noise)).square().mean()
