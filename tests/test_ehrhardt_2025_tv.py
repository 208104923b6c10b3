"""The benchmark of TV denoising on tiny problems: which rows it writes, and what they must say."""

import json

import pytest

from benchmarks.papers import ehrhardt_2025_tv, ehrhardt_2025_tv_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("tv") / "rows.jsonl"
    ehrhardt_2025_tv.main(["--quick", "--out", str(out)])
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_every_part_writes_rows_with_their_provenance(rows):
    assert {row["benchmark"] for row in rows} == {f"ehrhardt_2025_tv: {part}" for part in ehrhardt_2025_tv.PARTS}
    for row in rows:
        assert {"command", "commit", "seed", "versions", "device"} <= set(row)


def test_runs_report_work_in_order(rows):
    found = ehrhardt_2025_tv_page.of(rows, "convergence")
    assert {row["case"]["method"] for row in found} == {"MAID", "HOAG", *ehrhardt_2025_tv.RATES}
    for row in found:
        figures = row["figures"]
        assert all(a < b for a, b in zip(figures["work"], figures["work"][1:], strict=False))
        assert len(figures["work"]) == len(figures["value"]) == len(figures["tol"])
        early, late = figures["work_to_0.01"], figures["work_to_0.001"]
        assert late is None or early <= late
        if late is not None:
            assert figures["lower_to_0.001"] <= late


def test_momentum_never_needs_more_iterations(rows):
    found = ehrhardt_2025_tv_page.of(rows, "momentum")
    assert len(found) == len(ehrhardt_2025_tv.MOMENTUM_POINTS) * len(ehrhardt_2025_tv.MOMENTUM_TOLERANCES)
    for row in found:
        assert row["figures"]["momentum"] <= row["figures"]["plain"]


def test_photographs_stay_above_the_bound_on_eps(rows):
    learned = ehrhardt_2025_tv_page.select(
        ehrhardt_2025_tv_page.of(rows, "photographs"), method="MAID", variant="eps learned"
    )
    assert learned and all(row["figures"]["eps"] >= 0.999e-3 for row in learned)


def test_page_has_a_section_for_each_part(rows):
    page = ehrhardt_2025_tv_page.render(rows)
    assert page.count("### ") == len(ehrhardt_2025_tv.PARTS)
