"""Objectives of every family in the table, made from its line and its class: what tests iterate over.

A family that is added to `drpo_core.objectives.OBJECTIVES` is in here without a change.
"""

import dataclasses

import pytest

from drpo_core import DPPO, DRPO
from drpo_core.objectives import OBJECTIVES, label
from drpo_core.testing.implementation import form_of

BITING = {"delta": (0.15, (0.1, 0.2)), "eps": (0.2, (0.1, 0.3)), "max_ratio": (2.0,)}
"""Thresholds on both sides of which a few dozen tokens of ratios around 1 lie; for others, the family's typical ones."""

CAPS = {"min_ratio": 0.5}
CAP = 2.0


def variants_of(family):
    """The family at each threshold, and with a cap in each place where its class takes one."""
    made = [family.make(threshold) for threshold in BITING.get(family.threshold, family.typical)] or [family.make()]
    thresholds = {f"{family.threshold}{suffix}" for suffix in ("", "_low", "_high")}
    fields = getattr(family.objective, "__dataclass_fields__", {}).values()
    caps = [field.name for field in fields if field.default is None and field.name not in thresholds]
    return made + [dataclasses.replace(made[-1], **{cap: CAPS.get(cap, CAP)}) for cap in caps]


VARIANTS = [variant for family in OBJECTIVES for variant in variants_of(family)]

MEASURED = DPPO(delta=0.1, divergence="per_token")
"""Needs the argument `divergence`."""

ALL = [*VARIANTS, MEASURED]

RATIO_FORMS = [objective for objective in ALL if form_of(objective) == "ratio"]
"""Their gradient is the derivative of the loss's value."""

FULL = [variants_of(family)[-1] for family in OBJECTIVES]
"""Every family with two thresholds, or a cap, where it may have them."""

ONE_A_FAMILY = [variants_of(family)[0] for family in OBJECTIVES]

KINDS = list({(form_of(o), hasattr(o, "ratio_weight"), hasattr(o, "inside")): o for o in reversed(ONE_A_FAMILY)}.values())
KINDS += [DRPO(delta=0.15), MEASURED]
"""One for each way in which what is around an objective can treat it: that its numbers are right is `each_objective`'s."""

each_objective = pytest.mark.parametrize("objective", ALL, ids=label)
each_ratio_form = pytest.mark.parametrize("objective", RATIO_FORMS, ids=label)
each_kind = pytest.mark.parametrize("objective", KINDS, ids=label)
