"""What the audit computes, against the core called directly and against a sort."""

import json
import math
import re
import tracemalloc
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest

from drpo_core import (
    DPPO,
    DRPO,
    Tokens,
    VacuousTrustRegionWarning,
    binary_kl,
    expand_advantages,
    importance_ratio,
    probability_shift,
    summarize,
    token_diagnostics,
)
from drpo_core.audit import CHUNK_TOKENS, RolloutError, audit, open_rollouts, rows, statistics
from drpo_core.audit.report import kept_mass
from drpo_core.audit.statistics import DATA_FIGURES


def off_policy(shape, seed=3):
    """Rollouts of which no two tokens are alike."""
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(1.5, shape)
    log_prob = np.minimum(behavior + rng.normal(0, 0.7, shape), -1e-6)
    return {
        "log_prob": log_prob,
        "behavior_log_prob": behavior,
        "advantages": rng.normal(size=shape),
        "mask": rng.random(shape) < 0.9,
    }


@pytest.fixture
def npz(tmp_path):
    def write(*, chunk_tokens=CHUNK_TOKENS, **data):
        np.savez(tmp_path / "r.npz", **data)
        return open_rollouts(tmp_path / "r.npz", chunk_tokens=chunk_tokens)

    return write


def figures(report, snapshot="log_prob"):
    return {(item.row.name, item.row.quantile): item.figures for item in report.snapshots[snapshot].objectives}


def test_figures_are_the_core_diagnostics_whatever_the_chunks(npz):
    data = off_policy((30, 11))
    report = audit(npz(chunk_tokens=17, **data))
    assert len(report.snapshots["log_prob"].objectives) == 1 + len(rows())
    for item in report.snapshots["log_prob"].objectives:
        wanted = summarize(token_diagnostics(item.row.objective, *(data[name] for name in list(data)[:3]), mask=data["mask"]))
        merged = {**{name: report.snapshots["log_prob"].health[name] for name in DATA_FIGURES}, **item.figures}
        assert merged.keys() == wanted.keys()
        for name, value in wanted.items():
            assert merged[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name


def test_health(npz):
    data = off_policy((20, 10))
    mask = data["mask"]
    data["log_prob"][~mask] = np.nan
    valid = np.argwhere(mask)
    data["log_prob"][tuple(valid[3])] = 0.25
    data["log_prob"][tuple(valid[5])] = -np.inf
    data["behavior_log_prob"][tuple(valid[7])] = -np.inf
    data["advantages"][tuple(valid[9])] = 0.0
    snapshot = audit(npz(**data)).snapshots["log_prob"]
    health, valid_tokens = snapshot.health, int(mask.sum())
    assert (health["tokens"], health["valid_tokens"], health["masked_tokens"]) == (200, valid_tokens, 200 - valid_tokens)
    assert health["active_tokens"] == valid_tokens - 2
    assert health["masked_nan"] == {"log_prob": 200 - valid_tokens, "behavior_log_prob": 0, "advantages": 0}
    assert health["positive_log_prob"] == {"log_prob": 1, "behavior_log_prob": 0}
    assert health["infinite"] == {"log_prob": 1, "behavior_log_prob": 1, "advantages": 0}
    for bound in (0.1, 0.01, 0.001):
        share = np.mean(np.exp(data["behavior_log_prob"][mask]) <= bound)
        assert health["rare_fraction"][f"{bound:g}"] == pytest.approx(share)
    assert 0 < health["rare_fraction"]["0.001"] < health["rare_fraction"]["0.1"] < 1
    assert snapshot.warnings == [
        f"log_prob: 1 valid tokens hold -inf (first at {tuple(map(int, valid[5]))})",
        f"log_prob: 1 valid tokens hold a value above 0, which no log-prob has (first at {tuple(map(int, valid[3]))})",
        f"behavior_log_prob: 1 valid tokens hold -inf, and enter no figure (first at {tuple(map(int, valid[7]))})",
    ]


def test_sentinels_and_zeros_in_place_of_log_probs_are_warned_about(npz):
    data = off_policy((4, 5))
    data["mask"][:] = True
    data["log_prob"][1, 2] = -9999.0
    data["behavior_log_prob"][2, 3], data["log_prob"][2, 3] = 0.0, -4.0
    sentinel, zero = audit(npz(**data)).snapshots["log_prob"].warnings
    assert sentinel.startswith("log_prob: 1 valid tokens hold a value below -1000")
    assert zero.startswith("behavior_log_prob: 1 valid tokens hold a value exactly 0 where the other policy's is below -1")
    assert zero.endswith("(first at (2, 3))")


def test_log_probs_far_above_zero_are_a_warning_and_no_overflow(npz):
    data = off_policy((5, 7))
    data["mask"][:] = True
    data["log_prob"][0, :3] = data["behavior_log_prob"][0, 1:4] = [800.0, 1e300, 3.0]
    report = audit(npz(**data), curves=True, quantiles=[0.1, 0.9])
    assert report.snapshots["log_prob"].health["positive_log_prob"] == {"log_prob": 3, "behavior_log_prob": 3}
    assert len(report.snapshots["log_prob"].warnings) >= 2
    json.dumps(report.as_dict(), allow_nan=False)


def test_rounding_above_zero_is_no_warning(npz):
    data = {name: array.astype(np.float16) for name, array in off_policy((4, 4)).items() if name != "mask"}
    data["log_prob"][0, 0] = 0.01
    assert audit(npz(**data)).snapshots["log_prob"].warnings == []


@pytest.mark.parametrize("name", ["log_prob", "behavior_log_prob", "advantages"])
def test_nan_at_valid_tokens_is_an_error_with_its_count_and_place(npz, name):
    data = off_policy((6, 9))
    data["mask"][:] = True
    data["mask"][1, 4] = False
    data[name][[1, 2, 5], [4, 8, 0]] = np.nan
    with pytest.raises(RolloutError, match=rf"{name}: 2 NaN at valid tokens, the first at index \(2, 8\)"):
        audit(npz(chunk_tokens=7, **data))


def test_no_valid_token_is_an_error(npz):
    data = off_policy((6, 9))
    with pytest.raises(RolloutError, match="mask: no token is valid"):
        audit(npz(**{**data, "mask": np.zeros((6, 9), bool)}))


def test_no_active_token_gives_null(npz):
    data = off_policy((6, 9))
    report = audit(npz(**{**data, "advantages": np.zeros(6)}), quantiles=[0.5])
    assert report.snapshots["log_prob"].health["diverging_tokens"] == 0
    assert len(report.snapshots["log_prob"].objectives) == 1 + len(rows())
    assert len(report.snapshots["log_prob"].warnings) == 3
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["snapshots"]["log_prob"]["objectives"][0]["weight_min"] is None


def measures(data):
    """The three divergences, of diverging valid tokens."""
    x, b, a = (data[name] for name in ("log_prob", "behavior_log_prob", "advantages"))
    where = data["mask"] & (a * (x - b) > 0)
    shift = np.abs(probability_shift(x, b))[where]
    return {"DPPO": shift, "KL": binary_kl(x, b)[where], "PPOClip": np.abs(np.expm1(x - b))[where]}


@pytest.mark.parametrize("q", [1e-9, 0.003, 0.02, 0.31, 0.5, 0.999, 1 - 1e-9])
def test_at_quantile_drops_that_share_of_the_diverging_tokens(npz, q):
    data = off_policy((300, 13))
    report = audit(npz(chunk_tokens=999, **data), [], quantiles=[q, 0.1])
    n = len(measures(data)["DPPO"])
    active = int((data["mask"] & (data["advantages"] != 0)).sum())
    assert report.snapshots["log_prob"].health["diverging_tokens"] == n
    checked = []
    for item in report.snapshots["log_prob"].objectives:
        if item.row.quantile != q:
            continue
        # IPO drops converging tokens besides
        either = ("outside_positive_diverging", "outside_negative_diverging")
        outside = {"PPOClip": ["dropped"], "DPPO": ["dropped"], "IPO": either}
        names = outside.get(type(item.row.objective).__name__, ["corrective"])
        lost = round(sum(item.figures[f"{name}_fraction"] for name in names) * active)
        assert abs(lost / n - q) <= 1 / n
        # not one token fewer than asked for, but the one at the threshold
        assert lost == min(round(q * n), n - 1)
        checked.append(item.row.family)
    assert checked == ["PPO-clip", "SPO", "DPPO-TV", "DPPO-KL", "DRPO", "Mask-DRPO", "IPO"]


def test_at_quantile_thresholds_are_those_of_a_sort(npz):
    data = off_policy((40, 13))
    found = [item.row for item in audit(npz(**data), [], quantiles=[0.25]).snapshots["log_prob"].objectives[1:]]
    thresholds = {row.family: row.parameters.get("delta", row.parameters.get("eps")) for row in found}
    for family, values in zip(("DPPO-TV", "DPPO-KL", "PPO-clip"), measures(data).values(), strict=True):
        ascending = np.sort(values)
        assert thresholds[family] == pytest.approx(ascending[len(values) - 1 - round(0.25 * len(values))], rel=1e-12)
    assert thresholds["DRPO"] == thresholds["Mask-DRPO"] == thresholds["DPPO-TV"]
    assert thresholds["SPO"] == thresholds["PPO-clip"]


def test_at_quantile_with_ties_never_drops_more(npz):
    data = {"log_prob": np.log(np.full(10, 0.6)), "behavior_log_prob": np.log(np.full(10, 0.5)), "advantages": np.ones(10)}
    report = audit(npz(**data), [], quantiles=[0.5])
    dppo = next(item for item in report.snapshots["log_prob"].objectives if item.row.family == "DPPO-TV")
    assert dppo.row.parameters["delta"] == pytest.approx(0.1)
    assert dppo.figures["dropped_fraction"] == 0.0


def test_rows_note_a_vacuous_region_without_a_python_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rows(delta=[0.15, 12.5, (0.5, 1.5)])
    by_name = {row.name: row.warning for row in found}
    assert by_name["DRPO(delta=0.15)"] is None
    assert "delta = 12.5 is at least 1" in by_name["DRPO(delta=12.5)"]
    assert "delta = 1.5" in by_name["DRPO(delta_low=0.5, delta_high=1.5)"]
    assert sum(row.family in ("DPPO-TV", "Mask-DRPO") for row in found) == 2
    with pytest.warns(VacuousTrustRegionWarning):
        DRPO(delta=12.5)


def test_default_rows():
    assert [row.label for row in rows()] == [
        "CISPO c=5", "PPO-clip ε=0.2", "PPO-clip ε=0.2/0.28", "SPO ε=0.2", "SPO ε=0.2/0.28", "DPPO-TV δ=0.15",
        "DPPO-KL δ=0.05", "DRPO δ=0.15", "DRPO δ=12.5", "Mask-DRPO δ=0.15", "REINFORCE", "SAPO τ=1.05/1", "IcePop c=0.5/5",
        "IPO δ=0.3", "TOPR", "GPPO ε=0.2", "UP ε_low=0.2", "ASPO ε=0.2 c=3 dual_clip=3", "PSPO α=0.1",
        "RIPO", "DCPO", "Band-KL", "Band-chi2",
    ]  # fmt: skip


@dataclass
class Mine:
    """An objective of the user's own: neither frozen nor with a trust region."""

    tau: float = 0.5
    table: dict = field(default_factory=dict)

    def loss(self, tokens):  # noqa: D102
        return -tokens.advantages * tokens.ratio

    def weight(self, tokens):  # noqa: D102
        return tokens.xp.exp(-self.tau * tokens.xp.abs(tokens.log_ratio))


class Plain:
    """An objective with attributes instead of fields."""

    loss, weight = Mine.loss, Mine.weight

    def __init__(self):
        self.tau = math.inf


class Shapeless(Mine):
    """Its weight would be broadcast."""

    def weight(self, tokens):  # noqa: ARG002, D102
        return np.ones(1)


def test_objectives_of_the_users_own(npz):
    data = off_policy((30, 11))
    report = audit(npz(**data), [Mine(), *rows(delta=[0.2], delta_kl=[], eps=[], max_ratio=[])[:3], DRPO(delta=0.1)])
    found = report.snapshots["log_prob"].objectives
    assert [item.row.label for item in found] == [
        "PG-IS", "Mine tau=0.5 table={}", "DPPO-TV δ=0.2", "DRPO δ=0.2", "Mask-DRPO δ=0.2", "DRPO δ=0.1",
    ]  # fmt: skip
    wanted = summarize(token_diagnostics(Mine(), *(data[name] for name in list(data)[:3]), mask=data["mask"]))
    assert {name: found[1].figures[name] for name in found[1].figures} == pytest.approx(
        {name: wanted[name] for name in found[1].figures}
    )
    assert found[1].figures["outside_fraction"] == 0.0


def test_the_report_of_an_objective_of_the_users_own_is_strict_json(npz):
    report = audit(npz(**off_policy((3, 4))), [Mine(table={"a": [np.float64("nan"), object, (1, True)]}), Plain()]).as_dict()
    mine, plain = json.loads(json.dumps(report, allow_nan=False))["snapshots"]["log_prob"]["objectives"][1:]
    assert mine["objective"] == "Mine"
    assert mine["parameters"] == {"tau": 0.5, "table": {"a": [None, "<class 'object'>", [1, True]]}}
    assert (plain["name"], plain["parameters"]) == ("Plain(tau=inf)", {"tau": None})


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        (DRPO, "expected an instance such as DRPO(delta=0.15), got the class DRPO"),
        (object(), "expected methods loss and weight, got object without loss and weight"),
        (Shapeless(), r"Shapeless.weight: expected an array of the tokens' shape, (12,), got shape (1,)"),
    ],
    ids=["class", "object", "shape"],
)
def test_what_is_no_objective_is_refused(npz, objective, line):
    with pytest.raises(TypeError, match=re.escape(line)):
        audit(npz(**off_policy((3, 4))), [objective])


def test_tokens_are_made_once_a_chunk(npz, monkeypatch):
    made, of = [], Tokens.of
    monkeypatch.setattr(Tokens, "of", lambda *arrays, **options: made.append(1) or of(*arrays, **options))
    table = rows(delta=[0.15], delta_kl=[0.05], eps=[0.2], max_ratio=[5.0])
    made.clear()
    audit(npz(chunk_tokens=40, **off_policy((20, 10))), [*table, Mine()], curves=True)
    assert len(made) == 5


def test_any_number_of_chunks_gives_the_same_figures(npz, monkeypatch):
    data = off_policy((40, 10))
    whole = figures(audit(npz(**data)))
    monkeypatch.setattr(statistics, "MERGED_AT_ONCE", 3)
    chunked = figures(audit(npz(chunk_tokens=7, **data)))
    assert list(whole) == list(chunked)
    for row, found in whole.items():
        assert found == pytest.approx(chunked[row], rel=1e-12)


def test_curves_hold_every_active_token_and_the_mean_weight(npz):
    data = off_policy((30, 11))
    snapshot = audit(npz(chunk_tokens=50, **data), rows(delta=[0.15]), curves=True).snapshots["log_prob"]
    assert snapshot.counts.sum() == snapshot.health["active_tokens"]
    assert snapshot.counts[0].sum() == (data["mask"] & (data["advantages"] > 0)).sum()
    for curve, item in zip(snapshot.curves, snapshot.objectives, strict=True):
        mean = curve.total.sum() / snapshot.counts.sum()
        assert mean == pytest.approx(item.figures["weight_mean"], rel=1e-9)


def test_advance_adds_up_to_every_pass(npz):
    data, seen = off_policy((30, 11)), []
    audit(npz(**data), advance=seen.append)
    assert sum(seen) == 330
    seen.clear()
    audit(npz(**data), quantiles=[0.1], advance=seen.append)
    assert sum(seen) == 5 * 330


def test_memory_is_bounded_by_the_chunk(npz):
    peaks = []
    for sequences in (256, 1024):
        found = npz(**off_policy((sequences, 512)))
        tracemalloc.start()
        audit(found, rows(delta=[0.15], eps=[], max_ratio=[], delta_kl=[]), quantiles=[0.1])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    # a float64 array of a chunk is half a megabyte; half a million tokens in four such arrays would be 17 MB
    assert peaks[1] < 40 * 8 * CHUNK_TOKENS


def test_per_sequence_advantages(npz):
    data = off_policy((30, 11))
    data["advantages"] = data["advantages"][:, 0]
    wide = {**data, "advantages": expand_advantages(data["advantages"], data["mask"])}
    wanted = summarize(token_diagnostics(DPPO(delta=0.15), *(wide[k] for k in list(wide)[:3]), mask=wide["mask"]))
    found = figures(audit(npz(**data)))["DPPO(delta=0.15, divergence='binary_tv')", None]
    assert found["dropped_fraction"] == pytest.approx(wanted["dropped_fraction"]) != 0.0
    assert math.isclose(found["gradient_mass_kept"], wanted["gradient_mass_kept"])
    assert importance_ratio(data["log_prob"], data["behavior_log_prob"])[data["mask"]].mean() == pytest.approx(
        wanted["ratio_mean"]
    )


def test_the_mass_that_truncated_sampling_keeps(npz):
    rng = np.random.default_rng(5)
    mu = rng.dirichlet(np.full(12, 0.5), 4000)
    pi = mu * np.exp(rng.normal(0.0, 0.1, mu.shape))
    pi /= pi.sum(-1, keepdims=True)
    for kept in (12, 3):
        over = np.where(mu >= np.sort(mu, -1)[:, -kept, None], mu, 0.0)
        over /= over.sum(-1, keepdims=True)
        sampled = (over.cumsum(-1) > rng.random((4000, 1))).argmax(-1)[:, None]
        log_pi, log_mu = (np.log(np.take_along_axis(p, sampled, -1)) for p in (pi, over))
        mask = rng.random(log_pi.shape) < 0.9
        advantages = np.ones_like(log_pi)
        report = audit(npz(log_prob=log_pi, behavior_log_prob=log_mu, advantages=advantages, mask=mask, chunk_tokens=100))
        health = report.snapshots["log_prob"].health
        r = np.exp(log_pi - log_mu)[mask]
        assert health["ratio_standard_error"] == pytest.approx(r.std(ddof=1) / math.sqrt(r.size), rel=1e-10)
        mass = pi[over > 0.0].sum() / 4000
        assert abs(health["ratio_mean"] - mass) < 4.0 * health["ratio_standard_error"]
        said = kept_mass(health)
        assert (said is None) == (kept == 12)
        assert said is None or f"{health['ratio_mean']:.4f} ± {health['ratio_standard_error']:.4f}" in said
