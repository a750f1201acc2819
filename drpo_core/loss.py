"""Losses with their analytic gradients: per token, and of a batch with its final gradient and diagnostics in one pass."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import is_numpy_namespace

from drpo_core._checks import check_number
from drpo_core._sequences import Sequences
from drpo_core.diagnostics import combine_diagnostics, diagnostics_of, map_diagnostics, separated
from drpo_core.engines.trace import Trace, UntraceableError
from drpo_core.modes.mode import Mode, check_others, evaluated, is_whole_mode, reduction_of_counted, resolve
from drpo_core.objectives import is_known
from drpo_core.objectives.protocol import check_objective, inside_of, loss_of, ratio_weight_of, weight_of
from drpo_core.reduction import prompt_mean, reduction_coefficients, token_mean
from drpo_core.tokens import Tokens, check_tokens, constant

if TYPE_CHECKING:
    from collections.abc import Callable

    from drpo_core._arrays import Array, Bool, Float, Int, Namespace
    from drpo_core._sequences import Across
    from drpo_core.diagnostics import Diagnostics
    from drpo_core.objectives import Objective
    from drpo_core.reduction import Reduction

__all__ = ["PolicyLoss", "SlowEngineWarning", "TokenLoss", "policy_loss_and_gradient", "token_loss_and_gradient"]

Engine: TypeAlias = Literal["auto", "arrays", "compiled"]

CHUNK = 1 << 15
"""Tokens at a time on a CPU: their intermediate results, some twenty arrays, stay in a core's cache."""


class SlowEngineWarning(UserWarning):
    """Array operations run where a compiled loop would be several times faster."""


class TokenLoss(NamedTuple):
    """Per token: the loss L, its gradient ∂L/∂log π = −A r w, and the weight w; all 0 at masked tokens."""

    loss: Array
    gradient: Array
    weight: Array


class PolicyLoss(NamedTuple):
    """Scalar `loss`, its `gradient` in log π, and `diagnostics`, or None where they were not asked for."""

    loss: Array
    gradient: Array
    diagnostics: Diagnostics | None


def token_loss_and_gradient(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    proximal_log_prob: Float[Array, "*tokens"] | None = None,
    reference_log_prob: Float[Array, "*tokens"] | None = None,
    segment_ids: Int[Array, " tokens"] | None = None,
    divergence: Float[Array, "*tokens"] | None = None,
    across: Across | None = None,
    xp: Namespace | None = None,
) -> TokenLoss:
    """Unreduced loss L of an objective with its analytic gradient ∂L/∂log π = −A r w.

    The ratio in the gradient saturates at e²⁰ (ℓ = 20 nats). The gradient keeps its sign there, where the derivative of
    the saturated value would be 0. A token whose weight is 0 has a gradient of exactly 0, whatever its ratio.
    A NaN at a valid token gives a NaN gradient, or drops the token where the weight is a mask; see `drpo_core.validate`.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`: then L and w include its corrections, L and
        the gradient its penalties; its reduction is left to you.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; any shape, the same for all three.
        float16 and bfloat16 are computed in float32.
    mask
        True at tokens that count. Masked positions may hold anything, NaN included: they are replaced before any
        arithmetic. None: every token counts.
    proximal_log_prob, reference_log_prob
        log π_old and log π_ref of the sampled tokens, where the mode needs them.
    segment_ids
        Of packed tokens: which sequence each belongs to, for a mode that looks at sequences.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    across
        Combines what each rank has found of its part of the same padded rows, where sequences are divided over ranks:
        ``across(array, "sum" | "max")``.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    TokenLoss
        `loss` and `weight` in the dtype of the arithmetic, `gradient` in the dtype of `log_prob`.

    Raises
    ------
    TypeError
        If an array is not real floating-point, the mask is not boolean, or the objective is none.
    ValueError
        If the shapes differ.

    References
    ----------
    `docs/derivations/index.md`: an objective is its gradient weight.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DRPO, token_loss_and_gradient
    >>> log_prob, behavior = np.log([0.5, 0.2, 0.3]), np.log([0.25, 0.2, 0.6])
    >>> result = token_loss_and_gradient(DRPO(delta=0.5), log_prob, behavior, np.array([1.0, 1.0, -1.0]))
    >>> result.gradient.round(6)
    array([-1. , -1. ,  0.2])
    """
    check_objective(objective)
    log_prob, behavior_log_prob, advantages, divergence = map(constant, (log_prob, behavior_log_prob, advantages, divergence))
    xp, dtype = check_tokens(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp)
    mode = resolve(
        objective,
        log_prob,
        behavior_log_prob,
        advantages,
        mask=mask,
        proximal_log_prob=constant(proximal_log_prob),
        reference_log_prob=constant(reference_log_prob),
        segment_ids=segment_ids,
        across=across,
        diagnostics=False,
        dtype=dtype,
        xp=xp,
    )
    objective = mode.objective
    tokens = Tokens.of(log_prob, mode.anchor_log_prob, advantages, mask=mask, divergence=divergence, dtype=dtype, xp=xp)
    weight = weight_of(objective, tokens)
    loss, gradient = loss_of(objective, tokens), gradient_of(tokens, weight, ratio_weight_of(objective, tokens), mask=mask)
    if mode.factor is not None:
        kept = mode.factor != 0.0
        loss, gradient, weight = (xp.where(kept, mode.factor * each, 0.0) for each in (loss, gradient, weight))
    if mode.penalty is not None:
        loss, gradient = (
            each + xp.where(mode.counted, penalty, 0.0) for each, penalty in zip((loss, gradient), mode.penalty, strict=True)
        )
    gradient = xp.astype(gradient, log_prob.dtype, copy=False)
    if mask is None:
        return TokenLoss(loss, gradient, weight)
    return TokenLoss(xp.where(mask, loss, 0.0), gradient, xp.where(mask, weight, 0.0))


def policy_loss_and_gradient(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"],
    proximal_log_prob: Float[Array, "*tokens"] | None = None,
    reference_log_prob: Float[Array, "*tokens"] | None = None,
    reduction: Reduction | None = None,
    normalizer: float | Array | None = None,
    token_weights: Float[Array, "*tokens"] | None = None,
    segment_ids: Int[Array, " tokens"] | None = None,
    divergence: Float[Array, "*tokens"] | None = None,
    diagnostics: bool = True,
    engine: Engine = "auto",
    threads: int | None = None,
    across: Across | None = None,
    xp: Namespace | None = None,
) -> PolicyLoss:
    """Scalar loss Σ m c L of a batch, its gradient m c ∂L/∂log π = −m c A r w, and diagnostics, in one pass.

    The coefficients c are those of the reduction, so the gradient is final.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a `drpo_core.modes.Mode`.
    log_prob, behavior_log_prob, advantages
        log π, log μ (nats, ≤ 0) and A of the sampled tokens; (…, tokens) padded or (tokens,) packed.
        float16 and bfloat16 are computed in float32.
    mask
        True at tokens that count. Masked positions may hold anything, NaN included.
    proximal_log_prob, reference_log_prob
        log π_old and log π_ref of the sampled tokens, where the mode needs them.
    reduction
        `drpo_core.token_mean`, `drpo_core.sequence_mean_token_mean`, `drpo_core.sequence_mean_token_sum` or
        `drpo_core.reduction.prompt_mean`, also with arguments bound by `functools.partial`; or a
        `drpo_core.reduction.LinearReduction`. None: the mode's own, or the mean over tokens. A mode of ``"prompt_mean"`` needs
        it, for the prompts' ids.
    normalizer
        Denominator of the whole batch, where this call sees a micro-batch or a shard of it.
    token_weights
        Constant factors of the per-token losses (truncated importance weights, say).
    segment_ids
        Of packed tokens: which sequence each belongs to.
    divergence
        Per-token divergence for ``DPPO(divergence="per_token")``.
    diagnostics
        Whether to compute them: what `drpo_core.token_diagnostics` returns, from the same pass.
    engine
        ``"compiled"``: one loop over NumPy arrays, compiled for the objective at its first use in a second or two
        (numba, extra `compiled`). ``"arrays"``: array operations, in any namespace; NumPy's in chunks that stay in the
        cache. ``"auto"``: compiled where that is possible.
    threads
        Of the compiled loop; default: the CPUs this process may use. The result does not depend on it.
    across
        As in `token_loss_and_gradient`.
    xp
        Namespace of the arrays; inferred when omitted.

    Returns
    -------
    PolicyLoss
        `loss` 0-d, `gradient` in the shape and dtype of `log_prob`, and `diagnostics`.

    Raises
    ------
    TypeError
        If an array is not real floating-point, the mask is not boolean, or the reduction is not one of those above.
    ValueError
        If the shapes differ, a number is out of its range, or the engine is unknown or does not take these arrays.
    ImportError
        If ``engine="compiled"`` finds no numba.
    UntraceableError
        If ``engine="compiled"`` can't compile what the objective does; the other engines run any.

    Warns
    -----
    SlowEngineWarning
        Once a process, if ``engine="auto"`` would compile and finds no numba.

    References
    ----------
    `docs/derivations/index.md`: an objective is its gradient weight.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import DRPO, policy_loss_and_gradient, summarize
    >>> log_prob, behavior = np.log([[0.5, 0.2, 0.3]]), np.log([[0.25, 0.2, np.nan]])
    >>> advantages, mask = np.array([[1.0, 1.0, -1.0]]), np.array([[True, True, False]])
    >>> result = policy_loss_and_gradient(DRPO(delta=0.5), log_prob, behavior, advantages, mask=mask)
    >>> float(result.loss.round(6)), result.gradient.round(6).tolist()
    (-1.375, [[-0.5, -0.5, 0.0]])
    >>> summarize(result.diagnostics)["attenuated_fraction"]
    0.5
    """
    check_engine(engine)
    check_objective(objective)
    if threads is not None:
        threads = int(check_number("threads", threads, at_least=1, whole=True))
    log_prob, behavior_log_prob, advantages, divergence = map(constant, (log_prob, behavior_log_prob, advantages, divergence))
    xp, dtype = check_tokens(log_prob, behavior_log_prob, advantages, mask=mask, divergence=divergence, xp=xp)
    options: dict[str, Any] = {"normalizer": normalizer, "token_weights": token_weights, "segment_ids": segment_ids}
    reduction = reduction_of(objective, reduction, across=across)
    others = {"proximal_log_prob": constant(proximal_log_prob), "reference_log_prob": constant(reference_log_prob)}

    def coefficients_of(counted: Array) -> Array:
        return constant(reduction_coefficients(reduction, counted, dtype=dtype, **options, xp=xp))

    numpy = is_numpy_namespace(xp)
    if engine == "compiled" and not numpy:
        msg = f"engine: 'compiled' takes NumPy arrays, got {type(log_prob).__module__}.{type(log_prob).__name__}"
        raise ValueError(msg)
    tokens = (log_prob, behavior_log_prob, advantages, mask)
    if numpy and is_whole_mode(objective) and segment_ids is None and across is None and may_compile(engine):
        check_others(objective, others, log_prob, xp=xp)
        settings: dict[str, Any] = {"dtype": dtype, "diagnostics": diagnostics, "threads": threads}
        whole = compiled_mode(objective, coefficients_of, *tokens, divergence, *others.values(), **settings)
        if whole is not None:
            return whole._replace(gradient=whole.gradient.astype(log_prob.dtype, copy=False))
    mode = resolve(
        objective,
        *tokens[:3],
        mask=mask,
        **others,
        segment_ids=segment_ids,
        across=across,
        diagnostics=diagnostics,
        dtype=dtype,
        xp=xp,
    )
    coefficients = coefficients_of(mode.counted)
    objective, scaled = mode.objective, mode.scaled(coefficients)
    arrays = (log_prob, mode.anchor_log_prob, advantages, mask, scaled, divergence)
    if numpy and may_compile(engine):
        try:
            result = compiled_pass(objective, *arrays, dtype=dtype, diagnostics=diagnostics, threads=threads)
        except UntraceableError:
            if engine == "compiled":
                raise
        else:
            result = mode.added(result, coefficients, xp=xp)
            return result._replace(gradient=result.gradient.astype(log_prob.dtype, copy=False))  # type: ignore[no-any-return]
    result = (chunked_pass if numpy else policy_pass)(objective, *arrays, dtype=dtype, diagnostics=diagnostics, xp=xp)
    result = mode.added(result, coefficients, xp=xp)
    return result._replace(  # type: ignore[no-any-return]
        gradient=xp.astype(result.gradient, log_prob.dtype, copy=False),
        diagnostics=None if result.diagnostics is None else separated(result.diagnostics, xp=xp),
    )


def reduction_of(objective: Objective, reduction: Reduction | None, *, across: Across | None = None) -> Reduction:
    """The reduction that is given; else a mode's, or the mean over tokens."""
    if isinstance(objective, Mode):
        if across is not None and objective.reduction not in {"token_mean", "token_sum"}:
            msg = (
                "across: a rank can't count sequences that others share: expected a mode whose reduction is 'token_sum' "
                f"(with global_coefficients as token_weights) or 'token_mean', got {objective.reduction!r}"
            )
            raise ValueError(msg)
        if objective.reduction == "prompt_mean":
            if isinstance(reduction, partial) and reduction.func is prompt_mean:
                return reduction
            msg = (
                "reduction: expected functools.partial(drpo_core.reduction.prompt_mean, group_ids=ids), because "
                f"{objective!r} needs to know which prompt each sequence answers, got {reduction!r}"
            )
            raise ValueError(msg)
        if reduction is not None:
            msg = f"reduction: expected None, because {objective!r} has its own, got {reduction!r}"
            raise ValueError(msg)
        return reduction_of_counted(objective)
    return token_mean if reduction is None else reduction


# --- the kernel ------------------------------------------------------------------------------------------------------


def policy_pass(
    objective: Objective,
    log_prob: Float[Array, "*tokens"],
    behavior_log_prob: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    mask: Bool[Array, "*tokens"],
    coefficients: Float[Array, "..."],
    divergence: Float[Array, "*tokens"] | None = None,
    *,
    dtype: Any,
    diagnostics: bool,
    select: bool = True,
    xp: Namespace,
) -> PolicyLoss:
    """Σ m c L, m c ∂L/∂log π and diagnostics of checked arrays: all that any path runs, whatever the objective.

    ``select=False`` leaves masked inputs as they are. Results are selected in any case, so that is right where nothing
    differentiates them again, nothing warns of NaN, and the objective does not look across tokens.
    """
    tokens = Tokens.of(
        log_prob, behavior_log_prob, advantages, mask=mask if select else None, divergence=divergence, dtype=dtype, xp=xp
    )
    weight = weight_of(objective, tokens)
    ratio_weight = ratio_weight_of(objective, tokens)
    return PolicyLoss(
        xp.sum(xp.where(mask & (coefficients != 0.0), coefficients * loss_of(objective, tokens), 0.0)),
        gradient_of(tokens, weight, ratio_weight, mask=mask, coefficients=coefficients),
        diagnostics_of(tokens, weight, ratio_weight, inside_of(objective, tokens), mask) if diagnostics else None,
    )


def mode_pass(
    mode: Mode,
    log_prob: Float[Array, "rows tokens"],
    behavior_log_prob: Float[Array, "rows tokens"],
    advantages: Float[Array, "rows tokens"],
    mask: Bool[Array, "rows tokens"],
    coefficients: Float[Array, "..."],
    divergence: Float[Array, "rows tokens"] | None = None,
    proximal_log_prob: Float[Array, "rows tokens"] | None = None,
    reference_log_prob: Float[Array, "rows tokens"] | None = None,
    *,
    dtype: Any,
    diagnostics: bool,
    select: bool = True,
    xp: Namespace,
) -> PolicyLoss:
    """`policy_pass` of a whole mode: with its anchor, corrections and penalties; a row is a sequence."""
    log_probs = (log_prob, behavior_log_prob, proximal_log_prob, reference_log_prob)
    found = evaluated(mode, *log_probs, advantages, Sequences(mask, None, xp=xp), diagnostics=diagnostics, dtype=dtype)
    arrays = (log_prob, found.anchor_log_prob, advantages, mask, found.scaled(coefficients), divergence)
    result = policy_pass(found.objective, *arrays, dtype=dtype, diagnostics=diagnostics, select=select, xp=xp)
    return found.added(result, coefficients, xp=xp)  # type: ignore[no-any-return]


def counted_pass(
    mode: Mode,
    log_prob: Float[Array, "rows tokens"],
    behavior_log_prob: Float[Array, "rows tokens"],
    advantages: Float[Array, "rows tokens"],
    mask: Bool[Array, "rows tokens"],
    coefficients: Float[Array, "..."],  # noqa: ARG001 -- what they depend on is found here
    divergence: Float[Array, "rows tokens"] | None = None,  # noqa: ARG001
    proximal_log_prob: Float[Array, "rows tokens"] | None = None,
    reference_log_prob: Float[Array, "rows tokens"] | None = None,
    *,
    dtype: Any,
    diagnostics: bool,
    select: bool = True,  # noqa: ARG001
    xp: Namespace,
) -> PolicyLoss:
    """In the place of the gradient, 1 at the tokens that the mode's reduction counts, else 0; the arguments of `mode_pass`."""
    log_probs = (log_prob, behavior_log_prob, proximal_log_prob, reference_log_prob)
    found = evaluated(mode, *log_probs, advantages, Sequences(mask, None, xp=xp), diagnostics=diagnostics, dtype=dtype)
    counted = xp.astype(found.counted, dtype)
    return PolicyLoss(xp.sum(counted), counted, None)


def gradient_of(
    tokens: Tokens,
    weight: Float[Array, "*tokens"],
    ratio_weight: Float[Array, "*tokens"] | None,
    *,
    mask: Bool[Array, "*tokens"] | None,
    coefficients: Float[Array, "..."] | None = None,
) -> Float[Array, "*tokens"]:
    """−m c A r w; exactly 0 where m, c or w is 0, whatever the others are. `ratio_weight`: its own r w."""
    gradient = -tokens.advantages * tokens.ratio * weight if ratio_weight is None else -tokens.advantages * ratio_weight
    moves = weight != 0.0
    if coefficients is not None:
        moves, gradient = moves & (coefficients != 0.0), coefficients * gradient
    return tokens.xp.where(moves if mask is None else mask & moves, gradient, 0.0)


# --- engines ---------------------------------------------------------------------------------------------------------


def check_engine(engine: object) -> None:
    """Raise unless it is one of the three."""
    if not isinstance(engine, str) or engine not in ("auto", "arrays", "compiled"):
        msg = f"engine: expected 'auto', 'arrays' or 'compiled', got {engine!r}"
        raise ValueError(msg)


def may_compile(engine: Engine, compiler: Literal["numba", "triton"] = "numba") -> bool:
    """Whether to try a compiled loop; raises if one is asked for and there is no compiler, or all are turned off."""
    if engine == "arrays":
        return False
    if os.environ.get("DRPO_COMPILED") == "0":
        if engine == "compiled":
            msg = "engine: 'compiled' is turned off by the environment variable DRPO_COMPILED=0"
            raise ValueError(msg)
        return False
    if _is_installed(compiler):
        return True
    if engine == "compiled":
        msg = f"engine: 'compiled' needs {compiler}: pip install 'drpo-core[{_EXTRAS[compiler]}]'"
        raise ImportError(msg)
    if compiler == "numba":
        _say_once_how_to_compile()
    return False


_EXTRAS = {"numba": "compiled", "triton": "triton"}


def chunked_pass(
    objective: Objective, *arrays: Array, dtype: Any, diagnostics: bool, chunk: int = CHUNK, xp: Namespace
) -> PolicyLoss:
    """`policy_pass` in chunks of tokens, where the objective looks at one token at a time."""
    log_prob, mask = arrays[0], arrays[3]
    size = 1
    for extent in log_prob.shape:
        size *= extent
    if size <= chunk or not is_elementwise(objective, diagnostics=diagnostics):
        return policy_pass(objective, *arrays, dtype=dtype, diagnostics=diagnostics, xp=xp)
    flat = [None if a is None else xp.reshape(xp.broadcast_to(a, mask.shape), (-1,)) for a in arrays]
    gradient = xp.empty_like(flat[0], dtype=dtype)
    losses: list[Array] = []
    parts: list[Any] = []
    for start in range(0, size, chunk):
        part = slice(start, start + chunk)
        result = policy_pass(
            objective, *(None if a is None else a[part] for a in flat), dtype=dtype, diagnostics=diagnostics, xp=xp
        )
        gradient[part] = result.gradient
        losses.append(result.loss)
        parts.append(result.diagnostics)
    merged = None
    if diagnostics:
        merged = combine_diagnostics(map_diagnostics(lambda *fields: xp.stack(fields), *parts), xp=xp)
    return PolicyLoss(xp.sum(xp.stack(losses)), xp.reshape(gradient, log_prob.shape), merged)


def compiled_mode(
    mode: Mode,
    coefficients_of: Callable[[Array], Array],
    *arrays: Array | None,
    compiled: Callable[..., PolicyLoss] | None = None,
    one: Callable[[], Array] = lambda: np.ones((), np.float32),
    **options: Any,
) -> PolicyLoss | None:
    """`mode_pass` as a compiled loop; None where the mode can't be compiled as a whole.

    `coefficients_of`: those of the reduction, from the mask of the tokens that it counts. The arrays are those of
    `mode_pass`, without coefficients. `compiled`: what runs a pass, `compiled_pass` by default; `one` makes a 0-d 1 for it.
    """
    before, after = arrays[:4], arrays[4:]
    compiled, counted = compiled or compiled_pass, before[-1]
    if counted.ndim == 0:  # type: ignore[union-attr]
        # a number has no row, which `resolve` says
        return None
    try:
        if mode.corrections and not mode.count_masked:
            found = compiled(mode, *before, one(), *after, **options | {"diagnostics": False}, run=counted_pass)
            counted = found.gradient != 0.0
        return compiled(mode, *before, coefficients_of(counted), *after, **options, run=mode_pass)
    except UntraceableError:
        return None


def compiled_pass(
    objective: Objective,
    *arrays: Array | None,
    dtype: Any,
    diagnostics: bool,
    run: Callable[..., PolicyLoss] = policy_pass,
    **threading: Any,
) -> PolicyLoss:
    """A pass over NumPy arrays as a compiled loop; raises `UntraceableError` if the objective can't be compiled."""
    from drpo_core.engines import numba_loop  # noqa: PLC0415 -- numba is an extra

    gradient = np.empty(arrays[0].shape, dtype)  # type: ignore[union-attr]

    def flat(array: Array | None) -> Array | None:
        if array is None:
            return None
        kept = array.dtype if array.dtype == np.bool_ else dtype
        return np.asarray(array, kept, order="C").reshape(-1)

    loss, statistics = numba_loop.run(
        run,
        objective,
        tuple(map(flat, arrays)),
        gradient.reshape(-1),
        diagnostics=diagnostics,
        width=max(1, gradient.shape[-1]) if gradient.ndim else None,
        **threading,
    )
    return PolicyLoss(loss, gradient, statistics)


def is_elementwise(objective: Objective, *, diagnostics: bool = True) -> bool:
    """Whether tokens may come to the objective in chunks: its methods do nothing across tokens.

    A user's own are run on symbols to see that, at every call, because they may have changed. `diagnostics`: whether
    they include its trust region.
    """
    if is_known(objective):
        return True
    trace = Trace()
    fields = {name: trace.input(name) for name in Tokens._fields if name != "xp"}
    tokens = Tokens(**fields, xp=trace.namespace)
    try:
        methods = (loss_of, weight_of, ratio_weight_of, *([inside_of] if diagnostics else []))
        results = [method(objective, tokens) for method in methods]
        return not any(result.reduced for result in results if result is not None)
    except (UntraceableError, AttributeError, TypeError, ValueError):
        return False


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _say_once_how_to_compile() -> None:
    msg = (
        "policy losses on a CPU run as array operations, several times slower than the compiled loop: "
        "pip install 'drpo-core[compiled]' (or pass engine='arrays')"
    )
    warnings.warn(msg, SlowEngineWarning, stacklevel=_caller())


def _caller() -> int:
    """The `stacklevel`, in the calling function, of the code that called this library or an adapter of it."""
    frame, level = sys._getframe(1), 1  # noqa: SLF001 -- `skip_file_prefixes` is for Python 3.12
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("drpo_core", "drpo_torch"):
        frame, level = frame.f_back, level + 1
    return level
