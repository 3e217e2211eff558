"""Did `neon diagnose` foresee what Neon did? Its verdicts next to what was measured, for every setting with its own S.

python -m mini.diagnosed --out ../results/mini    # in mini/: diagnose.csv, diagnose.md
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mini import toy
from mini.plan import Run, runs, titles
from mini.settings import CHAINS
from neon import NeonError
from neon.cli import command_line
from neon.diagnose import UNKNOWN
from neon.files import read_json
from report.tables import as_csv, by_role, markdown, write_all

COLUMNS = ["family", "setting", "seed", "s", "s_lo", "s_hi", "cosine", "verdict", "w_predicted", "w_lo", "w_hi"]
COLUMNS += ["w_searched", "gain", "gain_selftrained", "precision_base", "recall_base", "sign_right"]
TOY = {"epochs": 5000, "fine_tune": 50, "samples": 50_000}  # as its notebook has them


def diagnosed() -> list[Run]:
    """The runs of which there is a diagnosis."""
    return [run for name, chain in CHAINS.items() for run in runs(name, chain) if list(run.diagnose())]


def line(found: Mapping, setting: str, seed: int, of: Mapping[str, pd.Series]) -> dict:
    """A line of diagnose.csv. found: what `neon diagnose` wrote; of: role → its row of final.csv.

    w_predicted: of the snapshot that the search chose; of the last if it chose the base. sign_right: does the sign of s
    agree with what helped more; empty where neither Neon nor self-training lowered FID.
    """
    base, neon = of["base"], of["neon"]
    gain, gain_selftrained = base["fid"] - neon["fid"], base["fid"] - of["selftrained"]["fid"]
    snapshots = {one["budget"]: one for one in found["selftrained"]}
    chosen = snapshots.get(neon["budget"]) or found["selftrained"][-1]
    right = (found["s"] < 0) == (gain > gain_selftrained) if max(gain, gain_selftrained) > 0 else None
    return {
        **{"family": base["family"], "setting": setting, "seed": seed},
        **{name: found[name] for name in ("s", "s_lo", "s_hi", "cosine", "verdict")},
        **{"w_predicted": chosen["w"], "w_lo": chosen["w_lo"], "w_hi": chosen["w_hi"], "w_searched": neon["w"]},
        **{"gain": gain, "gain_selftrained": gain_selftrained, "sign_right": right},
        **{f"{metric}_base": base[metric] for metric in ("precision", "recall")},
    }


def table_of(found: Mapping[tuple[str, int], Mapping], final: pd.DataFrame) -> pd.DataFrame:
    """found: (setting, seed) → its diagnosis. Raises NeonError where the final rows of one are missing."""
    rows = []
    for (setting, seed), diagnosis in found.items():
        reported = final[(final["setting"] == setting) & (final["seed"] == seed)]
        if reported.empty:
            raise NeonError(f"{setting}, seed {seed}: a diagnosis without final rows")
        rows.append(line(diagnosis, setting, seed, {role: part.loc[seed] for role, part in by_role(reported).items()}))
    return pd.DataFrame(rows, columns=COLUMNS)


def by_setting(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """For reading, a line for each setting."""
    lines = []
    for setting, rows in table.groupby("setting", sort=False):
        cosine, gap = rows["cosine"].astype(float).mean(), (rows["precision_base"] - rows["recall_base"]).mean()
        lines.append(
            {
                **{"setting": names.get(setting, setting), "seeds": len(rows), "cosine": cosine},
                **{"sign right": right_of(rows), "cannot tell": of(rows["verdict"] == UNKNOWN)},
                **{
                    "w predicted": rows["w_predicted"].astype(float).median(),
                    "w searched": rows["w_searched"].median(),
                },
                **{"gain": rows["gain"].mean(), "precision − recall of the base": gap},
            }
        )
    return pd.DataFrame(lines)


def right_of(rows: pd.DataFrame) -> str:
    return of(rows["sign_right"].dropna().astype(bool))


def of(flags: pd.Series) -> str:
    return f"{int(flags.sum())} of {len(flags)}"


def rank_correlation(one: pd.Series, other: pd.Series) -> float:
    """Spearman's, of the pairs without NaN."""
    both = pd.concat([one, other], axis=1).astype(float).dropna()
    return float(both.iloc[:, 0].rank().corr(both.iloc[:, 1].rank()))


def summary(table: pd.DataFrame) -> list[str]:
    """Sentences: how often the sign is right, what ranks the settings by gain, how good the predicted w is."""
    told = table[table["verdict"] != UNKNOWN]
    means = (
        table.assign(cosine=table["cosine"].astype(float), gap=table["precision_base"] - table["recall_base"])
        .groupby("setting", sort=False)[["cosine", "gap", "gain"]]
        .mean()
    )
    predicted = table["w_predicted"].astype(float)
    ratio = (predicted / table["w_searched"].where(table["w_searched"] > 0)).dropna()
    inside = (table["w_lo"] <= table["w_searched"]) & (table["w_searched"] <= table["w_hi"])
    by_cosine, by_gap = (rank_correlation(one, means["gain"]) for one in (-means["cosine"], means["gap"]))
    return [
        f"The sign of s was right in {right_of(table)} runs; {of(table['verdict'] == UNKNOWN)} verdicts were"
        f" 'cannot tell', and {right_of(told)} of the others were right.",
        f"Rank correlation with the gain over {len(means)} settings: {by_cosine:.2f} of −cosine, {by_gap:.2f} of the"
        " base's precision − recall.",
        f"The predicted w was {ratio.median():.2g} of the searched one (median), and the searched one in the predicted"
        f" interval in {of(inside)} runs.",
    ]


# ---------------------------------------------------------------- the toy


def toy_signs(seeds: int = 10, epochs: int = 5000, fine_tune: int = 50, samples: int = 50_000) -> pd.DataFrame:
    """Columns zeta, seed, cosine, w: the cosine before self-training, and the best w measured at ζ = 1."""
    generator = torch.Generator().manual_seed(0)
    data = toy.real_data(seeds, 1000, generator)

    def loss_on(images: torch.Tensor):
        return lambda theta: toy.denoising_loss(theta, images, generator)

    base, squares = toy.train(loss_on(data), toy.noise_predictor(seeds, generator), epochs, 3e-3, anneal=True)

    def gradient(images: torch.Tensor) -> toy.Theta:
        return toy.gradient(base, images, torch.Generator().manual_seed(1))  # the same times and noise for both

    real, parts = gradient(toy.real_data(seeds, samples, generator)), []
    for zeta in (1.1, 0.9):
        S = toy.ddim(base, torch.randn(seeds, samples, 2, generator=generator), zeta)
        trained, _ = toy.train(loss_on(S[:, :1000]), base, fine_tune, 1e-5)
        w = np.linspace(-3, 3, 31)
        distance = [toy.frechet(*toy.ddim_moments(toy.merged(base, trained, float(x)), 1.0)).numpy() for x in w]
        columns = {"cosine": toy.cosine(real, gradient(S), squares).numpy(), "w": w[np.argmin(distance, axis=0)]}
        parts.append(pd.DataFrame({"zeta": zeta, "seed": range(seeds), **columns}))
    return pd.concat(parts, ignore_index=True)


def toy_sentence(found: pd.DataFrame) -> str:
    right = found["w"] * found["cosine"] < 0
    parts = [f"ζ = {zeta:g}: {of(right[found['zeta'] == zeta])}" for zeta in found["zeta"].unique()]
    how_often = f"{of(right)} runs ({', '.join(parts)})"
    return f"In the Gaussian toy the cosine had the sign that the theory gives to the best w in {how_often}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = {(run.name, run.seed): read_json(run.diagnosis()) for run in diagnosed()}
    table = table_of(found, pd.read_csv(args.out / "final.csv"))
    sentences = [*summary(table), toy_sentence(toy_signs(**TOY))]
    text = markdown(by_setting(table, titles(CHAINS))) + "\n" + "\n".join(f"- {one}" for one in sentences) + "\n"
    write_all(args.out, {"diagnose.csv": as_csv(table), "diagnose.md": text})
    print(text)


if __name__ == "__main__":
    command_line(main)
