"""The contract (neon.family.Family), held by every family: what `neon` calls is there and does what it promises."""

import dataclasses
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neon import Diverged, NeonError
from neon.distributed import World
from neon.dropout import dropout, masks_of
from neon.family import FAMILIES, Family, Recipe, get_family, rows_of
from neon.precision import DTYPES
from neon.selftrain import train
from neon.weights.checkpoint import save_safetensors

sys.path.append(str(Path(__file__).parent / "var"))
OWN = str(Path(__file__).parents[1] / "examples" / "my_family.py")  # the user's own, as its page in docs has it
BATCH = 16
# Small networks in which all that is random in training happens, and options of their losses.
SMALL = {
    "edm": ("digits", {"dropout": 0.3, "augment_dim": 9}, {"augment": 0.5}),
    "flow": ("digits", {"dropout": 0.3}, {"flip": True, "coupling": "ot"}),
    "var": ("tiny", {"label_drop": 0.5, "drop_path": 0.3}, {"enlarge": 1.125}),
    "xar": ("digits", {"dropout": 0.3}, {"flip": True}),
    "imm": ("digits", {}, {"k": 8}),
    "diffusers": ("digits", {"dropout": 0.3}, {}),
    OWN: ("digits", {"width": 16}, {}),
}
SAMPLING = {"edm": {"num_steps": 2}, "flow": {"num_steps": 2, "solver": "euler"}, "xar": {"flow_steps": 2}}
SAMPLING |= {"var": {"top_k": 20}, "imm": {"num_steps": 1}, "diffusers": {"num_inference_steps": 3, "eta": 1.0}}
SAMPLING |= {OWN: {"num_steps": 2}}


@pytest.fixture(scope="module", params=SMALL, ids=lambda name: Path(name).stem)
def case(request, tmp_path_factory):
    """A family, and a function that makes its small model, the same at each call."""
    family, folder = get_family(request.param), tmp_path_factory.mktemp(Path(request.param).stem)
    config, options, loss = SMALL[request.param]
    loading = {}
    if request.param == "var":
        from var_cases import TINY, write_pair

        loading = {"vae_ckpt": str(write_pair(folder, TINY).parent / "vae_ch160v4096z32.pth")}

    def model():
        torch.manual_seed(0)
        made = family.create(config, device="cpu", **loading, **options)
        with torch.no_grad():  # initial zeros would hide what is behind them
            for p in family.weights(made).parameters():
                p.add_(0.05 * torch.randn_like(p))
        return made

    images, labels = {"var": ((3, 64, 64), 10)}.get(request.param, ((1, 8, 8), 10))
    drawn = torch.Generator().manual_seed(1)
    data = SimpleNamespace(
        shape=images,
        pixels=torch.randint(256, (2 * BATCH, *images), generator=drawn, dtype=torch.uint8),
        labels=torch.randint(labels, (2 * BATCH,), generator=drawn),
    )
    return SimpleNamespace(
        family=family,
        model=model,
        data=data,
        loss=loss,
        loading=loading,
        sampling=dataclasses.asdict(family.Sampling()) | SAMPLING[request.param],
        path=folder,
    )


def test_the_contract_is_complete(case):
    """Every name of the protocol is there, functions take the parameters it lists, and nothing is without a type."""
    family = case.family
    for name in Family.__annotations__:
        assert hasattr(family, name), name
    for name, wanted in vars(Family).items():
        if name.startswith("_") or not inspect.isfunction(wanted):
            continue
        found = inspect.signature(getattr(family, name)).parameters
        for parameter in list(inspect.signature(wanted).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            takes_any = any(p.kind is p.VAR_KEYWORD for p in found.values())
            by_name = takes_any and parameter.kind is parameter.KEYWORD_ONLY
            assert parameter.name in found or by_name, (name, parameter)
        typed = all(p.annotation is not p.empty for p in found.values() if p.kind is not p.VAR_KEYWORD)
        assert typed or family.name not in FAMILIES, name
    assert get_family(family.name) is family and set(family.released_precision.split("+")) <= set(DTYPES)
    assert isinstance(family.released_tf32, bool)
    assert all(isinstance(recipe, Recipe) for recipe in family.recipes.values())


def test_options_have_help_texts(case):
    for options in (case.family.Sampling, case.family.Loading):
        for field in dataclasses.fields(options):
            assert len(field.metadata["help"]) > 5 and not field.metadata["help"].endswith("."), field.name


def test_a_snapshot_loads_and_samples_alike(case):
    """create → save weights with metadata → load: the same images, whatever the batch, with the same weights."""
    family, model = case.family, case.model()
    path = case.path / "snapshot.safetensors"
    save_safetensors(path, family.weights(model).state_dict(), family.metadata(model))
    loaded = family.load(path, device="cpu", **case.loading)
    assert not loaded.training
    assert list(family.weights(loaded).state_dict()) == list(family.weights(model).state_dict())
    seeds = torch.tensor([3, 2**40 + 1, 5])
    labels = family.labels(loaded, seeds)
    of_others = family.labels(loaded, seeds[1:])
    assert labels is of_others is None or (labels.dtype == torch.int64 and torch.equal(labels[1:], of_others))
    images = family.sample(loaded, seeds, labels, **case.sampling)
    assert images.dtype == torch.uint8 and images.shape == (3, *case.data.shape)
    again = family.sample(model, seeds[1:], of_others, **case.sampling)
    assert (again.int() - images[1:].int()).abs().max() <= 1
    loaded.compile()  # of what `sample` runs; PyTorch compiles at the first call
    buffers = [name for name in family.weights(model).state_dict() if family.is_buffer(name)]
    assert not set(buffers) & {name for name, _ in family.weights(model).named_parameters()}


def test_a_noise_map_is_the_sampler_in_its_parts(case):
    """Of families that have one (neon.family.Differentiable); tests/test_gmo.py differentiates it."""
    family, model, seeds = case.family, case.model(), torch.tensor([3, 5])
    assert hasattr(family, "noise_map") == (family.name in ("edm", "flow", "imm"))
    if hasattr(family, "noise_map"):
        labels = family.labels(model, seeds)
        found = family.noise_map(model, seeds, labels, **case.sampling).images()
        assert torch.equal(found, family.sample(model, seeds, labels, **case.sampling))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused(case, value):
    model = case.model()
    with torch.no_grad():
        for p in case.family.weights(model).parameters():
            p.fill_(value)
    seeds = torch.arange(2)
    with pytest.raises(Diverged):
        case.family.sample(model, seeds, case.family.labels(model, seeds), **case.sampling)


# ---------------------------------------------------------------- a training step, however it is divided


class Images:
    def __init__(self, data):
        self.pixels, self.labels, self.shape = data.pixels, data.labels, data.shape

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        return self.pixels[list(indices)]


class Rank(World):
    """One of several processes, alone in this one: `average` keeps its gradients."""

    def average(self, tensors):
        if len(tensors) > 1:
            GRADIENTS.append(torch.cat([t.flatten() for t in tensors]))

    def gather(self, value):
        return [value] * self.size

    def barrier(self):
        pass


GRADIENTS: list[torch.Tensor] = []


def gradient(case, folder, processes=1, micro_batch=None, seed=0) -> torch.Tensor:
    """Of the first step, averaged over the processes."""
    recipe = Recipe(batch=BATCH, lr=1e-6, budget=BATCH, snapshot=BATCH, loss=case.loss)
    GRADIENTS.clear()
    for rank in range(processes):
        out = folder / f"{processes}-{rank}-{micro_batch}-{seed}"
        options = {"world": Rank(rank, processes), "micro_batch": micro_batch, "seed": seed}
        train(case.family, case.model(), Images(case.data), recipe, out, **options)
    return torch.stack(GRADIENTS).mean(0)


@pytest.mark.parametrize("processes, micro_batch", [(1, 8), (1, 4), (2, None), (4, None), (2, 4)])
def test_micro_batches_and_processes_divide_a_step_and_change_nothing(case, tmp_path, processes, micro_batch):
    whole, other = gradient(case, tmp_path), gradient(case, tmp_path, seed=1)
    divided = gradient(case, tmp_path, processes, micro_batch)
    assert whole.norm() > 0 and (other - whole).norm() > 0.05 * whole.norm()  # what random numbers change
    assert (divided - whole).norm() < 1e-4 * whole.norm()


def test_imms_groups_are_not_split(tmp_path):
    family = get_family("imm")
    model = family.create("digits", device="cpu")
    draws = family.draw(model, 8, torch.Generator(), images=None)
    with pytest.raises(NeonError, match="groups of 4 images; 6 images"):
        family.loss(model, torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6), rows_of(draws, 0, 6, 8))


def test_rows_of_draws():
    draws = (torch.arange(8), None, (torch.arange(2),))
    found = rows_of(draws, 4, 8, 8)
    assert found[0].tolist() == [4, 5, 6, 7] and found[1] is None and found[2][0].tolist() == [1]


def test_masks_belong_to_images():
    x, seeds = torch.ones(6, 40, 50), torch.arange(100, 106)
    with masks_of(seeds, "cpu"):
        first, second = dropout(x, 0.25), dropout(x, 0.25)
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        with masks_of(seeds[rows], "cpu"):
            parts.append(dropout(x[rows], 0.25))
    assert torch.equal(torch.cat(parts), first) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((first == 0).float().mean() - 0.25) < 0.02
    assert torch.equal(dropout(x, 0.25, training=False), x)
    torch.manual_seed(0)
    outside = dropout(x, 0.25)
    torch.manual_seed(0)
    assert torch.equal(outside, torch.nn.functional.dropout(x, 0.25))


def test_recipes_keep_their_precision():
    """What the released code trained in, as far as it differs from float32."""
    trained = {(name, r.precision, r.tf32) for name in FAMILIES for r in get_family(name).recipes.values()}
    assert {("var", "float16", True), ("xar", "float16", True), ("imm", "float16", False)} <= trained
    assert replace(Recipe(1, 1.0, 1, 1), tf32=True).tf32
