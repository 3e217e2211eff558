"""Tables of results → the cases of a claim → its verdict. The parameters of a check are those in paper/claims.yaml.

A case is a number with its 95 % interval, turned so that the claim says 'above −margin'. It agrees if all of the
interval is above, disagrees if none of it is, and is open otherwise.

    reproduced        every case agrees
    not reproduced    no case agrees, and one or more disagree
    mixed (k of n)    all else: k of n cases agree; of one open case: k of its n seeds are above
    not measured      no case has its table, setting and columns

A case over seeds has the t-interval of the differences within a seed; one seed has none, so it is open. A share of
seeds has Wilson's interval, and its claim is 'more than half'. A curve or a number of the paper has no interval: the
number alone decides.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from neon import NeonError
from neon.measure.metrics import t_interval

NOT_MEASURED = "not measured"
VERDICTS = ("reproduced", "mixed", "not reproduced", NOT_MEASURED)


class NotMeasured(Exception):
    """A table, a setting or a column that is not there."""


# ---------------------------------------------------------------- cases and verdicts


@dataclass(frozen=True)
class Case:
    """A number that the claim says is above −margin, and its interval; without a number: not measured."""

    name: str
    value: float = np.nan
    lo: float = np.nan
    hi: float = np.nan
    margin: float = 0.0
    above: int = 0  # of the seeds
    seeds: int = 1
    text: str = ""  # for reading

    @property
    def measured(self) -> bool:
        return not np.isnan(self.value)

    @property
    def agrees(self) -> bool:
        return self.lo > -self.margin

    @property
    def disagrees(self) -> bool:
        return self.hi <= -self.margin


def over_seeds(name: str, values: pd.Series, margin: float = 0.0) -> Case:
    """A case of one number for each seed; of no seed: not measured."""
    if values.empty:
        return Case(name)
    mean, half = t_interval(values.to_numpy())
    text = f"{mean:+.3g} [{mean - half:.3g}, {mean + half:.3g}]" if np.isfinite(half) else f"{mean:+.3g}, no interval"
    text += f" (margin {margin:.2g})" if margin else ""
    return Case(name, mean, mean - half, mean + half, margin, int((values > -margin).sum()), len(values), text)


def of_share(name: str, count: int, total: int) -> Case:
    """A case of so many seeds: more than half of all is claimed."""
    found = binomtest(count, total).proportion_ci(method="wilson")
    return Case(name, count / total - 0.5, found.low - 0.5, found.high - 0.5, 0.0, count, total, f"{count} of {total}")


def alone(name: str, value: float, margin: float, text: str) -> Case:
    """A case of a number without an interval."""
    return Case(name, value, value, value, margin, int(value > -margin), 1, text)


def verdict(cases: list[Case]) -> str:
    """As the head of this file says."""
    measured = [case for case in cases if case.measured]
    agreeing = sum(case.agrees for case in measured)
    if not measured:
        return NOT_MEASURED
    if agreeing == len(measured):
        return "reproduced"
    if not agreeing and any(case.disagrees for case in measured):
        return "not reproduced"
    if len(measured) == 1:
        return f"mixed ({measured[0].above} of {measured[0].seeds})"
    return f"mixed ({agreeing} of {len(measured)})"


def evidence(cases: list[Case]) -> str:
    """One line: the number of each case, then the names of those without; '' if nothing is measured."""
    shown = [f"{case.name}: {case.text}" if case.name else case.text for case in cases if case.measured]
    absent = [case.name for case in cases if not case.measured]
    return "; ".join([*shown, *([f"{NOT_MEASURED}: {', '.join(absent)}"] if absent and shown else [])])


# ---------------------------------------------------------------- tables


class Tables:
    """The tables of a folder of results by name: `ablations/cross/final` is ablations/cross/final.csv."""

    def __init__(self, folder: Path):
        self.folder, self.read = folder, {}

    def __call__(self, name: str) -> pd.DataFrame:
        """Raises NotMeasured if there is no such table, NeonError if the file holds something else."""
        path = self.folder / f"{name}.csv"
        if name not in self.read:
            if not path.exists():
                raise NotMeasured
            try:
                self.read[name] = pd.read_csv(path, dtype={"setting": str})
            except ValueError:  # of pandas and of decoding
                raise NeonError(f"{path}: not a table") from None
        return self.read[name]

    def rows(self, table: str, where: Mapping[str, object], *columns: str) -> pd.DataFrame:
        """The lines with these values, and with numbers in the columns. Raises NotMeasured if none is, NeonError."""
        found = self(table)
        if not {*where, *columns} <= set(found):
            raise NotMeasured
        for column, value in where.items():
            found = found[found[column].astype(str) == str(value)]
        try:
            found = found.astype(dict.fromkeys(columns, float)).dropna(subset=list(columns))
        except ValueError:
            text = f"{self.folder / table}.csv: something other than numbers in {', '.join(columns)}"
            raise NeonError(text) from None
        if found.empty:
            raise NotMeasured
        return found

    def seeds(self, model: Mapping[str, object], setting: object, column: str) -> pd.Series:
        """Seed → the number of a model, see paper/claims.yaml. Raises NotMeasured, and NeonError if a seed has two."""
        where = {key: str(value).format(setting) for key, value in model.items() if key not in ("table", "column")}
        table, column = model.get("table", "final"), model.get("column", column)
        found = self.rows(table, where, "seed", column).set_index("seed")[column]
        if not found.index.is_unique:
            raise NeonError(f"{self.folder / table}.csv: a seed of {' '.join(where.values())} has several rows")
        return found


# ---------------------------------------------------------------- checks: tables and parameters → cases


def paired(tables: Tables, tolerance: float, settings=("",), column: str = "fid", less=None, more=None) -> list[Case]:
    """`less` has the smaller number of the two, within a seed and in each setting; without one of them it is 0.

    margin: tolerance × mean of `less`.
    """

    def of(setting: object) -> Case:
        models = {name: model for name, model in (("less", less), ("more", more)) if model}
        found = {name: tables.seeds(model, setting, column) for name, model in models.items()}
        both = pd.DataFrame(found).dropna().reindex(columns=["less", "more"], fill_value=0.0)
        return over_seeds(str(setting), both["more"] - both["less"], tolerance * both["less"].mean())

    return each(settings, of)


def share(tables: Tables, _: float, table: str, column: str, by: str, where=None, of: str = "") -> list[Case]:
    """More than half of the seeds have it, for each value of `by`. column: yes or no, or a share of `of` seeds."""
    rows = tables.rows(table, where or {}, column, *([of] if of else []))
    if by not in rows:
        raise NotMeasured
    groups = rows.assign(count=rows[column] * rows[of] if of else rows[column], total=rows[of] if of else 1.0)
    sums = groups.groupby(by, sort=False)[["count", "total"]].sum().round().astype(int)
    return [of_share(f"{by} {name}" if of else str(name), *counts) for name, *counts in sums.itertuples()]


def unimodal(tables: Tables, tolerance: float, table: str, settings: list) -> list[Case]:
    """No step of FID(w) goes up before the minimum or down after it. margin: tolerance × range of the curve."""

    def of(setting: object, curve: pd.Series) -> Case:
        steps, low = np.diff(curve), int(np.argmin(curve))
        worst = max(0.0, *steps[:low], *-steps[low:])
        return alone(str(setting), -worst, tolerance * np.ptp(curve), f"{worst:.2g} of {np.ptp(curve):.3g}")

    return curves(tables, table, settings, 3, of)


def quadratic(tables: Tables, tolerance: float, table: str, settings: list) -> list[Case]:
    """A parabola fits the five points of FID(w) nearest to the minimum. margin: tolerance × range of these points."""

    def of(setting: object, curve: pd.Series) -> Case:
        near = curve.iloc[np.argsort(np.abs(curve.index - curve.idxmin()), kind="stable")[:5]]
        worst = np.abs(np.polyval(np.polyfit(near.index, near, 2), near.index) - near).max()
        return alone(str(setting), -worst, tolerance * np.ptp(near), f"{worst:.2g} of {np.ptp(near):.3g}")

    return curves(tables, table, settings, 5, of)


def curves(tables: Tables, table: str, settings: list, points: int, of: Callable) -> list[Case]:
    """A case for each seed's FID(w) at the B and γ of its best w >= 0, if it has so many points."""

    def cases(setting: object) -> Iterator[Case]:
        rows = tables.rows(table, {"setting": setting}, "w", "fid", "budget", "seed")
        rows = rows.reindex(columns=["w", "fid", "budget", "seed", "cfg"])
        for _, part in rows[np.isfinite(rows["fid"])].groupby("seed"):
            best = part.loc[part["fid"].where(part["w"] >= 0).idxmin()]
            same = part["budget"].isin([0, best["budget"]]) & ((part["cfg"] == best["cfg"]) | part["cfg"].isna())
            curve = part[same].set_index("w")["fid"].sort_index()
            if len(curve) >= points:
                yield of(setting, curve)

    return each(settings, cases)


def u_shape(tables: Tables, _: float, table: str, settings: list) -> list[Case]:
    """For each setting and |S|: the first and the last B are worse than the best one between them, by its mean."""

    def of(setting: object) -> Iterator[Case]:
        rows = tables.rows(table, {"setting": setting}, "fid", "budget", "num_synthetic", "seed")
        for size, part in rows[rows["budget"] > 0].groupby("num_synthetic"):
            fids = part.pivot(index="seed", columns="budget", values="fid").sort_index(axis="columns")
            if len(fids.columns) > 2:
                best = fids.iloc[:, 1:-1].mean().idxmin()
                for end, name in ((0, "first"), (-1, "last")):
                    yield over_seeds(f"{setting} |S| {size:g} {name}", (fids.iloc[:, end] - fids[best]).dropna())

    return each(settings, of)


def set_size(tables: Tables, tolerance: float, table: str, setting: str, sizes: list, whole: int) -> list[Case]:
    """A smaller |S| has the FID of the whole, each at its best B. margin: tolerance × mean gain of the whole."""
    rows = tables.rows(table, {"setting": setting}, "fid", "num_synthetic", "seed")
    fids = rows.groupby(["seed", "num_synthetic"])["fid"].min().unstack()

    def of(size: object) -> Case:
        if not {0, size, whole} <= set(fids):
            raise NotMeasured
        margin = tolerance * (fids[0] - fids[whole]).mean()
        return over_seeds(f"|S| {size}", (fids[whole] - fids[size]).dropna(), margin)

    return each(sizes, of)


def number(tables: Tables, tolerance: float, table: str, where: dict, columns: list[str], paper: float) -> list[Case]:
    """The first of the columns that is measured is the paper's number. margin: tolerance × the paper's number."""

    def of(column: str) -> Case:
        found = tables.rows(table, where, column)[column].mean()
        return alone("", -abs(found - paper), tolerance * abs(paper), f"{found:.3g}, paper {paper:g}")

    return sorted(each(columns, of), key=lambda case: not case.measured)[:1]


CHECKS = {check.__name__: check for check in (paired, share, unimodal, quadratic, u_shape, set_size, number)}


def each(names: Iterable, of: Callable) -> list[Case]:
    """The case or cases of each; one without a number where something is missing."""
    return [case for name in names for case in _attempt(name, of)]


def _attempt(name: object, of: Callable) -> list[Case]:
    try:
        found = of(name)
        return [found] if isinstance(found, Case) else list(found) or [Case(str(name))]
    except NotMeasured:
        return [Case(str(name))]
