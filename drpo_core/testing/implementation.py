"""What is under test: any policy loss, described by a small declaration of what it claims to be.

`from_function` wraps a loss written with NumPy, torch or JAX; `from_core` wraps an objective of this library. Both give
an `Implementation`, which the checks call with a `TokenBatch` and which answers with an `Evaluation`: loss, gradient and,
if the function has one, weight, as NumPy arrays.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

import drpo_core
from drpo_core import divergence as divergences
from drpo_core import reduction as reductions
from drpo_core.loss import policy_loss_and_gradient, token_loss_and_gradient
from drpo_core.modes import Mode
from drpo_core.modes.mode import is_whole_mode
from drpo_core.objectives import CISPO, GPPO, is_known, parameters_of
from drpo_core.objectives.thresholds import VacuousTrustRegionWarning
from drpo_core.testing.frameworks import Framework, Outputs, framework_named
from drpo_core.testing.oracle import SATURATION
from drpo_core.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drpo_core.objectives import Objective
    from drpo_core.testing.batch import BoolArray, FloatArray, TokenBatch

__all__ = ["REDUCTIONS", "Evaluation", "Implementation", "Source", "from_adapter", "from_core", "from_function"]

Reduction: TypeAlias = Literal["none", "sum", "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]

REDUCTIONS = ("none", "sum", "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum")

ARGUMENTS = (
    "log_prob",
    "behavior_log_prob",
    "advantages",
    "mask",
    "segment_ids",
    "normalizer",
    "proximal_log_prob",
    "reference_log_prob",
)
"""Names by which the kit passes a batch to a function; `arguments` maps them to the function's own."""


@dataclass(frozen=True)
class Source:
    """Code that calls the function under test as the kit does, for the snippet that reproduces a failure.

    Parameters
    ----------
    function
        Statements that define `function`, which takes the arguments of the kit.
    evaluate
        Statements that define `evaluate(function, **batch)`, which returns (loss, gradient, weight).
    bfloat16
        Statements that make `function` round its floating-point arrays to bfloat16.
    """

    function: str
    evaluate: str
    bfloat16: str = ""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A policy loss under test and what it claims to be.

    Usually made by `from_function` or `from_core`.

    Parameters
    ----------
    name
        Shown in reports and test ids.
    call
        Takes the arguments of the kit as NumPy arrays, and a dtype; returns (loss, gradient, weight or None).
    objective
        What it implements, an objective or a `drpo_core.modes.Mode`; None if nothing the kit has a formula for (only
        structural properties are checked then).
    form
        ``"ratio"`` if the gradient is the derivative of the loss value, ``"score"`` if something in it is detached.
    reduction, horizon
        ``"none"`` for per-token losses; otherwise how they are reduced to a scalar.
    takes_mask, takes_normalizer, takes_packed
        Whether it has a mask; a denominator of the whole batch; 1-D packed tokens (with `segment_ids` if it wants them).
    dtypes
        Of its inputs; the first is used wherever dtype is not what a check is about.
    max_abs_log_ratio
        Where the claim holds. Published losses often clamp ℓ at ±20.
    local
        Whether a token's gradient depends on that token alone (not so for sequence-level ratios such as GSPO).
    gradient
        ``"analytic"`` (its own formula), ``"autodiff"`` or ``"differences"``: how well it can be known. Autodiff of the
        value has an absolute error of u abs(A) where r is small: the derivative of expm1 is computed as expm1 + 1.
    keeps_boundary
        Whether a token exactly on the boundary of the trust region is kept, as in every shipped DPPO.
    shape
        A fixed (sequences, tokens), for implementations that recompile at a new one.
    cost
        Relative time of a call: expensive ones are given fewer examples.
    family
        The same implementation of another objective, for properties that relate several.
    reference
        An implementation this one must agree with (the eager one of a compiled, the loop of a vmapped).
    divergences
        Functions of NumPy arrays, named and called as in `drpo_core.divergence`, for P21 and P22.
    second_order
        What differentiating the gradient must give: ``"derivative"``, ``"error"`` where it is refused, or ``"unknown"``.
    derivative
        The same with the gradient for a loss, whose gradient is the second derivative; None without autodiff.
    source
        How to call it without the kit.
    """

    name: str
    call: Callable[[dict[str, Any], str], Outputs]
    objective: Objective | None = None
    form: Literal["ratio", "score"] = "ratio"
    reduction: Reduction = "none"
    horizon: float = 1.0
    takes_mask: bool = True
    takes_normalizer: bool = False
    takes_packed: bool = False
    dtypes: tuple[str, ...] = ("float64",)
    max_abs_log_ratio: float = float(SATURATION)
    local: bool = True
    gradient: Literal["analytic", "autodiff", "differences"] = "analytic"
    keeps_boundary: bool = True
    shape: tuple[int, int] | None = None
    cost: float = 1.0
    family: Callable[[Objective], Implementation] | None = None
    reference: Implementation | None = None
    divergences: Mapping[str, Callable[..., FloatArray]] = field(default_factory=dict)
    second_order: Literal["derivative", "error", "unknown"] = "unknown"
    derivative: Implementation | None = None
    source: Source | None = None

    def __call__(self, batch: TokenBatch, *, normalizer: float | None = None, dtype: str | None = None) -> Evaluation:
        """Loss, gradient and weight of a batch."""
        dtype = self.dtypes[0] if dtype is None else dtype
        given = self.arguments(batch, normalizer, dtype)
        passed = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in given.items()}
        with np.errstate(all="ignore"):
            loss, gradient, weight = self.call(passed, dtype)
        changed = tuple(
            name
            for name, value in given.items()
            if isinstance(value, np.ndarray) and not np.array_equal(value, passed[name], equal_nan=value.dtype != bool)
        )
        return Evaluation(self, batch, normalizer, dtype, loss, gradient, weight, changed)

    def __str__(self) -> str:
        """Its name."""
        return self.name

    @property
    def others(self) -> tuple[str, ...]:
        """The log-probs that it needs besides those of π and μ."""
        return self.objective.arguments if isinstance(self.objective, Mode) else ()

    @property
    def exact_gradient(self) -> bool:
        """Whether the gradient is good to rounding, not a finite difference."""
        return self.gradient != "differences"

    def arguments(self, batch: TokenBatch, normalizer: float | None, dtype: str) -> dict[str, Any]:
        """What the function is called with; bfloat16 travels as float32, which NumPy has."""
        storage = np.float64 if dtype == "float64" else np.float32
        arguments: dict[str, Any] = {name: getattr(batch, name).astype(storage) for name in batch.inputs}
        if self.takes_mask:
            arguments["mask"] = batch.mask
        if batch.segment_ids is not None:
            arguments["segment_ids"] = batch.segment_ids
        if normalizer is not None:
            arguments["normalizer"] = normalizer
        return arguments

    def coefficients(self, batch: TokenBatch, normalizer: float | None = None) -> FloatArray:
        """What the reduction multiplies each per-token loss with; 0 at masked tokens."""
        mask = batch.mask if self.takes_mask else np.ones(batch.shape, dtype=bool)
        if self.reduction in ("none", "sum"):
            return mask.astype(np.float64)
        counted = mask.astype(np.float64)
        if self.reduction == "token_mean":
            return counted / (normalizer or max(float(mask.sum()), 1.0))
        if batch.segment_ids is None:
            length = np.broadcast_to(mask.sum(axis=-1, keepdims=True), mask.shape)
            sequences = int((mask.sum(axis=-1) > 0).sum())
        else:
            same = batch.segment_ids[:, None] == batch.segment_ids[None, :]
            length = (same & mask).sum(axis=-1)
            sequences = len(np.unique(batch.segment_ids[mask]))
        each = np.maximum(length, 1) if self.reduction == "sequence_mean_token_mean" else self.horizon
        coefficients: FloatArray = counted / each / (normalizer or max(sequences, 1))
        return coefficients

    def denominator(self, batch: TokenBatch) -> float:
        """What the whole batch is divided by: tokens, or sequences that have any."""
        if self.reduction == "token_mean":
            return float(max(batch.mask.sum(), 1))
        return float(max((batch.mask.sum(axis=-1) > 0).sum(), 1))

    def of(self, objective: Objective) -> Implementation:
        """The same implementation of another objective."""
        if self.family is None:
            msg = f"{self.name} has no family: it implements one objective only"
            raise TypeError(msg)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VacuousTrustRegionWarning)
            return self.family(objective)


@dataclass(frozen=True)
class Evaluation:
    """What an implementation made of a batch: everything as float64 NumPy arrays.

    `loss` has the batch's shape if the implementation does not reduce, else it is 0-d. `changed` names the inputs that
    the implementation overwrote.
    """

    implementation: Implementation
    batch: TokenBatch
    normalizer: float | None
    dtype: str
    loss: FloatArray
    gradient: FloatArray
    returned_weight: FloatArray | None
    changed: tuple[str, ...]

    @cached_property
    def coefficients(self) -> FloatArray:
        """What the reduction multiplies each per-token loss with."""
        return self.implementation.coefficients(self.batch, self.normalizer)

    @cached_property
    def weight(self) -> FloatArray:
        """w: as returned, or −gradient / (A r coefficient); NaN where that can't tell."""
        if self.returned_weight is not None:
            return self.returned_weight
        with np.errstate(all="ignore"):
            ratio = np.exp(np.minimum(self.batch.log_ratio, SATURATION))
            unweighted = self.batch.advantages * ratio * self.coefficients
            return np.where(unweighted == 0.0, np.nan, -self.gradient / unweighted)

    @property
    def weighed(self) -> BoolArray:
        """Where the weight is known: valid tokens, and A ≠ 0 unless the weight was returned."""
        valid: BoolArray = self.coefficients > 0.0
        return valid if self.returned_weight is not None else valid & np.isfinite(self.weight)


def from_function(
    function: Callable[..., Any],
    framework: str | Framework = "numpy",
    *,
    returns_gradient: bool = False,
    has_aux: bool = False,
    arguments: Mapping[str, str] | None = None,
    constants: Mapping[str, object] | None = None,
    transform: str | None = None,
    name: str | None = None,
    call_source: str | None = None,
    **claims: Any,
) -> Implementation:
    """Wrap a policy loss for the kit.

    Parameters
    ----------
    function
        Takes arrays of the framework by keyword and returns a loss (per token or scalar), or ``(loss, gradient)`` or
        ``(loss, gradient, weight)`` with `returns_gradient`. Its arguments are named: of ``**kwargs`` alone, whether it
        takes a mask can't be read.
    framework
        ``"numpy"``, ``"numpy-readonly"``, ``"array-api-strict"``, ``"torch"``, ``"jax"``, or an object with the same
        methods. The gradient of a loss is taken by the framework's autodiff, or by finite differences in NumPy.
    returns_gradient
        Whether the function returns its own gradient in log π.
    has_aux
        Whether it returns a pair, such as ``(loss, metrics)``, of which only the first is meant.
    arguments
        The function's names for the kit's `log_prob`, `behavior_log_prob`, `advantages`, `mask`, `segment_ids` and
        `normalizer`, `proximal_log_prob` and `reference_log_prob`, where they differ. Whether it takes the mask, the ids and
        the normalizer is read from its signature; the last two are passed where the claimed mode needs them.
    constants
        Further keyword arguments of every call.
    transform
        One of the framework's: ``"jit"`` or ``"vmap"`` (JAX), ``"compile"``, ``"inductor"`` or ``"vmap"`` (torch).
    name
        Default: the function's own.
    call_source
        Statements that define `function` in reproducing snippets; default: an import of this one.
    **claims
        Further fields of `Implementation`, such as ``objective=DPPO(delta=0.25)`` and ``reduction="token_mean"``.

    Returns
    -------
    Implementation
        To give to `check_implementation` or `parametrize_with_checks`.

    Raises
    ------
    TypeError
        If the name of a claim or an argument is unknown.
    ValueError
        If the framework or the transform is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from drpo_core import PolicyGradient
    >>> from drpo_core.testing import check_implementation, from_function
    >>> def surrogate(log_prob, behavior_log_prob, advantages, mask):
    ...     ratio = np.exp(np.where(mask, log_prob - behavior_log_prob, 0.0))
    ...     return np.where(mask, -advantages * ratio, 0.0)
    >>> implementation = from_function(surrogate, objective=PolicyGradient())
    >>> implementation.takes_mask, implementation.takes_normalizer
    (True, False)
    """
    glue = framework_named(framework) if isinstance(framework, str) else framework
    names = {key: key for key in ARGUMENTS}
    unknown = set(arguments or {}) - set(names)
    if unknown:
        msg = f"arguments: expected keys among {', '.join(ARGUMENTS)}, got {', '.join(sorted(unknown))}"
        raise TypeError(msg)
    if claims.get("reduction", "none") not in REDUCTIONS:
        msg = (
            f"reduction: expected one of {', '.join(REDUCTIONS)}, got {claims['reduction']!r}; none of them counts sequences "
            "without valid tokens, so a mean over all rows can't be declared"
        )
        raise ValueError(msg)
    names.update(arguments or {})
    accepted = _accepted(function, names)
    fixed = dict(constants or {})

    def renamed(**batch: object) -> object:
        returned = function(**{names[key]: value for key, value in batch.items() if key in accepted}, **fixed)
        return returned[0] if has_aux else returned

    own_name = getattr(function, "__name__", type(function).__name__)
    prepared = glue.prepare(renamed, differentiate=not returns_gradient, transform=transform)
    source = Source(
        call_source if call_source is not None else _call_source(function, own_name, names, accepted, fixed, has_aux=has_aux),
        glue.source(differentiate=not returns_gradient),
        glue.bfloat16_source,
    )
    claims = _of_mode(claims)
    detected: dict[str, Any] = {
        "takes_mask": "mask" in accepted,
        "takes_normalizer": "normalizer" in accepted,
        "takes_packed": "segment_ids" in accepted,
        "gradient": "analytic" if returns_gradient else glue.gradient,
        "cost": glue.cost,
        "shape": glue.fixed_shape(transform),
        "dtypes": glue.dtypes[:2],
        "source": source,
    }
    implementation = Implementation(name=name or own_name, call=prepared, **(detected | claims))
    gradient = None if returns_gradient else glue.gradient_of(renamed)
    if gradient is None:
        return implementation
    second = glue.prepare(gradient, differentiate=True, transform=transform)
    # after `evaluate`, which imports the framework
    evaluate = f"{source.evaluate}\n\n{glue.gradient_source}"
    return replace(implementation, derivative=replace(implementation, call=second, source=replace(source, evaluate=evaluate)))


def _of_mode(claims: dict[str, Any]) -> dict[str, Any]:
    """The claims, with what a mode says of reduction and form; a mode that is no more than its objective, as that."""
    mode = claims.get("objective")
    if not isinstance(mode, Mode):
        return claims
    reduction = "sum" if mode.reduction == "token_sum" else mode.reduction
    said = {"reduction": reduction, "horizon": mode.horizon or 1.0}
    if mode.is_plain:
        return said | claims | {"objective": mode.objective}
    # anchor and corrections are constants, and their tokens look at each other
    return said | {"form": "score", "local": False} | claims


def from_core(
    objective: Objective,
    framework: str = "numpy",
    *,
    transform: str | None = None,
    autodiff: bool = False,
    **claims: Any,
) -> Implementation:
    """`drpo_core.token_loss_and_gradient` of an objective, under one framework.

    Parameters
    ----------
    objective
        Such as ``DRPO(delta=0.15)``.
    framework, transform
        As for `from_function`.
    autodiff
        Differentiate the loss value instead of taking the analytic gradient (ratio forms only; the saturated ratio has
        no derivative).
    **claims
        Further fields of `Implementation`.

    Returns
    -------
    Implementation
        With its family (any objective) and the divergences of the core.

    Examples
    --------
    >>> from drpo_core import DRPO
    >>> from drpo_core.testing import from_core
    >>> print(from_core(DRPO(delta=0.15), "numpy-readonly"))
    core[numpy-readonly]-DRPO(delta=0.15)
    """
    glue = framework_named(framework)
    label = "-".join(part for part in (framework, transform, "autodiff" if autodiff else None) if part)
    if is_whole_mode(objective):

        def reduced(**batch: Any) -> Any:
            return policy_loss_and_gradient(objective, **batch, diagnostics=False)[:2]

        call = "lambda **batch: policy_loss_and_gradient(function_of, **batch, diagnostics=False)[:2]"
        return _of_a_mode(
            objective,
            reduced,
            glue,
            f"core[{label}]-{objective!r}",
            f"from drpo_core import policy_loss_and_gradient\n\nfunction = {call}",
            **{"returns_gradient": True, "transform": transform} | claims,
        )
    functions = (getattr(divergences, f"{support}_{kind}") for support in ("binary", "top_k", "full") for kind in ("tv", "kl"))
    claimed: dict[str, Any] = {
        "takes_mask": True,
        "takes_packed": True,
        "takes_normalizer": False,
        "dtypes": glue.dtypes,
        "max_abs_log_ratio": float(SATURATION) if autodiff else np.inf,
        "divergences": {function.__name__: glue.plain(function) for function in functions},
    } | claims

    @cache
    def build(objective: Objective) -> Implementation:
        analytic = partial(token_loss_and_gradient, objective)

        def value(log_prob: Any, behavior_log_prob: Any, advantages: Any, mask: Any = None) -> Any:
            # not token_loss_and_gradient, whose results have no graph; a masked token has A = 0, so L = 0
            return objective.loss(Tokens.checked(log_prob, behavior_log_prob, advantages, mask=mask))

        made = describe(objective)
        names, call = (
            ("Tokens", f"lambda **batch: {made}.loss(Tokens.checked(**batch))")
            if autodiff
            else ("token_loss_and_gradient", f"partial(token_loss_and_gradient, {made})")
        )
        return from_function(
            value if autodiff else analytic,
            glue,
            returns_gradient=not autodiff,
            transform=transform,
            name=f"core[{label}]-{made}",
            call_source=(f"from functools import partial\n\n{_imports(objective, names)}\n\nfunction = {call}"),
            **{"objective": objective, "form": form_of(objective), "family": build} | claimed,  # type: ignore[arg-type]
        )

    return build(objective)  # type: ignore[arg-type]  # the Protocol can't say hashable


def from_adapter(
    objective: Objective, framework: str, *, reduction: Reduction = "none", transform: str | None = None, **claims: Any
) -> Implementation:
    """`token_loss` of an adapter (`drpo_torch`, `drpo_jax`), or its `policy_loss` with a reduction.

    Parameters
    ----------
    objective
        Such as ``DRPO(delta=0.15)``.
    framework
        ``"torch"`` or ``"jax"``.
    reduction
        ``"none"`` for `token_loss`; otherwise the name of a function of `drpo_core.reduction`, for `policy_loss`.
    transform
        As for `from_function`.
    **claims
        Further fields of `Implementation`.

    Returns
    -------
    Implementation
        With its family; a transformed one has the eager one as its reference.
    """
    glue, adapter = framework_named(framework), importlib.import_module(f"drpo_{framework}")
    label = "-".join(part for part in (reduction if reduction != "none" else None, transform) if part)

    def reduced(objective: Objective) -> Callable[..., Any]:
        reduce = getattr(reductions, reduction)

        def loss(log_prob: Any, mask: Any, segment_ids: Any = None, normalizer: Any = None, **tokens: Any) -> Any:
            given = {"log_prob": log_prob, "mask": mask, "segment_ids": segment_ids, "normalizer": normalizer}
            return adapter.policy_loss(objective, **given, **tokens, reduction=reduce)[0]

        return loss

    if is_whole_mode(objective):

        def of_mode(**batch: Any) -> Any:
            return adapter.policy_loss(objective, **batch, diagnostics=False)[0]

        name = f"{adapter.__name__}{f'[{label}]' if label else ''}-{objective!r}"
        call = "lambda **batch: policy_loss(function_of, **batch, diagnostics=False)[0]"
        source = f"from {adapter.__name__} import policy_loss\n\nfunction = {call}"
        declared = {"gradient": "analytic", "max_abs_log_ratio": np.inf, "transform": transform}
        return _of_a_mode(objective, of_mode, glue, name, source, **declared | claims)

    @cache
    def build(objective: Objective) -> Implementation:
        imports = _imports(objective, *([reduction] if reduction != "none" else []))
        call = (
            f"partial(token_loss, {describe(objective)})"
            if reduction == "none"
            else f"lambda **batch: policy_loss({describe(objective)}, reduction={reduction}, **batch)[0]"
        )
        declared: dict[str, Any] = {
            "objective": objective,
            "form": form_of(objective),
            "reduction": reduction,
            "gradient": "analytic",
            "takes_packed": reduction != "none" and transform != "vmap",
            "dtypes": glue.dtypes,
            "max_abs_log_ratio": np.inf,
            "family": build,
            # functorch and Dynamo refuse in their own words
            "second_order": "derivative" if framework == "jax" else "error" if transform is None else "unknown",
            "reference": from_adapter(objective, framework, reduction=reduction) if transform else None,
        }
        return from_function(
            partial(adapter.token_loss, objective) if reduction == "none" else reduced(objective),
            glue,
            transform=transform,
            name=f"{adapter.__name__}{f'[{label}]' if label else ''}-{describe(objective)}",
            call_source=(
                "from functools import partial\n\n"
                f"{imports}\nfrom {adapter.__name__} import policy_loss, token_loss\n\nfunction = {call}"
            ),
            **declared | claims,
        )

    return build(objective)  # type: ignore[arg-type]  # the Protocol can't say hashable


def _of_a_mode(
    mode: Mode, function: Callable[..., Any], glue: Framework, name: str, source: str, **claims: Any
) -> Implementation:
    """A loss of a mode that takes the arguments of the kit by keyword, and its source, where the mode is `function_of`."""
    definition = (
        "from drpo_core.anchors import *\nfrom drpo_core.corrections import *\nfrom drpo_core.modes import Mode\n"
        f"from drpo_core.objectives import *\nfrom drpo_core.penalties import *\n\nfunction_of = {mode!r}\n"
    )
    given: dict[str, Any] = {"objective": mode, "dtypes": glue.dtypes} | claims
    implementation = from_function(function, glue, name=name, call_source=f"{definition}\n{source}", **given)
    # a sum has no denominator
    counts = mode.reduction != "token_sum"
    return replace(implementation, takes_packed=claims.get("transform") != "vmap", takes_normalizer=counts)


def _imports(objective: object, *names: str) -> str:
    """Source that imports the objective's class, and other names of the core."""
    kind = type(objective)
    if kind.__name__ in drpo_core.__all__:
        return f"from drpo_core import {', '.join((kind.__name__, *names))}"
    lines = [f"from drpo_core import {', '.join(names)}"] if names else []
    return "\n".join(
        (*lines, f"from {'drpo_core.objectives' if is_known(objective) else kind.__module__} import {kind.__name__}")
    )


def form_of(objective: Objective) -> str:
    """Whether the core's gradient of an objective is the derivative of its value."""
    return "score" if isinstance(objective, (CISPO, GPPO)) else "ratio"


def describe(objective: object) -> str:
    """The objective as one would write it in Python, without hyper-parameters that are not set."""
    if isinstance(objective, Mode):
        return repr(objective)
    fields = getattr(type(objective), "__dataclass_fields__", None)
    if fields is None and type(objective).__repr__ is object.__repr__:
        return f"{type(objective).__name__}({', '.join(f'{k}={v!r}' for k, v in parameters_of(objective).items())})"
    if fields is None:
        return repr(objective)
    default = {name: f.default for name, f in fields.items()}
    given = (f"{name}={getattr(objective, name)!r}" for name in fields if getattr(objective, name) != default[name])
    return f"{type(objective).__name__}({', '.join(given)})"


def _accepted(function: Callable[..., Any], names: Mapping[str, str]) -> frozenset[str]:
    """The kit's arguments that a function takes; by name, so **kwargs does not count for the optional ones."""
    parameters = inspect.signature(function).parameters
    required = ("log_prob", "behavior_log_prob", "advantages")
    missing = [names[key] for key in required if names[key] not in parameters]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        msg = f"{getattr(function, '__name__', function)}: no argument {', '.join(missing)}; map its names with `arguments`"
        raise TypeError(msg)
    if missing:  # only **kwargs: whatever is given
        return frozenset(names)
    return frozenset(key for key in names if key in required or names[key] in parameters)


def _call_source(
    function: Callable[..., Any],
    own_name: str,
    names: Mapping[str, str],
    accepted: frozenset[str],
    fixed: Mapping[str, object],
    *,
    has_aux: bool,
) -> str:
    qualified = getattr(function, "__qualname__", "<unknown>")
    importable = "<" not in qualified and "." not in qualified
    # `function` is the name of the wrapper
    target = own_name if own_name.isidentifier() and own_name != "function" else "loss_under_test"
    origin = (
        f"from {function.__module__} import {own_name}{'' if target == own_name else f' as {target}'}"
        if importable
        else f"# {target}: the function under test, defined at {getattr(function, '__module__', '?')}.{qualified}"
    )
    keys = [key for key in ARGUMENTS if key in accepted]
    always = [key for key in keys if key in ARGUMENTS[:4]]
    optional = {key: names[key] for key in keys if key not in always}
    passed = [f"{names[key]}={key}" for key in always] + [f"{key}={value!r}" for key, value in fixed.items()]
    if optional:
        passed += [f"**{{{optional!r}[key]: value for key, value in optional.items()}}"]
    parameters = [*always, *(["**optional"] if optional else [])]
    first = "[0]" if has_aux else ""
    return f"{origin}\n\ndef function({', '.join(parameters)}):\n    return {target}({', '.join(passed)}){first}"
