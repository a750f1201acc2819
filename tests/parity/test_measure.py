"""The comparison itself: what it lets pass and what it doesn't, and placeholders, which can't enter a loss."""

import sys

import numpy as np
import pytest
from measure import Difference, batches, computed, difference
from sources import isolate

from drpo_core import PPOClip
from drpo_core.modes import Mode

MODE = Mode(PPOClip(eps=0.2), reduction="sequence_mean_token_mean")


def same(arrays):
    result = computed(MODE, arrays)
    return result.loss, result.gradient


def scaled(loss=1.0, gradient=1.0, *, empty=1.0):
    """Another framework's function; `empty` multiplies the gradient where a sequence has no token."""

    def theirs(arrays):
        value, slope = same(arrays)
        return value * loss, slope * gradient * (1.0 if arrays["mask"].any(axis=1).all() else empty)

    return theirs


def measured(theirs, **options):
    found = Difference()
    difference(MODE, theirs, found, limit=1e-6, **options)
    return found


def test_the_same_is_no_difference():
    found = measured(same)
    found.check(0.0)
    assert (found.settings, found.cases, found.loss, found.gradient) == (1, 6, 0.0, 0.0)
    assert found.empty == {"same"}


@pytest.mark.parametrize("theirs", [scaled(loss=1.01), scaled(gradient=1.01), scaled(loss=np.nan), scaled(gradient=np.nan)])
def test_a_difference_is_found(theirs):
    with pytest.raises(ValueError, match="expected cases with differences up to 1e-06"):
        measured(theirs).check(1e-6)


def test_a_loss_of_its_own_is_not_compared():
    found = measured(scaled(loss=2.0), value=False)
    found.check(1e-6)
    assert found.loss is None


@pytest.mark.parametrize(("empty", "word"), [(15 / 16, "counted"), (np.nan, "NaN"), (2.0, "differs")])
def test_what_an_empty_sequence_does(empty, word):
    assert measured(scaled(empty=empty)).empty == {word}


def test_batches_have_what_they_promise():
    for arrays in batches():
        ratio = np.exp(arrays["log_prob"] - arrays["behavior_log_prob"])[arrays["mask"]]
        lengths = arrays["mask"].sum(axis=1)
        assert lengths.min() == 1
        assert lengths.max() > 5
        assert {-1.0, 0.0, 1.0} == set(np.sign(arrays["advantages"][:, 0]))
    assert ratio.max() > 10.0


def test_placeholders(tmp_path, monkeypatch):
    package = tmp_path / "some_framework"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    code = (
        "import some_engine.ops as ops",
        "from some_engine import Base, Mixin, available, compiled, config",
        "class Trainer(Mixin, Base):",
        "    def __init__(self): self.ready = True",
        "@compiled",
        "@config(dynamic=True)",
        "def loss(x): return 2.0 * x",
        "def wrong(x): return ops.scale(x) * x",
        "if available(): import no_such_module",
    )
    (package / "losses.py").write_text("\n".join(code))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    isolate("some_framework", root=tmp_path, placeholders=("some_engine",), values={"some_engine.ops": {"one": 1.0}})
    from some_framework import losses  # noqa: PLC0415 -- it is made above

    assert losses.loss(3.0) == 6.0
    assert losses.Trainer().ready
    assert losses.ops.one == 1.0
    with pytest.raises(TypeError, match="unsupported operand"):
        losses.wrong(3.0)
