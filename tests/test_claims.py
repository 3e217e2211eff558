"""The ledger of claims: the rules of its verdicts, and that it follows from the committed results."""

import inspect
import math
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from processes import BIN, ROOT

from neon import NeonError
from report import claims
from report.checks import CHECKS, Tables, evidence, paired, quadratic, set_size, share, u_shape, unimodal, verdict

MINI, PAPER = ROOT / "results/mini", ROOT / "results/paper"
GAIN = {"less": {"setting": "{}", "role": "neon"}, "more": {"setting": "{}", "role": "base"}}
CLAIMS = {entry["id"]: entry for entry in claims.claims()}


def finals(**fids) -> pd.DataFrame:
    """euler10_neon=[4, 5]: FID of each seed."""
    parts = [[*name.rsplit("_", 1), seed, fid] for name, of in fids.items() for seed, fid in enumerate(of)]
    return pd.DataFrame(parts, columns=["setting", "role", "seed", "fid"])


def results(folder: Path, **tables: pd.DataFrame) -> Tables:
    """A folder with these tables; gmo__final is gmo/final.csv."""
    for name, table in tables.items():
        path = folder / f"{name.replace('__', '/')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False)
    return Tables(folder)


# ---------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("neon", "found"),
    [
        ([8, 9, 10.1], "reproduced"),
        ([12, 13, 14.1], "not reproduced"),
        ([9, 14, 11], "mixed (2 of 3)"),
        ([10, 11, 12], "not reproduced"),  # Neon is the base
        ([8], "mixed (1 of 1)"),
        ([math.nan], "not measured"),
    ],
)
def test_a_claim_of_one_setting(tmp_path, neon, found):
    tables = results(tmp_path, final=finals(a_base=[10, 11, 12], a_neon=neon))
    assert verdict(paired(tables, 0, ["a"], **GAIN)) == found


@pytest.mark.parametrize(
    ("b", "c", "found"),
    [
        ([8, 9, 10.1], [7, 8, 9.1], "reproduced"),
        ([8, 9, 10.1], [12, 13, 14.1], "mixed (1 of 2)"),
        ([12, 13, 14.1], [12, 13, 14.1], "not reproduced"),
        ([12, 13, 14.1], [9, 14, 11], "not reproduced"),
        ([14, 9, 11], [9, 14, 11], "mixed (0 of 2)"),
        ([8, 9, 10.1], [], "reproduced"),
        ([], [], "not measured"),
    ],
)
def test_a_claim_of_two_settings(tmp_path, b, c, found):
    base = [10, 11, 12]
    tables = results(tmp_path, final=finals(b_base=base, b_neon=b, c_base=base, c_neon=c))
    cases = paired(tables, 0, ["b", "c"], **GAIN)
    assert verdict(cases) == found
    assert evidence(cases).endswith("; not measured: c") == (bool(b) and not c)


def test_evidence_is_the_paired_difference_and_its_interval(tmp_path):
    tables = results(tmp_path, final=finals(a_base=[10, 20, 30, 99], a_neon=[9, 18, 27]))  # seed 3 has no pair
    (case,) = paired(tables, 0.1, ["a"], **GAIN)
    assert (case.value, case.seeds) == (2, 3)
    assert case.hi == pytest.approx(2 + 4.30265 / math.sqrt(3), rel=1e-5)
    assert evidence([case]) == "a: +2 [-0.484, 4.48] (margin 1.8)"


def test_a_tolerance_makes_no_gain_a_claim_that_can_hold(tmp_path):
    tables = results(
        tmp_path, final=finals(a_base=[10.0, 10.1, 9.9], a_neon=[9.9, 10.1, 9.7], b_base=[10, 11], b_neon=[5, 6.1])
    )
    none = {"less": GAIN["more"], "more": GAIN["less"]}
    assert verdict(paired(tables, 0.05, ["a"], **none)) == "reproduced"
    assert verdict(paired(tables, 0, ["a"], **none)).startswith("mixed")
    assert verdict(paired(tables, 0.05, ["b"], **none)) == "not reproduced"


def test_a_number_next_to_zero(tmp_path):
    cosines = pd.DataFrame({"zeta": [0.9, 0.9, 1.1, 1.1], "seed": [0, 1, 0, 1], "cosine": [0.4, 0.41, -0.3, -0.31]})
    tables = results(tmp_path, toy_cosines=cosines)
    model = {"table": "toy_cosines", "zeta": "{}"}
    assert verdict(paired(tables, 0, [0.9], "cosine", more=model)) == "reproduced"
    assert verdict(paired(tables, 0, [1.1], "cosine", more=model)) == "not reproduced"
    assert verdict(paired(tables, 0, [1.1], "cosine", less=model)) == "reproduced"


@pytest.mark.parametrize(
    ("shares", "found"),
    [
        ((1, 1), "reproduced"),
        ((0, 0.1), "not reproduced"),
        ((1, 0.5), "mixed (1 of 2)"),
        ((0.5, 0.6), "mixed (0 of 2)"),
    ],
)
def test_a_share_of_seeds(tmp_path, shares, found):
    table = pd.DataFrame({"sampler": "z", "epochs": [50, 250], "positive": shares, "seeds": 10})
    tables = results(tmp_path, toy=table)
    cases = share(tables, 0, "toy", "positive", "epochs", {"sampler": "z"}, "seeds")
    assert verdict(cases) == found
    assert evidence(cases).startswith(f"epochs 50: {10 * shares[0]:.0f} of 10")


def test_yes_or_no_of_each_seed(tmp_path):
    right = [True] * 5 + [False, True, False, True, False] + [None, None]
    table = pd.DataFrame({"setting": ["a"] * 5 + ["b"] * 5 + ["c"] * 2, "sign_right": right})
    cases = share(results(tmp_path, diagnose=table), 0, "diagnose", "sign_right", "setting")
    assert [(case.name, case.text) for case in cases] == [("a", "5 of 5"), ("b", "2 of 5")]
    assert verdict(cases) == "mixed (1 of 2)"


def grid(fids: dict[float, float]) -> pd.DataFrame:
    """FID(w) at budget 8 and γ = 2, next to worse points of another budget and γ."""
    rows = [(w, 2.0, 8 if w else 0, fid) for w, fid in fids.items()] + [
        (1, 2.0, 16, 90),
        (1, 3.0, 8, 80),
        (0, 3.0, 0, 99),
    ]
    table = pd.DataFrame(rows, columns=["w", "cfg", "budget", "fid"])
    return table.assign(setting="a", seed=0)


def test_a_curve_has_one_minimum(tmp_path):
    one = results(tmp_path / "one", grid=grid({-1: 20, 0: 10, 1: 4, 2: 3, 3: 6}))
    two = results(tmp_path / "two", grid=grid({-1: 20, 0: 10, 1: 4, 2: 7, 3: 6}))
    short = results(tmp_path / "short", grid=grid({0: 10, 1: 4}))
    assert verdict(unimodal(one, 0.02, "grid", ["a"])) == "reproduced"
    assert verdict(unimodal(two, 0.02, "grid", ["a"])) == "not reproduced"
    assert verdict(unimodal(two, 0.1, "grid", ["a"])) == "reproduced"  # the step of 1 is less than 1.6
    assert verdict(unimodal(short, 0.02, "grid", ["a", "b"])) == "not measured"


def test_a_parabola_near_the_minimum(tmp_path):
    exact = {w: 3 + (w - 1.2) ** 2 for w in (-1, 0, 0.5, 1, 1.5, 2, 9)}
    bent = results(tmp_path / "bent", grid=grid({w: abs(w - 1) for w in (-1, 0, 1, 2, 3)}))
    assert verdict(quadratic(results(tmp_path, grid=grid(exact | {9: 1000})), 1e-6, "grid", ["a"])) == "reproduced"
    assert verdict(quadratic(bent, 0.1, "grid", ["a"])) == "not reproduced"


def budgets(*fids: list[float], size: int = 100) -> pd.DataFrame:
    """FIDs of the budgets 1, 2, … of each seed, and of the base."""
    rows = [("s", seed, size, b + 1, fid) for seed, of in enumerate(fids) for b, fid in enumerate(of)]
    rows += [("s", seed, 0, 0, 10.0) for seed in range(len(fids))]
    return pd.DataFrame(rows, columns=["setting", "seed", "num_synthetic", "budget", "fid"])


def test_the_budget_has_a_best_value_between_its_ends(tmp_path):
    up = results(tmp_path / "up", budget=budgets([5, 3, 6], [5.1, 3, 6.2]))
    down = results(tmp_path / "down", budget=budgets([5, 3, 2], [5.1, 3, 2.1]))
    assert verdict(u_shape(up, 0, "budget", ["s"])) == "reproduced"
    assert verdict(u_shape(down, 0, "budget", ["s"])) == "mixed (1 of 2)"
    assert verdict(u_shape(results(tmp_path, budget=budgets([5, 3])), 0, "budget", ["s"])) == "not measured"


def test_a_small_set_keeps_most_of_the_gain(tmp_path):
    whole = budgets([4, 3], [4, 3.1], [4, 2.9], size=2000)
    small = budgets([3.5, 4], [3.5, 4], [3.4, 4]).query("num_synthetic > 0")
    tables = results(tmp_path, budget=pd.concat([whole, small]))
    arguments = ("budget", "s", [100, 50], 2000)  # a gain of 6.5 in place of 7; there is no set of 50
    assert verdict(set_size(tables, 0.2, *arguments)) == "reproduced"
    assert verdict(set_size(tables, 0.01, *arguments)) == "not reproduced"
    assert evidence(set_size(tables, 0.2, *arguments)).endswith("; not measured: 50")


def test_what_is_not_there_is_not_measured(tmp_path):
    tables = results(tmp_path, final=finals(a_base=[1, 2], a_neon=[1, 2]), toy=pd.DataFrame({"epochs": [50]}))
    assert verdict(paired(tables, 0, ["a"], column="recall", **GAIN)) == "not measured"
    for entry in (
        {"check": {"name": "share", "table": "toy", "column": "positive", "by": "epochs"}},
        {"check": {"name": "u_shape", "table": "none", "settings": ["a"]}},
        {"check": {"name": "set_size", "table": "none", "setting": "a", "sizes": [1], "whole": 2}},
    ):
        assert claims.judged(tables, {"id": "x", "tolerance": 0} | entry) == {"verdict": "not measured", "evidence": ""}


@pytest.mark.parametrize("broken", ["bytes", "text", "twice", "budget"])
def test_a_broken_table_is_an_error_of_one_line(tmp_path, broken):
    good = finals(a_base=[1, 2], a_neon=[1, 2])
    tables = results(tmp_path, final=pd.concat([good, good]) if broken == "twice" else good)
    if broken == "bytes":
        (tmp_path / "final.csv").write_bytes(b"\xff\xfe\x00")
    if broken == "text":
        results(tmp_path, final=good.assign(fid="low"))
    check = {"name": "paired", "settings": ["a"], **GAIN}
    if broken == "budget":
        results(tmp_path, budget=pd.concat([budgets([5, 3, 6])] * 2))
        check = {"name": "u_shape", "table": "budget", "settings": ["s"]}
    with pytest.raises(NeonError) as error:
        claims.judged(tables, {"id": "x", "tolerance": 0, "check": check})
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ---------------------------------------------------------------- the claims


def test_every_claim_has_an_id_of_its_own_a_check_that_takes_its_parameters_and_plain_words():
    entries = claims.claims()
    assert len(CLAIMS) == len(entries) and {entry["kind"] for entry in entries} == {"paper", "objection", "number"}
    for entry in entries:
        check = dict(entry["check"])
        inspect.signature(CHECKS[check.pop("name")]).bind(None, entry["tolerance"], **check)
        assert re.fullmatch(r"[a-z0-9-]+", entry["id"]) and entry["claim"].endswith(".") and entry["source"]
        assert len(entry["claim"].split()) <= 25


def test_each_family_has_its_claims():
    for name in ("fid", "recall", "precision"):
        assert {f"{name}-{family}" for family in ("edm", "flow", "var", "xar", "imm")} <= CLAIMS.keys()


def test_every_number_of_the_paper_is_a_claim_made_from_its_table(tmp_path):
    table, main = (pd.read_csv(ROOT / f"paper/{name}.csv") for name in ("table_a1", "neon_results"))
    count = (
        table[["fid_uncond", "fid_cond"]].notna().sum().sum()
        + main[["base_fid", "neon_fid", "w", "cfg"]].notna().sum().sum()
    )
    assert sum(entry["kind"] == "number" for entry in CLAIMS.values()) == count > 100
    shutil.copytree(ROOT / "paper", tmp_path / "paper")
    table.replace({"fid_uncond": 1.12}, 1.25).to_csv(tmp_path / "paper/table_a1.csv", index=False)
    changed = {entry["id"]: entry["claim"] for entry in claims.claims(tmp_path / "paper")}
    assert {name for name in changed if changed[name] != CLAIMS[name]["claim"]} == {"fid-of-edm-neon-ffhq64-uncond"}


def test_a_row_that_measures_a_number_of_the_paper_gives_it_a_verdict(tmp_path):
    folder = tmp_path / "paper"
    line = {"benchmark": "ffhq64", "kind": "uncond", "fid_released": 1.14}
    settings = {"setting": ["xar_b"], "fid_base": [1.73], "fid_neon": [1.4], "w_star": [1.5], "cfg_star": [math.nan]}
    a1 = pd.DataFrame([line | {"model": "EDM + Neon"}, line | {"model": "EDM-VP", "fid_released": 2.6}])
    results(folder, table_a1=a1.assign(fid_rerun=math.nan), settings=pd.DataFrame(settings))
    found = claims.ledger(folder).set_index("id")
    measured = found[found["verdict"] != "not measured"]["verdict"].to_dict()
    assert measured == {
        "fid-of-edm-vp-ffhq64-uncond": "not reproduced",
        "fid-of-edm-neon-ffhq64-uncond": "reproduced",
        "fid-of-the-base-xar-b": "reproduced",
        "fid-of-neon-xar-b": "not reproduced",
        "best-w-xar-b": "reproduced",
    }
    assert found["evidence"]["fid-of-edm-neon-ffhq64-uncond"] == "1.14, paper 1.12"


def test_controls_rivals_and_the_successor_have_a_verdict_once_they_are_measured(tmp_path):
    """Neon has FID 4, its base 10; made-up numbers of the others."""

    def made(**fids):
        """euler10_neon=4: three seeds near it."""
        return finals(**{name: [fid, fid + 0.1, fid - 0.1] for name, fid in fids.items()})

    def for_each(**fids):
        """The same in every family."""
        families = ("euler10", "fm4", "tau06", "cfg2", "imm8")
        return made(**{f"{setting}{name}": fid for setting in families for name, fid in fids.items()})

    real, corrupted = {"-real_selftrained": 9}, {"-corrupted_neon": 9.9, "-corrupted_base": 10}
    gmo = {"imm1-gmo0.1_base": 36, "imm1-gmo0_neon": 36, "imm1-gmo0.1_neon": 30, "imm1-noise0.1_neon": 35}
    guided = for_each(**{"-sims_neon": 3.9, "-auto_neon": 2})
    chosen = made(fm4_base=10, fm4_neon=5).assign(chosen_by="digits", judged_by="second")
    other = made(fm4_neon=50).assign(chosen_by="second", judged_by="second")
    results(
        tmp_path / "mini",
        final=for_each(_neon=4, _base=10),
        controls__final=for_each(**real, **corrupted, **{"-random_neon": 3, "-older_neon": 4}),
        rivals__final=pd.concat([guided, made(**{"tau06-ddo_selftrained": 5})]),
        gmo__final=made(**gmo),
        spaces=pd.concat([chosen, other]),
        diagnose=pd.DataFrame({"setting": ["fm4"] * 5, "sign_right": [True] * 5}),
    )
    found = claims.ledger(tmp_path / "mini").set_index("id")["verdict"]
    expected = {
        "not-compute": "reproduced",
        "not-random": "not reproduced",
        "not-average": "not reproduced",
        "corrupted": "reproduced",
        "sims": "reproduced",
        "autoguidance": "not reproduced",
        "ddo": "reproduced",
        "gmo": "reproduced",
        "gmo-not-noise": "reproduced",
        "gmo-one-step": "reproduced",
        "second-space": "reproduced",
        "diagnose": "reproduced",
    }
    assert found[list(expected)].to_dict() == expected


@pytest.mark.parametrize(
    "text", ["", "claims: 3", "claims: [{id: x}]", "a: [", "claims: [{id: x, check: {name: guess}}]"]
)
def test_a_broken_list_of_claims_is_an_error(tmp_path, text):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(NeonError, match=r"claims\.yaml"):
        claims.claims(tmp_path)


# ---------------------------------------------------------------- the committed results


@pytest.mark.parametrize("folder", [MINI, PAPER], ids=lambda folder: folder.name)
def test_the_committed_ledger_follows_from_the_committed_results(folder):
    """If it does not: `make claims`."""
    assert (folder / "claims.csv").read_text() == claims.as_csv(claims.ledger(folder))


def test_a_changed_result_changes_a_verdict(tmp_path):
    shutil.copytree(
        MINI, tmp_path / "mini", ignore=lambda _, names: [n for n in names if "." in n and not n.endswith(".csv")]
    )
    before = claims.ledger(tmp_path / "mini").set_index("id")["verdict"]
    final = pd.read_csv(tmp_path / "mini/final.csv")
    final.loc[final["setting"] == "fm4", "role"] = final["role"].map(
        {"base": "neon", "neon": "base", "selftrained": "selftrained"}
    )
    final.to_csv(tmp_path / "mini/final.csv", index=False)
    after = claims.ledger(tmp_path / "mini").set_index("id")["verdict"]
    changed = {"fid-flow", "recall-flow", "precision-flow"}
    objections = {"not-random", "not-average", "not-compute"}  # the gain of flow matching is compared with others there
    assert set(before.index[before != after]) == changed | objections
    assert (before[sorted(changed)] == "reproduced").all() and (after[sorted(changed)] == "not reproduced").all()


def test_the_stage_depends_on_every_table_that_a_claim_reads():
    stage = yaml.safe_load((ROOT / "mini/dvc.yaml").read_text())["stages"]["claims"]
    deps = {(ROOT / "mini" / path).resolve() for path in stage["deps"]}
    read = {
        ROOT / "results" / entry["scale"] / f"{place.get('table', 'final')}.csv"
        for entry in CLAIMS.values()
        for place in (entry["check"], *(entry["check"].get(name, {}) for name in ("less", "more")))
        if entry["scale"] != "paper"  # of another pipeline, which must not run from here
    }
    there = {path for path in read if path.exists()}
    assert len(there) > 6
    assert {path for path in there if not {path, path.parent} & deps} == set()


def test_in_words():
    verdicts = ["reproduced", "mixed (1 of 2)", "not reproduced", "not measured", "not reproduced"]
    table = pd.DataFrame({"id": list("abcde"), "verdict": verdicts})
    expected = "1 of 5 claims reproduced on digits; 1 mixed; 1 not measured; not reproduced: `c`, `e`"
    assert claims.in_words(table) == expected
    assert claims.of_numbers(table[3:4]) == "the paper's 1 numbers: not measured here"
    assert claims.of_numbers(table) == "the paper's 5 numbers: 4 measured, 1 of them reproduced"


def test_where_it_failed(tmp_path):
    def of(**changes):
        """Neon − base of each setting: FID, recall, precision."""
        rows = []
        for setting, (fid, recall, precision) in changes.items():
            for seed in range(3):
                base = {"setting": setting, "seed": seed, "fid": 9 + seed, "recall": 0.5, "precision": 0.5}
                neon = base | {"fid": 9 + seed * 1.1 + fid, "recall": 0.5 + recall, "precision": 0.5 + precision}
                rows += [base | {"role": "base"}, base | {"role": "selftrained"}, neon | {"role": "neon"}]
        return pd.DataFrame(rows)

    good, none, other, last = (-5, 0.1, -0.1), (0, 0.1, -0.1), (-5, -0.1, 0.1), (0.5, 0.1, -0.1)
    results(
        tmp_path, final=of(good=good, none=none), ablations__x__final=of(other=other), controls__final=of(last=last)
    )
    found = claims.failures(tmp_path)
    assert found[["setting", "what"]].to_numpy().tolist() == [
        ["none", "no sure gain"],
        ["other", "recall fell, precision rose"],
    ]
    assert found["gain"].iloc[1].startswith("+4.9 [")


def test_each_statement_about_failures_names_a_line_that_shows_it():
    """A setting of the table, or a claim that is not reproduced; a rerun may change both."""
    text = (ROOT / "docs/where-it-fails.md").read_text().partition("## Settings")[0]
    statements = re.findall(r"^- .*?(?=^- |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    settings = set(claims.failures(MINI)["setting"])
    verdicts = claims.ledger(MINI).set_index("id")["verdict"]
    assert len(statements) > 5
    for statement in statements:
        named = set(re.findall(r"`(.*?)`", re.sub(r"\s+", " ", statement)))
        assert named <= settings | set(verdicts.index), statement
        assert named & settings or any(verdicts[name].startswith(("mixed", "not rep")) for name in named), statement


def test_the_command_prints_writes_and_refuses(tmp_path):
    results(tmp_path / "mini", final=finals(fm4_base=[10, 11, 12], fm4_neon=[8, 9, 10.1]))

    def run(*argv):
        return subprocess.run([BIN / "python", "-m", "report.claims", *argv], capture_output=True, text=True, cwd=ROOT)

    printed = run(tmp_path / "mini")
    assert "reproduced       fid-flow: Neon lowers FID" in printed.stdout and "fm4: +1.97 [" in printed.stdout
    assert not (tmp_path / "mini/claims.csv").exists()
    assert run(tmp_path / "mini", "--write").returncode == 0
    written = (tmp_path / "mini/claims.csv").read_text()
    assert pd.read_csv(tmp_path / "mini/claims.csv").columns.tolist() == claims.COLUMNS
    (tmp_path / "mini/final.csv").write_bytes(b"\xff")
    for folder in (tmp_path / "mini", tmp_path):
        refused = run(folder, "--write")
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and refused.stderr.startswith("error: ")
    assert (tmp_path / "mini/claims.csv").read_text() == written
