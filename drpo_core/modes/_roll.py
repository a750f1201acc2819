"""The actor losses of ROLL (commit 8eb27cc of August 2026)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from drpo_core.anchors import Proximal, Sequence
from drpo_core.corrections import DivergenceMask, ImportanceWeight, OutwardMask, RatioMask
from drpo_core.modes._keys import ONE_RATIO, Keys, cispo, made
from drpo_core.modes.mode import Mode
from drpo_core.objectives import CISPO, TOPR, PPOClip, Reinforce
from drpo_core.penalties import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core.objectives import Objective

__all__ = ["roll"]

DEFAULTS: Mapping[str, Any] = {
    "pg_clip": 0.2,
    "use_pg_clip_range": False,
    "pg_clip_low": 0.2,
    "pg_clip_high": 0.2,
    "dual_clip_loss": False,
    "importance_sampling": "token",
    "ratio_type": "token",
    "tis_lower_bound": 0.0,
    "tis_upper_bound": 1.0,
    "topr_positive_weight": 1.0,
    "topr_negative_weight": 1.0,
    "cispo_epsilon_low": 0.1,
    "cispo_epsilon_high": 0.1,
    "cispo_use_unified_mask": False,
    "kimi15_tau": 0.1,
    "loss_agg_mode": "seq-mean-token-mean",
    "use_kl_loss": False,
    "kl_loss_coef": 0.0,
    "enable_old_logprobs_recompute": False,
    "train_infer_correction": None,
    "entropy_loss_coef": 0.0,
    "rl_loss_coef": 1.0,
    "difficulty_loss_weight": False,
    "length_loss_weight": False,
    "use_topr_loss": False,
    "postive_loss_coef": 0.0,
    "use_topr_neg_loss_coef": 0.0,
    "use_policy_loss_type": "PPO",
}
CORRECTION: Mapping[str, Any] = {"is_weight": {}, "filters": ()}
IS_WEIGHT: Mapping[str, Any] = {"enabled": False, "weight_type": "token", "upper_bound": 1.2, "detach": True}
FILTER: Mapping[str, Any] = {
    "enabled": False,
    "agg_type": "token",
    "ratio_enabled": True,
    "ratio_low": 0.8,
    "ratio_high": 1.2,
    "diff_enabled": False,
    "diff_low": -0.2,
    "diff_high": 0.2,
}


def roll(pg_variant: str = "ppo", /, **keys: Any) -> Mode:
    """An actor loss of ROLL by its ``pg_variant``, under the keys of its RLVR and agentic pipelines.

    ``old_log_probs`` of ROLL is `proximal_log_prob` here, ``infer_logprobs`` `behavior_log_prob`, ``ref_log_probs``
    `reference_log_prob`; the mask is ``final_response_mask``, or ``response_mask`` where there is none.

    ==============  ==========================================================  ==========================================
    ``pg_variant``  keys, besides those of all                                  what differs
    ==============  ==========================================================  ==========================================
    ``ppo``         ``pg_clip`` (0.2), or with ``use_pg_clip_range``            ``dual_clip_loss`` is at 1 + 2 ``pg_clip``;
                    ``pg_clip_low`` and ``pg_clip_high`` (0.2);                 its paper: 3
                    ``dual_clip_loss``; ``importance_sampling`` (``"token"``,
                    or ``"seq"``: GSPO)
    ``vanilla``     none                                                        π_old plays no part
    ``tis``         ``tis_lower_bound`` (0), ``tis_upper_bound`` (1)
    ``topr``        ``topr_positive_weight``, ``topr_negative_weight`` (1)      ROLL: by the sign of the score, here of A;
                                                                                paper: the ratio of the sequence
    ``cispo``       ``cispo_epsilon_low``, ``cispo_epsilon_high`` (0.1);        paper: no lower bound
                    ``cispo_use_unified_mask``
    ``kimi15``      ``kimi15_tau`` (0.1)                                        paper: the square of the sequence's ℓ
    ==============  ==========================================================  ==========================================

    Parameters
    ----------
    pg_variant
        See the table. ``"ppo"`` is also the loss of the default ``ActorWorker`` of both pipelines, which reads no
        ``pg_variant``. RLVR's ``ActorWorker`` alone reads ``importance_sampling``; ``ActorPGWorker`` ignores it.
    **keys
        ``loss_agg_mode`` (``"seq-mean-token-mean"``, or ``"token-mean"``, ``"seq-mean-token-sum"``); ``use_kl_loss`` with
        ``kl_loss_coef`` (0.0); ``train_infer_correction``, a dict of ``is_weight``, itself one of ``enabled`` (False),
        ``weight_type`` (``"token"``, ``"geometric"``, ``"sequence"``), ``upper_bound`` (1.2, or None) and ``detach``, which
        has no effect, and of ``filters``, a list of dicts of ``enabled`` (False), ``agg_type`` (as ``weight_type``),
        ``ratio_enabled`` (True) with ``ratio_low`` (0.8) and ``ratio_high`` (1.2), ``diff_enabled`` (False) with
        ``diff_low`` (−0.2) and ``diff_high`` (0.2); ``enable_old_logprobs_recompute`` (False), which says what the filters
        leave in the denominators.

    Returns
    -------
    Mode
        Its gradient is ROLL's, for ``topr`` where A has the sign of the score, as with two values of the reward of which
        one is positive; and its loss too, except with ``topr``, and with filters and ``"token-mean"``.

    Raises
    ------
    TypeError, ValueError
        If the name, a key or a value is unknown, a key is given that these settings do not use, or a value asks for what
        no mode does:

        - ``"segment"`` as ``ratio_type`` of the agentic losses, as ``weight_type`` or ``agg_type``: one ratio a run of
          tokens;
        - ``"seq-mean-token-sum-norm"``, a sum over the padded width of the micro-batch;
        - ``entropy_loss_coef``, which needs logits; ``rl_loss_coef``, a factor of the loss; ``difficulty_loss_weight`` and
          ``length_loss_weight``, which are `token_weights`; weights of ``topr`` other than 1;
        - ``use_topr_loss``, ``postive_loss_coef``, ``use_topr_neg_loss_coef`` and ``use_policy_loss_type``, which nothing in
          ROLL reads;
        - a ``diff`` filter that is not symmetric, or of the mean or sum of a sequence: the differences have signs;
        - with ``"seq"``, weights and filters of tokens; with ``kimi15``, weights, which multiply the quadratic term too; with
          ``cispo_use_unified_mask``, filters that do not count, because what it drops does;
        - filters without ``enable_old_logprobs_recompute``, unless the sums are those of a mode: ROLL divides by what the
          filters drop too, ``"token-mean"`` does not apply them to the policy loss at all, and they drop the KL.

    Notes
    -----
    With ``"seq"`` the advantages of a sequence must be equal. ROLL's k3 drops the gradient of values above 10. Its
    configuration has no fields for the keys of ``tis``, ``cispo`` and ``kimi15``: what YAML says of them is dropped, and the
    loss has its defaults. It sets ``enable_old_logprobs_recompute`` itself where an update has several steps or
    ``init_kl_coef`` (0.2) is positive. With ``"token-mean"``, samples that ``final_response_mask`` drops keep the quadratic
    term of ``kimi15``.

    References
    ----------
    https://github.com/alibaba/ROLL/blob/8eb27cc/roll/pipeline/rlvr/actor_worker.py, actor_pg_worker.py beside it,
    roll/pipeline/agentic/agentic_actor_pg_worker.py, roll/utils/functionals.py and roll/utils/train_infer_corrections.py.

    Examples
    --------
    >>> from drpo_core import modes
    >>> modes.roll("ppo", importance_sampling="seq", use_pg_clip_range=True, pg_clip_low=3e-4, pg_clip_high=4e-4)
    Mode(PPOClip(eps_low=0.0003, eps_high=0.0004), anchor=Sequence(Proximal()), reduction='sequence_mean_token_mean')
    """
    return made("ROLL", "pg_variant", LOSSES, DEFAULTS, pg_variant, keys)


def _ppo(keys: Keys) -> Mode:
    names = ("pg_clip_low", "pg_clip_high") if keys.flag("use_pg_clip_range") else ("pg_clip", "pg_clip")
    low, high = (keys.number(name, above=0.0) for name in names)
    dual = 1.0 + 2.0 * keys.number("pg_clip", above=0.0) if keys.flag("dual_clip_loss") else None
    at_sequences = keys.choice("importance_sampling", {"token": False, "seq": True})
    return _mode(keys, PPOClip(eps_low=low, eps_high=high, dual_clip=dual), at_sequences=at_sequences)


def _vanilla(keys: Keys) -> Mode:
    return _mode(keys, Reinforce(), has_ratio=False)


def _tis(keys: Keys) -> Mode:
    low, high = keys.number("tis_lower_bound", at_least=0.0), keys.number("tis_upper_bound", above=0.0)
    return _mode(keys, CISPO(min_ratio=low or None, max_ratio=high))


def _topr(keys: Keys) -> Mode:
    for key in ("topr_positive_weight", "topr_negative_weight"):
        if keys[key] != 1.0:
            keys.refuse(key, "no objective of this library has it")
    return _mode(keys, TOPR())


def _cispo(keys: Keys) -> Mode:
    low, high = (keys.number(f"cispo_epsilon_{side}", above=0.0) for side in ("low", "high"))
    if not keys.flag("cispo_use_unified_mask"):
        return _mode(keys, cispo(low, high))
    if low >= 1.0:
        keys.refuse("cispo_use_unified_mask", "the mask needs cispo_epsilon_low < 1, a bound of the logarithm of the ratio")
    mask = OutwardMask(eps_low=-math.log1p(-low), eps_high=math.log1p(high))
    return _mode(keys, cispo(low, high), masks_of_loss=(mask,))


def _kimi15(keys: Keys) -> Mode:
    penalty = Penalty(coefficient=keys.number("kimi15_tau", above=0.0), estimator="k2", to="proximal")
    return _mode(keys, Reinforce(), penalties=(penalty,), has_ratio=False)


LOSSES: Mapping[str, Callable[[Keys], Mode]] = {
    "ppo": _ppo,
    "vanilla": _vanilla,
    "tis": _tis,
    "topr": _topr,
    "cispo": _cispo,
    "kimi15": _kimi15,
}

_NOWHERE = "nothing in ROLL reads it"
_REFUSED: Mapping[str, str] = {
    "entropy_loss_coef": "it needs logits",
    "rl_loss_coef": "a mode has no factor of its own: multiply the loss",
    "difficulty_loss_weight": "pass token_weights",
    "length_loss_weight": "pass token_weights",
    "use_topr_loss": _NOWHERE,
    "postive_loss_coef": _NOWHERE,
    "use_topr_neg_loss_coef": _NOWHERE,
    "use_policy_loss_type": _NOWHERE,
}
_SEGMENT = "no part of this library has one ratio for each run of tokens"
_LEVELS: Mapping[str, Any] = {level: level for level in ("token", "geometric", "sequence")}
_REDUCTIONS: Mapping[str, str] = {
    "token-mean": "token_mean",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-mean": "sequence_mean_token_mean",
}

_Mask: TypeAlias = RatioMask | DivergenceMask


def _mode(
    keys: Keys,
    objective: Objective,
    *,
    masks_of_loss: tuple[OutwardMask, ...] = (),
    penalties: tuple[Penalty, ...] = (),
    at_sequences: bool = False,
    has_ratio: bool = True,
) -> Mode:
    """The objective with ROLL's corrections, KL and aggregation."""
    for key, reason in _REFUSED.items():
        if keys[key] != DEFAULTS[key]:
            keys.refuse(key, reason)
    if has_ratio and keys.choice("ratio_type", {"token": False, "segment": True}):
        keys.refuse("ratio_type", _SEGMENT)
    if keys["loss_agg_mode"] == "seq-mean-token-sum-norm":
        keys.refuse("loss_agg_mode", "it divides by the padded width of the micro-batch")
    reduction = keys.choice("loss_agg_mode", _REDUCTIONS)
    recompute = keys.flag("enable_old_logprobs_recompute")
    masks, weights = _train_infer_correction(keys)
    if weights and penalties:
        keys.refuse("train_infer_correction", "ROLL multiplies the quadratic term with the weights too")
    if masks_of_loss and masks and recompute:
        keys.refuse("train_infer_correction", "what the unified mask drops counts in ROLL, what the filters drop does not")
    if at_sequences and any(weight.level == "token" for weight in weights):
        keys.refuse("train_infer_correction", ONE_RATIO)
    if at_sequences and any(_of_tokens(mask) for mask in masks):
        keys.refuse("train_infer_correction", "ROLL averages over the tokens that are left")
    penalties = (*penalties, *_kl(keys))
    if masks and not recompute:
        _check_denominators(keys, masks, penalties, reduction)
    return Mode(
        objective,
        anchor=Sequence(Proximal()) if at_sequences else Proximal(),
        corrections=(*masks_of_loss, *masks, *weights),
        penalties=penalties,
        reduction=reduction,
        count_masked=not (masks and recompute),
    )


def _kl(keys: Keys) -> tuple[Penalty, ...]:
    if not keys.flag("use_kl_loss"):
        return ()
    coefficient = keys.number("kl_loss_coef", at_least=0.0)
    return (Penalty(coefficient=coefficient, estimator="k3"),) if coefficient > 0.0 else ()


def _check_denominators(keys: Keys, masks: tuple[_Mask, ...], penalties: tuple[Penalty, ...], reduction: str) -> None:
    """Refuse filters after which ROLL's sums are not a mode's: its denominators are of all tokens and sequences then."""
    why = None
    if reduction == "token_mean":
        why = "its token-mean does not apply filters to the policy loss"
    elif penalties:
        why = "the filters drop penalties too, and its denominators count what they drop"
    elif reduction == "sequence_mean_token_mean" and any(_of_tokens(mask) for mask in masks):
        why = "it averages over the tokens that are left, and over all sequences"
    if why:
        keys.refuse("train_infer_correction", f"without enable_old_logprobs_recompute {why}")


def _train_infer_correction(keys: Keys) -> tuple[tuple[_Mask, ...], tuple[ImportanceWeight, ...]]:
    """The filters, and the weights."""
    if keys["train_infer_correction"] is None:
        return (), ()
    parts = _section(keys, "train_infer_correction", keys["train_infer_correction"], CORRECTION)
    filters = parts["filters"]
    if not isinstance(filters, (list, tuple)):
        msg = f"filters: expected a list of dicts, got {filters!r}"
        raise TypeError(msg)
    masks = (mask for given in filters for mask in _filter(_section(keys, "filters", given, FILTER)))
    return tuple(masks), _weight(_section(keys, "is_weight", parts["is_weight"], IS_WEIGHT))


def _weight(rules: Keys) -> tuple[ImportanceWeight, ...]:
    rules.ignore("detach")  # ROLL's log-probs under π_old have no graph
    if not rules.flag("enabled"):
        return ()
    return (ImportanceWeight(level=_level(rules, "weight_type"), high=rules.optional("upper_bound", above=0.0)),)


def _filter(rules: Keys) -> tuple[_Mask, ...]:
    if not rules.flag("enabled"):
        return ()
    masks: list[_Mask] = []
    level = _level(rules, "agg_type")
    if rules.flag("ratio_enabled"):
        low, high = rules.number("ratio_low", at_least=0.0), rules.number("ratio_high", above=0.0)
        masks.append(RatioMask(level=level, low=low or None, high=high))
    if rules.flag("diff_enabled"):
        low, high = rules.number("diff_low"), rules.number("diff_high", above=0.0)
        if level != "token" or low != -high:
            rules.refuse("diff_enabled", "this library's mask of π_old − μ is of tokens, and of the absolute value")
        masks.append(DivergenceMask(estimator="binary_tv", high=high))
    rules.check_all_read()
    return tuple(masks)


def _level(rules: Keys, key: str) -> Any:
    if rules[key] == "segment":
        rules.refuse(key, _SEGMENT)
    return rules.choice(key, _LEVELS)


def _of_tokens(mask: _Mask) -> bool:
    return isinstance(mask, DivergenceMask) or mask.level == "token"


def _section(keys: Keys, key: str, given: object, defaults: Mapping[str, Any]) -> Keys:
    """The keys of a section of the configuration."""
    if not isinstance(given, Mapping):
        msg = f"{key}: expected a dict of {', '.join(defaults)}, got {given!r}"
        raise TypeError(msg)
    return Keys(f"ROLL's {key}", keys.name, defaults, given)
