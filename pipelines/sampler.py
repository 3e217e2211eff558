"""A pipeline's own sampler, called so that image i depends on seed i and its label alone."""

import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from functools import wraps

import torch
from torch import nn

from neon import Diverged, NeonError
from neon.precision import autocast, decoder, network
from neon.sampling import new_streams, to_uint8
from pipelines.model import Model


@torch.no_grad()
def sample(model: Model, seeds: torch.Tensor, labels: torch.Tensor | None, sampling: Mapping) -> torch.Tensor:
    """One image per seed, uint8 (N, C, H, W). sampling: what the pipeline is called with.

    Raises NeonError for impossible options and for schedulers whose noise is that of a batch; Diverged.
    """
    device = model.device
    call = model.kind.call(labels, len(seeds), model.prompts) | _options(model, sampling)
    generators = new_streams(seeds, device).generators
    before = _states(device)
    with _watched(model.network, len(seeds)):
        images = _images(model, generators, call)
    if any(not torch.equal(a, b) for a, b in zip(before, _states(device))):
        kind = type(model.pipe.scheduler).__name__
        raise NeonError(f"{kind} draws noise for whole batches: image i would not be that of seed i; choose another")
    return to_uint8(images.to(device).movedim(-1, 1) * 2 - 1, nearest=True)


def _images(model: Model, generators: list[torch.Generator], call: Mapping) -> torch.Tensor:
    """What the pipeline makes, (N, H, W, C) float32 in [0, 1] on the CPU."""
    try:
        with (
            noise_from(model.pipe.scheduler, generators),
            decoding_in(model.vae, decoder(model.precision)),
            autocast(model.device, network(model.precision)),
        ):
            return torch.from_numpy(model.pipe(**call, generator=generators, output_type="np").images)
    except ValueError as error:  # what a pipeline or scheduler says of impossible options
        raise NeonError(f"{type(model.pipe).__name__}: {' '.join(str(error).split())}") from None


@contextmanager
def _watched(module: nn.Module, n: int):
    """Raises Diverged at its end if an output of the network was not finite: pipelines clip, which would hide it."""
    finite: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _, inputs, output: finite.append(output[0].isfinite().all()))
    try:
        yield
    finally:
        hook.remove()
    if not torch.stack(finite).all():
        raise Diverged(f"the network's output for {n} images is not finite")


def _options(model: Model, sampling: Mapping) -> dict[str, object]:
    """What the pipeline's call takes of the sampling options. Raises NeonError for what would have no effect."""
    if sampling["num_inference_steps"] < 1:
        raise NeonError(f"num_inference_steps must be at least 1, not {sampling['num_inference_steps']}")
    takes = inspect.signature(type(model.pipe).__call__).parameters
    for field, none in (("guidance_scale", 1.0), ("eta", 0.0)):
        if field not in takes and sampling[field] != none:
            raise NeonError(f"{type(model.pipe).__name__} takes no {field}: leave it at {none:g}")
    return {field: value for field, value in sampling.items() if field in takes}


def _states(device: torch.device) -> list[torch.Tensor]:
    """Of the global generators, which no image may depend on."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def noise_from(scheduler, generators: list[torch.Generator]):
    """Inside, the scheduler computes in float32, and noise that it adds comes from the images' own generators.

    Some pipelines do not hand them on. Where guidance makes two rows of an image, each draws from its generator.
    """
    step = scheduler.step
    takes = "generator" in inspect.signature(step).parameters

    @wraps(step)
    def drawn(output, *args, **options):
        if takes:
            options["generator"] = generators * (len(output) // len(generators))
        return step(output.float(), *args, **options)

    scheduler.step = drawn
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def decoding_in(vae: nn.Module | None, precision: str):
    """Inside, the VAE decodes under the autocast of that precision, whatever is around it."""
    if vae is None:
        yield
        return
    decode = vae.decode

    @wraps(decode)
    def inside(latents, *args, **options):
        with autocast(latents.device, precision):
            return decode(latents.to(vae.dtype), *args, **options)

    vae.decode = inside
    try:
        yield
    finally:
        del vae.decode
