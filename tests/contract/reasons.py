"""What is left out of the product, and what is refused: data, each with its reason.

A cell that is left out is counted by its reason and never run. A cell that is refused is run, and must raise the stated
error with the stated name in its message. `MAY` is either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from contract import axes, names
from contract.axes import (
    Ambient,
    Device,
    Divided,
    DType,
    Engine,
    Given,
    Library,
    Measured,
    Recorded,
    Regime,
    Shape,
    Storage,
    Use,
)
from contract.subjects import ARRAYS, OF_DIAGNOSTICS, OF_MODES, PER_TOKEN, SUBJECTS, is_vocabulary

from drpo_core.modes import Mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from contract.calls import Cell

Predicate = "Callable[[str, Cell], bool]"

NUMPY = (Library.NUMPY, Library.READ_ONLY)
OWNERS = {"numpy": NUMPY, "torch": (Library.TORCH,), "jax": (Library.JAX,)}
WITHOUT_GRADIENT = (Ambient.NO_GRAD, Ambient.INFERENCE)
_EQUAL = (Regime.ON_POLICY, Regime.CERTAIN, Regime.DISTANT)
TRANSFORMS = (Use.FUNC_GRAD, Use.VMAP, Use.VMAP_ONE, Use.COMPILE)


def _dtypes(cell: Cell) -> set[DType]:
    return {choice for name, choice in cell.items() if name in ARRAYS and isinstance(choice, DType)}


def _all_dtypes(cell: Cell) -> set[DType]:
    """Of numbers that are one per token too."""
    return {choice for choice in cell.values() if isinstance(choice, DType)}


def _named(subject: str, *ends: str) -> bool:
    return subject.rpartition(".")[2] in ends


def _linear(cell: Cell) -> bool:
    return getattr(cell.get("reduction"), "name", "") == "linear"


def _is_base_objective(cell: Cell) -> bool:
    return cell["objective"] == next(iter(names.objectives()))


def _has_float16(cell: Cell) -> bool:
    return DType.FLOAT16 in _dtypes(cell) or cell["ambient"] is Ambient.AUTOCAST_FLOAT16


def _has_tv(subject: str) -> bool:
    return _named(subject, "binary_tv", "full_tv", "top_k_tv", "full_divergences", "top_k_divergences")


def _mode(cell: Cell) -> Mode | None:
    objective = names.of_label(cell.get("objective"))
    return objective if isinstance(objective, Mode) else None


def _has_parts(cell: Cell) -> bool:
    return _mode(cell) is not None and cell["objective"] != "mode alone"


def _of_groups(subject: str) -> bool:
    return _named(
        subject, "group_advantages", "length_weighted_advantages", "pass_at_k_advantages", "reward_decoupled_advantages"
    )


def _last_axis(subject: str) -> bool:
    names_ = ("full_tv", "full_kl", "top_k_tv", "top_k_kl", "sampled_in_top_k", "score_centering")
    return is_vocabulary(subject) or _named(subject, *names_)


def _has_temperatures(cell: Cell) -> bool:
    """Whether a temperature is one per token."""
    return any(isinstance(cell.get(name), DType) for name in PER_TOKEN)


def _centred(subject: str, cell: Cell) -> bool:
    """Whether a score-centring term is formed."""
    return _named(subject, "score_centering") or cell.get("centering", Given.ABSENT) is not Given.ABSENT


def _sequences(cell: Cell) -> bool:
    return getattr(cell.get("reduction"), "name", "").startswith("sequence")


def _traced_shapes(subject: str, cell: Cell) -> set[Shape]:
    shapes = {Shape.PADDED, Shape.NUMBER, Shape.NO_TOKENS, Shape.NO_ROWS}
    if any(cell.get(name, Given.ABSENT) is not Given.ABSENT for name in ("segment_ids", "group_ids")):
        shapes.add(Shape.PACKED)
    # a large batch is taken in blocks by the losses of the adapter
    return shapes | ({Shape.LARGE} if _named(subject, "policy_loss") else set())


LEFT_OUT: tuple[tuple[Callable[[str, Cell], bool], str], ...] = (
    (lambda _, c: c["library"] in NUMPY and DType.BFLOAT16 in _dtypes(c), "NumPy has no bfloat16"),
    (
        lambda _, c: c["library"] is Library.STRICT and bool(_dtypes(c) & {*axes.HALVES}),
        "array-api-strict has no 16-bit floats",
    ),
    (
        lambda _, c: c["ambient"].library is not None and c["library"] not in OWNERS[c["ambient"].library],
        "a state of another library's",
    ),
    (
        lambda _, c: c["library"] in {Library.JAX, Library.STRICT} and c["storage"] is not Storage.CONTIGUOUS,
        "these arrays have no strides to choose",
    ),
    (
        lambda _, c: c["ambient"] is Ambient.NO_X64 and bool({DType.FLOAT64, DType.INT64} & _all_dtypes(c)),
        "JAX without x64 has no 64-bit arrays",
    ),
    (lambda _, c: c["use"] is Use.JIT and c["library"] is not Library.JAX, "a transform of JAX"),
    (lambda s, c: c["use"] is Use.JIT and _named(s, "validate", "summarize"), "documented as eager"),
    (
        lambda _, c: c["use"] is Use.BACKWARD and c["library"] not in {Library.TORCH, Library.JAX},
        "these arrays can't be differentiated",
    ),
    (
        lambda _, c: c["ambient"] in WITHOUT_GRADIENT and c["use"] is not Use.FORWARD,
        "where no gradient is recorded, none is taken",
    ),
    (
        lambda s, c: _linear(c) and not _named(s, "policy_loss", "logits_policy_loss", "linear_policy_loss"),
        "linear reductions are the adapters' losses' own",
    ),
    (
        lambda s, c: c["library"] is Library.JAX and c["shape"] not in _traced_shapes(s, c),
        "JAX compiles every operation for every shape: a few stand for all",
    ),
    (
        lambda _, c: c["use"] is Use.COMPILE and axes.Number.SCALAR in c.values(),
        "Dynamo traces a NumPy scalar as an array",
    ),
    (
        lambda s, c: c["use"] is Use.COMPILE and any(refusal.always for refusal in refusals(s, c)),
        "Dynamo raises an error of its own for every error",
    ),
    (
        lambda s, c: (
            _named(s, "group_advantages")
            and bool(c["divide_by_mean"])
            and not c["divide_by_std"]
            and c["regime"] not in {Regime.ON_POLICY, Regime.CERTAIN}
        ),
        "a mean is divided by where rewards are 0 or more, and these are of either sign",
    ),
    (
        lambda s, c: (
            str(c.get("objective")).startswith("Band-KL")
            and c["regime"] in {Regime.CERTAIN, *((Regime.DISTANT,) if _centred(s, c) else ())}
        ),
        "at π = 1 the bound of a KL band and the ratio are the same but for a rounding",
    ),
    (
        lambda _, c: c["ambient"] is Ambient.DEBUG_NANS and (_has(c, "vocabulary_size") or _has_temperatures(c)),
        "these cells have NaN in the padding and in temperatures of masked tokens, and to read them is an operation that gives NaN",
    ),
    (
        lambda s, c: _named(s, "summarize") and c["ambient"] is Ambient.DEBUG_NANS,
        "a statistic of nothing is NaN",
    ),
    (
        lambda s, c: _named(s, "merge_diagnostics") and c["ambient"] is Ambient.DEBUG_NANS,
        "these cells slice their arrays, and a slice of a masked NaN is an operation that gives NaN",
    ),
    (
        lambda _, c: (
            c.get("engine", Engine.ARRAYS) is not Engine.ARRAYS
            and not c.get("diagnostics", True)
            and not _is_base_objective(c)
        ),
        "a loop takes a second to compile: one without diagnostics is compiled for one objective",
    ),
    (
        lambda _, c: (
            c["use"] in {Use.JIT, Use.VMAP, Use.VMAP_ONE} and c["library"] is Library.JAX and c["regime"] is not Regime.TYPICAL
        ),
        "what JAX traces does not depend on values",
    ),
    (
        lambda s, c: (
            c["use"] is Use.JVP
            and is_vocabulary(s)
            and (not _named(s, "full_divergences") or _has_temperatures(c) or c["support"] is not Given.ABSENT)
        ),
        "documented as reverse mode only",
    ),
    (
        lambda _, c: c["shape"] is Shape.LARGE and c["regime"] is not Regime.TYPICAL,
        "a large batch is a small one repeated: where the policies are is tested on the small one",
    ),
    (
        lambda _, c: bool(c.get("overwrite_logits")) and c["use"] is Use.CREATE_GRAPH,
        "these cells differentiate in the logits twice, and what is overwritten is no longer theirs",
    ),
    (
        lambda _, c: c["shape"] is Shape.LARGE and _has(c, "chunk_tokens"),
        "chunks of two tokens of a large batch are thousands, after each of which a 16-bit ∂weight is rounded, as documented",
    ),
    (
        lambda _, c: c["ambient"] is Ambient.DEBUG_NANS and c["use"] in {Use.VMAP, Use.VMAP_ONE},
        "these cells stack what vmap takes apart, which is an operation that gives NaN where masked positions hold one",
    ),
    (
        lambda _, c: c.get("vocabulary_group") is Divided.DTENSOR and c["ambient"] is Ambient.ANOMALY,
        "torch looks for NaN in gradients with an operation that DTensor lacks",
    ),
    (
        lambda s, c: _has_tv(s) and c["use"] is not Use.FORWARD and c["regime"] in _EQUAL,
        "TV has no derivative where the probabilities are equal",
    ),
    (
        lambda s, c: _named(s, "binary_kl", "top_k_kl") and c["use"] is not Use.FORWARD and c["regime"] is Regime.CERTAIN,
        "what is left of a probability of 1 is known to rounding only, and its derivative not at all",
    ),
    (
        lambda s, c: (
            _named(s, "top_k_tv", "top_k_kl", "top_k_divergences")
            and c["regime"] in {Regime.DISTANT, Regime.CERTAIN}
            and bool(_dtypes(c) & {*axes.HALVES})
        ),
        "probabilities rounded to 16 bits that leave no rest add up to more than 1",
    ),
    (
        lambda s, c: _named(s, "top_k_divergences") and c["log_normalizer"] in axes.HALVES,
        "a normaliser of 16 bits is a factor of 1 ± 0.01 of all probabilities, and the rest what that leaves",
    ),
    (
        lambda _, c: (
            _has(c, "top_k")
            and "hidden" in c
            and (c["ambient"] in axes.AUTOCAST or bool({c["hidden"], c["weight"]} & {*axes.HALVES}))
        ),
        "products of 16 bits round logits that are near each other to another order",
    ),
    (
        lambda s, c: c["use"] is Use.COMPILE and Use.COMPILE not in SUBJECTS[s].promises,
        "torch.compile is documented to break the graph there",
    ),
    (
        lambda _, c: c["use"] is Use.COMPILE and c["shape"] in {Shape.NO_TOKENS, Shape.NO_ROWS, Shape.LARGE},
        "compiling takes seconds: its cells are those of other shapes",
    ),
    (
        lambda _, c: c["use"] is Use.COMPILE and c["storage"] is Storage.EXPANDED,
        "Dynamo looks at .grad of what is no leaf, which warns",
    ),
    (
        lambda s, c: _last_axis(s) and (c["shape"], c["storage"]) == (Shape.NUMBER, Storage.EXPANDED),
        "expanding the only axis makes all of a vocabulary the same token",
    ),
    (
        lambda s, c: c.get("device") is Device.GPU and c["shape"] is Shape.LARGE and is_vocabulary(s),
        "a program a row of logits, interpreted: thousands of rows take minutes",
    ),
    (
        lambda _, c: c["use"] is Use.COMPILE and c.get("device") is Device.GPU,
        "under torch.compile, every engine is the same array expression",
    ),
    (
        lambda _, c: c["use"] is Use.COMPILE and c["ambient"] is not Ambient.PLAIN,
        "compiling takes seconds: its cells are those without another state",
    ),
)


class Refusal(NamedTuple):
    """What a cell raises, with a name in its message. `always` is False where a right result would do as well."""

    error: tuple[type[Exception], ...]
    name: str
    reason: str
    always: bool = True


def _engine(reason: str, *, always: bool = True) -> Refusal:
    return Refusal((ValueError, ImportError), "engine", reason, always)


REFUSED: tuple[tuple[Callable[[str, Cell], bool], Refusal], ...] = (
    (
        lambda _, c: c.get("segment_ids", Given.ABSENT) is not Given.ABSENT and c["shape"] not in {Shape.PACKED, Shape.ONE},
        Refusal((ValueError,), "segment_ids", "segment ids are of packed tokens"),
    ),
    (
        lambda s, c: _of_groups(s) and c["group_ids"] is not Given.ABSENT and c["shape"] not in {Shape.PACKED, Shape.ONE},
        Refusal((ValueError,), "rewards", "group ids are of a list of rewards"),
    ),
    (
        lambda _, c: _linear(c) and _has(c, "normalizer"),
        Refusal((ValueError,), "normalizer", "a linear reduction divides by itself"),
    ),
    (
        lambda _, c: _linear(c) and c.get("segment_ids", Given.ABSENT) is not Given.ABSENT,
        Refusal((ValueError,), "segment_ids", "a linear reduction finds its own sequences"),
    ),
    (
        lambda s, c: (_of_groups(s) or _named(s, "generalized_advantages")) and c["shape"] is Shape.NUMBER,
        Refusal((ValueError,), "rewards", "one reward has no group"),
    ),
    (
        lambda s, c: _named(s, "group_advantages") and c["divide_by_std"] and c["divide_by_mean"],
        Refusal((ValueError,), "divide_by_mean", "one of the two divides"),
    ),
    (
        lambda s, c: _named(s, "informative_groups") and len(c["shape"].leading) != 2,
        Refusal((ValueError,), "rewards", "groups are rows"),
    ),
    (
        lambda s, c: _named(s, "reduction_count", "global_normalizer") and not getattr(c.get("reduction"), "counts", True),
        Refusal((ValueError,), "reduction", "a number that is bound is no count"),
    ),
    (
        lambda _, c: _mode(c) is not None and c.get("reduction", Given.ABSENT) is not Given.ABSENT,
        Refusal((ValueError,), "reduction", "a mode has its own reduction"),
    ),
    *(
        (
            lambda _, c, name=name: (
                c.get(name, Given.ABSENT) is not Given.ABSENT and name not in getattr(_mode(c), "arguments", ())
            ),
            Refusal((ValueError,), name, f"{name} of an objective, or of a mode that has no use for it"),
        )
        for name in OF_MODES
    ),
    (
        lambda s, c: s in OF_DIAGNOSTICS and _has_parts(c),
        Refusal((ValueError,), "objective", "diagnostics of a mode are those of its loss"),
    ),
    (
        lambda s, c: (
            (_has_parts(c) or (c.get("objective") == "mode alone" and "reduction" in c))
            and c["shape"] is Shape.NUMBER
            and not _named(s, "score_centering")
        ),
        Refusal((ValueError,), "mask", "a number is no sequence, which modes look at"),
    ),
    (
        lambda s, c: _named(s, "expand_advantages") and c["segment_ids"] is Given.ABSENT and len(c["shape"].leading) != 2,
        Refusal((ValueError,), "mask", "padded sequences are rows"),
    ),
    (
        lambda _, c: names.is_per_token(c.get("objective")) and c.get("divergence", Given.ABSENT) is Given.ABSENT,
        Refusal((TypeError, ValueError), "divergence", "a divergence per token is the caller's to measure"),
    ),
    (
        lambda s, c: s.startswith("drpo_core.") and c.get("engine") is Engine.COMPILED and c["library"] not in NUMPY,
        _engine("the core's loop is compiled for NumPy arrays"),
    ),
    (
        lambda s, c: s.startswith("drpo_torch.") and c.get("engine") is Engine.COMPILED and c["use"] in TRANSFORMS,
        _engine("a transform of torch has no memory to give to a compiled loop", always=False),
    ),
    (
        lambda s, c: is_vocabulary(s) and c.get("engine") is Engine.COMPILED and _has_float16(c),
        _engine("a compiled softmax may know no float16", always=False),
    ),
    (
        lambda s, c: is_vocabulary(s) and c.get("engine") is Engine.COMPILED and c["storage"] is not Storage.CONTIGUOUS,
        _engine("a compiled softmax may read contiguous rows only", always=False),
    ),
    (
        lambda _, c: _has(c, "top_k") and c["top_k_ids"] is not Given.ABSENT,
        Refusal((ValueError,), "top_k", "ids are given or found"),
    ),
    (
        lambda s, c: _named(s, "validate") and c["regime"] is Regime.IMPOSSIBLE,
        Refusal((ValueError,), "log_prob: ", "a token of probability 0 can't have been sampled", always=False),
    ),
    (
        lambda s, c: (
            _named(s, "linear_policy_loss", "linear_log_prob")
            and c["library"] is Library.TORCH
            and c["weight"] is not c["hidden"]
            and (c["ambient"] not in axes.AUTOCAST or DType.FLOAT64 in {c["weight"], c["hidden"]})
        ),
        Refusal((TypeError,), "weight", "a product of two dtypes is left to autocast, which leaves float64 as it is"),
    ),
    (
        lambda _, c: (
            isinstance(c.get("divergence"), Measured) and c["divergence"].of != "top_k" and _has(c, "chunk_vocabulary")
        ),
        Refusal((ValueError,), "chunk_vocabulary", "a full divergence needs whole rows of logits"),
    ),
    (
        lambda _, c: c.get("centering") in {Recorded.FULL, Recorded.HEAD} and _has(c, "chunk_vocabulary"),
        Refusal((ValueError,), "chunk_vocabulary", "a full centring needs whole rows of logits"),
    ),
    (
        lambda s, c: _centred(s, c) and _has_parts(c) and c["objective"] != "mode of tokens",
        Refusal((ValueError,), "", "the term is of outcomes of one token, whatever the others are"),
    ),
    (
        lambda _, c: c.get("centering") in {Recorded.FULL, Recorded.HEAD} and c.get("objective") == "mode of tokens",
        Refusal((ValueError,), "centering.proximal_log_prob", "a full record is of one policy"),
    ),
    (
        lambda s, c: c["use"] in TRANSFORMS and c["use"] not in SUBJECTS[s].promises and c["library"] is Library.TORCH,
        Refusal((RuntimeError,), "", "torch.func is not promised there: right or an error", always=False),
    ),
    (
        lambda s, c: c["use"] is Use.BATCHED and _named(s, "token_log_prob", "linear_log_prob", "full_divergences"),
        Refusal((RuntimeError,), "vectorised cotangents", "which rows are needed differs between cotangents", always=False),
    ),
    (
        lambda _, c: bool(c.get("overwrite_logits")) and c["use"] in {Use.RETAINED, Use.BATCHED, Use.TWICE},
        Refusal((RuntimeError, ValueError), "", "logits that have been overwritten can't be read again", always=False),
    ),
    (
        lambda _, c: bool(c.get("overwrite_logits")) and c["storage"] is Storage.EXPANDED,
        Refusal((RuntimeError, ValueError), "", "rows that share memory can't each hold their gradient", always=False),
    ),
    (
        lambda _, c: (
            "objective" in c and c.get("log_prob") is DType.FLOAT16 and c["library"] in NUMPY and c["regime"] is Regime.DISTANT
        ),
        Refusal(
            (RuntimeWarning, FloatingPointError), "overflow", "a gradient that float16 can't hold, as NumPy says", always=False
        ),
    ),
    (
        lambda s, c: (
            c["shape"] is Shape.NUMBER
            and (
                _sequences(c)
                or _named(s, "sequence_mean_token_mean", "sequence_mean_token_sum", "prompt_mean", "global_coefficients")
            )
        ),
        Refusal((ValueError,), "mask", "a number is no sequence"),
    ),
)


def _has(cell: Cell, name: str) -> bool:
    return cell.get(name, axes.Number.ABSENT) is not axes.Number.ABSENT


def left_out(subject: str, cell: Cell) -> str | None:
    """Why a cell is not run, or None."""
    return next((reason for predicate, reason in LEFT_OUT if predicate(subject, cell)), None)


def refusals(subject: str, cell: Cell) -> list[Refusal]:
    """What a cell may raise."""
    return [refusal for predicate, refusal in REFUSED if predicate(subject, cell)]


def explain(value: Any) -> str:
    """A choice as a word."""
    return str(getattr(value, "value", value))
