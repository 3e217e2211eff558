"""What a search says of one setting: FID over the merge weight w and guidance γ, and the best point.

The search by a surface measures a few points of every seed and predicts FID on a grid of (w, γ), at the B that is best
for the seed. The search by a grid measures every point that is shown, at several B.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from neon import NeonError
from report.drawing import images

NEAR = 1 / 8  # of the range of γ: a point that was measured at most this far away is drawn with a line at γ


@dataclass(frozen=True)
class Star:
    """The best (w, γ, B) of a search: the lowest mean FID over w > 0 if it is below the base's; otherwise the base.

    w: 0 if the base is best; then B is the one of the best w ≠ 0. guidance: NaN if none was searched. The edges say
    that nothing beyond was looked at: the best w is the greatest, or the best γ the least or the greatest of the scan.
    """

    w: float
    guidance: float
    budget: int
    fid: float
    w_at_edge: bool = False
    guidance_at_edge: bool = False

    @property
    def at_edge(self) -> bool:
        return self.w_at_edge or self.guidance_at_edge

    @property
    def label(self) -> str:
        return (f"lowest at w = {self.w:.3g}" if self.w else "lowest at the base") + EDGE * self.w_at_edge

    @property
    def guidance_label(self) -> str:
        """'γ = 2', and '' where none was searched."""
        return "" if math.isnan(self.guidance) else f"γ = {self.guidance:.3g}" + EDGE * self.guidance_at_edge


EDGE = " (edge of the scan)"


def star(rows: pd.DataFrame) -> Star:
    """Of the rows of one setting: columns seed, w, budget, fid and perhaps cfg.

    Only points that the most seeds have count: means over different seeds do not compare. Raises NeonError if no FID
    of w >= 0 is finite.
    """
    fid = _means(rows)
    if not (fid["w"] >= 0).any():
        raise NeonError("the search holds no finite FID of w >= 0")
    best = fid[fid["w"] >= 0].iloc[0]
    merged = pd.concat([fid[fid["w"] > 0], fid[fid["w"] < 0], fid]).iloc[0]
    return _star(rows, best, merged["budget"])


def best_base(rows: pd.DataFrame) -> Star | None:
    """The base with the guidance that suits it best; None if it has no finite FID."""
    fid = _means(rows)
    fid = fid[fid["w"] == 0]
    return None if fid.empty else _star(rows, fid.iloc[0], fid.iloc[0]["budget"])


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean FID over seeds of every point that the most seeds have, the lowest first; only finite ones."""
    rows = rows.assign(cfg=rows.get("cfg", math.nan))
    fid = rows.groupby(["w", "cfg", "budget"], dropna=False)["fid"].agg(["mean", "count"]).reset_index()
    return fid[(fid["count"] == fid["count"].max()) & np.isfinite(fid["mean"])].sort_values("mean", kind="stable")


def _star(rows: pd.DataFrame, best: pd.Series, budget: float) -> Star:
    guidances = rows.get("cfg", pd.Series(dtype=float)).dropna()
    at_edge = guidances.nunique() > 1 and best["cfg"] in (guidances.min(), guidances.max())
    w_at_edge = 0 < best["w"] == rows["w"].max()
    return Star(best["w"], best["cfg"], int(budget), best["mean"], bool(w_at_edge), bool(at_edge))


@dataclass(frozen=True)
class Search:
    """One setting. Both tables have the columns seed, w, cfg (NaN without guidance), budget and fid.

    fids: FID to draw, of the same points for every seed; a prediction's standard error, or NaN, is predicted_se.
    measured: the points that were measured, with precision and recall. budgets: seed → B where FIDs are predicted.
    """

    fids: pd.DataFrame
    measured: pd.DataFrame
    budgets: Mapping[int, int] | None = None

    @property
    def predicted(self) -> bool:
        return self.budgets is not None

    @property
    def budget_label(self) -> str:
        """Of a predicted plane: 'B = 12.8k', or the range if the seeds' best B differ."""
        low, high = min(self.budgets.values()), max(self.budgets.values())
        return f"B = {images(low)}" if low == high else f"each seed's best\nB, {images(low)} to {images(high)}"

    def at_best_budget(self) -> pd.DataFrame:
        """What was measured at the B that each seed's plane is for, and of the base."""
        best = self.measured["seed"].map(self.budgets)
        return self.measured[(self.measured["budget"] == best) | (self.measured["w"] == 0)]

    def near(self, guidance: float) -> tuple[pd.DataFrame, float]:
        """Of `at_best_budget` the points near that γ, and how near these are: 0 if γ was not searched."""
        rows = self.at_best_budget()
        if math.isnan(guidance):
            return rows, 0.0
        distance = NEAR * float(np.ptp(self.fids["cfg"]))
        return rows[(rows["cfg"] - guidance).abs() <= distance], distance


def searches(search: pd.DataFrame, curves: pd.DataFrame | None = None) -> dict[str, Search]:
    """Setting → what its search says, in order of `search`.

    search: rows that were measured. curves: predictions, columns setting, seed, w, cfg, budget, fid, fid_se; a setting
    without them for each of its seeds has what was measured.
    """
    search = search.assign(cfg=search.get("cfg", math.nan))
    return {setting: _search(rows, _of(curves, setting)) for setting, rows in search.groupby("setting", sort=False)}


def _of(table: pd.DataFrame | None, setting: str) -> pd.DataFrame | None:
    return None if table is None else table[table["setting"].astype(str) == str(setting)]


def _search(rows: pd.DataFrame, curves: pd.DataFrame | None) -> Search:
    if curves is None or set(curves["seed"]) != set(rows["seed"]):
        return Search(rows, rows)
    budgets = curves.groupby("seed")["budget"].first().to_dict()
    fids = curves.assign(budget=curves["budget"].mode()[0]).rename(columns={"fid_se": "predicted_se"})
    seeds = fids.groupby(["w", "cfg"], dropna=False)["fid"].transform("count")
    fids["fid"] = fids["fid"].where(seeds == len(budgets))  # means over fewer seeds do not compare
    return Search(_with_base(fids), rows, budgets)


def _with_base(fids: pd.DataFrame) -> pd.DataFrame:
    """Also at w = 0, which a regular grid may step over: linear between its neighbours."""
    w, values = fids["w"], ["fid", "predicted_se"]
    if (w == 0).any() or not w.min() < 0 < w.max():
        return fids
    low, high = w[w < 0].max(), w[w > 0].min()
    below, above = fids[w == low], fids[w == high]  # the same seeds and γ in the same order
    share = -low / (high - low)
    base = below.assign(w=0.0)
    base[values] = (1 - share) * below[values].to_numpy() + share * above[values].to_numpy()
    return pd.concat([fids, base]).sort_values(["seed", "cfg", "w"])


def at_budget(rows: pd.DataFrame, budget: int) -> pd.DataFrame:
    """The rows of that B and of the base."""
    return rows[(rows["budget"] == budget) | (rows["w"] == 0)]


def at_guidance(rows: pd.DataFrame, guidance: float) -> pd.DataFrame:
    """The rows of that γ; all of them if it is NaN."""
    return rows if math.isnan(guidance) else rows[rows["cfg"] == guidance]
