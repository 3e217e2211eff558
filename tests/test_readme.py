"""The README says what is there."""

import re
from pathlib import Path

import torch
import yaml

from mini import readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_measured_tables_are_those_in_results():
    """Of the README and of docs/mini.md; each has its markers once."""
    texts = {document: document.read_text() for document in readme.DOCUMENTS}
    assert {document: readme.filled(text, readme.tables()) for document, text in texts.items()} == texts
    for name in readme.tables():
        assert sum(text.count(f"<!-- {name}:begin -->") for text in texts.values()) == 1


def test_tables_go_between_their_markers():
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    assert readme.filled(text, {"x": "| new |\n", "y": "z"}) == text.replace("old", "| new |")


def test_links_to_files_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_where_the_paper_was_published():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert cited["url"].endswith("kpLRYtPGt3") and cited["repository-code"].endswith("VITA-Group/Neon")
    for part in ("ICLR 2026, oral", "kpLRYtPGt3", "VITA-Group/Neon", "docs/since.md"):
        assert part in README


def test_the_page_is_published_with_least_permissions_by_pinned_actions():
    text = (ROOT / ".github/workflows/pages.yml").read_text()
    workflow = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {}
    assert job["permissions"] == {"contents": "read", "pages": "write", "id-token": "write"}
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in job["steps"] if "uses" in step)
    assert (ROOT / "results/mini/index.html").exists() and "results/mini/index.html" in text


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    base, selftrained, model = (torch.nn.Linear(3, 2) for _ in range(3))
    exec(example, {"base": base, "selftrained": selftrained, "model": model})
    torch.testing.assert_close(model.weight, 2 * base.weight - selftrained.weight)
