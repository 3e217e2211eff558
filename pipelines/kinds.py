"""What differs between the pipelines of diffusers that can be trained here: what an image is made of, and how the
network is asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from neon import NeonError
from neon.family import named
from neon.precision import autocast

if TYPE_CHECKING:
    from pipelines.model import Model

Labels = torch.Tensor | None


@dataclass(frozen=True)
class Kind:
    """How a class of pipelines is called and trained.

    call(labels, n, prompts): the arguments that say what n images show. predict(model, x, t, labels, dropped): the
    network's output for x (N, C, h, w) at times t (N,); dropped: (N,) bool, which of them go without their label.
    """

    call: Callable[[Labels, int, Sequence[str]], dict]
    predict: Callable[["Model", torch.Tensor, torch.Tensor, Labels, torch.Tensor | None], torch.Tensor]
    labels: str = ""  # 'classes', 'prompts' or none


def _plain(model: "Model", x, t, labels, dropped) -> torch.Tensor:
    return model.network(x, t).sample


def _of_class(model: "Model", x, t, labels, dropped) -> torch.Tensor:
    """The class after the last stands for none."""
    if dropped is not None:
        labels = torch.where(dropped.to(labels.device), model.classes, labels)
    return model.network(x, timestep=t, class_labels=labels).sample


def _of_prompt(model: "Model", x, t, labels, dropped) -> torch.Tensor:
    embeds, _ = encoded(model, labels, dropped)
    return model.network(x, t, encoder_hidden_states=embeds).sample


def _of_prompt_and_pooled(model: "Model", x, t, labels, dropped) -> torch.Tensor:
    embeds, _, pooled, _ = encoded(model, labels, dropped, prompt_2=None, prompt_3=None)
    return model.network(x, timestep=t, encoder_hidden_states=embeds, pooled_projections=pooled).sample


@torch.no_grad()
def encoded(model: "Model", labels: torch.Tensor, dropped: torch.Tensor | None, **more) -> tuple:
    """What the pipeline's text encoders make of the prompts, in float32; a dropped one is the empty text."""
    gone = [False] * len(labels) if dropped is None else dropped.cpu().tolist()
    texts = ["" if out else model.prompts[i] for i, out in zip(labels.cpu().tolist(), gone)]
    with autocast(model.device, "float32"):
        return model.pipe.encode_prompt(
            texts, **more, device=model.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )


def _texts(labels, n, prompts) -> dict:
    return {"prompt": [prompts[i] for i in labels.tolist()]}


PIXELS = Kind(lambda labels, n, prompts: {"batch_size": n}, _plain)
CLASSES = Kind(lambda labels, n, prompts: {"class_labels": labels.tolist()}, _of_class, "classes")

KINDS = {
    "DDPMPipeline": PIXELS,
    "DDIMPipeline": PIXELS,
    "DiTPipeline": CLASSES,
    "StableDiffusionPipeline": Kind(_texts, _of_prompt, "prompts"),
    "StableDiffusion3Pipeline": Kind(_texts, _of_prompt_and_pooled, "prompts"),
}


def kind_of(pipeline: object) -> Kind:
    """Of the name of a pipeline's class. Raises NeonError if it is not known here."""
    if not isinstance(pipeline, str):
        raise NeonError("the pipeline's class is code of its own, which is not run")
    return named(KINDS, pipeline, "class of pipelines")
