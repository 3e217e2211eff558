"""The mini scale: every number that its pipeline uses. plan.py makes commands from them; run.py prints or runs these.

Seeds 0… are the reported replicates (each has its own base, S, fine-tune and evaluation noise). Seeds 100… were used to
choose these values and those of the search by surface; 103… only to test it.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

Options = dict[str, object]  # of a `neon` command: {"num_steps": 10} is --num_steps 10
Values = tuple[float, ...]

TRAIN = 1200  # of 1797 digits; numbers are reported against the other 597
TOKENIZER_STEPS = 1500  # of VAR's tokenizer
COPIES = "40000-40999"  # seeds of the images that are compared with the training digits
BATCH = 500  # images made at a time
TRAINING, HELDOUT, CORRUPTED = "runs/data/train", "runs/data/heldout", "runs/data/corrupted"
NETWORK = "digits"  # in every family; its recipes are digits_base and digits
FEATURES = ("digits:runs/features.safetensors", "digits:runs/second/features.safetensors")  # the first, the second
SEARCH_METRICS = "fid,precision,recall"
FINAL_METRICS = "fid,kid,precision,recall,density,coverage"


@dataclass(frozen=True)
class Base:
    """A model trained from nothing, once for each seed."""

    family: str
    seeds: range
    options: Options = field(default_factory=dict)  # more options of `neon train`
    older: int = 0  # every so many images a snapshot is kept: an earlier θ_r, for the controls and rivals


@dataclass(frozen=True)
class Images:
    """Seeds of images, as `--seeds` takes them."""

    synthetic: str = "10000-11999"  # S
    search: str = "20000-20999"  # choose w, measured against the training digits
    final: str = "30000-31999"  # reported, measured against the held-out digits; "": nothing is


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to make S and to sample: it has its S, its fine-tune, its search over w and its reported images."""

    title: str  # in tables and figures
    sampling: Options  # of S, of the search and of the reported images
    synthetic: Options = field(default_factory=dict)  # more of them, of S alone
    training: Options = field(default_factory=dict)  # changes to the recipe `digits`
    w: Values  # searched: all of them by a grid, 0 to the last by a surface
    grid: dict[str, Values] = field(
        default_factory=dict
    )  # searched together with w: all, or from the first to the last
    method: Literal["surface", "grid"] = "surface"

    by: Literal["merge", "guidance"] = "merge"  # how θ_s is used

    # What it takes from elsewhere. CHAIN/SETTING names a setting of a chain.
    data: str = ""  # fine-tuned on these images in place of S
    S: str = ""  # fine-tuned on the S of that CHAIN/SETTING
    of: str = ""  # S and fine-tune are those of that CHAIN/SETTING
    parts: tuple[int, ...] = ()  # searched too: fine-tunes on so many images of S
    snapshot: int = 0  # searched: the fine-tune after so many images; 0: all its snapshots
    digits: int = 0  # has a base of its own, trained on so many digits; 0: the chain's base

    # θ_s that is no fine-tune on one set of images.
    older: int = 0  # the base itself, after so many images of its own training
    random: bool = False  # the base and a random direction, as long as the fine-tune of `of` in every tensor
    ddo: bool = False  # trained to tell real digits from S, the likelihood ratio being what tells them apart
    second: bool = False  # searched with the second features, and judged with both


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Base → S → fine-tune → search → reported numbers, for each of some settings and seeds."""

    base: str  # of BASES
    seeds: range
    settings: dict[str, Setting]
    images: Images = Images()
    metrics: str = SEARCH_METRICS  # of the search
    reported: str = FINAL_METRICS
    options: Options = field(default_factory=dict)  # more options of every command
    folder: str = "runs/{kind}/{chain}"  # where its files are; kind: S, selftrain, rows, base


FRESH = range(103, 105)

BASES = {
    "edm": Base("edm", range(3), older=25600),
    "edm-more": Base("edm", range(3, 5), older=25600),
    "flow": Base("flow", range(5), older=30016),
    "var": Base("var", range(5), {"vae_ckpt": "runs/vqvae.safetensors"}, older=9600),
    "xar": Base("xar", range(5), older=12800),
    "imm": Base("imm", range(5), older=24000),
    "diffusers": Base("diffusers", range(5)),
    "edm-fresh": Base("edm", FRESH),
    "flow-fresh": Base("flow", FRESH),
    "var-fresh": Base("var", FRESH, {"vae_ckpt": "runs/vqvae.safetensors"}),
    "xar-fresh": Base("xar", FRESH),
    "imm-fresh": Base("imm", FRESH),
}

SHORT = {"budget": 12800, "snapshot": 12800}  # a fine-tune of one snapshot

# A family's first setting is its headline.
EULER10 = Setting(
    title="EDM, 10 Euler steps (mode seeking)",  # few first-order steps: the theory predicts w* > 0
    sampling={"solver": "euler", "num_steps": 10, "sigma_max": 20},
    w=(-1, -0.5, 0, 0.5, 1, 1.5, 2, 3),
)
HEUN8 = Setting(
    title="EDM, 8 Heun steps (not mode seeking)",  # they spread out here: high recall, low precision
    sampling={"solver": "heun", "num_steps": 8, "sigma_max": 20},
    training=SHORT,
    w=(-1, 0, 0.5, 1, 2),
)
REAL = Setting(
    title="EDM, real images in place of S (control)",  # no bias of a sampler to reverse
    sampling=EULER10.sampling,
    data=TRAINING,
    training=SHORT,
    w=(-1, 0, 1),
    method="grid",  # what it shows is a curve that is flat on both sides
)
HEUN18 = Setting(
    title="EDM, 18 Heun steps (the paper's sampler)",
    sampling={"solver": "heun", "num_steps": 18, "sigma_max": 20},
    training=SHORT,
    w=(-1, 0, 0.5, 1, 2),
)
FM4 = Setting(
    title="Flow matching, 4 Euler steps (mode seeking)",  # large steps: the theory predicts w* > 0
    sampling={"solver": "euler", "num_steps": 4},
    w=(-1, 0, 0.5, 1, 1.5, 2, 3, 4),
)
TAU06 = Setting(
    title="VAR, temperature 0.6 (mode seeking)",  # a low temperature: the theory predicts w* > 0
    sampling={"temperature": 0.6, "top_k": 0, "top_p": 0},
    synthetic={"cfg": 0.5},
    w=(-1, 0, 0.25, 0.5, 0.75, 1, 1.5),
    grid={"cfg": (0, 0.5, 1, 1.5)},
)
CFG2 = Setting(
    title="xAR, guidance 2 (mode seeking)",  # the theory predicts w* > 0
    sampling={"flow_steps": 10},
    synthetic={"cfg": 2},
    w=(-1, 0, 1, 2, 3),
    grid={"cfg": (2, 3.5, 5)},
)
IMM8 = Setting(
    title="IMM, 8 steps",
    sampling={"num_steps": 8},
    synthetic={"cfg_scale": 1.5},
    snapshot=12800,
    w=(-1, 0, 1, 2, 3),
    grid={"cfg_scale": (1.25, 1.5, 1.75, 2, 2.5)},
)
IMM4 = Setting(
    title="IMM, 4 steps",
    sampling={"num_steps": 4},
    of="imm/imm8",
    snapshot=12800,
    w=(-1, 0, 1, 2, 3),
    grid={"cfg_scale": (1.25, 1.5, 1.75, 2, 2.5)},
)
IMM2 = Setting(
    title="IMM, 2 steps",
    sampling={"num_steps": 2},
    of="imm/imm8",
    snapshot=12800,
    w=(-1, 0, 1, 2),
    grid={"cfg_scale": (1.25, 1.5, 1.75, 2)},
)
IMM1 = Setting(
    title="IMM, 1 step",
    sampling={"num_steps": 1},
    of="imm/imm8",
    snapshot=12800,
    w=(-1, 0, 1, 2),
    grid={"cfg_scale": (1.25, 1.5, 1.75, 2)},
)
SIZES = Setting(
    title="IMM, 4 steps, γ = 1.75",  # FID against B for several |S|: parts of the S of imm8, and the whole
    sampling={"num_steps": 4, "cfg_scale": 1.75},
    of="imm/imm8",
    parts=(100, 500),
    w=(0, 1, 2, 4),
    method="grid",  # of all snapshots
)
DDIM10 = Setting(
    title="diffusers pipeline, 10 DDIM steps",
    sampling={"num_inference_steps": 10},
    w=(-1, 0, 0.5, 1, 1.5, 2, 3),
)
LORA = Setting(
    title="diffusers pipeline, adapters of rank 4",  # on the S of ddim10
    sampling=DDIM10.sampling,
    training={"recipe": "digits_lora"},
    S="diffusers/ddim10",
    w=DDIM10.w,
)

# `make mini`; tables and figures show the settings in this order. The demo is the first chain alone.
CHAINS = {
    "demo": Chain(base="edm", seeds=range(3), settings={"euler10": EULER10, "heun8": HEUN8, "real": REAL}),
    "more": Chain(base="edm-more", seeds=range(3, 5), settings={"euler10": EULER10, "real": REAL, "heun18": HEUN18}),
    "paper": Chain(base="edm", seeds=range(3), settings={"heun18": HEUN18}),
    "flow": Chain(base="flow", seeds=range(5), settings={"fm4": FM4}),
    "var": Chain(base="var", seeds=range(5), settings={"tau06": TAU06}),
    "xar": Chain(
        base="xar",
        seeds=range(5),
        settings={"cfg2": CFG2},
        images=Images("10000-10999", "20000-20499", "30000-30999"),
    ),
    "imm": Chain(base="imm", seeds=range(5), settings={"imm8": IMM8, "imm4": IMM4, "imm2": IMM2, "imm1": IMM1}),
    "diffusers": Chain(base="diffusers", seeds=range(5), settings={"ddim10": DDIM10, "lora": LORA}),
    "sizes": Chain(
        base="imm",
        seeds=range(3),
        settings={"sizes": SIZES},
        images=Images("", "20000-20499", ""),
        metrics="fid",
        folder="runs/{chain}/{kind}",
    ),
}


def own_digits(n: int) -> Setting:
    """EDM with a base that saw n of the digits only."""
    return Setting(
        title=f"base trained on {n} digits",
        sampling=EULER10.sampling,
        training=SHORT,
        digits=n,
        w=(-1, 0, 0.5, 1, 1.5, 2, 3),
    )


def foreign(family: str, S: str) -> Setting:
    """EDM fine-tuned on the S of another family."""
    return Setting(
        title=f"S from {family}", sampling=EULER10.sampling, training=SHORT, S=S, w=(-1, 0, 0.5, 1, 1.5, 2, 3)
    )


def guided(cfg: float) -> Setting:
    """VAR whose S is made with that guidance, searched over w and its own guidance."""
    return Setting(
        title=f"S at γ = {cfg}",
        sampling=TAU06.sampling,
        synthetic={"cfg": cfg},
        w=(0, 0.25, 0.5, 0.75, 1),
        grid={"cfg": (0, 0.5, 1, 1.5)},
    )


ABLATION = "runs/ablations/{chain}/{kind}"

# `make mini-ablations`, from what `make mini` trained.
ABLATIONS = {
    "cross": Chain(  # Fig. 8
        base="edm",
        seeds=range(3),
        settings={
            "own": foreign("EDM itself", "demo/euler10"),
            "flow": foreign("flow matching", "flow/fm4"),
            "imm": foreign("IMM", "imm/imm8"),
            "var": foreign("VAR", "var/tau06"),
            "xar": foreign("xAR", "xar/cfg2"),
        },
        folder=ABLATION,
        reported=SEARCH_METRICS,
    ),
    "part": Chain(  # Fig. 9
        base="edm",
        seeds=range(3),
        settings={str(n): own_digits(n) for n in (150, 300, 600, 1200)},
        folder=ABLATION,
        reported=SEARCH_METRICS,
    ),
    "guidance": Chain(  # Fig. 10
        base="var",
        seeds=range(3),
        settings={str(cfg): guided(cfg) for cfg in (0, 0.5, 1, 2)},
        options={"vae_ckpt": "runs/vqvae.safetensors"},
        folder=ABLATION,
        reported=SEARCH_METRICS,
    ),
}

METHOD = "runs/methods/{chain}/{kind}"


def fresh(name: str, *settings: str) -> Chain:
    """A chain's settings on seeds that nothing was chosen with."""
    chain = CHAINS[name]
    found = {
        key: replace(one, of=one.of and f"fresh-{one.of}") for key, one in chain.settings.items() if key in settings
    }
    changes = {"base": f"{chain.base}-fresh", "seeds": FRESH, "folder": METHOD, "reported": SEARCH_METRICS}
    return replace(chain, settings=found, **changes)


def by_grid(name: str, chain: Chain) -> Chain:
    """The same S and fine-tunes, searched by the grid."""
    found = {key: replace(one, of=one.of or f"{name}/{key}", method="grid") for key, one in chain.settings.items()}
    return replace(chain, seeds=chain.seeds[:2], settings=found, folder=METHOD, reported=SEARCH_METRICS)


def some(name: str, *settings: str) -> Chain:
    return replace(CHAINS[name], settings={key: CHAINS[name].settings[key] for key in settings})


# `make mini-methods`: the search by surface against the whole grid, on reported seeds and on fresh ones. The committed
# searches by surface are those of CHAINS.
COMPARED = {
    "demo": some("demo", "euler10"),
    "paper": some("paper", "heun18"),
    "flow": some("flow", "fm4"),
    "var": some("var", "tau06"),
    "xar": some("xar", "cfg2"),
    "imm": some("imm", "imm8", "imm1"),
    "fresh-demo": fresh("demo", "euler10"),
    "fresh-paper": fresh("paper", "heun18"),
    "fresh-flow": fresh("flow", "fm4"),
    "fresh-var": fresh("var", "tau06"),
    "fresh-xar": fresh("xar", "cfg2"),
    "fresh-imm": fresh("imm", "imm8", "imm1"),
}
METHODS = {name: chain for name, chain in COMPARED.items() if name.startswith("fresh-")}
METHODS |= {f"grid-{name}": by_grid(name, chain) for name, chain in COMPARED.items()}

# Per chain the setting whose gain is put to the test, and the B of the direction that a random one is compared with.
TESTED = {
    "demo": ("euler10", 12800),
    "more": ("euler10", 12800),
    "flow": ("fm4", 12800),
    "var": ("tau06", 6400),
    "xar": ("cfg2", 9600),
    "imm": ("imm8", 12800),
}


def controls(name: str, key: str, snapshot: int) -> Chain:
    """What else the gain could come from: each replaces θ_s, all else is as it is for Neon."""
    chain, one = CHAINS[name], CHAINS[name].settings[key]
    kinds = {
        "real": ("real images in place of S", {"data": TRAINING}),
        "corrupted": ("corrupted real images in place of S", {"data": CORRUPTED}),
        "random": ("a random direction", {"of": f"{name}/{key}", "random": True, "snapshot": snapshot}),
        "older": ("extrapolation of its own training", {"older": 2 * BASES[chain.base].older}),
    }
    return tested(name, "controls", {f"{key}-{kind}": variant(one, *how) for kind, how in kinds.items()})


def variant(one: Setting, title: str, changes: Options) -> Setting:
    """A setting with some things changed; its title keeps the family's name."""
    return replace(one, **{"title": f"{one.title.partition(',')[0]}: {title}", **changes})


def tested(name: str, kind: str, settings: dict[str, Setting], seeds: int = 5) -> Chain:
    """A chain of its own for settings on the bases of that chain."""
    return replace(
        CHAINS[name], seeds=CHAINS[name].seeds[:seeds], settings=settings, folder=f"runs/{kind}/{{chain}}/{{kind}}"
    )


def second_features(name: str, key: str) -> Chain:
    one = replace(CHAINS[name].settings[key], of=f"{name}/{key}", second=True)
    return tested(name, "spaces", {key: one})


# `make mini-controls`
CONTROLS = {f"controls-{name}": controls(name, *setting) for name, setting in TESTED.items()}
SPACES = {f"spaces-{name}": second_features(name, key) for name, (key, _) in TESTED.items()}


def rivals(name: str, key: str, *kinds: str) -> Chain:
    """Other ways to use two models, or real images, on the same bases."""
    one, place, older = CHAINS[name].settings[key], f"{name}/{key}", BASES[CHAINS[name].base].older
    ways = {
        "sims": ("SIMS", {"of": place, "by": "guidance"}),
        "auto": ("autoguidance", {"older": older, "by": "guidance"}),
        "ddo": ("DDO", {"S": place, "ddo": True, "w": (-1, 0), "method": "grid"}),
    }
    return tested(name, "rivals", {f"{key}-{kind}": variant(one, *ways[kind]) for kind in kinds}, seeds=3)


def gmo(name: str, *keys: str, strengths: Values = (0, 0.1)) -> Chain:
    """S with the Jacobian of the sampler reweighted, or with noise as large."""
    settings = {}
    for key in keys:
        one = replace(CHAINS[name].settings[key], of="", training=SHORT)
        made = {"cfg_scale": 1.5} if name == "imm" else one.synthetic
        for strength in strengths:
            changed = {**made, **FEW, "gmo": strength} if strength else made
            settings[f"{key}-gmo{strength}"] = steps(one, f"GMO, α = {strength}", {"synthetic": changed})
        noise = {"synthetic": {**made, **FEW, "gmo": 0.1, "gmo_control": "noise"}}
        settings[f"{key}-noise0.1"] = steps(one, "noise as large as GMO's change at α = 0.1", noise)
    return replace(tested(name, "gmo", settings, seeds=3), images=Images(synthetic="10000-10999"))


FEW = {"gmo_iterations": 10, "gmo_probes": 10}  # of the default's 20 each, for S takes 30 times as long as without


def steps(one: Setting, title: str, changes: Options) -> Setting:
    """A variant whose title keeps the sampler, too."""
    return replace(one, title=f"{one.title.partition(' (')[0]}: {title}", **changes)


# `make mini-rivals`
RIVALS = {
    "guided-demo": rivals("demo", "euler10", "sims", "auto"),
    "guided-flow": rivals("flow", "fm4", "sims", "auto"),
    "guided-imm": rivals("imm", "imm8", "sims", "auto"),
    "ddo-demo": rivals("demo", "euler10", "ddo"),
    "ddo-var": rivals("var", "tau06", "ddo"),
}
GMO = {
    "gmo-imm": gmo("imm", "imm1", "imm2", "imm4", strengths=(0, 0.05, 0.1, 0.2)),
    "gmo-flow": gmo("flow", "fm4"),
}

DIAGNOSED = CHAINS
ALL = CHAINS | ABLATIONS | METHODS | CONTROLS | SPACES | RIVALS | GMO
TITLED = {"mini": CHAINS, "ablations": ABLATIONS, "controls": CONTROLS, "rivals": RIVALS, "gmo": GMO}
