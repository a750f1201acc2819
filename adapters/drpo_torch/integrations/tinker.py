"""tinker: every objective as a loss of `TrainingClient.forward_backward_custom`, run by the client or by the server.

`custom_loss` makes the callable that the client runs between two requests; `per_datum_loss` makes the function that
``ServiceClient.create_custom_loss`` traces with torch.fx, so that the server may run it in one request.
"""

from __future__ import annotations

import operator
import warnings
from typing import TYPE_CHECKING, Any

import torch
from tinker import Datum, TensorData

from drpo_core import summarize, token_mean
from drpo_core.diagnostics import EffectiveSampleSize, Mean
from drpo_core.engines.trace import BOOL, FLOAT, Trace
from drpo_core.loss import policy_pass
from drpo_core.modes import Mode
from drpo_torch.integrations import BehaviorPolicyWarning
from drpo_torch.loss import policy_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drpo_core import Objective
    from drpo_core.engines.trace import Symbol
    from drpo_core.reduction import Reduction

__all__ = ["INPUT_RANKS", "custom_loss", "per_datum_inputs", "per_datum_loss", "summarize_metrics"]

INPUT_RANKS = {"logprobs": 1, "sampling_logprobs": 1, "advantages": 1, "mask": 1}
"""`input_ranks` of ``ServiceClient.create_custom_loss`` for a `per_datum_loss`."""

_READ = ("target_tokens", "logprobs", "advantages", "mask", "weights")
_RECORDED = ("log_prob", "behavior_log_prob", "advantages", "mask", "coefficients")
_REMEDY = "give the log-probs that came with the sampled tokens (SampledSequence.logprobs), shifted like target_tokens"


def custom_loss(
    objective: Objective, *, reduction: Reduction | None = None, normalizer: float | None = None
) -> Callable[[Sequence[Datum], Sequence[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]:
    """The loss of an objective as a callable for `TrainingClient.forward_backward_custom`.

    It reads of each datum's `loss_fn_inputs`, all of the length of `target_tokens`: `logprobs`, log μ as the sampler
    returned it; `advantages`; optionally `mask`, not 0 at tokens that count (default: all do), and `weights`, factors of
    the per-token losses.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``, or a mode that needs no policy but π and μ, such as
        ``drpo_core.modes.tinker("dro", beta=0.1)``.
    reduction
        A reduction of `drpo_core` over all tokens of the call; a datum is a sequence. None: a mode's own; of an objective the
        sum over tokens, as tinker's own losses are.
    normalizer
        Its denominator; None for that of the call's own tokens or sequences.

    Returns
    -------
    callable
        From data and their log-probs, log π, to the loss and metrics: the statistics of `drpo_core.token_diagnostics` over the
        whole call as ``trust_region/<name>``.

    Raises
    ------
    ValueError
        If a mode needs log-probs that tinker has not. When called, if a datum lacks an input, has one of another shape or
        one that would have no effect.

    Warns
    -----
    BehaviorPolicyWarning
        When called, if `logprobs` can't be the sampler's: all 0, or all equal to the current policy's.

    Examples
    --------
    ::

        future = training_client.forward_backward_custom(data, custom_loss(DRPO(delta=0.15)))
    """
    if needed := getattr(objective, "arguments", ()):
        msg = f"objective: tinker's data have no {' and no '.join(needed)}, which {objective!r} needs"
        raise ValueError(msg)
    if reduction is None and not isinstance(objective, Mode):
        reduction, normalizer = token_mean, 1.0 if normalizer is None else normalizer

    def loss(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        columns = [_columns(i, datum) for i, datum in enumerate(data)]
        behavior, advantages, mask, weights = (torch.cat(parts) for parts in zip(*columns, strict=True))
        log_prob, mask = torch.cat(list(logprobs)), mask != 0
        _check_anchor(log_prob.detach(), behavior, mask & (advantages != 0))
        lengths = torch.tensor([len(part) for part in logprobs])
        value, statistics = policy_loss(
            objective,
            log_prob=log_prob,
            behavior_log_prob=behavior,
            advantages=advantages,
            mask=mask,
            reduction=reduction,
            normalizer=normalizer,
            token_weights=weights if any("weights" in datum.loss_fn_inputs for datum in data) else None,
            segment_ids=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        )
        assert statistics is not None
        return value, {f"trust_region/{name}": figure for name, figure in summarize(statistics).items()}

    return loss


def per_datum_loss(
    objective: Objective,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The summed loss of an objective over one datum, as a function for ``ServiceClient.create_custom_loss``.

    Its body is the objective's recorded arithmetic (`drpo_core.engines.trace`), so torch.fx sees only functions of torch and
    operators. It differentiates to the library's gradient −A r w, whatever the objective.

    Parameters
    ----------
    objective
        Such as ``drpo_core.DRPO(delta=0.15)``.

    Returns
    -------
    callable
        Of `logprobs` (log π), `sampling_logprobs` (log μ), `advantages` and `mask`, each (tokens,), to the loss and
        metrics that tinker sums over data: what `summarize_metrics` needs for all diagnostics but extremes. Make the
        inputs with `per_datum_inputs`.

    Raises
    ------
    UntraceableError
        If the objective does something that can't be recorded.
    ValueError
        If a mode is more than an objective whose tokens are added up.

    Examples
    --------
    ::

        handle = service_client.create_custom_loss(per_datum_loss(DRPO(delta=0.15)), INPUT_RANKS).result()
        result = training_client.forward_backward_custom(per_datum_inputs(data), handle).result()
        figures = summarize_metrics(result.metrics)
    """
    if getattr(objective, "reduction", "token_sum") != "token_sum":
        msg = f"objective: tinker adds up tokens, expected a mode whose reduction is 'token_sum', got {objective!r}"
        raise ValueError(msg)
    objective = getattr(objective, "alone", objective)
    trace = Trace()
    symbols: dict[str, Any] = dict(
        zip(_RECORDED, (trace.input(name, BOOL if name == "mask" else FLOAT) for name in _RECORDED), strict=True)
    )
    recorded = policy_pass(objective, **symbols, divergence=None, dtype=FLOAT, diagnostics=True, xp=trace.namespace)
    diagnostics = recorded.diagnostics or {}

    def loss(
        logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        arrays = (logprobs.detach(), sampling_logprobs, advantages, mask != 0, torch.ones_like(logprobs))
        run = _Replay(trace, dict(zip(_RECORDED, arrays, strict=True)))
        gradient = run(recorded.gradient)
        # 0 in value, the gradient in derivative; by selection, because at a masked token log π may be a NaN
        moving = torch.where(gradient == 0, 0.0, logprobs)
        value = run(recorded.loss) + torch.sum(gradient * (moving - moving.detach()))
        metrics = {
            f"custom/{name}/{field}:sum": run(symbol)
            for name, statistic in diagnostics.items()
            if isinstance(statistic, (Mean, EffectiveSampleSize))
            for field, symbol in statistic._asdict().items()
        }
        return value, metrics

    loss.__name__ = f"drpo_core_{type(objective).__name__.lower()}"
    return loss


def per_datum_inputs(data: Sequence[Datum]) -> list[Datum]:
    """Data for a `per_datum_loss`, from the data that `custom_loss` takes.

    `logprobs`, which is the name of log π there, becomes `sampling_logprobs`, and a missing `mask` one that counts every
    token.

    Parameters
    ----------
    data
        With `target_tokens`, `logprobs`, `advantages` and perhaps `mask` in `loss_fn_inputs`.

    Returns
    -------
    list
        Of copies.

    Raises
    ------
    ValueError
        If a datum lacks an input, has one of another shape or one that would have no effect, which `weights` is here.

    Warns
    -----
    BehaviorPolicyWarning
        If `logprobs` are all 0.
    """
    result = []
    for i, datum in enumerate(data):
        if "weights" in datum.loss_fn_inputs:
            msg = f"datum[{i}].loss_fn_inputs['weights']: expected none, because a per-datum loss does not read it"
            raise ValueError(msg)
        behavior, advantages, mask, _ = _columns(i, datum)
        _check_anchor(None, behavior, (mask != 0) & (advantages != 0))
        inputs = {"sampling_logprobs": behavior, "advantages": advantages, "mask": mask}
        copies = {name: TensorData.from_torch(column) for name, column in inputs.items()}
        copies["target_tokens"] = datum.loss_fn_inputs["target_tokens"]
        result.append(Datum(datum.model_input, copies, datum.model_input_spans, datum.loss_fn_input_spans))
    return result


def summarize_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Diagnostics from the summed metrics of a `per_datum_loss`, under the names that `custom_loss` gives them.

    Parameters
    ----------
    metrics
        ``ForwardBackwardOutput.metrics``; what is not of a `per_datum_loss` is passed over.

    Returns
    -------
    dict
        ``trust_region/<name>``: as of all tokens of the call at once; NaN for a statistic that counted nothing.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in metrics.items():
        if key.startswith("custom/") and key.endswith(":sum"):
            name, _, field = key.removeprefix("custom/").removesuffix(":sum").rpartition("/")
            parts.setdefault(name, {})[field] = torch.tensor(value, dtype=torch.float64)
    figures = summarize(
        {
            name: kind(**fields)
            for name, fields in parts.items()
            for kind in (Mean, EffectiveSampleSize)
            if set(kind._fields) == fields.keys()
        }
    )
    return {f"trust_region/{name}": figure for name, figure in figures.items()}


def _columns(i: int, datum: Datum) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log μ, A, mask and weights of one datum, (tokens,) each."""
    given = datum.loss_fn_inputs
    where = f"datum[{i}].loss_fn_inputs"
    if unread := sorted(given.keys() - set(_READ)):
        msg = f"{where}: expected none but {', '.join(_READ)}, got {', '.join(unread)}, which no objective reads"
        raise ValueError(msg)
    for name in ("target_tokens", "logprobs", "advantages"):
        if name not in given:
            msg = f"{where}[{name!r}]: expected {'log μ' if name == 'logprobs' else 'it'}, got none"
            raise ValueError(f"{msg}; {_REMEDY}" if name == "logprobs" else msg)
    tokens = given["target_tokens"].to_torch()
    if tokens.ndim != 1:
        msg = f"{where}['target_tokens']: expected one sampled token a position, got shape {tuple(tokens.shape)}"
        raise ValueError(msg)
    ones = torch.ones(tokens.shape)
    columns = [given[name].to_torch() if name in given else ones for name in _READ[1:]]
    for name, column in zip(_READ[1:], columns, strict=True):
        if column.shape != tokens.shape:
            msg = f"{where}[{name!r}]: expected the shape of target_tokens, {tuple(tokens.shape)}, got {tuple(column.shape)}"
            raise ValueError(msg)
    behavior, advantages, mask, weights = columns
    return behavior, advantages, mask, weights


def _check_anchor(log_prob: torch.Tensor | None, behavior: torch.Tensor, active: torch.Tensor) -> None:
    """Warn of log-probs that no sampler has returned for these tokens."""
    behavior = behavior[active]
    if len(behavior) < 2:
        return  # one token may well have a log-prob of 0
    if not behavior.any():
        msg = f"logprobs are 0 at every token with an advantage: these are not the behaviour policy's; {_REMEDY}"
    elif log_prob is not None and torch.equal(behavior, log_prob[active]):
        msg = (
            "logprobs equal the current policy's at every token with an advantage: every ratio is 1, no threshold matters "
            f"and all objectives have the same gradient, unless it has just been sampled from in the same precision; {_REMEDY}"
        )
    else:
        return
    warnings.warn(msg, BehaviorPolicyWarning, stacklevel=3)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "divide": operator.truediv,
    "equal": operator.eq,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "less": operator.lt,
    "less_equal": operator.le,
    "multiply": operator.mul,
    "negative": operator.neg,
    "not_equal": operator.ne,
    "subtract": operator.sub,
}


class _Replay:
    """Runs what a trace has recorded on torch tensors, or on what torch.fx passes for them; each thing once."""

    def __init__(self, trace: Trace, inputs: dict[str, Any]) -> None:
        self.constants, self.values = trace.constants, dict(inputs)
        self.like = inputs["log_prob"]

    def __call__(self, symbol: Symbol) -> Any:  # noqa: ANN401 -- a Tensor or a Proxy
        if symbol.name not in self.values:
            self.values[symbol.name] = self._compute(symbol)
        return self.values[symbol.name]

    def _compute(self, symbol: Symbol) -> Any:  # noqa: ANN401
        if symbol.operation == "constant":
            if symbol.kind == BOOL:
                return torch.full_like(self.like, symbol.name == "True", dtype=torch.bool)
            return torch.full_like(self.like, self.constants[symbol.name])
        function = _OPERATORS[symbol.operation] if symbol.operation in _OPERATORS else getattr(torch, symbol.operation)
        return function(*(self(argument) for argument in symbol.arguments))
