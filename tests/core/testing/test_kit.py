"""The verification kit itself: it passes what is right, fails what is wrong, and what it shows reproduces."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

import drpo_core.testing as kit
from drpo_core import DPPO, DRPO, SPO, PolicyGradient, PPOClip
from drpo_core.testing import (
    CHECKS,
    PropertyViolated,
    TokenBatch,
    check_implementation,
    from_core,
    from_function,
    parametrize_with_checks,
    token_batches,
    vocabularies,
)
from drpo_core.testing.batch import literal, round_to
from drpo_core.testing.oracle import reference
from drpo_core.testing.profiles import settings_for

DELTA = 0.25


def select(mask, log_prob, behavior_log_prob, advantages):
    return [np.where(mask, array, 0.0) for array in (log_prob, behavior_log_prob, advantages)]


def drpo(log_prob, behavior_log_prob, advantages, mask):
    x, b, a = select(mask, log_prob, behavior_log_prob, advantages)
    r = np.exp(np.minimum(x - b, 20.0))
    weight = 1.0 - np.sign(a) * (np.exp(x) - np.exp(b)) / DELTA
    loss = -a * r + np.abs(a) * np.exp(b) * (r - 1.0) ** 2 / (2.0 * DELTA)
    return tuple(np.where(mask, array, 0.0) for array in (loss, -a * r * weight, weight))


def dppo(log_prob, behavior_log_prob, advantages, mask, *, low=DELTA, high=DELTA, strict=False):
    x, b, a = select(mask, log_prob, behavior_log_prob, advantages)
    r, d = np.exp(np.minimum(x - b, 20.0)), np.exp(x) - np.exp(b)
    beyond = (a > 0) & (d >= high if strict else d > high) | (a < 0) & (d <= -low if strict else d < -low)
    keep = mask & ~beyond
    return np.where(keep, -a * r, 0.0), np.where(keep, -a * r, 0.0)


def token_mean_drpo(log_prob, behavior_log_prob, advantages, mask, normalizer=None):
    n = max(mask.sum(), 1) if normalizer is None else normalizer
    loss, gradient, _ = drpo(log_prob, behavior_log_prob, advantages, mask)
    return loss.sum() / n, gradient / n


def value_only(log_prob, behavior_log_prob, advantages, mask):
    return drpo(log_prob, behavior_log_prob, advantages, mask)[0]


def right(function, **claims):
    return from_function(function, returns_gradient=function is not value_only, objective=DRPO(delta=DELTA), **claims)


@pytest.mark.parametrize(
    "implementation",
    [
        right(drpo),
        right(value_only),
        right(token_mean_drpo, reduction="token_mean"),
        from_function(dppo, returns_gradient=True, objective=DPPO(delta=DELTA)),
    ],
    ids=str,
)
def test_correct_losses_pass(implementation):
    report = check_implementation(implementation, settings="dev")
    assert report.ok, str(report)


# Wrong losses: function, what it claims, and the check that must catch it.


def mask_multiplied_in(log_prob, behavior_log_prob, advantages, mask):
    r = np.exp(log_prob - behavior_log_prob) * mask
    return -advantages * r, -advantages * r


def strict_boundary(log_prob, behavior_log_prob, advantages, mask):
    return dppo(log_prob, behavior_log_prob, advantages, mask, strict=True)


def swapped_thresholds(log_prob, behavior_log_prob, advantages, mask):
    return dppo(log_prob, behavior_log_prob, advantages, mask, low=0.4, high=0.1)


def local_denominator(log_prob, behavior_log_prob, advantages, mask, normalizer=None):
    del normalizer
    return token_mean_drpo(log_prob, behavior_log_prob, advantages, mask)


def padded_width_denominator(log_prob, behavior_log_prob, advantages, mask):
    return token_mean_drpo(log_prob, behavior_log_prob, advantages, mask, normalizer=mask.size)


def divides_zero_by_zero(log_prob, behavior_log_prob, advantages, mask):
    return token_mean_drpo(log_prob, behavior_log_prob, advantages, mask, normalizer=mask.sum())


def missing_absolute_advantage(log_prob, behavior_log_prob, advantages, mask):
    x, b, a = select(mask, log_prob, behavior_log_prob, advantages)
    r, d = np.exp(np.minimum(x - b, 20.0)), np.exp(x) - np.exp(b)
    return -a * r + (r - 1.0) * d / (2 * DELTA), np.where(mask, -a * r + r * d / DELTA, 0.0)


def missing_behavior_probability(log_prob, behavior_log_prob, advantages, mask):
    x, b, a = select(mask, log_prob, behavior_log_prob, advantages)
    r = np.exp(np.minimum(x - b, 20.0))
    w = 1.0 - np.sign(a) * (r - 1.0) / DELTA
    return np.where(mask, -a * r, 0.0), np.where(mask, -a * r * w, 0.0), w


def clamp_zeroes_the_gradient(log_prob, behavior_log_prob, advantages, mask):
    loss, gradient, weight = drpo(log_prob, behavior_log_prob, advantages, mask)
    ell = np.where(mask, log_prob - behavior_log_prob, 0.0)
    return loss, np.where(np.abs(ell) > 5.0, 0.0, gradient), weight


def forgotten_ratio(log_prob, behavior_log_prob, advantages, mask):
    loss, _, weight = drpo(log_prob, behavior_log_prob, advantages, mask)
    return loss, np.where(mask, -advantages * weight, 0.0), weight


def flipped_penalty(log_prob, behavior_log_prob, advantages, mask):
    x, b, a = select(mask, log_prob, behavior_log_prob, advantages)
    r, d = np.exp(np.minimum(x - b, 20.0)), np.exp(x) - np.exp(b)
    w = 1.0 + np.sign(a) * d / DELTA
    return -a * r - np.abs(a) * (r - 1.0) * d / (2 * DELTA), np.where(mask, -a * r * w, 0.0), w


def unused_clip(log_prob, behavior_log_prob, advantages, mask):
    x, b, a = select(mask, log_prob, behavior_log_prob, advantages)
    r = np.exp(np.minimum(x - b, 20.0))
    return np.where(mask, -a * r, 0.0), np.where(mask, -a * r, 0.0)


def broadcast_advantages(log_prob, behavior_log_prob, advantages, mask):
    first = advantages[:, 0] if advantages.shape[0] == advantages.shape[1] else advantages
    return drpo(log_prob, behavior_log_prob, np.broadcast_to(first, mask.shape), mask)


def off_by_one(log_prob, behavior_log_prob, advantages, mask):
    return drpo(log_prob, np.roll(behavior_log_prob, 1, axis=-1), advantages, np.ones_like(mask) & mask)


def changes_its_input(log_prob, behavior_log_prob, advantages, mask):
    result = drpo(log_prob, behavior_log_prob, advantages, mask)
    log_prob -= behavior_log_prob
    return result


def loses_precision(log_prob, behavior_log_prob, advantages, mask):
    x, b = (np.asarray(array, np.float16).astype(array.dtype) for array in (log_prob, behavior_log_prob))
    return drpo(x, b, advantages, mask)


def tempered(log_prob, behavior_log_prob, advantages, mask):
    return drpo(log_prob / 1.5, behavior_log_prob, advantages, mask)


DRPO_HALF, DPPO_ASYMMETRIC = DRPO(delta=DELTA), DPPO(delta_low=0.1, delta_high=0.4)
WRONG = [
    (mask_multiplied_in, PolicyGradient(), "none", "check_masked_inputs_are_inert"),
    (strict_boundary, DPPO(delta=DELTA), "none", "check_boundary_is_kept"),
    (swapped_thresholds, DPPO_ASYMMETRIC, "none", "check_thresholds_follow_the_sign_of_the_advantage"),
    (local_denominator, DRPO_HALF, "token_mean", "check_micro_batches_sum_to_the_batch"),
    (padded_width_denominator, DRPO_HALF, "token_mean", "check_padding_does_not_matter"),
    (divides_zero_by_zero, DRPO_HALF, "token_mean", "check_fully_masked_batch_is_finite"),
    (missing_absolute_advantage, DRPO_HALF, "none", "check_homogeneous_in_the_advantage"),
    (missing_behavior_probability, DRPO_HALF, "none", "check_weight_bounds"),
    (missing_behavior_probability, DRPO_HALF, "none", "check_weight_is_continuous"),
    (missing_behavior_probability, DRPO_HALF, "none", "check_weight_symmetries"),
    (clamp_zeroes_the_gradient, DRPO_HALF, "none", "check_gradient_matches_the_formula"),
    (clamp_zeroes_the_gradient, DRPO_HALF, "none", "check_gradient_is_the_derivative_of_the_loss"),
    (forgotten_ratio, DRPO_HALF, "none", "check_expected_gradient"),
    (tempered, DRPO_HALF, "none", "check_ratio_has_expectation_one"),
    (flipped_penalty, DRPO_HALF, "none", "check_converging_and_diverging_weights"),
    (flipped_penalty, DRPO_HALF, "none", "check_probability_and_ratio_thresholds_correspond"),
    (unused_clip, PPOClip(eps=0.2), "none", "check_weight_sign_is_the_trust_region"),
    (broadcast_advantages, DRPO_HALF, "none", "check_tokens_do_not_interact"),
    (off_by_one, DRPO_HALF, "none", "check_tokens_do_not_interact"),
    (changes_its_input, DRPO_HALF, "none", "check_inputs_are_not_changed"),
    (loses_precision, DRPO_HALF, "none", "check_rounding_error"),
    (tempered, DRPO_HALF, "none", "check_on_policy_gradient"),
]


def wrong(function, objective, reduction):
    return from_function(function, returns_gradient=True, objective=objective, reduction=reduction)


@pytest.mark.parametrize(("function", "objective", "reduction", "check"), WRONG, ids=lambda v: getattr(v, "__name__", None))
def test_wrong_losses_fail_the_check_that_should_catch_them(function, objective, reduction, check):
    report = check_implementation(wrong(function, objective, reduction), checks=[check], settings="ci")
    (result,) = report.failed
    assert result.counterexample.startswith(("TokenBatch(", "Vocabulary(", "('float"))
    # the snippet needs NumPy and the function, and fails for the same reason
    source = "\n".join(line for line in result.snippet.splitlines() if not line.startswith("from test"))
    source = "\n".join(line for line in source.splitlines() if f"import {function.__name__}" not in line)
    assert "drpo_core" not in source
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        exec(compile(source, "snippet", "exec"), {function.__name__: function})  # noqa: S102 -- that it runs is the point


def test_counterexample_is_small():
    report = check_implementation(wrong(mask_multiplied_in, PolicyGradient(), "none"), checks=["P1"], settings="ci")
    assert report.failed[0].counterexample.count("False") == 1


def test_a_loss_that_raises_is_a_failure_not_an_error():
    def broken(log_prob, behavior_log_prob, advantages, mask):  # noqa: ARG001 -- its signature is its interface
        msg = "no"
        raise RuntimeError(msg)

    report = check_implementation(from_function(broken), checks=["P5"])
    assert "raised RuntimeError: no" in report.failed[0].reason


def test_what_does_not_apply_has_a_reason():
    def plain(log_prob, behavior_log_prob, advantages):
        return -advantages * np.exp(np.minimum(log_prob - behavior_log_prob, 20.0))

    report = check_implementation(from_function(plain))
    assert report.ok
    reasons = {result.check: result.reason for result in report.results if result.status == "not applicable"}
    assert reasons["check_masked_inputs_are_inert"] == "takes no mask"
    assert all(reasons.values())
    assert "not applicable" in str(report)


def test_expected_failures_are_strict():
    implementation = wrong(padded_width_denominator, DRPO_HALF, "token_mean")
    known = {"check_padding_does_not_matter": "divides by the padded width"}
    assert check_implementation(implementation, checks=["P6"], expected_failures=known).ok
    fixed = right(token_mean_drpo, reduction="token_mean")
    assert not check_implementation(fixed, checks=["P6"], expected_failures=known).ok
    with pytest.raises(ValueError, match="check_nonsense"):
        check_implementation(fixed, expected_failures={"check_nonsense": "?"})


def test_an_expected_failure_of_a_property_is_one_of_its_checks():
    implementation = wrong(mask_multiplied_in, PolicyGradient(), "none")
    known = {"P1": "masks by multiplication"}
    report = check_implementation(implementation, checks=["P1"], expected_failures=known)
    assert report.ok
    assert [result.status for result in report.results] == ["expected failure", "passed"]
    report = check_implementation(right(drpo), checks=["P1"], expected_failures=known)
    assert [result.status for result in report.results] == ["unexpected pass"] * 2
    marks = parametrize_with_checks([right(drpo)], expected_failures=known | {"check_on_policy_gradient": "?"}).mark.args[1]
    strict = {p.id: [m.kwargs["strict"] for m in p.marks if m.name == "xfail"] for p in marks}
    assert strict["drpo-check_masked_inputs_are_inert"] == [False]
    assert strict["drpo-check_on_policy_gradient"] == [True]


def test_examples_are_tried_first():
    # a case that no strategy draws
    case = TokenBatch(*np.full((3, 1, 1), -40.0), np.ones((1, 1), dtype=bool))

    def broken_there(log_prob, behavior_log_prob, advantages, mask):
        loss, gradient, _ = drpo(log_prob, behavior_log_prob, advantages, mask)
        return loss, gradient * (2.0 if (advantages == -40.0).any() else 1.0)

    implementation = right(broken_there)
    assert check_implementation(implementation, checks=["check_on_policy_gradient"]).ok
    report = check_implementation(implementation, examples={"check_on_policy_gradient": [case]}, checks=["P9"])
    assert report.failed[0].counterexample == repr(case)
    mark = parametrize_with_checks([implementation], examples={"broken_there-check_on_policy_gradient": [case]}, checks=["P9"])
    with pytest.raises(PropertyViolated):
        mark.mark.args[1][0].values[0]()


def test_metrics_beside_the_loss_are_left_out():
    def with_metrics(log_prob, behavior_log_prob, advantages, mask):
        return drpo(log_prob, behavior_log_prob, advantages, mask), {"metrics": 1.0}

    implementation = right(with_metrics, has_aux=True)
    assert implementation.takes_mask
    assert check_implementation(implementation, checks=["P1", "P9"]).ok


def reproduces(source, **names):
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        exec(compile(source, "snippet", "exec"), names)  # noqa: S102 -- that it runs is the point


def test_snippets_of_divergences_and_of_bfloat16_run():
    def binary_kl(log_prob, behavior_log_prob):
        return -core_divergences["binary_kl"](log_prob, behavior_log_prob)

    core_divergences = dict(from_core(DRPO(delta=DELTA)).divergences)
    implementation = from_core(DRPO(delta=DELTA), divergences=core_divergences | {"binary_kl": binary_kl})
    for result in check_implementation(implementation, checks=["check_divergence_inequalities"]).failed:
        lines = [line for line in result.snippet.splitlines() if "import binary_kl" not in line]
        reproduces("\n".join(lines), binary_kl=binary_kl)

    for framework in ("torch", "jax"):
        objective = from_core(DRPO(delta=DELTA), framework, autodiff=True, dtypes=("bfloat16",))
        off = from_core(DRPO(delta=2.0 * DELTA), framework, autodiff=True, dtypes=("bfloat16",))
        doubled = replace(objective, call=off.call, source=off.source)
        (result,) = check_implementation(doubled, checks=["check_rounding_error"]).failed
        assert "bfloat16" in result.snippet
        reproduces(result.snippet)


def function(log_prob, behavior_log_prob, advantages, mask, num_items=None):
    del num_items
    return value_only(log_prob, behavior_log_prob, advantages, mask)


def test_a_loss_named_as_its_wrapper_does_not_call_itself():
    source = from_function(function, arguments={"normalizer": "num_items"}).source.function
    assert "import function as loss_under_test" in source
    scope = {"loss_under_test": function}
    exec(source.partition("\n\n")[2], scope)  # noqa: S102 -- that it runs is the point
    x = np.full((1, 1), -1.0)
    assert scope["function"](x, x, x, x < 0.0, normalizer=2.0) == 1.0


def test_second_derivatives_are_what_is_declared():
    def detached(log_prob, behavior_log_prob, advantages, mask):
        x, b, a = (torch.where(mask, v, 0.0) for v in (log_prob, behavior_log_prob, advantages))
        return -a * (x - b).clamp(max=20.0).exp().detach() * x

    claims = {"objective": PolicyGradient(), "form": "score"}
    statuses = [
        check_implementation(
            from_function(detached, "torch", second_order=declared, **claims), checks=["check_second_derivative"]
        ).results[0].status
        for declared in ("unknown", "error", "derivative")
    ]  # fmt: skip
    assert statuses == ["not applicable", "failed", "failed"]


def test_parametrize_marks_what_does_not_apply_and_what_is_known():
    mark = parametrize_with_checks([right(drpo)], expected_failures={"P9": "for the test"})
    parameters = mark.args[1] if hasattr(mark, "args") else mark.mark.args[1]
    marks = {parameter.id: [m.name for m in parameter.marks] for parameter in parameters}
    assert len(marks) == len(CHECKS)
    assert marks["drpo-check_packed_equals_padded"] == ["skip"]
    assert marks["drpo-check_on_policy_gradient"] == ["xfail"]
    assert marks["drpo-check_masked_inputs_are_inert"] == []


def test_four_lines_in_a_users_test_file(tmp_path):
    (tmp_path / "my_project.py").write_text(
        textwrap.dedent("""
        import torch
        def my_loss(logp, old_logp, adv, response_mask):
            ratio = (logp - old_logp).exp()
            return ((-adv * ratio) * response_mask).sum() / response_mask.sum()
        """)
    )
    (tmp_path / "test_mine.py").write_text(
        textwrap.dedent("""
        from drpo_core.testing import from_function, parametrize_with_checks
        from my_project import my_loss
        NAMES = {"log_prob": "logp", "behavior_log_prob": "old_logp", "advantages": "adv", "mask": "response_mask"}
        @parametrize_with_checks([from_function(my_loss, "torch", arguments=NAMES, reduction="token_mean")])
        def test_my_loss(check):
            check()
        """)
    )
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=False)  # noqa: S603
    assert "my_loss-check_masked_inputs_are_inert" in done.stdout
    assert "To reproduce" in done.stdout
    assert "from my_project import my_loss" in done.stdout
    assert "3 failed" in done.stdout, done.stdout[-3000:]


def test_properties_are_all_there():
    assert {info.property for info in CHECKS.values()} == {f"P{n}" for n in range(1, 28)}
    assert list(CHECKS) == [f"{name}" for name in CHECKS if name.startswith("check_")]
    assert all(info.statement.endswith(".") for info in CHECKS.values())
    assert kit.__all__ == sorted(kit.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))


def test_checks_can_be_called_directly():
    x = np.log([[0.5, 0.2]])
    batch = TokenBatch(x, x, np.ones((1, 2)), np.ones((1, 2), dtype=bool))
    check = CHECKS["check_on_policy_gradient"].function
    check(from_core(DRPO(delta=DELTA)), batch)
    with pytest.raises(PropertyViolated, match="P9 check_on_policy_gradient"):
        check(wrong(tempered, DRPO_HALF, "none"), batch)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_batches_are_what_they_say(dtype):
    @settings_for("ci")
    @given(token_batches(DPPO(delta=DELTA), dtype=dtype, shape=(4, 8)))
    def holds(batch):
        for array in (batch.log_prob, batch.behavior_log_prob, batch.advantages):
            assert np.array_equal(round_to(dtype, array), array)
        assert (batch.log_prob <= 0).all()
        assert (batch.behavior_log_prob <= 0).all()
        size = np.abs(batch.advantages)
        assert ((size == 0) | (size >= 0.0099) & (size <= 5.02)).all()

    holds()


def test_every_regime_is_reached():
    seen = set()

    @settings_for("ci")
    @given(token_batches(DPPO(delta=DELTA), shape=(5, 8)))
    def collect(batch):
        shift = np.exp(batch.log_prob) - np.exp(batch.behavior_log_prob)
        seen.update(
            name
            for name, found in {
                "boundary": np.abs(np.abs(shift) - DELTA) < 1e-14,
                "extreme": np.abs(batch.log_ratio) > 50,
                "near_certain": batch.log_prob > -1e-8,
                "near_on_policy": (batch.log_ratio != 0) & (np.abs(batch.log_ratio) < 1e-8),
                "on_policy": batch.log_ratio == 0,
                "tail": batch.log_prob < -20,
                "masked": ~batch.mask,
                "inactive": batch.advantages == 0,
            }.items()
            if found.any()
        )

    collect()
    assert len(seen) == 8


def test_vocabularies_are_distributions():
    @settings_for("ci")
    @given(vocabularies())
    def holds(case):
        for log_prob in (case.log_prob, case.behavior_log_prob):
            assert np.allclose(np.exp(log_prob).sum(axis=1), 1.0, rtol=1e-14)

    holds()


@pytest.mark.parametrize(
    ("objective", "weight"),
    [(DRPO(delta=0.5), 0.5), (SPO(eps=0.5), -1.0), (PPOClip(eps=0.2), 0.0), (DPPO(delta=DELTA), 1.0), (PolicyGradient(), 1.0)],
)
def test_oracle_against_hand_computed_weights(objective, weight):
    # π = ½, μ = ¼: r = 2, d = ¼
    exact = reference(objective, -np.log(2.0), -2.0 * np.log(2.0), 1.0)
    assert exact.weight == pytest.approx(weight, abs=1e-15)
    assert exact.gradient == pytest.approx(-2.0 * weight, abs=1e-15)


def test_literals_are_exact():
    array = np.array([[0.1, np.nan], [-np.inf, 1e-300]])
    assert np.array_equal(eval(literal(array), {"np": np}), array, equal_nan=True)  # noqa: S307


def test_importing_the_kit_imports_no_framework():
    code = (
        "import sys, drpo_core.testing; print(sorted({'torch', 'jax', 'drpo_torch', 'drpo_jax', 'pytest'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"
