"""The Fashion-MNIST scale: every number that its pipeline uses, in the types of mini/settings.py.

params.yaml chooses cpu or gpu.

Seeds 0… are the reported replicates. Seeds from 100 on are for choosing these values (docs/fashion.md).

Time, computed from throughput of one thread on a loaded AMD EPYC (images per CPU second, batches of 64, 28×28):

    family  network                        training  one pass of sampling
    edm     16 channels, [1, 2, 2]              165                   495
    flow    16 channels, [1, 2, 2]              210                   610
    var     width 128, depth 4, 70 codes        127     170 (whole image)
    imm     patches of 4, width 128, depth 4    223                   670
    lite0   at 64 pixels                          –                   550

With the numbers below, three seeds on two cores: edm 1.9 h, flow 1.6 h (if dopri5 takes 40 passes at its tolerance),
var 0.9 h with its tokenizer, imm 0.8 h, the features 0.1 h: 5.3 h. Computed, not measured as a whole.
"""

from dataclasses import replace
from pathlib import Path

import yaml

from mini.settings import Base, Chain, Images, Options, Setting

GPU = yaml.safe_load(Path(__file__).with_name("params.yaml").read_text())["scale"] == "gpu"

NETWORK = "fashion_gpu" if GPU else "fashion"  # in every family; its recipes are NETWORK_base and NETWORK
BATCH = 1000 if GPU else 100  # images made at a time
TRAINING, HELDOUT = "runs/data/train.zip", "runs/data/test.zip"
FEATURES = ("lite0", "cnn:runs/features.safetensors")  # the first, the second
DEVICE: Options = {"device": "cuda" if GPU else "cpu"}
SEEDS = range(3)
IMAGES = Images(
    synthetic="10000-15999" if GPU else "10000-11999",
    search="20000-24999" if GPU else "20000-20999",  # choose w, measured against the training images
    final="30000-39999",  # reported, measured against the test images
)
METRICS = "fid,precision,recall"

TOKENIZER: Options = {"vae_ckpt": "runs/vqvae.safetensors"}
LONG: Options = DEVICE | {"save_every": 512_000 if GPU else 25_600}  # images that a kill can cost
BASES = {
    "edm": Base("edm", SEEDS, LONG),
    "flow": Base("flow", SEEDS, LONG),
    "var": Base("var", SEEDS, LONG | TOKENIZER),
    "imm": Base("imm", SEEDS, LONG),
}

# A family's first setting is its headline.
EULER10 = Setting(
    title="EDM, 10 Euler steps",  # few first-order steps: the theory predicts w* > 0
    sampling={"solver": "euler", "num_steps": 10},
    w=(0, 3),
)
HEUN18 = Setting(
    title="EDM, 18 Heun steps (the paper's sampler)",
    sampling={"solver": "heun", "num_steps": 18},
    w=(0, 2),
)
FM4 = Setting(
    title="Flow matching, 4 Euler steps",  # large steps: the theory predicts w* > 0
    sampling={"solver": "euler", "num_steps": 4},
    w=(0, 4),
)
DOPRI5 = Setting(
    title="Flow matching, dopri5 (the paper's sampler)",
    sampling={"solver": "dopri5", "tol": 1e-5 if GPU else 1e-3},
    w=(0, 3),
)
TAU06 = Setting(
    title="VAR, temperature 0.6",  # a low temperature: the theory predicts w* > 0
    sampling={"temperature": 0.6, "top_k": 0, "top_p": 0},
    synthetic={"cfg": 0.5},
    w=(0, 1.5),
    grid={"cfg": (0, 1.5)},
)
IMM4 = Setting(
    title="IMM, 4 steps",
    sampling={"num_steps": 4},
    synthetic={"cfg_scale": 1.5},
    w=(0, 3),
    grid={"cfg_scale": (1.25, 2.5)},
)


def chain(base: str, **settings: Setting) -> Chain:
    return Chain(base=base, seeds=SEEDS, settings=settings, images=IMAGES, metrics=METRICS, options=DEVICE)


# `make fashion FAMILIES=…` names these; tables and figures show the settings in this order.
CHAINS = {
    "edm": chain("edm", euler10=EULER10, heun18=HEUN18),
    "flow": chain("flow", fm4=FM4, dopri5=DOPRI5),
    "var": chain("var", tau06=TAU06),
    "imm": chain("imm", imm4=IMM4),
}


def second_features(name: str) -> Chain:
    """The headline of a family, searched by the second features and judged by both."""
    key, one = next(iter(CHAINS[name].settings.items()))
    settings = {key: replace(one, of=f"{name}/{key}", second=True)}
    return replace(CHAINS[name], settings=settings, folder="runs/spaces/{chain}/{kind}")


# `make fashion-spaces FAMILIES=…`
SPACES = {f"spaces-{name}": second_features(name) for name in CHAINS}
DIAGNOSED: dict[str, Chain] = {}

ALL = CHAINS | SPACES
TITLED = {"fashion": CHAINS}
