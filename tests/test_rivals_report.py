"""Neon next to its controls and rivals: the numbers of the table and what the figure draws."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from report import rivals

SETTINGS = {"euler10": "EDM", "fm4": "Flow"}
ROLES = {"base": (0, 0), "selftrained": (-1, 12800), "neon": (1.5, 12800)}


def rows(setting, base, selftrained, neon, seeds=2, **columns):
    """Final rows of some seeds, each seed's FIDs 1 % above those of the seed before."""
    fids = {"base": base, "selftrained": selftrained, "neon": neon}
    for seed in range(seeds):
        for role, (w, budget) in ROLES.items():
            fid = fids[role] * 1.01**seed
            where = {"role": role, "family": "edm", "setting": setting, "seed": seed, "w": w, "budget": budget}
            yield where | {"fid": fid, "precision": 0.9, "recall": 0.8, "n": 2000} | columns


@pytest.fixture
def final():
    made = [
        *rows("euler10", 10, 20, 5),
        *rows("euler10-real", 10, 8, 9),
        *rows("euler10-sims", 10, 20, 4),
        *rows("euler10-ddo", 10, 2, 10),
        *rows("fm4", 40, 80, 10, seeds=1),
    ]
    return pd.DataFrame(made)


def test_each_method_has_the_rows_that_are_its_own(final):
    found = {method.title: own["fid"].iloc[0] for method, own, _ in rivals.models(final, "euler10")}
    assert found == {
        "Neon": 5,
        "self-training (w = −1)": 20,
        "fine-tuned on real images": 8,
        "Neon with real images as S": 9,
        "SIMS": 4,
        "DDO": 2,
    }
    assert [method.title for method, *_ in rivals.models(final, "fm4")] == ["Neon", "self-training (w = −1)"]


def test_the_share_is_paired_within_a_seed(final):
    (_, own, base), *_ = rivals.models(final, "euler10")
    assert rivals.share(own, base) == pytest.approx((50, 0), abs=1e-9)
    other = own.assign(fid=[5, 6])
    mean, half = rivals.share(other, base)
    assert mean == pytest.approx((50 + 100 * 6 / 10.1) / 2) and half == pytest.approx(
        12.706 * (59.406 - 50) / 2, rel=1e-3
    )


def test_the_table_says_what_each_method_costs(final):
    table = rivals.table(final, SETTINGS).set_index(["setting", "method"])
    assert table.loc[("EDM", "SIMS"), "passes"] == "×2" and table.loc[("EDM", "Neon"), "passes"] == "×1"
    assert table.loc[("EDM", "DDO"), "FID, % of base"] == "20 ± 0" and table.loc[("EDM", "base"), "images"] == "0"
    assert table.loc[("EDM", "Neon"), "images"] == "12,800" and table.loc[("EDM", "Neon"), "recall"] == "0.800"


def test_the_figure_draws_a_point_per_method_and_describes_it(final):
    fig = rivals.figure(final, SETTINGS)
    first, second = fig.axes[:2]
    labels = [text.get_text() for text in first.get_yticklabels()]
    assert labels[:2] == ["Neon", "self-training (w = −1)"] and len(labels) == 6
    points = [container.lines[0].get_xydata()[0].tolist() for container in first.containers]
    assert points == [pytest.approx([x, y]) for y, x in enumerate([50, 200, 80, 90, 40, 20])]
    assert first.get_xscale() == "log" and second.containers[0].lines[0].get_xydata()[0, 0] == pytest.approx(25)
    assert "EDM: Neon 50 %" in fig.get_label()
    plt.close(fig)


def test_strengths_of_gmo_are_compared_with_none(tmp_path):
    final = pd.DataFrame(
        [*rows("imm1-gmo0", 36, 30, 36), *rows("imm1-gmo0.1", 36, 30, 18), *rows("imm1-noise0.1", 36, 30, 36)]
    )
    table = rivals.strengths(final, {"imm1-gmo0.1": "GMO"}).set_index("setting")
    assert table.loc["GMO", "minus α = 0, paired"].startswith("-18") and table.loc["GMO", "no w > 0 helps"] == "0 of 2"
    assert table.loc["imm1-noise0.1", "minus α = 0, paired"] == "0 ± 0"


def test_headlines_are_the_settings_that_were_put_to_the_test(final):
    titles = {"euler10": "EDM, 10 steps (mode seeking)", "fm4": "Flow"}
    assert rivals.headlines(final, titles) == {"euler10": "EDM, 10 steps"}


def test_what_was_not_measured_is_left_out(tmp_path, final):
    final.to_csv(tmp_path / "final.csv", index=False)
    (tmp_path / "rivals").mkdir()
    pd.DataFrame([*rows("fm4-sims", 40, 80, 9)]).to_csv(tmp_path / "rivals/final.csv", index=False)
    found = rivals.read_all(tmp_path)
    assert set(found["setting"]) == set(final["setting"]) | {"fm4-sims"} and len(found) == len(final) + 6
