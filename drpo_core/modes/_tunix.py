"""The GRPO loss of Tunix (google-tunix 0.1.7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_core.anchors import Behavior, Sequence
from drpo_core.modes._keys import Keys, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import PPOClip
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.anchors import Anchor

__all__ = ["tunix"]

DEFAULTS: Mapping[str, Any] = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "epsilon_c": None,
    "beta": 0.04,
    "kl_loss_mode": "kl",
    "loss_agg_mode": "sequence-mean-token-mean",
}


def tunix(loss_algo: str = "grpo", /, **keys: Any) -> Mode:
    """The GRPO loss of Tunix 0.1.7 by its ``loss_algo``, under the keys and values of its ``GRPOConfig``.

    ``old_per_token_logps`` of Tunix is `behavior_log_prob` here: by default they are the sampler's.

    ==============  ============================================================
    ``loss_algo``   what differs
    ==============  ============================================================
    ``grpo``        the default KL is no penalty
    ``gspo-token``  the same; paper: 3e-4, 4e-4
    ==============  ============================================================

    Parameters
    ----------
    loss_algo
        See the table.
    **keys
        ``epsilon`` (0.2), ``epsilon_high`` (``epsilon``), ``epsilon_c`` (None): the dual clip; ``beta`` (0.04) with
        ``kl_loss_mode`` (``"kl"``, ``"mse_kl"``, ``"low_var_kl"``); ``loss_agg_mode`` (``"token-mean"``,
        ``"sequence-mean-token-mean"``, ``"seq-mean-token-sum"``, ``"sequence-mean-token-sum-norm"``).

    Returns
    -------
    Mode
        Its loss and gradient are Tunix's, without ``sampler_is_weights``: pass those as `token_weights`.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, or a key is given that these settings do not use.
        ``"sequence-mean-token-scale"`` is no mode: it divides by the padded width.

    Notes
    -----
    The default KL is k1, whose gradient has expectation 0: it is no penalty. Tunix computes in float32, and drops the gradient
    where log-ratios exceed 20 (10 with ``gspo-token``).

    References
    ----------
    https://github.com/google/tunix/blob/v0.1.7/tunix/rl/algo_core.py and tunix/rl/common.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.tunix("grpo", beta=0.0)
    Mode(PPOClip(eps_low=0.2, eps_high=0.2), reduction='sequence_mean_token_mean')
    """
    return made("Tunix", "loss_algo", LOSSES, DEFAULTS, loss_algo, keys)


def _grpo(keys: Keys) -> Mode:
    return _mode(keys, Behavior())


def _gspo(keys: Keys) -> Mode:
    return _mode(keys, Sequence(Behavior()))


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {"grpo": _grpo, "gspo-token": _gspo}

REDUCTIONS: Mapping[str, str] = {
    "token-mean": "token_mean",
    "sequence-mean-token-mean": "sequence_mean_token_mean",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    # without a norm of its own it divides by the number of rows that have a token
    "sequence-mean-token-sum-norm": "sequence_mean_token_sum",
}


def _mode(keys: Keys, anchor: Anchor) -> Mode:
    low = keys.number("epsilon", above=0.0)
    high = low if keys["epsilon_high"] is None else keys.number("epsilon_high", above=0.0)
    beta = keys.number("beta", at_least=0.0)
    estimator: Any = keys.choice("kl_loss_mode", {"kl": "k1", "mse_kl": "k2", "low_var_kl": "k3"}) if beta > 0.0 else None
    return Mode(
        PPOClip(eps_low=low, eps_high=high, dual_clip=keys.optional("epsilon_c", above=1.0)),
        anchor=anchor,
        penalties=() if beta == 0.0 else (Penalty(coefficient=beta, estimator=estimator),),
        reduction=keys.choice("loss_agg_mode", REDUCTIONS),
    )
