"""Modes as one compiled loop, in which a token's result may depend on its whole row."""

import dataclasses
import sys

import numpy as np
import pytest
from mode_oracles import arguments_for, batch, quiet
from whole_modes import EVERYTHING, distinct, needs_arrays

from drpo_core import PPOClip, UntraceableError, loss, policy_loss_and_gradient, summarize
from drpo_core.anchors import Prefix, Proximal
from drpo_core.corrections import ImportanceWeight, RatioMask, Veto
from drpo_core.engines import numba_loop, recording
from drpo_core.engines.trace import Trace
from drpo_core.modes import Mode
from drpo_core.penalties import Penalty


def evaluated(mode, arrays, engine, **options):
    names = ("log_prob", "behavior_log_prob", "advantages")
    given = arguments_for(mode, arrays)
    others = {name: array for name, array in given.items() if name not in names}
    return policy_loss_and_gradient(mode, *(given[name] for name in names), **others, engine=engine, **options)


@pytest.fixture
def wholes(monkeypatch):
    """Whether each mode was compiled as a whole."""
    found = []
    compiled_mode = loss.compiled_mode

    def watched(*arguments, **options):
        result = compiled_mode(*arguments, **options)
        found.append(result is not None)
        return result

    monkeypatch.setattr(loss, "compiled_mode", watched)
    return found


@pytest.mark.usefixtures("interpreted_loops")
@pytest.mark.parametrize("mode", distinct(), ids=repr)
def test_the_loop_does_what_arrays_do(mode, wholes):
    arrays = batch(seed=3)
    arrays["mask"][2] = False
    loop, expected = (evaluated(mode, arrays, engine) for engine in ("compiled", "arrays"))
    assert wholes == [not needs_arrays(mode)]
    np.testing.assert_allclose(loop.loss, expected.loss, rtol=1e-12)
    np.testing.assert_allclose(loop.gradient, expected.gradient, rtol=1e-12, atol=1e-300)
    figures, wanted = summarize(loop.diagnostics), summarize(expected.diagnostics)
    assert list(figures) == list(wanted)
    np.testing.assert_allclose(list(figures.values()), list(wanted.values()), rtol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compiled(dtype):
    """Rows of one token, of some, and of more than a block; the same to the last bit for any number of threads."""
    tolerance = 64 * np.finfo(dtype).eps
    for *more, sequences, tokens in ((70, 1), (2, 3, 8), (33, 130), (3, 2 * numba_loop.BLOCK + 5)):
        shape = (*more, sequences, tokens)
        arrays = {k: v.reshape(shape) for k, v in batch((int(np.prod(shape[:-1])), tokens), spread=0.1).items()}
        arrays = {k: v if v.dtype == np.bool_ else v.astype(dtype) for k, v in arrays.items()}
        loop, expected = evaluated(EVERYTHING, arrays, "compiled"), evaluated(EVERYTHING, arrays, "arrays")
        np.testing.assert_allclose(loop.loss, expected.loss, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(loop.gradient, expected.gradient, rtol=tolerance, atol=tolerance / shape[0])
        figures, wanted = summarize(loop.diagnostics), summarize(expected.diagnostics)
        np.testing.assert_allclose(list(figures.values()), list(wanted.values()), rtol=1e-4 if dtype == np.float32 else 1e-10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numba_loop, "TOKENS_PER_THREAD", 64)
            threaded = evaluated(EVERYTHING, arrays, "compiled", threads=3)
        np.testing.assert_array_equal(threaded.gradient, loop.gradient)
        assert (threaded.loss, threaded.diagnostics) == (loop.loss, loop.diagnostics)


def test_new_thresholds_compile_nothing():
    arrays = batch(seed=1)
    evaluated(EVERYTHING, arrays, "compiled")
    before = numba_loop.compilations()
    tighter = (ImportanceWeight(high=1.1), Veto(low=0.5, high=2.0), RatioMask(level="geometric", low=0.99, high=1.01))
    other = dataclasses.replace(EVERYTHING, corrections=tighter, penalties=(Penalty(coefficient=0.3),))
    loop, expected = (evaluated(other, arrays, engine) for engine in ("compiled", "arrays"))
    assert numba_loop.compilations() == before
    np.testing.assert_allclose(loop.gradient, expected.gradient, rtol=1e-12, atol=1e-300)


@dataclasses.dataclass(frozen=True)
class Own:
    """A correction of a user, which reads what may change."""

    arguments = ("behavior_log_prob",)
    counts = None

    def factor(self, evidence):
        """By the largest ratio of the row."""
        largest = evidence.policies.sequences.largest(evidence.log_ratio("policy/behavior"))
        return evidence.policies.xp.where(largest > sys.modules[__name__].LIMIT, 0.0, 1.0 + evidence.advantages)


LIMIT = 0.5


@pytest.mark.usefixtures("interpreted_loops")
def test_a_correction_of_one_s_own_is_compiled_as_it_is_now(monkeypatch, wholes):
    mode, arrays = quiet(Own()), batch(seed=2)
    results = []
    for limit in (0.1, 0.9):
        monkeypatch.setattr(sys.modules[__name__], "LIMIT", limit)
        results.append(evaluated(mode, arrays, "compiled").gradient)
        np.testing.assert_allclose(results[-1], evaluated(mode, arrays, "arrays").gradient, rtol=1e-12, atol=1e-300)
    assert wholes == [True, True]
    assert not np.array_equal(*results)


def test_an_objective_that_changes_is_compiled_anew(monkeypatch):
    """The methods of every part are in the key, those of a base class too."""
    arrays = batch(seed=2)
    mode = Mode(PPOClip(eps=0.2), corrections=(RatioMask(low=0.5, high=2.0),))
    kept = evaluated(mode, arrays, "compiled").gradient
    monkeypatch.setattr(RatioMask, "factor", lambda _, evidence: evidence.policies.xp.zeros_like(evidence.advantages))
    assert kept.any()
    assert not evaluated(mode, arrays, "compiled").gradient.any()


def test_what_can_t_be_compiled_is_found_out_once(monkeypatch):
    made = []
    make = recording._with_or_without_thresholds  # noqa: SLF001 -- to count its calls
    monkeypatch.setattr(recording, "_with_or_without_thresholds", lambda *arguments: made.append(1) or make(*arguments))
    # other tests may have made a loop of the same objective
    monkeypatch.setattr(recording, "_programs", {})
    mode = Mode(PPOClip(eps=0.3), anchor=Prefix(Proximal()))
    for _ in range(3):
        evaluated(mode, batch(seed=1), "auto")
    # the mode, and its objective alone
    assert len(made) == 2


def test_rows_in_a_trace():
    trace = Trace()
    xp, x = trace.namespace, trace.input("x")
    total = xp.sum(x, axis=-1, keepdims=True)
    again = xp.max(x - total, axis=-1, keepdims=True)
    assert (x.row, total.row, (2.0 * total).row, (x + total).row) == (False, True, True, False)
    assert (x.stage, total.stage, again.stage) == (0, 1, 2)
    statements = trace.statements(x + again)
    assert [[s.name for s in stage.reductions] for stage in statements.rows] == [[total.name], [again.name]]
    for refused in (lambda: xp.sum(total), lambda: xp.sum(x, axis=0), lambda: xp.max(x, axis=-1), lambda: x.shape[-1] < 2):
        with pytest.raises(UntraceableError):
            refused()


def test_widths_that_do_not_fit():
    x = np.zeros(12)
    arrays = (x, x, x, x == 0.0, np.ones(1), None, x, x)
    for width in (0, 5, 24):
        with pytest.raises(ValueError, match=rf"^width: expected a divisor of 12 tokens, got {width}$"):
            numba_loop.run(loss.mode_pass, EVERYTHING, arrays, np.empty(12), diagnostics=False, width=width)
    with pytest.raises(ValueError, match=r"^width: expected the tokens of a row"):
        numba_loop.run(loss.mode_pass, EVERYTHING, arrays, np.empty(12), diagnostics=False)


@pytest.mark.parametrize("engine", ["arrays", "compiled"])
def test_a_number_has_no_row(engine):
    x = np.asarray(-1.0)
    with pytest.raises(ValueError, match=r"^mask: expected at least one axis"):
        policy_loss_and_gradient(EVERYTHING, x, x, x, mask=x < 0.0, proximal_log_prob=x, reference_log_prob=x, engine=engine)
