"""The table of subjects: every public function, what it should give, and what its arguments may be.

The axes of a function follow from its signature: each parameter is found in one of the tables of parameters below. A new
function without a subject, or a new parameter in none of the tables, fails `test_names.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import torch
from contract import axes, names, oracle
from contract.axes import DType, Engine, Given, Library, Number, Use
from contract.world import VOCABULARY

import drpo_core

if TYPE_CHECKING:
    from collections.abc import Callable

# --- parameters ------------------------------------------------------------------------------------------------------------

ARRAYS: dict[str, tuple[DType, ...]] = {
    **dict.fromkeys(
        (
            "log_prob",
            "behavior_log_prob",
            "advantages",
            "values",
            "rewards",
            "token_weights",
            "divergence",
            "top_k_log_prob",
            "top_k_behavior_log_prob",
            "logits",
            "behavior_logits",
            "log_normalizer",
            "hidden",
            "weight",
            "bias",
            "noise",
            "proximal_log_prob",
            "reference_log_prob",
        ),
        axes.FLOATS,
    ),
    **dict.fromkeys(("tokens", "top_k_ids", "segment_ids", "group_ids", "lengths", "staleness"), axes.INTEGERS),
    **dict.fromkeys(("mask", "sampled_in_top_k", "candidates"), (DType.BOOL,)),
}
"""Arrays: the dtypes of each, independently of the others'."""

COUNTS = {"lengths", "staleness"}
"""Integers that are no ids."""

OF_MODES = ("proximal_log_prob", "reference_log_prob")
"""Arrays that are passed in any case where the mode of a cell needs them, and refused where it does not."""


class Domain(NamedTuple):
    """Which numbers a parameter takes."""

    above: float | None = None
    at_least: float | None = None
    below: float = math.inf
    at_most: float = math.inf
    whole: bool = False
    default: float | None = None

    def has(self, value: float) -> bool:
        """Whether a finite number is in the domain."""
        if self.whole and value != int(value):
            return False
        above = (self.above is None or value > self.above) and (self.at_least is None or value >= self.at_least)
        return above and value < self.below and value <= self.at_most


NUMBERS: dict[str, Domain] = {
    "temperature": Domain(above=0.0),
    "behavior_temperature": Domain(above=0.0),
    "logit_softcap": Domain(above=0.0),
    "entropy_coefficient": Domain(),
    "normalizer": Domain(at_least=0.0),
    "horizon": Domain(above=0.0),
    "std_offset": Domain(at_least=0.0),
    "tolerance": Domain(at_least=0.0),
    "chunk_tokens": Domain(at_least=1, whole=True),
    "chunk_vocabulary": Domain(at_least=1, whole=True),
    "vocabulary_size": Domain(at_least=1, at_most=VOCABULARY, whole=True),
    "threads": Domain(at_least=1, whole=True),
    "top_k": Domain(at_least=1, whole=True),
    # of advantages and corrections
    "discount": Domain(at_least=0.0, at_most=1.0),
    "trace_decay": Domain(at_least=0.0, at_most=1.0),
    "k": Domain(at_least=2, whole=True),
    "share": Domain(above=0.0),
    "low": Domain(),
    "high": Domain(),
    # of objectives
    "delta": Domain(above=0.0),
    "delta_low": Domain(above=0.0),
    "delta_high": Domain(above=0.0),
    "eps": Domain(above=0.0),
    "eps_low": Domain(above=0.0),
    "eps_high": Domain(above=0.0),
    "max_ratio": Domain(above=0.0),
    "min_ratio": Domain(above=0.0),
    "tau_positive": Domain(above=0.0),
    "tau_negative": Domain(above=0.0),
    "dual_clip": Domain(above=1.0),
    "alpha": Domain(above=0.0, below=1.0),
}
"""Numbers, and which of them a parameter takes."""

OWN_DOMAINS = {
    "drpo_core.corrections.clip_cov_weights low": Domain(below=5.0),
    "drpo_core.corrections.clip_cov_weights high": Domain(above=1.0),
}
"""Of one function's parameter, where the other bound has a default."""


def domain_of(place: str, name: str) -> Domain:
    """Which numbers the parameter of a place takes."""
    return OWN_DOMAINS.get(place, NUMBERS[name])


GOOD = {
    "temperature": 0.7,
    "behavior_temperature": 1.3,
    "logit_softcap": 3.0,
    "entropy_coefficient": 0.2,
    "normalizer": 7.0,
    "horizon": 7.0,
    "std_offset": 0.01,
    "tolerance": 0.1,
    "chunk_tokens": 2,
    "chunk_vocabulary": 3,
    "vocabulary_size": VOCABULARY,
    "threads": 2,
    "top_k": 3,
    "alpha": 0.1,
    "discount": 0.9,
    "trace_decay": 0.8,
    "k": 3,
    "share": 0.3141592,
    "low": 0.1,
    "high": 1.9,
}
PER_TOKEN = {"temperature", "behavior_temperature"}
"""Numbers that may also be one per token, of any floating dtype."""

ARRAYS_OF_NUMBERS = {"normalizer", "horizon"}
"""Numbers that may also be 0-d arrays, which nothing can check."""

FLAGS = {"entropy", "diagnostics", "tail", "overwrite_logits", "divide_by_std", "divide_by_mean", "leave_one_out"}
CHOICES: dict[str, tuple[Any, ...]] = {
    "objective": (*names.objectives(), *names.modes()),
    "reduction": axes.REDUCTIONS,
    "weights": (Given.ABSENT, Given.GIVEN),
    "engine": tuple(Engine),
    "xp": (Given.ABSENT, Given.GIVEN),
    "support": (Given.ABSENT, *axes.Supported),
    "centering": (Given.ABSENT, *axes.Recorded),
    "vocabulary_group": (Given.ABSENT, *axes.Divided),
}
ELSEWHERE = {
    "spread": "threads are given to the compiled loop by the torch adapter, whose cells they are",
    "group": "tests/test_torch_distributed.py runs several processes",
    "shard_group": "tests/test_torch_distributed.py runs several processes",
    "shard_axis_name": "tests/test_jax_distributed.py has sequences across devices",
    "axis_name": "given by the wrapper below",
    "dtype": "of a result; the default in these cells",
    "vocabulary_axis": "tests/jax/test_sharding.py divides the vocabulary",
    "across": "tests/torch/test_distributed.py and tests/jax/test_distributed.py divide sequences over ranks",
}
"""Parameters that are no axis here, and why."""


# --- functions -------------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A public function under the contract."""

    oracle: Callable[..., dict[str, torch.Tensor]]
    differentiated: tuple[str, ...] = ()
    """Arguments that receive a gradient."""
    results: tuple[str, ...] = ()
    """What the parts of a plain tuple are called."""
    world: dict[str, str] = {}  # noqa: RUF012 -- never written to
    """Arguments whose values have another name in the world."""
    promises: frozenset[Use] = frozenset()
    """Transforms beyond plain differentiation that the documentation promises."""
    call: Callable[..., Any] | None = None
    """How to call it with arrays, where they are not its arguments."""
    parameters: tuple[str, ...] = ()
    """Arguments of `call`, where they are not those of the function."""
    constant: frozenset[str] = frozenset()
    """Results that no gradient flows to, although the function is differentiable."""


EVERY_TRANSFORM = frozenset({Use.FUNC_GRAD, Use.VMAP, Use.VMAP_ONE, Use.COMPILE, Use.JVP})
_POLICIES = ("log_prob", "behavior_log_prob")
_VOCABULARY = {name: f"vocabulary_{name}" for name in _POLICIES}
_WHOLE = {name: f"all_{name}" for name in _POLICIES} | {"behavior_log_prob": "all_behavior_log_prob"}
_OUTCOMES = {name: f"top_k_{name}" for name in (*_POLICIES, "proximal_log_prob")}
_FIRST = ("log_prob",)


def _core() -> dict[str, Subject]:
    elementwise = ("log_ratio", "importance_ratio", "probability_shift", "binary_tv", "binary_kl", "k1", "k2", "k3")
    table = {name: Subject(getattr(oracle, name), _FIRST) for name in elementwise}
    for name in ("full_tv", "full_kl"):
        table[name] = Subject(getattr(oracle, name), _FIRST, world=_WHOLE)
    for name in ("top_k_tv", "top_k_kl"):
        table[name] = Subject(getattr(oracle, name), _FIRST, world=_VOCABULARY)
    table["sampled_in_top_k"] = Subject(oracle.sampled_in_top_k)
    table["group_advantages"] = Subject(oracle.group_advantages)
    for name in ("generalized", "length_weighted", "pass_at_k", "whitened"):
        table[f"advantages.{name}_advantages"] = Subject(getattr(oracle, f"{name}_advantages"))
    table["advantages.reward_decoupled_advantages"] = Subject(
        oracle.reward_decoupled_advantages, world={"rewards": "several_rewards"}
    )
    table["advantages.informative_groups"] = Subject(oracle.informative_groups)
    table["anchors.interpolated_proximal_log_prob"] = Subject(oracle.interpolated_proximal_log_prob)
    table["corrections.clip_cov_weights"] = Subject(oracle.clip_cov_weights)
    table["expand_advantages"] = Subject(
        oracle.expand_advantages, world={"advantages": "sequence_advantages", "segment_ids": "sequence_ids"}
    )
    table["token_loss_and_gradient"] = Subject(oracle.token_loss_and_gradient)
    table["policy_loss_and_gradient"] = Subject(oracle.policy_loss_and_gradient)
    table["token_diagnostics"] = Subject(oracle.token_diagnostics)
    table["validate"] = Subject(lambda *_, **__: {})
    arrays = ("objective", "log_prob", "behavior_log_prob", "advantages", "mask")
    table["centering.score_centering"] = Subject(oracle.score_centering, world=_OUTCOMES)
    table["merge_diagnostics"] = Subject(oracle.token_diagnostics, call=_merged, parameters=arrays)
    table["summarize"] = Subject(oracle.summary, call=_summarized, parameters=arrays)
    table["diagnostics.map_diagnostics"] = Subject(oracle.token_diagnostics, call=_mapped, parameters=arrays)
    return {f"drpo_core.{name}": subject for name, subject in table.items()}


def _reductions() -> dict[str, Subject]:
    def of(name: str) -> Callable[..., dict[str, torch.Tensor]]:
        def reduce(
            values: torch.Tensor, mask: torch.Tensor, *, horizon: float = 1.0, **options: Any
        ) -> dict[str, torch.Tensor]:
            reduction = axes.Reduction(name, (("horizon", horizon),))
            known = {key: options[key] for key in ("normalizer", "token_weights", "segment_ids") if key in options}
            return oracle.reduced(values, oracle.coefficients(reduction, mask, **known))

        return reduce

    def of_prompts(values: torch.Tensor, mask: torch.Tensor, *, group_ids: torch.Tensor, **options: Any) -> Any:
        """Tokens of one prompt, wherever they are, as the packed tokens of one sequence."""
        ids = group_ids if mask.ndim == 1 else group_ids[..., None].expand(mask.shape)
        weights = options.get("token_weights")
        options["token_weights"] = None if weights is None else weights.reshape(-1)
        known = {key: options[key] for key in ("normalizer", "token_weights") if key in options}
        mean = axes.Reduction("sequence_mean_token_mean")
        return oracle.reduced(
            values.reshape(-1), oracle.coefficients(mean, mask.reshape(-1), segment_ids=ids.reshape(-1), **known)
        )

    def total(values: torch.Tensor, mask: torch.Tensor, *, token_weights: torch.Tensor | None = None, **_: Any) -> Any:
        c = oracle.coefficients(axes.REDUCTIONS[0], mask, normalizer=1.0, token_weights=token_weights)
        return oracle.reduced(values, c, "total") | {"count": mask.sum().double()}

    def coefficients(reduction: axes.Reduction, mask: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        known = {
            k: v for k, v in options.items() if k in {"normalizer", "token_weights", "segment_ids", "bound_token_weights"}
        }
        return {"": oracle.coefficients(reduction, mask, **known)}

    def count(reduction: axes.Reduction, mask: torch.Tensor, segment_ids: torch.Tensor | None = None, **_: Any) -> Any:
        return {"": oracle.count(reduction, mask, segment_ids)}

    table = {
        f"drpo_core.{name}": Subject(of(name), ("values",))
        for name in ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum")
    }
    table["drpo_core.reduction.prompt_mean"] = Subject(of_prompts, ("values",), world={"group_ids": "prompt_ids"})
    table["drpo_core.reduction.masked_sum"] = Subject(total, ("values",))
    table["drpo_core.reduction.reduction_coefficients"] = Subject(coefficients, call=_coefficients)
    table["drpo_core.reduction.reduction_count"] = Subject(count, call=_count)
    return table


def _adapters() -> dict[str, Subject]:
    loss_and_diagnostics = ("loss", "diagnostics")
    head = ("hidden", "weight", "bias")
    token = {
        "token_loss": Subject(oracle.token_loss, _FIRST, promises=EVERY_TRANSFORM),
        "policy_loss": Subject(oracle.policy_loss, _FIRST, loss_and_diagnostics, promises=EVERY_TRANSFORM),
        "score_centering": Subject(oracle.score_centering_term, _FIRST, world=_OUTCOMES, promises=EVERY_TRANSFORM),
    }
    vocabulary = {
        "token_log_prob": Subject(oracle.token_log_prob, ("logits",)),
        "linear_log_prob": Subject(oracle.linear_log_prob, head),
        "logits_policy_loss": Subject(oracle.logits_policy_loss, ("logits",)),
        "linear_policy_loss": Subject(oracle.linear_policy_loss, head),
        "full_divergences": Subject(oracle.full_divergences, ("logits",)),
        "top_k_divergences": Subject(
            oracle.top_k_divergences, ("logits", "log_normalizer"), world={"support": "support_beyond_top_k"}
        ),
    }
    linear = {"linear_reduction": Subject(_linear_coefficients, call=_linear_reduction, parameters=("mask", "token_weights"))}
    table = token | vocabulary | linear
    return {f"{module}.{name}": subject for module in ("drpo_torch", "drpo_jax") for name, subject in table.items()}


def _distributed() -> dict[str, Subject]:
    def normalizer(reduction: axes.Reduction, mask: torch.Tensor, segment_ids: torch.Tensor | None = None, **_: Any) -> Any:
        return {"": oracle.count(reduction, mask, segment_ids)}

    def coefficients(reduction: axes.Reduction, mask: torch.Tensor, **options: Any) -> Any:
        known = {name: options[name] for name in ("segment_ids", "bound_token_weights") if name in options}
        return {"": oracle.coefficients(reduction, mask, normalizer=7.0, **known)}

    arrays = ("objective", "log_prob", "behavior_log_prob", "advantages", "mask")
    of_mask = ("reduction", "mask", "segment_ids")
    return {
        "drpo_torch.distributed.global_normalizer": Subject(normalizer, call=_torch_normalizer, parameters=of_mask),
        "drpo_torch.distributed.global_coefficients": Subject(coefficients, call=_torch_coefficients, parameters=of_mask),
        "drpo_torch.distributed.all_reduce_diagnostics": Subject(
            oracle.token_diagnostics, call=_torch_all_reduced, parameters=arrays
        ),
        "drpo_jax.distributed.global_normalizer": Subject(normalizer, call=_jax_normalizer, parameters=of_mask),
        "drpo_jax.distributed.global_coefficients": Subject(coefficients, call=_jax_coefficients, parameters=of_mask),
        "drpo_jax.distributed.all_reduce_diagnostics": Subject(
            oracle.token_diagnostics, call=_jax_all_reduced, parameters=arrays
        ),
    }


# --- calls with arrays, where the function takes something else ----------------------------------------------------------------


def _diagnostics(objective: Any, **arrays: Any) -> Any:
    return names.public()["drpo_core.token_diagnostics"](objective, **arrays)


def _merged(merge: Callable[..., Any], objective: Any, **arrays: Any) -> Any:
    """The diagnostics of what comes before a place of the last axis, merged with those of what comes after it."""
    if not arrays["mask"].ndim:
        return merge(_diagnostics(objective, **arrays))
    place = min(2, arrays["mask"].shape[-1])
    parts = ({k: v[..., part] for k, v in arrays.items()} for part in (slice(0, place), slice(place, None)))
    return merge(*(_diagnostics(objective, **part) for part in parts))


def _summarized(summarize: Callable[..., Any], objective: Any, **arrays: Any) -> Any:
    figures = summarize(_diagnostics(objective, **arrays))
    assert all(type(figure) is float for figure in figures.values())
    return {name: torch.tensor(figure, dtype=torch.float64, device="cpu") for name, figure in figures.items()}


def _mapped(map_diagnostics: Callable[..., Any], objective: Any, **arrays: Any) -> Any:
    return map_diagnostics(lambda field: field + 0.0, _diagnostics(objective, **arrays))


def _linear_reduction(function: Callable[..., Any], mask: Any, token_weights: Any = None) -> Any:
    reduction = function(lambda values, mask: (values * mask).sum() / oracle.LINEAR_DIVISOR)
    xp = names.namespace(mask)
    return reduction.coefficients(mask, dtype=xp.float32, token_weights=token_weights, xp=xp)


def _linear_coefficients(mask: torch.Tensor, token_weights: torch.Tensor | None = None, **_: Any) -> dict[str, torch.Tensor]:
    return {"": oracle.coefficients(axes.Reduction("linear"), mask, token_weights=token_weights)}


def _coefficients(function: Callable[..., Any], reduction: Any, mask: Any, **options: Any) -> Any:
    """Spread over the tokens, and 0 at masked ones, where they may be anything."""
    xp = names.namespace(mask)
    return xp.where(mask, function(reduction, mask, dtype=xp.float32, **{"xp": xp} | options), 0.0)


def _count(function: Callable[..., Any], reduction: Any, mask: Any, **options: Any) -> Any:
    xp = names.namespace(mask)
    return function(reduction, mask, dtype=xp.float32, **{"xp": xp} | options)


def _torch_normalizer(function: Callable[..., Any], reduction: Any, mask: Any, segment_ids: Any = None) -> Any:
    return function(reduction, mask, segment_ids=segment_ids)


def _torch_coefficients(function: Callable[..., Any], reduction: Any, mask: Any, segment_ids: Any = None) -> Any:
    everyone = torch.distributed.group.WORLD
    found = function(reduction, mask, normalizer=7.0, shard_group=everyone, segment_ids=segment_ids)
    return found.masked_fill_(~mask, 0.0)


def _torch_all_reduced(function: Callable[..., Any], objective: Any, **arrays: Any) -> Any:
    return function(_diagnostics(objective, **arrays))


def _on_one_device(function: Callable[..., Any], *arrays: Any) -> Any:
    """Under vmap with a name for its axis, which stands for a mesh of one device."""
    result = jax.vmap(function, axis_name="devices")(*(None if a is None else a[None] for a in arrays))
    return jax.tree.map(lambda a: a[0], result)


def _jax_normalizer(function: Callable[..., Any], reduction: Any, mask: Any, segment_ids: Any = None) -> Any:
    return _on_one_device(lambda m, s: function(reduction, m, axis_name="devices", segment_ids=s), mask, segment_ids)


def _jax_coefficients(function: Callable[..., Any], reduction: Any, mask: Any, segment_ids: Any = None) -> Any:
    of = functools.partial(function, reduction, normalizer=7.0, shard_axis_name="devices")
    return jax.numpy.where(mask, _on_one_device(lambda m, s: of(m, segment_ids=s), mask, segment_ids), 0.0)


def _jax_all_reduced(function: Callable[..., Any], objective: Any, **arrays: Any) -> Any:
    figures = _diagnostics(objective, **arrays)
    reduced = jax.vmap(lambda d: function(d, axis_name="devices"), axis_name="devices")(
        jax.tree.map(lambda a: a[None], figures)
    )
    return jax.tree.map(lambda a: a[0], reduced)


ON_DEVICES = {
    f"drpo_torch.{name}"
    for name in (
        "token_loss",
        "policy_loss",
        "token_log_prob",
        "linear_log_prob",
        "logits_policy_loss",
        "linear_policy_loss",
        "full_divergences",
        "top_k_divergences",
    )
}
"""What does on a GPU something else than on a CPU."""

OF_DIAGNOSTICS = {
    *(f"drpo_core.{name}" for name in ("token_diagnostics", "merge_diagnostics", "summarize", "diagnostics.map_diagnostics")),
    *(f"drpo_{library}.distributed.all_reduce_diagnostics" for library in ("torch", "jax")),
}
"""What is of diagnostics that a mode has only if it is no more than an objective."""

SUBJECTS: dict[str, Subject] = _core() | _reductions() | _adapters() | _distributed()

PART_OF_A_MODE = "is called by the losses: tests/core/test_modes.py, test_anchors.py, test_corrections.py, test_penalties.py"
VALUES = "holds what a function returned or will be given: its arrays are compared where they are returned"
CLASSES = {
    "BehaviorPolicyWarning": "a warning",
    "SlowEngineWarning": "a warning",
    "UntraceableError": "an error",
    "VacuousTrustRegionWarning": "a warning",
    "DoubleRatioWarning": "a warning",
    **dict.fromkeys(("Objective", "Anchor", "Correction", "PenaltyTerm", "TokenBounds"), "a protocol"),
    **{
        name: PART_OF_A_MODE
        for module in (drpo_core.anchors, drpo_core.corrections, drpo_core.penalties)
        for name in module.__all__
        if dataclasses.is_dataclass(getattr(module, name))
    },
    **dict.fromkeys(
        ("DCPOBounds", "RIPOBounds", "ChiSquareBounds", "KLBounds", "TVBounds"),
        "a value of TokenwiseClip, which is on the axis: tests/core/objectives/test_tokenwise.py",
    ),
    "Family": "a line of the table of objectives: tests/core/objectives/test_table.py",
    "Mode": "is on the axis of objectives: some of each kind",
    **dict.fromkeys(("KeptGroups", "Policies", "Evidence"), VALUES),
    **dict.fromkeys(("PolicyLoss", "TokenLoss", "CenteringTerm", "MaskedSum", "VocabularyLoss", "Divergences"), VALUES),
    **dict.fromkeys(("TopKCentering", "FullCentering"), VALUES),
    **dict.fromkeys(("TokenLogProb", "Tokens", "LinearHead", "TopKDivergence", "FullDivergence", "Support"), VALUES),
    **dict.fromkeys(
        ("Mean", "Maximum", "Minimum", "EffectiveSampleSize"), "merged and summarized by merge_diagnostics and summarize"
    ),
}
"""Public classes that are no objectives, and where they are held to the contract."""


NO_SUBJECTS = {
    **dict.fromkeys(
        ("drpo_torch.distributed.across", "drpo_jax.distributed.across"),
        "returns a function for the argument `across`: tests/torch/test_distributed.py and tests/jax/test_distributed.py",
    ),
    **dict.fromkeys(
        (f"drpo_core.objectives.{name}" for name in ("family_of", "is_known", "label", "parameters_of")),
        "takes an objective and no array: tests/core/objectives/test_table.py",
    ),
    **dict.fromkeys(
        (f"drpo_core.modes.{name}" for name in drpo_core.modes.__all__ if inspect.isfunction(getattr(drpo_core.modes, name))),
        "takes a framework's keys and no array: tests/modes",
    ),
    "drpo_core.diagnostics.diagnostics_of": "what token_diagnostics does once its arrays are checked: takes `Tokens`",
}
"""Public functions that are no subjects, and why."""


# --- axes of a subject -----------------------------------------------------------------------------------------------------


def function_of(subject: str) -> Callable[..., Any]:
    """The public function."""
    return names.public()[subject]


@functools.cache
def parameters_of(subject: str) -> dict[str, bool]:
    """Parameters that are axes, and whether they may be left out."""
    own = SUBJECTS[subject].parameters
    signature = inspect.signature(function_of(subject)).parameters
    found = {name: p.default is None for name, p in signature.items()}
    if own:
        found = {name: name in {"segment_ids", "token_weights"} for name in own}
    return {name: optional for name, optional in found.items() if name not in ELSEWHERE}


@functools.cache
def is_vocabulary(subject: str) -> bool:
    """Whether it takes logits, or what they are made of."""
    return bool({"logits", "hidden"} & set(parameters_of(subject)))


@functools.cache
def has_head(subject: str) -> bool:
    """Whether it takes hidden states and an LM head."""
    return "hidden" in parameters_of(subject)


@functools.cache
def axes_of(subject: str) -> dict[str, tuple[Any, ...]]:
    """Every axis of a function, and what it may be on it, the base first."""
    found: dict[str, tuple[Any, ...]] = {}
    vocabulary = is_vocabulary(subject)
    for name, optional in parameters_of(subject).items():
        if name in ARRAYS:
            found[name] = (Given.ABSENT, *ARRAYS[name]) if optional else ARRAYS[name]
            if name == "divergence" and vocabulary:
                found[name] += axes.MEASURED
        elif name in NUMBERS:
            required = inspect.signature(function_of(subject)).parameters[name].default is inspect.Parameter.empty
            found[name] = (*(() if required else (Number.ABSENT,)), Number.PLAIN, Number.SCALAR)
            found[name] += (Number.ARRAY,) if name in ARRAYS_OF_NUMBERS else ()
            found[name] += axes.FLOATS if name in PER_TOKEN else ()
        elif name in FLAGS:
            found[name] = (True, False) if name == "diagnostics" else (False, True)
        else:
            found[name] = CHOICES[name]
            if name == "reduction" and optional:
                found[name] = (Given.ABSENT, *CHOICES[name])
            if name == "objective" and subject in OF_DIAGNOSTICS:
                found[name] = (*names.objectives(), "mode alone", "mode of masks")
    return found | _environment(subject)


def _environment(subject: str) -> dict[str, tuple[Any, ...]]:
    differentiable = bool(SUBJECTS[subject].differentiated)
    libraries, uses = tuple(Library), axes.CORE_USES
    if not subject.startswith("drpo_core."):
        libraries = (Library.TORCH,) if subject.startswith("drpo_torch.") else (Library.JAX,)
        uses = axes.TORCH_USES if libraries == (Library.TORCH,) else axes.JAX_USES
    if not differentiable:
        uses = tuple(use for use in (Use.FORWARD, Use.JIT) if use in uses)
    owners = {"jax": Library.JAX, "torch": Library.TORCH, "numpy": Library.NUMPY, None: None}
    states = tuple(a for a in axes.Ambient if owners[a.library] in (None, *libraries))
    environment = {
        "library": libraries,
        "shape": tuple(axes.Shape),
        "storage": tuple(axes.Storage) if libraries != (Library.JAX,) else (axes.Storage.CONTIGUOUS,),
        "regime": tuple(axes.Regime),
        "ambient": states,
        "use": uses,
    }
    if "mask" in parameters_of(subject):
        environment["masked"] = tuple(axes.Masked)
    if subject in ON_DEVICES:
        environment["device"] = tuple(axes.Device)
    return environment
