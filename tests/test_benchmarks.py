"""The benchmarks run, their rows are complete, and the results page is made of nothing but those rows."""

import inspect
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    common,
    error_problems,
    errors,
    experiments,
    exports,
    hypergradients,
    projectors,
    report,
    tuning,
    tv,
)

SCRIPTS = (
    "hypergradients",
    "errors",
    "experiments",
    "projectors",
    "gpu",
    "regularizers",
    "ct",
    "saddle_errors",
    "sparse",
    "learned_reconstruction",
    "exports",
    "interruptions",
    "ridge",
    "certificates",
    "violations",
    "relative_errors",
    "upper_level",
    "papers/bogensperger_2024_ct",
    "papers/bogensperger_2024_tv_descent",
    "papers/bogensperger_2024_tv_discretisation",
    "papers/ehrhardt_2025_foe",
    "papers/kadagala_2025_joint",
    "papers/kadagala_2025_lpd",
    "papers/kadagala_report_classification",
    "papers/kadagala_report_segmentation",
    "papers/villacis_2025_regression",
    "papers/villacis_2025_wavelets",
)
# measured in double precision
DOUBLE = {
    "hypergradients", "errors", "experiments", "regularizers", "ct", "saddle_errors", "sparse", "interruptions",
    "certificates", "upper_level",
    "papers/villacis_2025_regression",
}  # fmt: skip
QUICK = {
    "gpu": ["--device", "cpu"],
    "regularizers": ["--models", "SmoothedTV"],
    "hypergradients": ["--rows", "implicit", "unrolled", "--unrolled-steps", "40", "--repeats", "1"],
    "errors": ["--problems", "quadratic"],
    "violations": ["--families", "quadratic", "weighted l1"],
    "experiments": ["--sizes", "8", "--repeats", "1", "--variants", "plain", "mixed precision"],
}
FIELDS = {
    "benchmark", "case", "settings", "figures", "command", "commit", "date", "seed", "versions", "device", "cpu",
    "cores", "x64",
}  # fmt: skip


def run_quickly(name, folder):
    """What it printed, where it failed."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", *QUICK.get(name, [])]
    command += ["--out", str(folder / f"{Path(name).name}.jsonl")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    return f"{name}: {done.stdout}{done.stderr}" if done.returncode else None


# one test, so that pytest-xdist runs every benchmark once
@pytest.mark.slow
def test_quick_runs_write_complete_rows_and_render(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        failed = [text for text in pool.map(lambda name: run_quickly(name, tmp_path), SCRIPTS) if text]
    assert not failed, "\n".join(failed)
    rows = {name: common.read_rows(tmp_path / f"{Path(name).name}.jsonl") for name in SCRIPTS}
    for name in SCRIPTS:
        assert rows[name]
        for row in rows[name]:
            check_row(row, name, tmp_path)
    assert max(r["figures"]["error"] for r in rows["hypergradients"] if r["case"]["row"] == "implicit") <= 1e-6
    assert sum(r["figures"]["violations"] for r in rows["errors"] if r["case"]["part"] == "certificates") == 0

    report.main(["--results", str(tmp_path), "--out", str(tmp_path / "results.md")])
    page = (tmp_path / "results.md").read_text()
    for name in SCRIPTS:
        assert f"python benchmarks/{name}.py --quick" in page
    assert "times faster" in page and "violations" in page and "Against plain Newton-CG" in page
    assert "LPD over the best filter" in page and "under the ceiling" in page and "of unrolled; criterion" in page
    assert "| FP 32² × 10, batch 2 | pure JAX |" in page
    assert "export for CUDA. With a callback, which cannot be exported: `from_callbacks`" in page
    distances = [row["figures"].get("distance", 0.0) for row in rows["projectors"]]
    assert max(distances) < 1e-5
    picture = tmp_path / "figures" / "hypergradients.png"
    assert picture.stat().st_size < 150_000
    assert f"(figures/{picture.name})" in page


def check_row(row, name, folder):
    assert set(row) >= FIELDS
    # several scripts may share a page, "PAGE: SCRIPT"
    assert row["benchmark"].rpartition(": ")[2] == Path(name).name
    assert row["command"].startswith(f"python benchmarks/{name}.py --quick")
    assert row["versions"]["jax"] == jax.__version__
    assert row["x64"] is (row["case"].get("dtype", "float64" if name in DOUBLE else "float32") == "float64")
    text = json.dumps(row)
    assert str(ROOT) not in text and str(folder) not in text and os.uname().nodename not in text


@pytest.mark.parametrize(
    "module", [hypergradients, errors, experiments, exports, projectors, report], ids=lambda module: module.__name__
)
def test_help(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_committed_results_render():
    page = report.build(common.RESULTS, figures=None)
    anchors = set(re.findall(r'<a id="(\w+)"></a>', page))
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert anchors == {path.stem for path in common.RESULTS.glob("*.jsonl")} == set(links)
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("[!r]*.md")))
    assert set(re.findall(r"results\.md#([^)]+)\)", text)) <= anchors
    for name in re.findall(r"\]\(figures/([^)]+)\)", page):
        assert (common.FIGURES / name).is_file()


def test_sources_page_names_what_is_there():
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "references.bib").read_text(encoding="utf-8"), re.M))
    named = re.findall(r"`([^`]+)`", page)
    paths = [name for name in named if "/" in name]
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    assert {name for name in named if re.fullmatch(r"\w+_\d{4}|kadagala_hoag_report", name)} <= keys
    assert {path.name for path in (ROOT / "benchmarks" / "papers").glob("*_*.py")} - {Path(p).name for p in paths} == {
        "__init__.py", "bogensperger_2024_ct_page.py", "bogensperger_2024_tv.py", "ehrhardt_2025_tv_page.py",
    }  # fmt: skip
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) == set(re.findall(r'<a id="([^"]+)"></a>', page))


@pytest.mark.parametrize("path", sorted(common.RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_rows_name_a_script_that_is_there(path):
    for row in common.read_rows(path):
        script = Path(row["command"].split()[1])
        page, _, part = row["benchmark"].partition(": ")
        assert page == path.stem and script.stem in (page, part)
        assert (ROOT / script).is_file()
    draw = getattr(report.find_module(path.stem), "figures", None)
    assert draw is None or list(inspect.signature(draw).parameters) == ["rows", "folder"]


def test_provenance_has_a_line_for_each_run_and_each_version_once(tmp_path):
    rows = []
    for arguments in ([], ["--quick"]):
        recorder = common.Recorder("test", options(tmp_path, *arguments))
        recorder.common |= {"commit": "abc", "date": "2026-11-21", "cores": 1 + len(rows) // 2}
        recorder.add({"row": "a"}, {})
        recorder.add({"row": "b"}, {})
        rows += recorder.rows
    rows[2]["versions"] = {"python": "3.12.0"}
    first, second, machine, versions = report.provenance(rows).splitlines()
    assert first == f"- `{rows[0]['command']}`: commit abc, 2026-11-21, seed 0, 1 core"
    assert second == f"- `{rows[2]['command']}`: commit abc, 2026-11-21, seed 0, 2 cores"
    assert machine.startswith("- device ") and versions.count("python") == 1
    assert f"python {rows[0]['versions']['python']} or 3.12.0, jbilevel" in versions
    assert f"jax {jax.__version__} (some runs)" in versions


def options(tmp_path, *arguments):
    parser = common.parser("A test.", defaults={"sizes": [8], "batch": [1]}, quick={"sizes": [4]})
    return common.parse(parser, ["--out", str(tmp_path / "test.jsonl"), *arguments])


def test_defaults_quick_values_and_given_ones(tmp_path):
    assert options(tmp_path).sizes == [8]
    assert options(tmp_path, "--quick").sizes == [4]
    assert options(tmp_path, "--quick", "--sizes", "5").sizes == [5]


def test_a_run_replaces_the_last_one_of_its_benchmark_and_device(tmp_path):
    args = options(tmp_path)
    for value in (1.0, 2.0):
        recorder = common.Recorder("test", args)
        recorder.add({"row": "a"}, {"ms": value, "bound": np.inf, "rate": np.float32(0.5)})
        recorder.write()
    elsewhere = {**recorder.rows[0], "device": {"platform": "gpu", "kind": "other", "count": 1}}
    with open(recorder.path, "a") as stream:
        stream.write(json.dumps(elsewhere) + "\n")
    recorder.write()
    rows = common.read_rows(recorder.path)
    assert [row["device"]["platform"] for row in rows] == ["gpu", "cpu"]
    assert rows[1]["figures"] == {"ms": 2.0, "bound": "inf", "rate": 0.5}


def test_earlier_rows_of_other_cases_are_kept_on_request(tmp_path):
    for arguments, case, value in (((), "a", 1), ((), "b", 2), (["--keep"], "a", 3), (["--keep"], "b", 4)):
        recorder = common.Recorder("test", options(tmp_path, *arguments))
        recorder.add({"row": case}, {"value": value})
        recorder.write()
    assert [(r["case"]["row"], r["figures"]["value"]) for r in common.read_rows(recorder.path)] == [("a", 3), ("b", 4)]


def test_machine_paths_stay_out_of_the_command(tmp_path):
    args = options(tmp_path, "--images", "/somewhere/private/pictures")
    args.export = "/somewhere/private/arrays"
    recorder = common.Recorder("test", args)
    row = recorder.add({}, {})
    assert "private" not in json.dumps(row) and row["settings"]["images"] == "pictures"


def test_no_gpu_is_a_sentence():
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no GPU"):
        common.take_device("gpu")


def test_a_missing_peer_names_the_extra():
    with pytest.raises(SystemExit, match=r"jbilevel\[test\]"):
        common.peer("no_such_library")


@pytest.mark.slow
def test_reference_problem_is_the_documented_one(camera64):
    images = common.images(64, 1)
    np.testing.assert_array_equal(images.noisy[0], camera64.noisy)
    assert tv.published_distance(64, 1, None, tv.reference(64, 1)) < 1e-9


def test_user_energy_is_the_library_energy(camera64):
    data = {"y": camera64.noisy}
    theta = jnp.asarray(tv.THETA)
    values = [problem.energy(theta, camera64.clean, data) for problem in tv.PROBLEMS.values()]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-12)


def test_tuning_finds_the_loosest_tolerances():
    tuned = tuning.tune(lambda tol, adjoint_tol: max(tol, 0.01 * adjoint_tol), 1e-4, 1e-10)
    np.testing.assert_allclose((tuned.tol, tuned.adjoint_tol), (1e-4, 1e-2))
    tuned = tuning.tune(lambda tol, adjoint_tol: max(0.01 * tol, adjoint_tol), 1e-4, 1e-10)
    np.testing.assert_allclose((tuned.tol, tuned.adjoint_tol), (1e-2, 1e-4))
    assert tuning.tune(lambda tol, adjoint_tol: max(tol, 1e-3), 1e-4, 1e-10).error == 1e-3


def test_fewest_steps():
    assert tuning.fewest(lambda steps: 0.9**steps, 1e-3, guess=130, limit=400)[0] in range(66, 74)
    assert tuning.fewest(lambda steps: 0.9**steps, 1e-3, guess=10, limit=400)[0] in range(66, 74)
    assert tuning.fewest(lambda steps: 1.0, 1e-3, guess=10, limit=40) == (40, 1.0)


def test_interleaved_timing_measures_each_call_equally_often():
    counts = {"a": 0, "b": 0}

    def call(name):
        counts[name] += 1
        return jnp.zeros(())

    seconds = common.interleave({name: lambda name=name: call(name) for name in counts}, repeats=3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    figures = common.spread([1e-3, 2e-3, 3e-3])
    assert figures["ms"] == pytest.approx(2.0) and figures["ms_min"] == pytest.approx(1.0)


def test_ratios_of_times_do_not_see_slow_phases_of_the_machine():
    fast, slow = common.spread([1e-3, 1e-3, 9e-3, 9e-3, 1e-3]), common.spread([2e-3, 2e-3, 18e-3, 18e-3, 18e-3])
    assert common.times_faster(fast, slow) == pytest.approx(2.0)
    assert common.times_faster({"ms": 1.0}, {"ms": 3.0}) == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("name", error_problems.ESTIMATED)
def test_stated_constants_hold(name):
    """1 <= Hessian <= L along random directions at a random image."""
    setup = error_problems.ESTIMATED[name]
    rng = np.random.default_rng(0)
    data = {"y": jnp.asarray(rng.uniform(size=(12, 12)))}
    params = jax.tree.map(jnp.asarray, setup.params)
    view = setup.problem.view(params, data)
    flat = jnp.asarray(0.01 * rng.standard_normal((12, 12)))
    hessian = jax.hessian(lambda v: view.value(v.reshape(12, 12)))(flat.ravel())
    curvatures = np.linalg.eigvalsh(np.asarray(hessian))
    assert curvatures[0] >= view.constants.strong_convexity - 1e-8
    assert curvatures[-1] <= view.constants.smoothness


@pytest.mark.slow
def test_exact_diagonal_by_colouring():
    rng = np.random.default_rng(0)
    data = {"y": jnp.asarray(rng.uniform(size=(7, 8)))}
    energy = lambda x: tv.user_energy(jnp.asarray(tv.THETA), x, data)  # noqa: E731
    x = jnp.asarray(rng.uniform(size=(7, 8)))
    diagonal, products = experiments.exact_diagonal(jax.linearize(jax.grad(energy), x)[1], x, None)
    hessian = jax.hessian(lambda v: energy(v.reshape(7, 8)))(x.ravel())
    np.testing.assert_allclose(diagonal.ravel(), jnp.diag(hessian), rtol=1e-12)
    assert products == 3
