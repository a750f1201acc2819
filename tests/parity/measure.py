"""How far a mode is from its framework's own function: the largest relative differences over seeded batches.

A module ``compare_<framework>`` says what is run. It has

- ``theirs(name, keys)``, which gives a function of a batch's arrays: their loss, and its gradient in log π;
- ``SETTINGS``, pairs of a name and keys, beyond the call that the docs show;
- ``FUNCTION``, what is run, in words, and ``PACKAGES``, the distributions whose versions are written down;
- where it is so: ``RELEASE``, a commit; ``FORMULAS``, names for which `theirs` is a formula written down in tests/modes;
  ``own_value(name, keys)``, whether their loss is another function of the same gradient; ``PRECISION``, "float32" if their
  function computes in it; ``PLACEHOLDERS``, modules that are replaced because no loss uses them.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
from framework_batches import batch

from drpo_core import policy_loss_and_gradient
from drpo_core.modes import DoubleRatioWarning

SPREADS = ((0.1, 0.03), (0.5, 0.2), (2.5, 0.5))
"""|log π − log π_old| and |log π_old − log μ| of the batches, in nats; in the last ratios exceed 25."""
LIMITS = {"float64": 1e-6, "float32": 1e-3}
"""Relative differences beyond which `Difference.check` fails: frameworks add 1e-8 to denominators."""


@dataclass
class Difference:
    """The largest relative differences of the cases of a mode."""

    settings: int = 0
    cases: int = 0
    loss: float | None = None
    gradient: float = 0.0
    empty: set[str] = field(default_factory=set)

    def check(self, limit):
        """Raise if it is no rounding."""
        largest = larger(self.gradient, self.loss or 0.0)
        if not self.cases or not largest <= limit:
            msg = f"expected cases with differences up to {limit}, got {self}"
            raise ValueError(msg)


def batches():
    """Batches of 16 sequences of 1 to 9 tokens: both signs of A and A = 0, ratios near 1 and far from it, masks with holes."""
    for seed, (drift, mismatch) in enumerate(SPREADS):
        arrays = batch(seed, drift=drift, mismatch=mismatch)
        yield arrays
        mask = arrays["mask"] & (np.random.default_rng(seed).random(arrays["mask"].shape) < 0.7)
        mask[:, 0] |= ~mask.any(axis=1)
        yield {**arrays, "mask": mask}


def difference(mode, theirs, found, *, value=True, limit):
    """Add the cases of one setting to what was found."""
    cases = found.cases
    for arrays in batches():
        ours = computed(mode, arrays)
        loss, gradient = theirs(arrays)
        largest = np.abs(gradient).max()
        if not ours.gradient.any() and not largest > 0.0:
            # masks leave nothing, which some frameworks divide by
            continue
        found.cases += 1
        found.gradient = larger(found.gradient, np.abs(ours.gradient - gradient).max() / largest)
        if value:
            found.loss = larger(found.loss or 0.0, abs(ours.loss - loss) / abs(loss))
    if found.cases == cases:
        msg = "expected a batch of which masks leave something"
        raise ValueError(msg)
    found.settings += 1
    found.empty.add(of_empty(mode, theirs, limit))


def of_empty(mode, theirs, limit):
    """What a sequence without a valid token does: the "same" in both, they have "counted" it, a "NaN", or it "differs"."""
    arrays = next(batches())
    mask = arrays["mask"].copy()
    mask[1] = False
    arrays = {**arrays, "mask": mask}
    ours = computed(mode, arrays).gradient
    _, gradient = theirs(arrays)
    if np.isnan(gradient).any():
        return "NaN"
    # a larger denominator makes all gradients smaller alike
    factor = (ours * gradient).sum() / (ours * ours).sum()
    if not np.abs(factor * ours - gradient).max() <= limit * np.abs(gradient).max():
        return "differs"
    return "same" if abs(factor - 1.0) <= limit else "counted" if factor < 1.0 else "differs"


def computed(mode, arrays):
    """Our loss and gradient."""
    names = ("log_prob", "behavior_log_prob", "advantages")
    given = {name: arrays[name] for name in ("mask", *mode.arguments)}
    # a compiled loop for each objective takes longer than all cases
    return policy_loss_and_gradient(mode, *(arrays[name] for name in names), **given, engine="arrays")


def larger(one, other):
    """The larger of two numbers; NaN if one of them is."""
    return float(np.maximum(one, other))


def made(function, names, keys):
    """A mode, of which no warning is news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubleRatioWarning)
        return function(*names, **keys)
