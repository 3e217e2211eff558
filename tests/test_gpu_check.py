"""`python -m benchmarks.gpu`: its rehearsal, its rows and its pages; tests/test_cuda.py is what it runs on a card."""

import ast
import inspect
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from processes import ROOT

sys.path.append(str(ROOT))
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bench as benches
from benchmarks.gpu import page, parity, speed, suite
from benchmarks.gpu.bench import PRECISIONS, Bench, Measurement
from benchmarks.gpu.card import Card, Graphed, StandIn
from benchmarks.gpu.parity import Case
from benchmarks.gpu.targets import Target, presets, rehearsed
from neon import NeonError
from neon.family import FAMILIES, get_family
from neon.files import read_object, write_json
from neon.sampling import Streams

ABOUT = {"card": "GPU A", "cards": 1, "driver": "1", "cuda": "13", "torch": "2", "commit": "abc", "date": "2026"}


@pytest.fixture
def rehearsal(tmp_path):
    return Bench(StandIn(), rehearsed(), tmp_path, rehearse=True)


# ---------------------------------------------------------------- the rehearsal, from end to end


def test_a_rehearsal_of_two_sections(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "rehearsed", lambda: [t for t in rehearsed() if t.family.name in ("edm", "var")])
    gpu.main(["--rehearse", "--only", "training,rates", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    found = read_object(path)
    assert [row["name"] for row in found["rows"]["rates"]] == list(PRECISIONS)
    assert [row["model"] for row in found["rows"]["training"]] == ["edm_digits", "var_digits"]
    for row in found["rows"]["training"]:
        assert row["images_per_second"] == pytest.approx(row["batch"] * row["steps_per_second"])
        assert 0 < row["share_of_products"] < 1 and row["peak_gib"] > 0
    assert found["environment"]["torch"] == version("torch")
    table = path.with_suffix(".md").read_text()
    assert "| edm_digits, digits | 8 | 4 | float32 |" in table and "Not measured." in table
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 + 4 + 2 + 1 and "6 rows, of which 0 are not measured" in printed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_rehearsal(tmp_path):
    gpu.main(["--rehearse", "--minutes", "25", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    rows = read_object(path)["rows"]
    assert not benches.failures(rows) and all("error" not in row for part in rows.values() for row in part)
    assert all(rows[name] for name in gpu.SECTIONS)
    for family in FAMILIES:
        mine = [row for row in rows["sampling"] if row.get("model") == f"{family}_digits"]
        assert all("images_per_second" in row or row["not measured"] == speed.DEPENDS for row in mine)
        assert sum("times_released" in row for row in mine) >= 4


def test_a_rehearsal_does_not_write_where_results_of_cards_are():
    with pytest.raises(NeonError, match="results of cards"):
        gpu.main(["--rehearse", "--only", "rates", "--out", str(gpu.RESULTS / "x")])
    assert not (gpu.RESULTS / "x").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(NeonError, match=r"no CUDA device here.*--rehearse"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "said"), [("--only rate", "no section 'rate'"), ("--minutes 0", "--minutes")])
def test_wrong_options(words, said):
    with pytest.raises(NeonError, match=said):
        gpu.main(["--rehearse", *words.split()])


# ---------------------------------------------------------------- which rows there are


@pytest.mark.parametrize("rehearse", [True, False])
def test_every_family_has_its_rows(tmp_path, rehearse):
    bench = Bench(StandIn(), rehearsed() if rehearse else presets(), tmp_path, rehearse)
    names = {section: [m.name for m in make(bench)] for section, make in gpu.SECTIONS.items()}
    assert all(len(set(part)) == len(part) for part in names.values())
    for family in FAMILIES:
        for precision in PRECISIONS:
            assert any(re.fullmatch(rf"{family} \S+, {precision}", name) for name in names["parity"])
    for target in bench.targets:
        assert {f"{target.name}, eager, {precision}" for precision in PRECISIONS} <= set(names["sampling"])
        assert f"{target.name}, released way" in names["sampling"] and f"{target.name}, float32" in names["whole"]
        assert f"{target.name}, {target.recipe}" in names["training"]
        assert any(name.startswith(f"{target.name}, compile") for name in names["compiled"])
        assert {f"{target.name}, random numbers", f"{target.name}, decoding"} <= set(names["parts"])


def test_every_network_of_the_presets_is_a_target():
    rows = [(name, row) for name in FAMILIES for row in get_family(name).presets.values()]
    found = {(t.family.name, t.network): t for t in presets()}
    assert {(name, row.network) for name, row in rows} <= found.keys() and len(presets()) == len(found)
    d36 = found["var", "d36_512"]
    assert (d36.batch, d36.micro_batch, d36.recipe, d36.sampling["cfg"]) == (32, 3, "d36_512", 3.2)


# ---------------------------------------------------------------- what happens to a measurement


def run(bench, measurements, minutes=1.0, known=(), only=("a",)):
    return benches.run({"a": lambda _: measurements}, bench, only, minutes, {"a": list(known)}, lambda rows: None)["a"]


def test_a_failure_becomes_a_row_and_the_rest_is_measured(rehearsal, capsys):
    def fails():
        raise RuntimeError("of the library\nin two lines")

    def full():
        raise torch.OutOfMemoryError("20 GiB")

    rows = run(
        rehearsal, [Measurement("x", 1, fails), Measurement("y", 1, full), Measurement("z", 1, lambda: {"n": 1})]
    )
    assert rows[0]["error"] == "RuntimeError: of the library in two lines" and rows[2]["n"] == 1
    assert benches.failures({"a": rows}) == ["a: x: error RuntimeError: of the library in two lines"]
    assert "a          z: n 1" in capsys.readouterr().out
    with pytest.raises(NeonError, match="1 of 3 measurements failed"):
        gpu.summary({"a": rows})
    assert benches.failures({"a": [{"name": "p", "passed": False}]})


def test_what_does_not_fit_into_the_time_is_not_begun(rehearsal):
    card = Bench(rehearsal.card, [], rehearsal.scratch)
    rows = run(card, [Measurement("x", 3600, lambda: {"n": 1}), Measurement("y", 1, lambda: {"n": 2})])
    assert rows[0]["not measured"] == "the 1 minutes were over" and rows[1]["n"] == 2


def test_a_card_that_no_longer_answers_ends_the_measurements(rehearsal, monkeypatch):
    def broken():
        raise RuntimeError("illegal access")

    monkeypatch.setattr(rehearsal.card, "check", broken, raising=False)
    rows = run(rehearsal, [Measurement("x", 1, broken), Measurement("y", 1, lambda: {"n": 2})])
    assert "error" in rows[0] and rows[1]["not measured"] == "the card no longer answered after x"


def test_known_rows_are_kept_and_missing_ones_measured(rehearsal):
    known = [{"name": "x", "n": 0}, {"name": "y", "not measured": "no time"}]
    both = [Measurement("x", 1, lambda: {"n": 1}), Measurement("y", 1, lambda: {"n": 2})]
    assert [row["n"] for row in run(rehearsal, both, known=known)] == [0, 2]
    assert run(rehearsal, both, known=known, only=()) == known


def test_what_is_written_in_between_has_the_rows_that_are_kept(rehearsal):
    """A run that is killed early loses nothing of the one before."""
    both = [Measurement("x", 1, lambda: {"n": 1}), Measurement("y", 1, lambda: {"n": 2})]
    known, written = {"a": [{"name": "y", "n": 0}], "b": [{"name": "z"}]}, []
    sections = {"a": lambda _: both, "b": lambda _: []}
    benches.run(sections, rehearsal, ["a"], 1, known, lambda rows: written.append(rows))
    (rows,) = written
    assert [row["n"] for row in rows["a"]] == [1, 0] and rows["b"] == known["b"]


def test_rows_of_other_code_or_another_card_are_not_kept(tmp_path):
    path = tmp_path / "gpu-a.json"
    rows = {"rates": [{"name": "float32", "tflops": 1.0}]}
    benches.writer(path, ABOUT, page.one_card)(rows)
    assert benches.kept_rows(path, ABOUT | {"date": "2027"}) == rows
    assert benches.kept_rows(path, ABOUT | {"commit": "abd"}) == benches.kept_rows(path, ABOUT | {"driver": "2"}) == {}
    assert benches.kept_rows(tmp_path / "other.json", ABOUT) == {}


def test_names_of_files():
    assert benches.slug({"card": "NVIDIA H100 80GB HBM3", "cards": 1}) == "nvidia-h100-80gb-hbm3"
    assert benches.slug({"card": "NVIDIA A100-SXM4", "cards": 8}) == "8x-nvidia-a100-sxm4"


def test_tests_that_fail_or_do_not_run_are_counted(tmp_path):
    file = tmp_path / "r.xml"
    file.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure message='x is\n1'/></testcase>"
        "<testcase name='c'><skipped/></testcase></testsuite></testsuites>"
    )
    found = suite.results(file)
    assert (found["tests_passed"], found["failed"], found["skipped"]) == (1, 1, 1) and not found["passed"]
    assert found["failures"] == ["b: x is 1"]
    file.write_text("<testsuites><testsuite><testcase name='c'><skipped/></testcase></testsuite></testsuites>")
    assert not suite.results(file)["passed"] and suite.results(file, may_skip=True)["passed"]


# ---------------------------------------------------------------- how it is measured


def test_steps_that_are_not_made_are_counted():
    options = {"num_steps": 18, "solver": "heun"}
    target = Target("t", get_family("edm"), "digits", 2, options, "digits", 2)
    tried = []

    def seconds(options):
        tried.append(options["num_steps"])
        return 0.5 + 0.25 * options["num_steps"]

    assert speed.at_all_steps(target, seconds) == pytest.approx(0.5 + 0.25 * 18) and tried == [2, 4]
    assert speed.at_all_steps(target._replace(sampling={**options, "num_steps": 3}), seconds) == 1.25 and tried[-1] == 3
    flow = Target("t", get_family("flow"), "digits", 2, {"solver": "dopri5", "num_steps": 1, "tol": 1e-5}, "digits", 2)
    assert speed.at_all_steps(target, lambda options: 1 - 0.1 * options["num_steps"]) == pytest.approx(0.8)
    speed.at_all_steps(flow, lambda options: tried.append(options["solver"]) or 1.0)
    assert tried[-1] == "euler"


def test_ratios_to_the_released_way():
    released = {"name": "r", "model": "m", "way": "released", "images_per_second": 4.0}
    faster = {"name": "f", "model": "m", "way": "eager", "images_per_second": 10.0}
    alone = {"name": "o", "model": "other", "way": "eager", "images_per_second": 1.0}
    rows = speed.with_ratios({"sampling": [faster, released, alone], "compiled": [faster, {"name": "x", "error": "e"}]})
    assert [row.get("times_released") for row in rows["sampling"]] == [2.5, None, None]
    assert rows["compiled"][0]["times_released"] == 2.5 and rows["compiled"][1] == {"name": "x", "error": "e"}


@pytest.mark.parametrize("name", ["edm", "imm", "var", "xar"])
def test_a_network_that_differs_is_not_within_tolerance(rehearsal, monkeypatch, name):
    case = Case(get_family(name), "digits", parity.DIGITS[name])
    assert parity.compared(rehearsal.card, case, "float32")["passed"]
    wrong = Case.model

    def model(self, device):
        found = wrong(self, device)
        for p in self.family.weights(found).parameters():
            p.mul_(1.01)
        return found

    monkeypatch.setattr(Case, "model", model)
    row = parity.compared(rehearsal.card, case, "float32")
    assert not row["passed"] and row["network"] > 1e-3 and row["gradient"] > 1e-3


def test_codes_of_images_are_found_without_tf32(rehearsal, monkeypatch):
    seen = []
    allowed = torch.backends.cuda.matmul
    encode = parity.var_family.VQVAE.encode
    monkeypatch.setattr(
        parity.var_family.VQVAE, "encode", lambda self, x: seen.append(allowed.allow_tf32) or encode(self, x)
    )
    before = allowed.allow_tf32
    assert parity.compared(rehearsal.card, Case(get_family("var"), "digits", parity.DIGITS["var"]), "tf32")["passed"]
    assert seen == [False, False] and allowed.allow_tf32 == before


def test_noise_of_the_cpu_on_any_device():
    """Streams of another device draw on the CPU and move it there: the meta device has no values to draw."""
    wanted = Streams([1, 2]).randn((3,))
    with parity.noise_of_the_cpu():
        here, there = Streams([1, 2], "cpu"), Streams([1, 2], "meta")
        assert torch.equal(here.randn((3,)), wanted) and there.randn((3,)).is_meta and there.randint(5).is_meta
        assert {g.device.type for g in there.generators} == {"cpu"}
    assert not hasattr(Streams([1], "cpu"), "onto")


def test_codes_are_followed_and_others_counted():
    probs = torch.full((2, 5, 7), 1 / 7)
    first = parity.Codes()
    ids = first.draw(probs, Streams([0, 1]))
    again, other = parity.Codes(first.kept), parity.Codes(first.kept)
    assert torch.equal(again.draw(probs, Streams([0, 1])), ids) and (again.other, again.drawn) == (0, 10)
    assert torch.equal(other.draw(probs, Streams([5, 6])), ids) and other.other > 0


def test_replayed_calls_read_new_arguments():
    graphed = Graphed(lambda x, t, k=1: {"y": k * x + t}, StandIn())
    first, second = graphed(torch.zeros(2), torch.tensor(1.0)), graphed(torch.ones(2), torch.tensor(5.0))
    assert first["y"].tolist() == [1, 1] and second["y"].tolist() == [6, 6] and len(graphed.graphs) == 1
    assert graphed(torch.ones(3), torch.tensor(0.0), k=2)["y"].tolist() == [2, 2, 2] and len(graphed.graphs) == 2


# ---------------------------------------------------------------- one class for all that needs a card


def needs_cuda(path: Path) -> set[str]:
    """What of torch.cuda, and of pinned memory, a file names."""
    names = (ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    return {name for name in names if re.search(r"torch\.cuda\b|\.cuda$|pin_memory|CUDAGraph", name)}


def test_all_that_needs_cuda_is_in_one_class():
    files = {path.name: needs_cuda(path) for path in (ROOT / "benchmarks/gpu").glob("*.py")}
    assert {name for name, found in files.items() if found} == {"card.py"}
    assert {"torch.cuda.CUDAGraph", "torch.cuda.Stream", "tensor.pin_memory"} <= files["card.py"]


def test_the_stand_in_has_every_method_of_a_card():
    """Of its own, with the same parameters: what it inherited would need a card."""
    for name, method in vars(Card).items():
        if (name.startswith("_") and name != "__init__") or name == "kind":
            continue
        own = vars(StandIn)[name]
        assert type(own) is type(method), name
        if inspect.isfunction(method):
            assert inspect.signature(own) == inspect.signature(method), name


# ---------------------------------------------------------------- pages

ROWS = {
    "tests": [{"name": "tests/test_cuda.py", "tests_passed": 20, "failed": 1, "skipped": 0, "failures": ["f: is 1"]}],
    "parity": [
        {"name": "edm cifar10_cond, tf32", "network": 1e-3, "gradient": 2e-3, "levels": 0.1, "passed": True},
        {"name": "var d16_256, tf32", "draws": 0.5, "network": 1.0, "levels": 9.0, "passed": False},
    ],
    "sampling": [
        {"name": "var_d16, released way", "model": "var_d16", "way": "released", "images_per_second": 20.0},
        {
            "name": "var_d16, eager, bfloat16",
            "model": "var_d16",
            "way": "eager",
            "precision": "bfloat16",
            "images_per_second": 50.0,
            "share_of_products": 0.25,
            "times_released": 2.5,
        },
        {"name": "var_d36, eager, float32", "model": "var_d36", "error": "OutOfMemoryError: a | b"},
        {"name": "xar_b, eager, float32", "not measured": "the 20 minutes were over"},
    ],
}


def test_the_table_of_a_card():
    table = page.one_card({"environment": ABOUT, "rows": ROWS})
    assert "| var d16_256, tf32 | 1 |  | 50.0 % | 9 | **no** |" in table
    assert "| var_d16, eager, bfloat16 | 50 | 2.50× | 25.0 % |  |" in table
    assert "failed: OutOfMemoryError: a / b |" in table and "not measured: the 20 minutes were over |" in table
    assert "| tests/test_cuda.py | 20 | 1 | 0 | f: is 1 |" in table
    assert "## Products of large matrices\n\nNot measured." in table


def test_the_page_shows_every_card(tmp_path):
    for name, about in (("gpu-a", ABOUT), ("8x-b", ABOUT | {"card": "B", "cards": 8})):
        write_json(tmp_path / f"{name}.json", {"environment": about, "rows": ROWS if name == "gpu-a" else {}})
    document = tmp_path / "gpu.md"
    document.write_text("text\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\n")
    page.main(["--results", str(tmp_path), "--page", str(document)])
    text = document.read_text()
    assert "old" not in text and "[1 × GPU A](../results/gpu/gpu-a.md)" in text
    assert "| 20 passed, 1 failed | 1 of 2 within tolerance |" in text
    assert "| `var_d16` | not measured | 50 (eager, bfloat16, 25.0 % of products); 2.50× of 20 |" in text
    assert "| `var_d36` | not measured | not measured |" in text


def test_without_any_card_the_page_says_so():
    text = page.all_cards({})
    assert all(f"| `{target.name}` | not measured |" in text for target in presets())


def test_the_page_in_docs_is_that_of_the_results():
    document = ROOT / "docs/gpu.md"
    tables = {"gpu": page.all_cards(page.read_cards(gpu.RESULTS)), "tolerances": page.tolerances() + "\n"}
    assert page.filled(document.read_text(), tables) == document.read_text()
    assert json.dumps(sorted(page.SECTIONS)) == json.dumps(sorted(gpu.SECTIONS))
