"""What is reported: base, self-trained model and Neon, compared on new images."""

import json
import math
from collections.abc import Mapping, Sequence

import torch

from neon import NeonError
from neon.measure.candidates import Point, by_of
from neon.sampling import parse_seeds

# Facts of rows whose FIDs can be compared: how images were sampled, and how they were measured.
ALIKE = ("family", "base_sha256", "vae_sha256", "class_idx", "dtype", "device", "tf32")
ALIKE += ("seeds", "features", "reference", "by")


def final_points(searched: Sequence[Mapping], options: Sequence[str]) -> dict[str, Point]:
    """The three points to compare on new images, by their roles: base, selftrained, neon.

    base: w = 0 with the sampling options that suit it best. neon: the lowest FID over w > 0 if it is below the base's;
    otherwise the base itself, so never w < 0. selftrained: w = −1 with the snapshot of the best w > 0 (or of the best
    w < 0 if no w > 0 was searched), and with the options that suit it best if w = −1 was searched, else with the
    base's. A FID that is not finite never wins.

    searched: rows of a finished search; options: names of the family's sampling options. Raises NeonError if the rows
    were not measured alike, if no FID is finite, or if no self-trained model is among them.
    """
    for fact in ALIKE:
        if len({json.dumps(row.get(fact)) for row in searched}) > 1:
            raise NeonError(f"the rows of the search differ in {fact}, so their FIDs cannot be compared")
    finite = sorted((row for row in searched if math.isfinite(row["fid"])), key=lambda row: row["fid"])
    if not finite:
        raise NeonError("the search holds no finite FID")
    swept = [name for name in options if len({row[name] for row in searched}) > 1]

    def best(of, default=None):
        return next((row for row in finite if of(row)), default)

    def point(row, w, snapshot=None):
        return Point(snapshot if w else None, w, tuple((name, row[name]) for name in swept))

    merged, base = best(lambda row: row["w"] > 0), best(lambda row: row["w"] == 0)
    trained = merged or best(lambda row: row["w"]) or next((row for row in searched if row["w"]), None)
    if trained is None:
        raise NeonError("the search holds no self-trained model")
    snapshot = trained["selftrained"]
    alone = best(lambda row: row["w"] == -1 and row["selftrained"] == snapshot) or base or trained
    at_base = point(base or merged or finite[0], 0.0)
    helps = merged and (base is None or merged["fid"] < base["fid"])
    return {
        "base": at_base,
        "selftrained": point(alone, -1.0, snapshot),
        "neon": point(merged, merged["w"], snapshot) if helps else at_base,
    }


def check_made_alike(searched: Sequence[Mapping], by: str) -> None:
    """Raises NeonError if the search went by another use of θ_s than `by`, a key of neon.measure.candidates.BY."""
    for row in searched:
        if (then := by_of(row)) != by:
            raise NeonError(f"the search was made --by {then}, this command has --by {by}: a w is not the other's")


def check_sampled_alike(searched: Sequence[Mapping], facts: Mapping[str, object]) -> None:
    """facts: sampling options, and how rows are measured, as they are now. Raises NeonError if the search, whose rows
    agree in an option, had another value."""
    for name, now in facts.items():
        then = {json.dumps(row[name]): row[name] for row in searched if name in row}
        if len(then) == 1 and now not in then.values():
            (value,) = then.values()
            raise NeonError(
                f"the search had {name} {value}, this command has {now}: the best w of one is not the other's"
            )


def in_common(searched: Sequence[Mapping], seeds: torch.Tensor) -> int:
    """How many of the images that are named by these seeds, (n,) int64, chose the points of a search."""
    used = torch.cat([seeds_of(row) for row in searched]).unique()
    return int(torch.isin(seeds, used).sum())


def seeds_of(row: Mapping) -> torch.Tensor:
    """The seeds of a row of results, (n,) int64: 'first-last' or a list."""
    seeds = row["seeds"]
    return parse_seeds(seeds) if isinstance(seeds, str) else torch.tensor(seeds, dtype=torch.int64)
