"""Hypothesis profiles: how many cases, whether random, where failures are remembered.

========== ======== ============================================================================================
profile    cases    for
========== ======== ============================================================================================
`dev`      25       seconds; the default
`ci`       50       derandomised: the same cases in every run
`nightly`  10,000   random; a database shared between runs; aims at large errors and the boundary
========== ======== ============================================================================================

The environment variable ``DRPO_PROFILE`` chooses; ``DRPO_EXAMPLES_DIR`` is the directory of the nightly database.
"""

from __future__ import annotations

import os

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis.database import DirectoryBasedExampleDatabase

__all__ = ["PROFILES", "settings_for"]

_COMMON = {
    "deadline": None,
    "print_blob": True,
    "report_multiple_bugs": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.nested_given],
    "verbosity": Verbosity.quiet,
}
_QUICK = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]

PROFILES: dict[str, hypothesis.settings] = {
    "dev": hypothesis.settings(max_examples=25, phases=_QUICK, **_COMMON),  # type: ignore[arg-type]
    "ci": hypothesis.settings(max_examples=50, derandomize=True, database=None, phases=_QUICK, **_COMMON),  # type: ignore[arg-type]
    "nightly": hypothesis.settings(
        max_examples=10_000,
        database=DirectoryBasedExampleDatabase(os.environ.get("DRPO_EXAMPLES_DIR", ".hypothesis/nightly")),
        **_COMMON,  # type: ignore[arg-type]
    ),
}
"""Settings by name."""


def settings_for(chosen: hypothesis.settings | str | None = None, *, cost: float = 1.0) -> hypothesis.settings:
    """Settings of a profile, with fewer cases for an implementation whose calls are expensive.

    Parameters
    ----------
    chosen
        Settings, used as they are; the name of a profile; or None for ``DRPO_PROFILE``, else ``"dev"``.
    cost
        The number of cases is divided by it, except in the nightly profile.

    Returns
    -------
    hypothesis.settings

    Raises
    ------
    ValueError
        If the profile is unknown.

    Examples
    --------
    >>> from drpo_core.testing.profiles import settings_for
    >>> settings_for("ci", cost=5.0).max_examples
    10
    """
    if isinstance(chosen, hypothesis.settings):
        return chosen
    name = chosen or os.environ.get("DRPO_PROFILE", "dev")
    if name not in PROFILES:
        msg = f"profile: expected one of {', '.join(PROFILES)}, got {name!r}"
        raise ValueError(msg)
    profile = PROFILES[name]
    if name == "nightly" or cost <= 1.0:
        return profile
    return hypothesis.settings(profile, max_examples=max(5, round(profile.max_examples / cost)))
