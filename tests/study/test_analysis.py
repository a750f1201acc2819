"""The analysis on results made up so that the answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from study import analysis, figures, intervals, measures, verdicts
from study.cells import (
    DEFAULT,
    METHODS,
    QUICK_SEEDS,
    SEEDS,
    SIX,
    TUNED_IN,
    Cell,
    comparison_cells,
    quick_cells,
    thresholds,
    tuning_cells,
)
from study.intervals import MISSING, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Interval
from study.results import MAXIMA, Result, path_of, read_all, write
from study.train import WEIGHT_EDGES

ROLLOUTS, BLOCKS = 120, 30
BINS = len(WEIGHT_EDGES) - 1
AVERAGED = (
    "rare",
    "entropy",
    "tv",
    "k3",
    "ratio",
    "tv_last",
    "k3_last",
    "ratio_last",
    "skipped",
    "kept",
    "dropped",
    "corrected",
)


def made_up(cell, level, *, end=None):
    """A run whose reward rises to `level`, and falls to `end` if that is given."""
    rewards = np.minimum(0.2 + 0.02 * np.arange(ROLLOUTS), level)
    if end is not None:
        rewards[80:] = end
    weights = [0] * BINS
    weights[WEIGHT_EDGES.index(1.0)] = 10
    curves = {name: [0.01 * (1 + i) for i in range(BLOCKS)] for name in (*AVERAGED, *sorted(MAXIMA))}
    return Result(cell, {"steps": 300.0, "reward": 0.2}, {"reward": rewards.tolist(), **curves}, weights)


TUNED = {name: method.grid[1] for name, method in METHODS.items() if method.grid}
LEVELS = {
    ("drpo-without-a", 12.5): 0.3,
    ("k1", TUNED["k1"]): 0.4,
    ("k2", TUNED["k2"]): 0.9,
    ("mask-drpo", TUNED["mask-drpo"]): 0.705,
    ("drpo", 2.5): 0.6,
}


def level(cell):
    """What a run's reward rises to: its line's level, and the seed's luck, which all lines share."""
    return LEVELS.get((cell.method, cell.threshold), 0.7) + 0.02 * (cell.seed % 5)


@pytest.fixture
def folder(tmp_path):
    """Tuning that prefers TUNED, and the whole comparison: GRPO and SPO collapse in FP8."""
    for cell in tuning_cells():
        write(tmp_path, made_up(cell, 0.8 if cell.threshold == TUNED.get(cell.method) else 0.6))
    for cell in comparison_cells(TUNED):
        falls = cell.setting in verdicts.FP8 and cell.method in ("grpo", "spo")
        write(tmp_path, made_up(cell, level(cell), end=0.05 if falls else None))
    return tmp_path


def test_verdicts_are_those_of_the_numbers_that_were_put_in(folder):
    runs = analysis.grouped(r for r in read_all(folder) if r.cell.seed in SEEDS and r.cell.training == DEFAULT)
    found = verdicts.decide(runs, TUNED, SEEDS)
    assert [v.name for v in found] == ["H1", "H2", "H3", "H4", "H4", "H4", "H4", "H4", "H5", "H6", "H7", "H8"]
    decided = {(v.name, v.claim.split()[1] if v.name == "H4" else ""): v.decision for v in found}
    assert decided == {
        ("H1", ""): SUPPORTED,
        ("H2", ""): SUPPORTED,
        ("H3", ""): SUPPORTED,
        ("H4", "k1"): SUPPORTED,
        ("H4", "k2"): NOT_SUPPORTED,
        ("H4", "k3"): NOT_SUPPORTED,
        ("H4", "tv"): NOT_SUPPORTED,
        ("H4", "chi2-without-a"): NOT_SUPPORTED,
        ("H5", ""): SUPPORTED,
        ("H6", ""): NOT_SUPPORTED,
        ("H7", ""): NOT_SUPPORTED,
        ("H8", ""): SUPPORTED,
    }
    (h6,) = (v.difference for v in found if v.name == "H6")
    # seeds are paired, so their luck leaves the difference alone
    assert h6 == pytest.approx((0.1, 0.1, 0.1), abs=0.005)


def test_among_equals_the_best_of_several_is_ahead_by_luck_only():
    rng = np.random.default_rng(0)
    noise = rng.normal(0.0, 0.04, (6, 5, 6))
    shares = verdicts.among_equals(noise, permutations=40, resamples=200)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares[NOT_SUPPORTED] > 0.05
    # with less luck than the margin, equals are as good as each other
    assert verdicts.among_equals(0.1 * noise, permutations=40, resamples=200)[SUPPORTED] == 1.0
    # one line far ahead is no longer so once its runs are spread over all lines
    ahead = noise + np.array([0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert verdicts.among_equals(ahead, permutations=40, resamples=200)[SUPPORTED] < 0.5


def test_the_report_has_every_cell_and_writes_every_figure(folder):
    text = analysis.report(folder, folder / "tables.txt", folder / "figures")
    assert text == (folder / "tables.txt").read_text()
    table = text.split("**Final reward**")[1].split("**")[0]
    rows = {row.split("|")[1].strip().removesuffix(" (tuned)"): row for row in table.strip().splitlines()}
    for line in ((name, t) for name in METHODS for t in thresholds(name, TUNED)):
        assert rows[figures.title(line).replace("|A|", "abs(A)")].count("[") == len(SIX) + 1
    assert "runs)" not in text
    for name in ("verdicts", "learning", "mismatch", "sensitivity", "weights"):
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 10_000


def test_a_missing_run_is_shown_and_keeps_its_verdicts_back(folder):
    cell = Cell("moe-bf16", "k2", TUNED["k2"], 3)
    path_of(folder, cell).unlink()
    text = analysis.report(folder, folder / "tables.txt", folder / "figures")
    assert "(4 of 5 runs)" in text
    assert "(29 of 30 runs)" in text
    (row,) = (row for row in text.splitlines() if row.startswith("| H4 | the k2"))
    assert MISSING in row
    assert text.count(MISSING) == 1


def test_a_report_works_from_a_few_runs_and_verdicts_from_none(tmp_path):
    assert {verdict.decision for verdict in verdicts.decide({}, {}, SEEDS)} == {MISSING}
    write(tmp_path, made_up(Cell("dense-bf16", "drpo", 12.5, 0), 0.7))
    write(tmp_path, made_up(tuning_cells()[-1], 0.7))
    text = analysis.report(tmp_path, tmp_path / "few.txt", tmp_path / "few")
    assert "(1 of 5 runs)" in text
    assert text.count(MISSING) == 12


def test_the_same_results_draw_the_same_figures(tmp_path):
    for cell in quick_cells():
        write(tmp_path, made_up(cell, 0.5))
    text = analysis.quick(tmp_path, tmp_path / "one")
    analysis.quick(tmp_path, tmp_path / "two")
    assert text.count("0.500") == 3 * len(QUICK_SEEDS)
    assert (tmp_path / "one" / "quick.svg").read_bytes() == (tmp_path / "two" / "quick.svg").read_bytes()


def test_interquartile_mean_cuts_a_quarter_at_either_end():
    values = np.array([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -100.0])
    assert intervals.interquartile_mean(values) == 3.5
    assert intervals.interquartile_mean(np.array([1.0, 2.0, 9.0])) == 4.0
    np.testing.assert_array_equal(intervals.interquartile_mean(np.stack([values, -values], 1)), [3.5, -3.5])


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    """Means of 20 normal runs: 95 % percentile intervals, a little short at so few runs."""
    generator = np.random.default_rng(0)
    covered = 0
    for i in range(300):
        scores = generator.normal(0.5, 0.1, (2, 10, 1))
        value, samples = intervals.bootstrap(scores, intervals.mean, resamples=500, seed=i)
        found = Interval.of(value[0], samples[:, 0])
        covered += found.low <= 0.5 <= found.high
    assert 0.87 < covered / 300 < 0.98


def test_bootstrap_draws_the_same_seeds_for_all_lines_and_each_setting_for_itself():
    luck = np.arange(10.0).reshape(2, 5, 1)
    value, samples = intervals.bootstrap(np.concatenate([luck, luck + 3.0], 2), resamples=200)
    np.testing.assert_allclose(samples[:, 1] - samples[:, 0], 3.0)
    assert value[1] - value[0] == 3.0
    assert samples[:, 0].std() > 0.3
    # settings are never exchanged: half of each resample is from either
    means = intervals.bootstrap(luck, intervals.mean, resamples=200)[1]
    assert means.min() >= 2.5
    assert means.max() <= 6.5


@pytest.mark.parametrize(
    ("rule", "supported", "not_supported", "undecided"),
    [
        (intervals.at_least(0.02), [(-0.01, 0.1), (-0.019, -0.01)], [(-0.1, -0.01)], [(-0.03, 0.01)]),
        (intervals.worse(0.02), [(-0.1, -0.001)], [(-0.01, 0.1)], [(-0.03, 0.01)]),
        (intervals.better(0.02), [(0.001, 0.1)], [(-0.1, 0.01)], [(-0.01, 0.03)]),
        (intervals.close(0.02), [(-0.01, 0.01)], [(-0.1, -0.03), (0.03, 0.1)], [(-0.01, 0.03), (-0.03, -0.01)]),
    ],
)
def test_rules(rule, supported, not_supported, undecided):
    for ends, decision in ((supported, SUPPORTED), (not_supported, NOT_SUPPORTED), (undecided, UNDECIDED)):
        for low, high in ends:
            assert rule(Interval((low + high) / 2, low, high)) == decision


def test_measures_of_a_run():
    cell = Cell("dense-bf16", "drpo", 12.5, 0)
    rises, falls = made_up(cell, 0.8), made_up(cell, 0.8, end=0.3)
    assert measures.final_reward(rises) == pytest.approx(0.8)
    assert (measures.collapsed(rises), measures.collapsed(falls)) == (0.0, 1.0)
    assert measures.collapsed(made_up(cell, 0.8, end=0.45)) == 0.0
    # 0.2 + 0.02 i, over 5 batches: 0.5 at batches 13 to 17
    assert measures.batches_to_level(rises) == 18.0
    assert measures.batches_to_level(made_up(cell, 0.4)) == ROLLOUTS
    assert measures.largest_mismatch(rises) == pytest.approx(0.3)
    norms = [1.0] * 28 + [10.5, math.nan]
    assert measures.spikes(replace(rises, curves={**rises.curves, "norm": norms})) == 1.0


@pytest.mark.parametrize("snapshot", figures.GEMMA.values())
def test_weights_of_the_gemma_rollouts_at_the_papers_delta_are_all_near_one(snapshot):
    counts = figures.gemma_weights([("pg-is", 0.0), ("drpo", 12.5), ("dppo-tv", 0.15)], snapshot)
    total = counts["pg-is", 0.0].sum()
    assert total > 1000
    assert all(by.sum() == total for by in counts.values())
    assert counts["pg-is", 0.0][WEIGHT_EDGES.index(1.0)] == total
    near = slice(WEIGHT_EDGES.index(0.92), WEIGHT_EDGES.index(1.08))
    assert counts["drpo", 12.5][near].sum() == total
    # what a mask drops has weight 0
    assert counts["dppo-tv", 0.15][WEIGHT_EDGES.index(0.0)] + counts["dppo-tv", 0.15][WEIGHT_EDGES.index(1.0)] == total


def test_tuning_is_shown_with_its_choice(folder):
    tuning = analysis.grouped(r for r in read_all(folder) if r.cell.setting == TUNED_IN and r.cell.seed >= 100)
    (row,) = (row for row in analysis.tuning_table(tuning, TUNED).splitlines() if row.startswith("| DRPO |"))
    assert row.count("**") == 2
    assert "**0.15: 0.800**" in row
