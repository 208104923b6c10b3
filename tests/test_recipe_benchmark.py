"""The recipe for a benchmark in CONTRIBUTING.md: its script runs, and its rows become a section of the results page."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common, report  # noqa: E402


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script of the recipe as the file benchmarks/recipe.py of a folder of its own, imported."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = text[text.index("### A benchmark, in one file") :]
    path = tmp_path / "benchmarks" / "recipe.py"
    path.parent.mkdir()
    path.write_text(re.search(r"^```python\n(.*?)^```$", recipe, re.M | re.S)[1], encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(report, "find_module", lambda name: module if name == "recipe" else None)
    return module


def test_the_recipe_runs_and_renders(script, tmp_path, capsys):
    out = tmp_path / "results" / "recipe.jsonl"
    script.main(["--quick", "--out", str(out)])
    assert "| gradient | 16 |" in capsys.readouterr().out
    rows = common.read_rows(out)
    assert [row["case"]["row"] for row in rows] == ["value", "gradient"]
    assert all(row["command"].startswith("python benchmarks/recipe.py --quick") for row in rows)
    assert all(row["figures"]["repeats"] == 2 and row["figures"]["ms"] > 0 for row in rows)

    section = report.section("recipe", rows, figures=None)
    assert section.startswith('<a id="recipe"></a>\n\n## Total variation: value and gradient\n\nHow long do')
    assert f"- `{rows[0]['command']}`: commit " in section and "who read the code" not in section
    assert script.render(rows) in section

    report.main(["--results", str(out.parent), "--out", str(tmp_path / "results.md")])
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert page.startswith("# Results") and "- [Total variation: value and gradient](#recipe)" in page
    assert section in page


def test_a_second_run_replaces_the_first(script, tmp_path):
    out = tmp_path / "recipe.jsonl"
    for _ in range(2):
        script.main(["--quick", "--out", str(out)])
    assert len(common.read_rows(out)) == 2
