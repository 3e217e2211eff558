"""A pipeline as a model: read from a folder, or from a file of weights that says what it needs."""

import hashlib
import importlib
import json
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cached_property, wraps
from pathlib import Path

import torch
from torch import nn

from neon import NeonError, extra
from neon.dropout import Dropout
from neon.family import named
from neon.files import existing, read_object, reading, reason_of, same_file
from neon.weights.checkpoint import load_into, open_weights, values_sha256
from neon.weights.pipeline import INDEX, is_pipeline, trained_component, weights_file
from pipelines.configs import NETWORKS, SCHEDULER
from pipelines.kinds import Kind, kind_of
from pipelines.lora import Adapted
from pipelines.loss import Levels, levels_of

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # a black image would be no sample of the model


class Model(nn.Module):
    """A pipeline: the network that is trained, all that stays frozen, and the prompts that its images have."""

    def __init__(self, pipe, component: str, folder: Path | None, precision: str, prompts: tuple[str, ...] = ()):
        """pipe: of diffusers. folder: where its frozen parts come from, if it has any."""
        super().__init__()
        self.network = getattr(pipe, component)
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.frozen = nn.ModuleDict({name: part for name, part in parts.items() if name != component})
        self.pipe, self.component, self.folder = pipe, component, folder
        self.precision, self.prompts = precision, prompts
        self.adapted: Adapted | None = None
        _own_masks(self.network)
        self.eval().requires_grad_(False)

    @property
    def kind(self) -> Kind:
        return kind_of(type(self.pipe).__name__)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def classes(self) -> int:
        """How many labels there are: classes or prompts; 0 without any."""
        return {"classes": self.network.config.get("num_embeds_ada_norm"), "prompts": len(self.prompts)}.get(
            self.kind.labels, 0
        )

    @property
    def vae(self) -> nn.Module | None:
        """Of its latents; None if it models pixels."""
        return dict(self.frozen.items()).get("vae")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what the network models."""
        size = self.network.config.sample_size
        return self.network.config.in_channels, *([size] * 2 if isinstance(size, int) else size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        if self.vae is None:
            return self.shape
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.out_channels, *(factor * side for side in self.shape[1:])

    @cached_property
    def levels(self) -> Levels:
        """Noise levels of training. Raises NeonError if the scheduler's are not known here."""
        return levels_of(self.pipe.scheduler)

    @cached_property
    def frozen_sha256(self) -> str:
        """Of the values of the frozen parts."""
        digests = [f"{name} {values_sha256(part)}" for name, part in sorted(self.frozen.items())]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @cached_property
    def around_sha256(self) -> str:
        """Of all that decides an image next to the network's weights: frozen parts, scheduler, prompts."""
        facts = {"frozen": self.frozen_sha256, "scheduler": described(self.pipe.scheduler), "prompts": self.prompts}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def adapt(self, rank: int) -> None:
        """From now on adapters of that rank are trained, not the network."""
        self.adapted = Adapted(self.network, rank)

    def compile(self, *args, **kwargs):
        self.network.compile(*args, **kwargs)


def _own_masks(network: nn.Module) -> None:
    """Dropout whose masks belong to images, and no labels dropped but those of the loss's own draws."""
    for module in network.modules():
        for name, part in module.named_children():
            if type(part) is nn.Dropout:
                setattr(module, name, Dropout(part.p))
            elif type(part).__name__ == "LabelEmbedding":
                part.dropout_prob = 0.0


def described(part) -> list:
    """[class, config] of a part of diffusers."""
    return [type(part).__name__, {k: v for k, v in part.config.items() if not k.startswith("_")}]


def new(config: str, hollow: bool = False, **options) -> Model:
    """A pipeline of a new network, initialised from the global generator, and DDIM. Raises NeonError."""
    record = {
        "class": "DDIMPipeline",
        "network": ["UNet2DModel", {**named(NETWORKS, config, "network of a pipeline"), **options}],
        "scheduler": ["DDIMScheduler", SCHEDULER],
    }
    return _recorded(record, "float32", hollow)


def read(
    path: Path, *, pipeline: str = "", prompts: str = "", precision: str = "float32", hollow: bool = False
) -> Model:
    """The model of a pipeline's folder, of a component in one, or of a file of weights.

    A file of weights outside of a pipeline says itself which it needs, if it is one of ours; `pipeline` names another
    folder. hollow: on the meta device, no weights are read. Raises NeonError.
    """
    folder, component, record = _place(existing(path), pipeline)
    if folder is None:
        model = _recorded(record, precision, hollow)
    else:
        pipe = _pipe(folder, component, hollow)
        model = Model(pipe, component, folder, precision, ("",) if hollow else _prompts(pipe, prompts))
        wanted = record.get("frozen_sha256") if record and not hollow else None
        if wanted and wanted != model.frozen_sha256:
            raise NeonError(f"{folder}: not the pipeline that {path} was trained in")
    if not hollow and not (folder and _same_weights(path, folder / component)):
        with open_weights(path) as weights:
            load_into(model.network, weights, path)
    return model


def _place(path: Path, pipeline: str) -> tuple[Path | None, str, Mapping]:
    """The folder of the pipeline, None if there is none; the component's name; and what the file says of itself."""
    if path.is_dir() and is_pipeline(path):
        return path, trained_component(path), {}
    component = path if path.is_dir() else path.absolute().parent
    if not pipeline and is_pipeline(component.parent) and component.name in read_object(component.parent / INDEX):
        return component.parent, component.name, {}
    with open_weights(path) as weights:
        record = _record(weights.metadata, path)
    folder = Path(pipeline or record.get("folder", ""))
    if pipeline or record.get("folder"):
        if not is_pipeline(folder):
            raise NeonError(f"{folder}: no {INDEX}, so no pipeline; give --pipeline the folder of the one of {path}")
        return folder, record.get("component") or trained_component(folder), record
    if not record:
        raise NeonError(f"{path}: does not say of which pipeline it is; give its folder with --pipeline")
    return None, record["component"], record


def _record(metadata: Mapping[str, str], path: Path) -> Mapping:
    """What the header of a file of ours says of its pipeline; nothing, of another file. Raises NeonError."""
    try:
        record = json.loads(metadata.get("pipeline", "{}"))
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
        if record:
            kind_of(record["class"])
            for part in ("network", "scheduler"):
                name, config = record[part]
                if not (isinstance(name, str) and isinstance(config, dict)):
                    raise ValueError(f"{part} is not [class, config]")
            if not all(isinstance(record.get(name, ""), str) for name in ("component", "folder", "frozen_sha256")):
                raise ValueError("component, folder or frozen_sha256 is not text")
            _ = record["component"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NeonError(f"{path}: its record of a pipeline is damaged ({error})") from None
    return record


def _same_weights(path: Path, component: Path) -> bool:
    """Are the weights of `path` those that the pipeline has read already?"""
    return same_file(weights_file(path), weights_file(component))


def _recorded(record: Mapping, precision: str, hollow: bool = False) -> Model:
    """A pipeline without frozen parts, from the classes and configs of its network and scheduler."""
    diffusers = _diffusers()
    try:
        (network, options), (scheduler, settings) = record["network"], record["scheduler"]
        kinds = getattr(diffusers, network), getattr(diffusers, scheduler)
        if not all(map(issubclass, kinds, (diffusers.ModelMixin, diffusers.SchedulerMixin))):
            raise ValueError(f"{network} with {scheduler}")
        with torch.device("meta" if hollow else "cpu"), _silent(diffusers):
            unet = kinds[0](**options)
        pipe = getattr(diffusers, record["class"])(unet, kinds[1](**settings))
    except Exception as error:  # of the library's constructors
        raise NeonError(f"a pipeline that diffusers cannot build ({reason_of(error)})") from None
    return Model(_quiet(pipe, "unet", hollow), "unet", None, precision)


def _pipe(folder: Path, component: str, hollow: bool):
    """The pipeline of a folder, in float32. Raises NeonError."""
    index = read_object(folder / INDEX)
    kind_of(index.get("_class_name"))
    if component not in index or not (folder / component).is_dir():
        raise NeonError(f"{folder}: its component {component} is missing")
    weights_file(folder / component)
    diffusers = _diffusers()
    given = {name: None for name, entry in index.items() if name in UNUSED or entry == [None, None]}
    try:
        with _silent(diffusers):
            if hollow:
                given |= {name: part for name in index if (part := _hollow_part(folder, name, index[name]))}
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, **given
            )
    except NeonError:
        raise
    except Exception as error:  # of diffusers, transformers and what they read with
        reason = " ".join(str(error).split())[:300]
        raise NeonError(f"{folder}: diffusers cannot load this pipeline ({reason})") from None
    return _quiet(pipe, component, hollow)


def _hollow_part(folder: Path, name: str, entry) -> nn.Module | None:
    """A network of the pipeline on the meta device; None for what is no network."""
    if not isinstance(entry, list) or not entry or entry[0] not in ("diffusers", "transformers") or name in UNUSED:
        return None
    cls = getattr(importlib.import_module(entry[0]), entry[1])
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return None
    with torch.device("meta"):
        if entry[0] == "diffusers":
            return cls.from_config(cls.load_config(folder / name))
        return cls(cls.config_class.from_pretrained(folder / name))


def _quiet(pipe, component: str, hollow: bool):
    """Without progress bars. On the meta device its times have values all the same; the network gets them without."""
    pipe.set_progress_bar_config(disable=True)
    if hollow:
        set_timesteps = pipe.scheduler.set_timesteps

        @wraps(set_timesteps)
        def on_cpu(*args, device=None, **options):
            return set_timesteps(*args, **options)

        def on_meta(_, args, options):
            move = lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value  # noqa: E731
            return tuple(map(move, args)), {name: move(value) for name, value in options.items()}

        pipe.scheduler.set_timesteps = on_cpu
        getattr(pipe, component).register_forward_pre_hook(on_meta, with_kwargs=True)
    return pipe


def _prompts(pipe, file: str) -> tuple[str, ...]:
    """The lines of the file of prompts that are not empty. Raises NeonError if it is missing or not wanted."""
    wanted = kind_of(type(pipe).__name__).labels == "prompts"
    if wanted and not file:
        raise NeonError(
            f"{type(pipe).__name__} makes images of texts: give a file with one on each line, --prompts FILE"
        )
    if file and not wanted:
        raise NeonError(f"{type(pipe).__name__} takes no prompts")
    with reading(file, "not a text file of prompts"):
        lines = existing(file).read_text(encoding="utf-8").splitlines() if file else []
    if file and not (lines := [line.strip() for line in lines if line.strip()]):
        raise NeonError(f"{file}: no prompts in it")
    return tuple(lines)


def _diffusers():
    with extra("diffusers"):
        import diffusers
    return diffusers


@contextmanager
def _silent(diffusers):
    """Inside, neither diffusers nor transformers shows bars or says what it would rather be given."""
    logs = [diffusers.utils.logging]
    if diffusers.utils.is_transformers_available():
        with extra("diffusers"):
            import transformers
        logs.append(transformers.utils.logging)
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity(log.CRITICAL)  # what is wrong is raised
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for log, level in zip(logs, before):
            log.set_verbosity(level)
            log.enable_progress_bar()
