"""Results: run files and Parquet files say the same, byte for byte, and the site's tables and figures are drawn from them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from study import __main__ as commands
from study import results, runner
from study.cells import DEFAULT, QUICK_SEEDS, SEEDS, Cell, comparison_cells, quick_cells, tuning_cells

ROOT = Path(__file__).parents[2]
NAN, INF = float("nan"), float("inf")
CELLS = [
    Cell("moe-bf16", "k3", 0.5, 3, replace(DEFAULT, rollouts=6)),
    Cell("dense-bf16", "drpo", 12.5, 0),
    Cell("dense-bf16", "pg-is", 0.0, 1),
]


needs_results = pytest.mark.skipif(not results.FULL.exists(), reason="a source distribution has no results")


def result(cell):
    """A run with unknown numbers, large ones and, but for the second cell, a curve that not every run has."""
    curves = {"reward": [0.125, 0.25], "norm": [1.5, 1e9], "kept": [NAN, 0.5], "ratio_max": [INF, 123456.0]}
    if cell != CELLS[1]:
        curves["entropy"] = [0.1 * cell.seed]
    return results.Result(cell, {"steps": 4, "reward": 0.2}, curves, [0, 3, 2**40])


@pytest.fixture
def folder(tmp_path):
    """Three runs, of which the log has the second twice, and the third not."""
    found = tmp_path / "runs"
    for cell in CELLS:
        results.write(found, result(cell))
    for cell, seconds in ((CELLS[1], 12.0), (CELLS[0], 7.1), (CELLS[1], 11.94)):
        results.log(found, cell, seconds)
    return found


def stored(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_result_reads_as_it_was_written(tmp_path):
    results.write(tmp_path, result(CELLS[0]))
    (found,) = results.read_all(tmp_path)
    assert (found.cell, found.prefit, found.weights) == (CELLS[0], {"steps": 4, "reward": 0.2}, [0, 3, 2**40])
    assert found.curves["reward"] == [0.125, 0.25]
    # four digits
    assert found.curves["ratio_max"][1] == 123500.0
    assert np.isnan([found.curves["kept"][0], found.curves["ratio_max"][0]]).all()
    for line in results.path_of(tmp_path, CELLS[0]).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_blocks_are_means_or_largest_and_leave_out_unknown_numbers():
    curves = {"reward": [1.0] * 6, "tv": [1.0, 2.0, 3.0, NAN, 5.0, 7.0], "norm": [1.0, 9.0, 2.0, 3.0, 4.0, 5.0]}
    assert results.compact(curves) == {"reward": [1.0] * 6, "tv": [2.0, 6.0], "norm": [9.0, 5.0]}


def test_unpacking_gives_the_bytes_that_were_packed(folder, tmp_path):
    assert results.pack(folder, tmp_path / "runs.parquet") == 3
    assert results.unpack(tmp_path / "runs.parquet", tmp_path / "again") == 3
    assert stored(tmp_path / "again") == stored(folder)
    assert len(stored(folder)) == 4


def test_a_folder_and_its_parquet_file_read_alike(folder, tmp_path):
    file = tmp_path / "runs.parquet"
    results.pack(folder, file)
    assert results.names(file) == results.names(folder) == {cell.name for cell in CELLS}
    # as text, in which NaN equals NaN
    assert list(map(repr, results.read_all(file))) == list(map(repr, results.read_all(folder)))
    assert runner.missing(file, [*CELLS, quick_cells()[0]]) == runner.missing(folder, [*CELLS, quick_cells()[0]])
    assert runner.status(file) == runner.status(folder)
    assert "computed" in pq.read_schema(file).names


def test_the_same_runs_pack_to_the_same_bytes(folder, tmp_path):
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    results.pack(folder, one)
    results.pack(folder, two)
    assert one.read_bytes() == two.read_bytes()
    assert [path for path in tmp_path.iterdir() if ".part" in path.name] == []


def test_an_unusable_folder_or_file_is_refused_and_left_alone(folder, tmp_path, capsys):
    file = tmp_path / "runs.parquet"
    results.pack(folder, file)
    before, packed = stored(folder), file.read_bytes()
    for arguments, reason in {
        ("unpack", file, folder): "found 3 in",
        ("unpack", tmp_path / "none.parquet", tmp_path / "new"): "found no run",
        ("pack", tmp_path / "none", file): "found no run",
        ("pack", file, file): "got the file",
        ("quick", "--results", file): "got the file",
        ("full", "--results", file): "got the file",
        ("report", "--results", tmp_path / "none"): "found no run",
    }.items():
        with pytest.raises(SystemExit):
            commands.main([*map(str, arguments)])
        assert reason in capsys.readouterr().err
    assert stored(folder) == before
    assert file.read_bytes() == packed
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "runs.parquet"}


@needs_results
def test_the_commands_pack_report_and_unpack(tmp_path, capsys):
    folder, file = tmp_path / "quick", tmp_path / "packed" / "quick.parquet"
    commands.main(["unpack", str(results.QUICK), str(folder)])
    commands.main(["pack", str(folder), str(file)])
    commands.main(["report", "--results", str(folder)])
    commands.main(["report", "--results", str(file)])
    commands.main(["status", "--results", str(file)])
    assert f"9 runs in {file}" in capsys.readouterr().out
    for name in ("tables.txt", "learning.svg"):
        assert (folder / name).read_bytes() == (tmp_path / "packed" / "quick.report" / name).read_bytes()


@needs_results
def test_the_kept_results_are_the_whole_study():
    full, quick = results.read_all(results.FULL), results.read_all(results.QUICK)
    seeds = sorted({r.cell.seed for r in full if r.cell.seed < 100})
    assert len(seeds) >= len(SEEDS)
    planned = {*tuning_cells(), *comparison_cells(runner.tuned_thresholds(full), seeds)}
    assert {r.cell for r in full} == planned
    assert {r.cell for r in quick} == set(quick_cells())
    assert {r.cell.seed for r in quick} == set(QUICK_SEEDS)
    assert {r.cell.name for r in full} == results.names(results.FULL)


@needs_results
def test_the_sites_tables_and_figures_are_drawn_from_the_kept_results(tmp_path, monkeypatch):
    pages = results.PAGES
    monkeypatch.setattr(results, "PAGES", tmp_path)
    commands.report(None)
    drawn = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    kept = {path.relative_to(pages): path.read_bytes() for path in [pages / "tables.txt", *pages.glob("figures/*")]}
    assert drawn.keys() == kept.keys()
    changed = [str(name) for name in kept if drawn[name] != kept[name]]
    assert changed == [], "draw them again: cd studies && python -m study report"


@pytest.mark.parametrize("builder", [SdistBuilder, WheelBuilder])
def test_no_distribution_has_the_results(builder):
    files = {file.distribution_path for file in builder(str(ROOT)).recurse_included_files()}
    assert "drpo_core/__init__.py" in files
    assert [file for file in files if "studies/results" in file or file.endswith(".parquet")] == []
