"""Wrong modes: functions of drpo_core and its adapters with one change each, and the test that must fail on each of them.

A mutant swaps a function's code while its test runs. `test_mode_mutants.py` runs them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import drpo_jax.loss
from backends import Backend

from drpo_core import _sequences, anchors, corrections, loss, penalties
from drpo_core.modes import mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FunctionType, ModuleType

TESTS = Path(__file__).parents[1]


@cache
def tests(file: str) -> ModuleType:
    """A file of tests as a module."""
    spec = importlib.util.spec_from_file_location(f"killers_{Path(file).stem}", TESTS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class ModeMutant:
    """A function with a change, the mistake that it makes, and the test that must see it: its file, name and arguments."""

    mistake: str
    function: Callable[..., Any]
    was: str
    now: str
    file: str
    test: str
    arguments: tuple[Any, ...] = ()

    def killer(self) -> Callable[[], None]:
        """The test with its arguments; an argument that is a function is called with the module of the tests."""
        module = tests(self.file)
        arguments = [a(module) if inspect.isfunction(a) else a for a in self.arguments]
        return lambda: getattr(module, self.test)(*arguments)

    @contextlib.contextmanager
    def world(self) -> Iterator[None]:
        """In which the function has the change."""
        function = plain(self.function)
        before = function.__code__
        function.__code__ = changed(function, self.was, self.now)
        try:
            yield
        finally:
            function.__code__ = before


def plain(function: Any) -> FunctionType:
    """The function of a method or a property."""
    return getattr(function, "fget", function)


def changed(function: FunctionType, was: str, now: str) -> Any:
    """The code of a function with a piece of its source replaced, which must occur once."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(was) != 1:
        msg = f"{function.__qualname__}: {was!r} occurs {source.count(was)} times"
        raise ValueError(msg)
    made: dict[str, Any] = {}
    code = compile(f"from __future__ import annotations\n{source.replace(was, now)}", function.__code__.co_filename, "exec")
    exec(code, dict(function.__globals__), made)  # noqa: S102 -- our own source
    return made[function.__name__].__code__


_CORRECTIONS, _ANCHORS, _PENALTIES = "core/test_corrections.py", "core/test_anchors.py", "core/test_penalties.py"
_MODES, _ADAPTERS, _SEQUENCES = "core/test_modes.py", "test_adapter_modes.py", "core/test_sequences.py"
_BOTH_LAYOUTS = "test_padded_and_packed"


def _of(kind: str) -> tuple[Any, ...]:
    return (Backend.NUMPY, getattr(corrections, kind))


def _mode_at(index: int) -> Callable[[Any], Any]:
    return lambda module: module.COMBINATIONS[index]


MUTANTS = (
    # detached
    ModeMutant(
        "anchors and corrections are differentiated",
        drpo_jax.loss._resolved,  # noqa: SLF001
        "jax.lax.stop_gradient(v)",
        "v",
        _ADAPTERS,
        "test_corrections_scale_the_gradient_and_are_not_differentiated",
    ),
    # levels
    ModeMutant(
        "sequence for token",
        corrections.Evidence.at_level,
        'if level != "token":',
        'if level == "token":',
        _CORRECTIONS,
        "test_by_hand",
    ),
    ModeMutant(
        "geometric mean for product",
        corrections.Evidence.at_level,
        'level == "sequence"',
        'level == "geometric"',
        _CORRECTIONS,
        "test_by_hand",
    ),
    ModeMutant(
        "sum for mean",
        _sequences.Sequences.mean,
        " / self.length(x)",
        "",
        _ANCHORS,
        "test_gspo_is_ppo_clip_with_the_sequence_s_ratio",
    ),
    ModeMutant(
        "mean over the padded width",
        _sequences.Sequences.length,
        "self.total(self.xp.ones_like(like))",
        "self.xp.ones_like(like[..., :1]) * like.shape[-1]",
        _CORRECTIONS,
        _BOTH_LAYOUTS,
        _of("RatioMask"),
    ),
    ModeMutant(
        "a sequence's ratio in a penalty of tokens",
        penalties.Penalty.value_and_gradient,
        "_power(x - getattr(policies, _POLICIES[self.ratio]), xp)",
        "_power(policies.sequences.mean(x - getattr(policies, _POLICIES[self.ratio])), xp)",
        _PENALTIES,
        _BOTH_LAYOUTS,
        (Backend.NUMPY, "r·k3"),
    ),
    ModeMutant(
        "tokens of equal covariance beyond the share",
        penalties.CovariancePenalty._chosen,  # noqa: SLF001
        "covariance > xp",
        "covariance >= xp",
        _PENALTIES,
        "test_equal_advantages_choose_nothing",
    ),
    ModeMutant(
        "a covariance with masked tokens in its means",
        corrections.covariances,
        "count = count_true(over, dtype, xp=xp)",
        "count = count_true(over | True, dtype, xp=xp)",
        _PENALTIES,
        _BOTH_LAYOUTS,
        (Backend.NUMPY, None),
    ),
    ModeMutant(
        "a sequence's weight counted once a token",
        corrections.ImportanceWeight.factor,
        "first = sequences.first_of_each()",
        "first = sequences.mask",
        _CORRECTIONS,
        "test_by_hand",
    ),
    ModeMutant(
        "the first row's weight for all rows",
        corrections.Evidence.at_level,
        "sequences.mean(ell)",
        "sequences.mean(ell)[:1]",
        _CORRECTIONS,
        _BOTH_LAYOUTS,
        _of("ImportanceWeight"),
    ),
    # ratios
    ModeMutant(
        "a ratio that counts twice is not seen",
        mode._warn_of_double_ratios,  # noqa: SLF001
        "counted[step] = repr(correction)",
        "pass",
        _MODES,
        "test_two_weights_that_share_a_step_warn",
        ("policy/behavior", "policy/behavior"),
    ),
    ModeMutant(
        "the anchor's ratio is not counted",
        mode._warn_of_double_ratios,  # noqa: SLF001
        'if getattr(mode.objective, "counts_ratio", True):',
        "if False:",
        _MODES,
        "test_the_warning_is_at_the_line_that_makes_the_mode",
    ),
    ModeMutant(
        "the ratio twice in the gradient",
        mode.Resolved.scaled,
        "coefficients * self.factor",
        "coefficients * self.factor * self.factor",
        _MODES,
        "test_the_gradient_is_a_product",
        (_mode_at(0), "arrays"),
    ),
    ModeMutant(
        "the inverse of the ratio",
        corrections.Evidence.log_ratio,
        "over - under",
        "under - over",
        _CORRECTIONS,
        "test_by_hand",
    ),
    ModeMutant(
        "the sampler for the proximal policy",
        anchors.Proximal.log_prob,
        "policies.proximal_log_prob",
        "policies.behavior_log_prob",
        _ANCHORS,
        _BOTH_LAYOUTS,
        (Backend.NUMPY, anchors.Sequence(anchors.Proximal())),
    ),
    # denominators
    ModeMutant(
        "tokens that are left out stay in the denominator",
        loss.policy_loss_and_gradient,
        "coefficients_of(mode.counted)",
        "coefficients_of(mask)",
        _MODES,
        "test_tokens_that_are_masked_count_or_do_not",
    ),
    ModeMutant(
        "a zeroed weight leaves the denominator too",
        mode.evaluated,
        "if correction.counts is None and not mode.count_masked:",
        "if not mode.count_masked:",
        _MODES,
        "test_tokens_that_are_masked_count_or_do_not",
    ),
    ModeMutant(
        "each rank's own mean",
        _sequences.Sequences.total_of_all,
        'total if self._across is None else self._across(total, "sum")',
        "total",
        _CORRECTIONS,
        "test_sequences_divided_over_two_ranks",
        (corrections.ImportanceWeight(high=1.5, normalize=True), 3),
    ),
    ModeMutant(
        "each rank's own sum",
        _sequences.Sequences.total,
        'total if self._across is None else self._across(total, "sum")',
        "total",
        _CORRECTIONS,
        "test_sequences_divided_over_two_ranks",
        (corrections.ImportanceWeight(level="sequence"), 3),
    ),
    ModeMutant(
        "each rank's own maximum",
        _sequences.Sequences.largest,
        'largest if self._across is None else self._across(largest, "max")',
        "largest",
        _CORRECTIONS,
        "test_sequences_divided_over_two_ranks",
        (corrections.DivergenceMask(over="max", high=0.1), 3),
    ),
    # clamps
    ModeMutant(
        "a clamp without a derivative",
        penalties._k3,  # noqa: SLF001
        " + xp.where(beyond, xp.expm1(-near) * (near - ell), 0.0)",
        "",
        _PENALTIES,
        "test_beyond_20_nats_value_and_gradient_stay_consistent",
        ("k3",),
    ),
    ModeMutant(
        "an exponential that overflows",
        penalties._power,  # noqa: SLF001
        "xp.where(ell > 20.0, 20.0, ell)",
        "ell",
        _PENALTIES,
        "test_ten_thousand_nats_stay_finite_and_keep_their_sign",
        ("r·k1", lambda module: module.np.float64),
    ),
    ModeMutant(
        "the anchor of a sequence overflows as a probability",
        anchors.Sequence.log_prob,
        "saturated_both_ways(sequences.mean(x - self.of.log_prob(policies)), xp=xp)",
        "sequences.mean(x - self.of.log_prob(policies))",
        _ANCHORS,
        "test_extreme_log_probs_stay_finite",
        (anchors.Sequence(anchors.Behavior()), 1e4, (slice(None), 3), lambda module: module.np.float32),
    ),
    # masks
    ModeMutant(
        "masked tokens are not replaced",
        mode.evidence_of,
        "xp.where(mask, array, 0.0)",
        "array",
        _MODES,
        "test_what_masked_tokens_hold_never_matters",
        ("float64",),
    ),
    ModeMutant(
        "a NaN is kept",
        corrections.DivergenceMask.factor,
        "(divergence if reduce is None else reduce(divergence)) <= self.high",
        "~((divergence if reduce is None else reduce(divergence)) > self.high)",
        _CORRECTIONS,
        "test_a_nan_at_a_valid_token_fails_closed",
        ("token",),
    ),
    ModeMutant(
        "a bound that is not kept",
        corrections._within,  # noqa: SLF001
        "ratio <= high",
        "ratio < high",
        _CORRECTIONS,
        "test_bounds_are_inclusive",
        (Backend.NUMPY,),
    ),
    ModeMutant(
        "vetoed by all for by any",
        corrections.Veto.factor,
        "sequences.largest(outside) <= 0.0",
        "sequences.mean(outside) < 1.0",
        _CORRECTIONS,
        "test_by_hand",
    ),
    ModeMutant(
        "positive advantages are masked too",
        corrections.NegativeSequenceMask.factor,
        "near | (evidence.advantages >= 0.0)",
        "near",
        _CORRECTIONS,
        "test_negative_advantages_alone_are_masked",
    ),
    ModeMutant(
        "converging tokens are masked",
        corrections.OutwardMask.factor,
        "(a <= 0.0) | (ell <= self.eps_high)",
        "(a <= 0.0) | (ell >= self.eps_high)",
        _CORRECTIONS,
        "test_only_outward_tokens_are_masked",
    ),
    ModeMutant(
        "one token too many is kept",
        corrections.SecondMomentMask.factor,
        "squares < xp.min(",
        "squares <= xp.min(",
        _CORRECTIONS,
        "test_second_moments",
    ),
    ModeMutant(
        "a token's own weight in the budget before it",
        corrections.PrefixBudgetMask.factor,
        "before - 0.5 * slope * before * (before - 1.0)",
        "before + 1.0 - 0.5 * slope * before * (before + 1.0)",
        _CORRECTIONS,
        "test_a_prefix_spends_its_budget",
    ),
    ModeMutant(
        "tokens that move back are masked",
        corrections.PrefixBudgetMask.factor,
        "back | ((",
        "((",
        _CORRECTIONS,
        "test_a_prefix_spends_its_budget",
    ),
    # order
    ModeMutant(
        "a token's own ratio among the earlier ones",
        _sequences.Sequences.smallest_before,
        ", shift=1",
        "",
        _CORRECTIONS,
        "test_by_hand",
    ),
    ModeMutant(
        "the past for the future",
        _sequences.Sequences.discounted_future,
        ", forward=False",
        "",
        _CORRECTIONS,
        "test_by_hand",
    ),
    ModeMutant(
        "a prefix of the next sequence",
        _sequences.Sequences._moved,  # noqa: SLF001
        "xp.where(self._segments.same(distance), kept, fill)",
        "kept",
        _SEQUENCES,
        _BOTH_LAYOUTS,
        (Backend.NUMPY, "running_total"),
    ),
    ModeMutant(
        "packed results in another order",
        _sequences.Segments.restored,
        "self._xp.take(ordered, self._xp.argsort(self._order, stable=True))",
        "ordered",
        _SEQUENCES,
        _BOTH_LAYOUTS,
        (Backend.NUMPY, "running_total"),
    ),
    # penalties
    ModeMutant(
        "corrections multiply the penalty",
        mode.Resolved.added,
        "coefficients * each, 0.0)",
        "self.scaled(coefficients) * each, 0.0)",
        _MODES,
        "test_the_gradient_is_a_product",
        (_mode_at(0), "arrays"),
    ),
    ModeMutant(
        "only the first penalty counts",
        mode._total,  # noqa: SLF001
        "sum(gradients[1:], gradients[0])",
        "gradients[0]",
        _PENALTIES,
        "test_penalties_add_up",
    ),
)
