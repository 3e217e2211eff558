"""The README says what is there."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_measured_table_is_the_one_in_results():
    from mini.readme import filled

    assert filled(README, (ROOT / "results/mini/table.md").read_text()) == README


def test_links_to_files_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    base, selftrained, model = (torch.nn.Linear(3, 2) for _ in range(3))
    exec(example, {"base": base, "selftrained": selftrained, "model": model})
    torch.testing.assert_close(model.weight, 2 * base.weight - selftrained.weight)
