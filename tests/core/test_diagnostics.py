"""Every diagnostic on six hand-computed tokens; merging, summaries, masks, invalid tokens, and real rollouts."""

import math
from math import log
from pathlib import Path

import numpy as np
import pytest
from backends import Backend

import drpo_core
from drpo_core import (
    CISPO,
    DPPO,
    DRPO,
    SPO,
    MaskDRPO,
    PolicyGradient,
    PPOClip,
    diagnostics,
    expand_advantages,
    merge_diagnostics,
    policy_loss_and_gradient,
    summarize,
    token_diagnostics,
)
from drpo_core.diagnostics import EffectiveSampleSize, Maximum, Mean, Minimum, map_diagnostics
from drpo_core.objectives import IPO, OBJECTIVES, SAPO, TOPR, IcePop, Reinforce

# eager JAX compiles every operation by itself: that is slow, and the same operations as under jit
BACKENDS = [b for b in Backend if b is not Backend.JAX]

# token     0            1           2            3             4             5
#           diverging    on-policy   diverging    converging    converging    A = 0
# r         2            1           1/2          3/2           1/4           2
# π − μ     1/4          0           −3/10        3/10          −3/10         1/4
PI, MU = np.array([0.5, 0.2, 0.3, 0.9, 0.1, 0.5]), np.array([0.25, 0.2, 0.6, 0.6, 0.4, 0.25])
LOG_PROB, BEHAVIOR = np.log(PI), np.log(MU)
ADVANTAGES = np.array([1.0, 1.0, -1.0, -2.0, 0.5, 0.0])
TOKENS = (LOG_PROB, BEHAVIOR, ADVANTAGES)
W = [1 - 0.25 / 0.2, 1.0, 1 - 0.3 / 0.2, 1 + 0.3 / 0.2, 1 + 0.3 / 0.2]  # of DRPO(δ = 0.2), tokens with A ≠ 0
RHO = [2 * 0.25, 1.0, 0.5 * 0.5, 1.5 * 2.5, 0.25 * 2.5]  # r |w|
BY_HAND = {
    "ratio_mean": (2 + 1 + 0.5 + 1.5 + 0.25 + 2) / 6,
    "ratio_max": 2.0,
    "log_ratio_abs_mean": (log(2) + 0 + log(2) + log(1.5) + log(4) + log(2)) / 6,
    "k1_mean": -(log(2) + 0 - log(2) + log(1.5) - log(4) + log(2)) / 6,
    "k3_mean": (1 - log(2) + 0 - 0.5 + log(2) + 0.5 - log(1.5) - 0.75 + log(4) + 1 - log(2)) / 6,
    "binary_tv_mean": (0.25 + 0 + 0.3 + 0.3 + 0.3 + 0.25) / 6,
    "binary_tv_max": 0.3,
    "invalid_fraction": 0.0,
    "outside_fraction": 4 / 5,  # all active ones but the on-policy one
    "outside_positive_diverging_fraction": 1 / 5,
    "outside_positive_converging_fraction": 1 / 5,
    "outside_negative_diverging_fraction": 1 / 5,
    "outside_negative_converging_fraction": 1 / 5,
    "dropped_fraction": 0.0,
    "attenuated_fraction": 0.0,
    "amplified_fraction": 2 / 5,
    "corrective_fraction": 2 / 5,
    "weight_mean": sum(W) / 5,
    "weight_min": 1 - 0.3 / 0.2,
    "weight_max": 1 + 0.3 / 0.2,
    # Σ |A r w| / Σ |A r|
    "gradient_mass_kept": (0.5 + 1 + 0.25 + 2 * 3.75 + 0.5 * 0.625) / (2 + 1 + 0.5 + 3 + 0.125),
    "effective_sample_size": sum(RHO) ** 2 / (5 * sum(rho**2 for rho in RHO)),
}


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-13, atol=1e-16, err_msg=name)


def figures(objective, *arrays, **options):
    return summarize(token_diagnostics(objective, *arrays, **options))


def values(backend, objective, *arrays, **options):
    """The value of every statistic, computed on a backend and checked to be 0-d; NaN where nothing was counted."""
    statistics = backend.run(token_diagnostics, objective, *arrays, **options)
    assert all(part.shape == () for statistic in statistics.values() for part in statistic)
    return {name: float(s.value) if s.count else math.nan for name, s in statistics.items()}


def test_by_hand(backend):
    assert_same(values(backend, DRPO(delta=0.2), *TOKENS), BY_HAND)


def test_kinds_of_statistics():
    kinds = {name: type(statistic) for name, statistic in token_diagnostics(DRPO(delta=0.2), *TOKENS).items()}
    assert kinds.pop("effective_sample_size") is EffectiveSampleSize
    assert kinds.pop("weight_min") is Minimum
    assert {kinds.pop(name) for name in ("ratio_max", "binary_tv_max", "weight_max")} == {Maximum}
    assert set(kinds.values()) == {Mean}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # outside, dropped, attenuated, amplified, corrective: fifths of the active tokens
        (PolicyGradient(), [0, 0, 0, 0, 0]),
        (PolicyGradient(max_ratio=1.2), [0, 0, 2, 0, 0]),
        (CISPO(max_ratio=1.2), [0, 0, 2, 0, 0]),
        (PPOClip(eps=0.6), [2, 1, 0, 0, 0]),
        (SPO(eps=0.6), [2, 0, 1, 2, 1]),
        (DPPO(delta=0.28), [3, 1, 0, 0, 0]),
        (DPPO(delta=0.15, divergence="binary_kl"), [3, 1, 0, 0, 0]),
        (DRPO(delta=0.28), [3, 0, 1, 2, 1]),
        (MaskDRPO(delta=0.28), [3, 0, 0, 0, 1]),
        (Reinforce(), [0, 0, 2, 2, 0]),
        (CISPO(min_ratio=0.3, max_ratio=1.2), [0, 0, 2, 1, 0]),
        (SAPO(tau_positive=1.0, tau_negative=1.05), [0, 0, 4, 0, 0]),
        (IcePop(min_ratio=0.3, max_ratio=1.6), [2, 2, 0, 0, 0]),
        (IPO(delta=0.28), [3, 3, 0, 0, 0]),
        (TOPR(), [0, 0, 2, 1, 0]),
    ],
    ids=repr,
)
def test_what_each_objective_does(objective, expected):
    got = figures(objective, *TOKENS)
    names = ("outside", "dropped", "attenuated", "amplified", "corrective")
    np.testing.assert_allclose([5 * got[f"{name}_fraction"] for name in names], expected, atol=1e-12)


def test_the_four_outside_fractions_add_up():
    for objective in (DRPO(delta=0.28), DPPO(delta=0.1), PPOClip(eps=0.6)):
        got = figures(objective, *TOKENS)
        parts = [v for name, v in got.items() if name.startswith("outside_") and name != "outside_fraction"]
        assert len(parts) == 4
        np.testing.assert_allclose(sum(parts), got["outside_fraction"])


def test_the_share_of_gradient_that_a_mask_keeps():
    got = figures(DPPO(delta=0.2), *TOKENS)
    np.testing.assert_allclose(got["gradient_mass_kept"], (1 + 3 + 0.125) / (2 + 1 + 0.5 + 3 + 0.125))
    rho = [0.0, 1.0, 0.0, 1.5, 0.25]
    np.testing.assert_allclose(got["effective_sample_size"], sum(rho) ** 2 / (5 * sum(r * r for r in rho)))


def test_on_policy():
    got = figures(DRPO(delta=0.2), BEHAVIOR, BEHAVIOR, ADVANTAGES)
    one = {"ratio_mean", "ratio_max", "weight_mean", "weight_min", "weight_max", "gradient_mass_kept", "effective_sample_size"}
    assert {name for name, value in got.items() if value == 1.0} == one
    assert all(value == 0.0 for name, value in got.items() if name not in one)


def test_masked_tokens_do_not_enter(backend):
    mask = np.array([True, False, True, True, False, True, True, False, True])
    spread = [np.full(9, np.nan) for _ in TOKENS]
    for array, token in zip(spread, TOKENS, strict=True):
        array[mask] = token
    assert_same(values(backend, DRPO(delta=0.2), *spread, mask=mask), BY_HAND)


def test_layout_does_not_matter():
    two_rows = [array.reshape(2, 3) for array in TOKENS]
    assert_same(figures(DRPO(delta=0.2), *two_rows), BY_HAND)


def test_the_order_is_that_of_the_documentation():
    assert list(figures(DRPO(delta=0.2), *TOKENS)) == list(BY_HAND)


def test_merging_parts_is_the_whole(backend):
    parts = [backend.call(token_diagnostics, DRPO(delta=0.2), *map(backend.asarray, rows)) for rows in split(3)]
    assert_same(summarize(merge_diagnostics(*parts)), BY_HAND)


@pytest.mark.parametrize("cut", [0, 1, 5, 6])
def test_merging_uneven_and_empty_parts(cut):
    parts = [token_diagnostics(DRPO(delta=0.2), *rows) for rows in split(cut)]
    merged = merge_diagnostics(*parts)
    assert_same(summarize(merged), BY_HAND)
    assert_same(summarize(merge_diagnostics(*reversed(parts))), BY_HAND)


def split(cut):
    return [[array[rows] for array in TOKENS] for rows in (slice(None, cut), slice(cut, None))]


def test_merging_one_part_or_many():
    parts = [token_diagnostics(DRPO(delta=0.2), *(array[i : i + 1] for array in TOKENS)) for i in range(6)]
    assert_same(summarize(merge_diagnostics(*parts)), BY_HAND)
    assert_same(summarize(merge_diagnostics(token_diagnostics(DRPO(delta=0.2), *TOKENS))), BY_HAND)


def test_merging_does_not_change_its_arguments():
    part = token_diagnostics(DRPO(delta=0.2), *TOKENS)
    before = summarize(part)
    merge_diagnostics(part, part)
    assert summarize(part) == before


def test_merging_errors():
    part = token_diagnostics(DRPO(delta=0.2), *TOKENS)
    with pytest.raises(ValueError, match=r"^parts: expected at least one dict of diagnostics, got none$"):
        merge_diagnostics()
    with pytest.raises(
        TypeError, match=r"^parts: expected dicts of diagnostics, got list; pass merge_diagnostics\(\*parts\)$"
    ):
        merge_diagnostics([part, part])
    with pytest.raises(TypeError, match=r"^parts: expected dicts of diagnostics, got NoneType$"):
        merge_diagnostics(part, None)
    other = {name: statistic for name, statistic in part.items() if name != "k3_mean"}
    for parts in ((part, other), (other, part)):
        with pytest.raises(ValueError, match=r"^parts: expected the same names in every .*, got \['k3_mean'\] in some only$"):
            merge_diagnostics(*parts)


def test_merging_by_name_not_by_place():
    """Parts whose names come in another order were added crosswise."""
    first, second = (token_diagnostics(DRPO(delta=0.2), *rows) for rows in split(2))
    turned = dict(reversed(second.items()))
    merged = merge_diagnostics(first, turned)
    assert list(merged) == list(first)
    assert_same(summarize(merged), BY_HAND)
    assert_same(summarize(merge_diagnostics(turned, first)), BY_HAND)


def test_merging_what_was_not_asked_for_is_an_error_and_nothing_is_nothing():
    result = policy_loss_and_gradient(DRPO(delta=0.2), *TOKENS, mask=np.ones(6, dtype=bool), diagnostics=False)
    assert result.diagnostics is None
    with pytest.raises(TypeError, match="got NoneType"):
        merge_diagnostics(result.diagnostics)
    assert merge_diagnostics({}, {}) == {}


def test_merging_statistics_that_are_floats_by_now():
    """Such as those of `map_diagnostics(float, …)`, sent between processes."""
    parts = [token_diagnostics(DRPO(delta=0.2), *rows) for rows in split(2)]
    as_arrays = merge_diagnostics(*parts)
    as_floats = merge_diagnostics(*(map_diagnostics(lambda field: np.asarray(float(field)), part) for part in parts))
    assert summarize(as_floats) == summarize(as_arrays)


def test_a_function_of_every_field_keeps_names_classes_and_order():
    part = token_diagnostics(DRPO(delta=0.2), *TOKENS)
    doubled = map_diagnostics(lambda field: 2 * field, part)
    assert list(doubled) == list(part)
    for name, statistic in part.items():
        assert type(doubled[name]) is type(statistic)
        assert tuple(doubled[name]) == tuple(2 * field for field in statistic)


def test_a_function_of_the_fields_of_several_goes_by_name():
    part = token_diagnostics(DRPO(delta=0.2), *TOKENS)
    other = map_diagnostics(lambda field: 3 * field, dict(reversed(part.items())))
    total = map_diagnostics(lambda x, y: x + y, part, other)
    assert list(total) == list(part)
    assert all(tuple(total[name]) == tuple(field + 3 * field for field in part[name]) for name in part)
    with pytest.raises(KeyError, match="ratio_mean"):
        map_diagnostics(lambda x, y: x + y, part, {})


def arrays_of(statistics):
    return [field for statistic in statistics.values() for field in statistic]


@pytest.mark.parametrize("engine", ["arrays", "compiled"])
@pytest.mark.parametrize("function", ["token_diagnostics", "policy_loss_and_gradient", "merge_diagnostics"])
def test_no_two_fields_share_memory(low_precision_backend, function, engine):
    """An all-reduce in place of one count changed all that shared it (fault 28)."""
    backend = low_precision_backend if engine == "arrays" else Backend.NUMPY
    tokens = [backend.asarray(array) for array in TOKENS]
    mask = backend.asarray(np.ones(6, dtype=bool))
    if function == "policy_loss_and_gradient":
        statistics = policy_loss_and_gradient(DRPO(delta=0.2), *tokens, mask=mask, engine=engine).diagnostics
    else:
        statistics = token_diagnostics(DRPO(delta=0.2), *tokens, mask=mask)
        if function == "merge_diagnostics":
            statistics = merge_diagnostics(statistics, statistics)
    fields = arrays_of(statistics)
    if backend is Backend.TORCH:
        assert len({field.data_ptr() for field in fields}) == len(fields)
        before = summarize(statistics)
        statistics["ratio_mean"].count.mul_(2.0)
        after = summarize(statistics)
        assert {name for name in after if after[name] != before[name]} == {"ratio_mean"}
    else:
        assert all(isinstance(field, backend.array_type) for field in fields)


@pytest.mark.parametrize("family", OBJECTIVES, ids=lambda family: family.name)
def test_every_objective_of_the_table_has_diagnostics(backend, family):
    made = family.make(family.typical[0] if family.typical else None)
    got = values(backend, made, *TOKENS)
    assert set(got) == set(BY_HAND)  # jax.jit sorts them
    parts = [got[f"{name}_fraction"] for name in ("dropped", "attenuated", "amplified", "corrective")]
    assert 0.0 <= sum(parts) <= 1.0 + 1e-12
    assert got["weight_min"] <= got["weight_mean"] <= got["weight_max"]
    assert got["outside_fraction"] == 0.0 or hasattr(family.objective, "inside")
    same = ("ratio_mean", "ratio_max", "log_ratio_abs_mean", "k1_mean", "k3_mean", "binary_tv_mean", "binary_tv_max")
    assert_same({name: got[name] for name in same}, {name: BY_HAND[name] for name in same})


@pytest.mark.parametrize(
    ("which", "value", "invalid"),
    [
        ("log_prob", math.nan, True),
        ("log_prob", math.inf, True),
        ("log_prob", -math.inf, False),  # π = 0 can happen
        ("behavior_log_prob", math.nan, True),
        ("behavior_log_prob", math.inf, True),
        ("behavior_log_prob", -math.inf, True),  # μ can't have sampled what it gives no probability
        ("advantages", math.nan, True),
        ("advantages", math.inf, True),
        ("advantages", -math.inf, True),
    ],
)
def test_invalid_tokens_are_counted_and_enter_nothing_else(which, value, invalid):
    names = ("log_prob", "behavior_log_prob", "advantages")
    arrays = {n: np.append(array, value if n == which else -1.0) for n, array in zip(names, TOKENS, strict=True)}
    got = figures(DRPO(delta=0.2), **arrays)
    if invalid:
        assert_same(got, BY_HAND | {"invalid_fraction": 1 / 7})
    else:
        assert got["invalid_fraction"] == 0.0
        np.testing.assert_allclose(got["ratio_mean"], (7.25 + 0.0) / 7)
        np.testing.assert_allclose(got["binary_tv_max"], math.exp(-1))


def test_masked_invalid_tokens_are_not_counted():
    arrays = [np.append(array, math.nan) for array in TOKENS]
    assert_same(figures(DRPO(delta=0.2), *arrays, mask=np.array([True] * 6 + [False])), BY_HAND)


@pytest.mark.parametrize("shape", [(6,), (0,), (2, 0)])
def test_nothing_to_count(backend, shape):
    """A fully masked batch and empty ones: NaN in a summary, and neutral in a merge."""
    mask = backend.asarray(np.zeros(shape, dtype=bool))
    nan = [backend.asarray(np.full(shape, np.nan))] * 3
    nothing = backend.call(token_diagnostics, DRPO(delta=0.2), *nan, mask=mask)
    assert all(math.isnan(value) for value in summarize(nothing).values())
    whole = backend.call(token_diagnostics, DRPO(delta=0.2), *map(backend.asarray, TOKENS))
    assert_same(summarize(merge_diagnostics(nothing, whole)), BY_HAND)
    assert_same(summarize(merge_diagnostics(whole, nothing)), BY_HAND)


def test_without_advantages_only_the_policies_are_described():
    got = figures(DRPO(delta=0.2), LOG_PROB, BEHAVIOR, np.zeros(6))
    nan = {name for name, value in got.items() if math.isnan(value)}
    names = list(BY_HAND)
    assert nan == set(names[names.index("outside_fraction") :])


def test_summaries_are_floats(backend):
    statistics = backend.call(token_diagnostics, DRPO(delta=0.2), *map(backend.asarray, TOKENS))
    assert {type(value) for value in summarize(statistics).values()} == {float}
    assert summarize({}) == {}


def test_a_summary_of_what_is_no_dict():
    assert summarize(None) == {}  # as a policy loss gives where they were not asked for
    with pytest.raises(TypeError, match=r"^statistics: expected a dict of diagnostics, got list$"):
        summarize([token_diagnostics(DRPO(delta=0.2), *TOKENS)])


def test_a_single_token_is_enough():
    got = figures(DRPO(delta=0.2), *(array[:1] for array in TOKENS))
    assert not any(math.isnan(value) for value in got.values())
    np.testing.assert_allclose([got["ratio_mean"], got["weight_min"]], [2.0, W[0]], rtol=1e-14)


def test_float32_stays_float32(backend):
    statistics = backend.run(token_diagnostics, DRPO(delta=0.2), *(array.astype(np.float32) for array in TOKENS))
    assert {part.dtype for statistic in statistics.values() for part in statistic} == {np.dtype(np.float32)}


def test_a_summary_is_one_transfer_from_a_device(monkeypatch):
    class OnDevice(np.ndarray):
        is_cuda = True

    transfers = []

    def transfer(array, device):
        transfers.append((array.shape, device))
        return array

    monkeypatch.setattr(diagnostics, "to_device", transfer)
    statistics = {"mean": Mean(np.asarray(6.0), np.asarray(4.0)), "maximum": Maximum(np.asarray(7.0), np.asarray(1.0))}
    expected = {"mean": 1.5, "maximum": 7.0}
    assert summarize(statistics) == expected
    assert not transfers
    assert summarize({n: type(s)(*(part.view(OnDevice) for part in s)) for n, s in statistics.items()}) == expected
    assert transfers == [((2,), "cpu")]


def merged(*statistics):
    (result,) = merge_diagnostics(*({"statistic": type(s)(*map(np.asarray, s))} for s in statistics)).values()
    return result


def test_statistics_by_hand():
    assert merged(Mean(6.0, 4.0), Mean(2.0, 1.0)).value == 8 / 5
    assert merged(Maximum(6.0, 4.0), Maximum(7.0, 1.0)) == (7.0, 5.0)
    assert merged(Minimum(6.0, 4.0), Minimum(7.0, 1.0)) == (6.0, 5.0)
    effective = merged(EffectiveSampleSize(1.0, 1.0, 1.0), EffectiveSampleSize(3.0, 9.0, 1.0))
    assert effective.value == (1 + 3) ** 2 / (2 * (1 + 9))
    zero = np.asarray(0.0)
    assert math.isnan(Mean(zero, zero).value)
    assert math.isnan(EffectiveSampleSize(zero, zero, np.asarray(3.0)).value)


@pytest.mark.parametrize("kind", [Maximum, Minimum])
def test_a_nan_extreme_is_not_lost_in_merging(kind):
    nan, one = kind(np.nan, 1.0), kind(1.0, 1.0)
    assert math.isnan(merged(nan, one).value)
    assert math.isnan(merged(one, nan).value)


def test_a_measured_divergence_is_used():
    measured = np.array([0.5, 0.0, 0.1, 0.5, 0.1, 0.5])
    got = figures(DPPO(delta=0.2, divergence="per_token"), *TOKENS, divergence=measured)
    assert got["outside_fraction"] == 2 / 5
    assert got["dropped_fraction"] == 1 / 5


def test_a_token_without_a_direction_is_outside_only():
    """ℓ = 0 with a measured divergence above δ: neither diverging nor converging."""
    got = figures(DPPO(delta=0.2, divergence="per_token"), *(array[1:2] for array in TOKENS), divergence=np.array([0.5]))
    assert {name: value for name, value in got.items() if name.startswith("outside") and value} == {"outside_fraction": 1.0}


def test_errors(backend):
    with pytest.raises(TypeError, match=r"mask: expected a bool dtype, got .*float64"):
        backend.run(token_diagnostics, DRPO(delta=0.2), *TOKENS, mask=np.ones(6))
    with pytest.raises(ValueError, match=r"advantages: expected the shape of log_prob, \(6,\), got \(1,\)"):
        backend.run(token_diagnostics, DRPO(delta=0.2), LOG_PROB, BEHAVIOR, np.ones(1))


ROLLOUTS = Path(drpo_core.__file__).parent / "audit" / "data" / "gemma3_270m_arithmetic.npz"


@pytest.mark.parametrize(
    ("snapshot", "shift", "dropped", "least", "most"),
    [
        ("step0", 0.00259, 0.0, 0.614, 1.216),
        ("lr1e6_step1", 0.00557, 0.0053, -1.185, 1.892),
        ("lr1e6_step4", 0.01427, 0.0252, -4.799, 3.859),
        ("lr1e6_step8", 0.02691, 0.0392, -5.076, 6.571),
        ("lr2e5_step1", 0.08465, 0.120, -4.952, 7.182),
        ("lr2e5_step8", 0.21753, 0.273, -5.664, 7.664),
    ],
)
def test_known_figures_of_real_rollouts(snapshot, shift, dropped, least, most):
    with np.load(ROLLOUTS) as rollouts:
        mask = rollouts["mask"]
        tokens = (
            rollouts[f"log_prob_{snapshot}"],
            rollouts["behavior_log_prob"],
            expand_advantages(rollouts["advantages"], mask),
        )
    dppo, drpo = figures(DPPO(delta=0.15), *tokens, mask=mask), figures(DRPO(delta=0.15), *tokens, mask=mask)
    assert abs(dppo["binary_tv_mean"] - shift) <= 0.5e-5
    assert abs(dppo["dropped_fraction"] - dropped) <= (0.5e-4 if dropped < 0.1 else 0.5e-3)
    assert abs(drpo["weight_min"] - least) <= 0.5e-3
    assert abs(drpo["weight_max"] - most) <= 0.5e-3
    assert drpo["corrective_fraction"] == dppo["dropped_fraction"]
    assert drpo["invalid_fraction"] == 0.0
