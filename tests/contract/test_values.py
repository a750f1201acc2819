"""Values nobody looks at: the same list for every number, every array and every choice, wherever a caller can put one."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import drpo_jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from contract.arrays import bits, exact, flatten, make
from contract.axes import DType, Library, Shape
from contract.calls import call_of
from contract.places import array_places, base_cell, choice_places, numbers
from contract.subjects import ARRAYS, COUNTS, GOOD, NUMBERS, SUBJECTS, domain_of, parameters_of
from contract.world import VOCABULARY

import drpo_core

# a call is compared with another, or refused: however XLA compiles it
pytestmark = pytest.mark.usefixtures("interpreted_over_few", "quick_compilation")

NUMBER_PLACES, ARRAY_PLACES, CHOICE_PLACES = list(numbers()), list(array_places()), list(choice_places())


def ids(places):
    return [place.id for place in places]


def good(place):
    return {"delta": 0.2, "eps": 0.2, "max_ratio": 1.5, "dual_clip": 3.0}.get(
        place.name.split("_")[0], GOOD.get(place.name, 1.5)
    )


def wrong_and_right(place):
    """Each value with the plain number it stands for, or None where it is none of the parameter's."""
    domain, number = domain_of(place.id, place.name), good(place)
    yield from ((v, v if domain.has(v) else None) for v in (0, -1))
    yield from ((v, None) for v in (math.nan, math.inf, -math.inf, "1", True, 10**400, [number], 1j))
    yield np.array([number]), None
    if domain.whole:
        yield from ((np.int64(number), number), (number + 0.5, None), (float("nan"), None))
    else:
        yield from (
            (np.float64(number), number),
            (np.float32(number), float(np.float32(number))),
            (np.int64(3), 3.0 if domain.has(3) else None),
        )
    yield np.float64(math.nan), None
    yield np.float64(-2.0), -2.0 if domain.has(-2.0) else None
    if place.default is not dataclasses.MISSING:
        yield None, place.default if place.default is None else "refused"
    else:
        yield None, None


def few(place, values):
    """Of what JAX compiles at every call, one right number: tests/jax/test_contract.py compares the programs of all types."""
    one = np.int64 if NUMBERS[place.name].whole else np.float64
    slow = place.id.startswith("drpo_jax.linear_")
    # where no id is padding, the size of the vocabulary is what it would be without it
    slow_size = place.name == "vocabulary_size" and place.id.startswith("drpo_jax.")
    some = [(v, plain) for v, plain in values if not slow or plain in {None, "refused"} or type(v) is one]
    return [(v, plain) for v, plain in some if not slow_size or plain is None or plain == "refused"]


def outputs(result):
    return {path: bits(array) for path, array in flatten(result).items()}


@pytest.mark.filterwarnings("ignore::drpo_core.VacuousTrustRegionWarning")
@pytest.mark.parametrize("place", NUMBER_PLACES, ids=ids(NUMBER_PLACES))
def test_a_number_means_what_it_is_or_is_refused_by_name(place, ledger):
    ran, wrong = Counter(), []
    for value, plain in few(place, wrong_and_right(place)):
        try:
            got = place.call(value)
        except (TypeError, ValueError) as error:
            named = place.name in str(error)
            right = named and (plain is None or plain == "refused")
            outcome = f"{type(error).__name__}: {error}"[:110] if not right else None
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:110]
        else:
            accepted = (value is None and plain is None and place.default is None) or plain not in {None, "refused"}
            outcome = None if accepted else "a result"
            if accepted and value is not None and outputs(got) != outputs(place.call(plain)):
                outcome = f"another result than {plain!r}"
        if outcome is not None:
            shown = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "10**400"
            wrong.append(f"{place.id} = {shown}: {outcome}")
        ran["held" if plain is not None else "refused"] += 1
    ledger(ran)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "place", [p for p in NUMBER_PLACES if NUMBERS[p.name].above == 0.0 or p.name == "normalizer"], ids=lambda p: p.id
)
def test_a_number_as_an_array_means_what_it_is_or_is_refused_by_name(place, ledger):
    """0-d arrays of NumPy are read; of other libraries nothing may be, where it would synchronise a device."""
    wrong, ran = [], Counter()
    number = good(place)
    for value in (np.array(number), np.array(-2.0), np.array(math.nan), np.array(math.inf), np.array([number, number])):
        try:
            got = place.call(value)
        except (TypeError, ValueError) as error:
            if place.name not in str(error):
                wrong.append(f"{place.id} = {value!r}: {type(error).__name__}: {error}"[:200])
        except Exception as error:
            wrong.append(f"{place.id} = {value!r}: {type(error).__name__}: {error}"[:200])
        else:
            if value.ndim or value != number:
                wrong.append(f"{place.id} = {value!r}: a result")
            elif outputs(got) != outputs(place.call(number)):
                wrong.append(f"{place.id} = {value!r}: another result than {number!r}")
        ran["held" if value.ndim == 0 and value == number else "refused"] += 1
    ledger(ran)
    assert not wrong, "\n".join(wrong)


def impostors(place):  # noqa: PLR0912 -- a branch an impostor
    """What is no array for this argument, and a word for it."""
    array = place.arrays[place.name]
    values, library = exact(array), place.library

    def of(dtype, library=library, values=values):
        return make(values, dtype, library)

    integral = place.dtypes[0] is DType.INT64
    boolean = place.dtypes[0] is DType.BOOL
    yield "a list", values.tolist()
    yield "a number", 0.5
    yield "a string", "mask"
    if place.required:
        yield "None", None
    with np.errstate(invalid="ignore"):
        if not integral:
            yield "integers", of(DType.INT64)
        if not boolean:
            yield "booleans", of(DType.BOOL)
        if integral or boolean:
            yield "floats", of(DType.FLOAT32)
    if library is Library.TORCH:
        yield "complex numbers", torch.tensor(values).to(torch.complex64)
    elif library is Library.NUMPY:
        yield "complex numbers", values.astype(np.complex64)
        yield "objects", values.astype(object)
        if not integral and not boolean:
            yield "NumPy's bfloat16", jnp.asarray(values, dtype="bfloat16").__array__()
    else:
        yield "complex numbers", jnp.asarray(values).astype("complex64")
    if library is not Library.NUMPY:
        yield "a NumPy array", of(array.dtype.name if library is Library.JAX else str(array.dtype)[6:], Library.NUMPY)
    elif len(place.arrays) > 1:
        yield "a torch tensor", of(place.dtypes[0], Library.TORCH)
    if place.name in {"hidden", "logits"} and array.ndim:
        yield "nothing on the last axis", array[..., :0]
    yield "one axis more", array[None]
    if array.ndim:
        yield "one axis less", array[0]
        yield "one element of the last axis", array[..., :1]
        if array.shape[0] > 1:
            yield "one row", array[:1]


@pytest.mark.parametrize("place", ARRAY_PLACES, ids=ids(ARRAY_PLACES))
def test_what_is_no_array_of_an_argument_is_refused_by_name(place, ledger):
    ran, wrong = Counter(), []
    array = place.arrays[place.name]
    for word, value in impostors(place):
        if _is_right(place, word, array):
            continue
        ran["refused"] += 1
        try:
            place.call(**{**place.arrays, place.name: value})
        except (TypeError, ValueError) as error:
            if not any(name in str(error) for name in (place.name, *_also(place, word))):
                wrong.append(f"{place.id} = {word}: {type(error).__name__}: {error}".splitlines()[0][:200])
        except Exception as error:
            wrong.append(f"{place.id} = {word}: {type(error).__name__}: {error}".splitlines()[0][:200])
        else:
            wrong.append(f"{place.id} = {word}: a result")
    ledger(ran)
    assert not wrong, "\n".join(wrong)


AXES = {"nothing on the last axis", "one axis more", "one axis less", "one element of the last axis", "one row"}


def _also(place, word):
    """Of a wrong shape or library, the error may name any array that it is compared with."""
    if word == "a torch tensor":
        return [*place.arrays]
    return [*place.arrays, "mask", "tokens", "weight"] if word in AXES else []


def _is_right(place, word, array):
    """Shapes that are as good as the right one: where nothing else has the axis."""
    subject, _, name = place.id.partition(" ")
    alone = len([a for a in place.arrays.values() if a is not None]) == 1 and name != "divergence full.behavior"
    if word in AXES and (alone or _named(subject, "global_normalizer", "reduction_count", "reduction_coefficients")):
        return True
    if subject.endswith("expand_advantages") and word == "one element of the last axis":
        return name == "mask"  # sequences may have any length
    if name == "weight" and word in {"one row", "one axis less"} and word == "one row":
        return True  # a vocabulary of one word, if there is no bias
    # as many recorded tokens as one likes
    if word == "one element of the last axis" and name == "top_k_ids" and "top_k_behavior_log_prob" not in place.arrays:
        return True
    # the hidden size of a recorded head is its own; the vocabulary of logits too
    last = word == "one element of the last axis"
    return last and array.shape[-1:] in {(VOCABULARY,), (0,)} and name == "logits"


def _named(subject, *ends):
    return subject.rpartition(".")[2] in ends


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if "top_k_ids" in parameters_of(s)])
def test_one_id_of_one_token_is_not_k_ids_of_it(subject, ledger):
    """A number has as many axes as a token that is one: none is left for K."""
    call = call_of(subject, base_cell(subject, shape=Shape.NUMBER, top_k_ids=DType.INT64))
    one = {name: array[..., 0] if name.startswith("top_k_") else array for name, array in call.arrays.items()}
    with pytest.raises(ValueError, match=r"^top_k_ids: expected"):
        call.function(**one)
    ledger(Counter(refused=1))


@pytest.mark.parametrize("place", CHOICE_PLACES, ids=ids(CHOICE_PLACES))
def test_what_is_no_choice_is_refused_by_name(place, ledger):
    ran, wrong = Counter(), []
    candidates = {
        "objective": (None, "DRPO", 0.15, drpo_core.DRPO, object()),
        "reduction": ("mean", 1.0, max, lambda values: values.sum(), object()),
        "engine": ("", "jit", "eager", "numpy", 1, True),
        "weights": (1.0, "ab", object(), (1.0,), (1.0, 2.0, 3.0), (1.0, None), (1.0, math.nan), [[1.0], [2.0]]),
        "support": ("top_p", 0.1, object(), [0], drpo_jax.Divergences),
        "vocabulary_group": ("world", 1, object(), [0]),
        "centering": ("top_k", 0.1, object(), drpo_jax.Divergences, [0.1]),
        "divergence": ("binary_tv", 0.1, object(), drpo_jax.Divergences, [0.1]),
    }[place.name]
    for value in candidates:
        ran["refused"] += 1
        try:
            place.call(value)
        except (TypeError, ValueError) as error:
            if place.name not in str(error):
                wrong.append(f"{place.id} = {value!r}: {type(error).__name__}: {error}"[:200])
        except Exception as error:
            wrong.append(f"{place.id} = {value!r}: {type(error).__name__}: {error}"[:200])
        else:
            wrong.append(f"{place.id} = {value!r}: a result")
    ledger(ran)
    assert not wrong, "\n".join(wrong)


def test_a_divergence_that_no_objective_has_is_refused_by_name(ledger):
    """The one field of an objective that is a word."""
    for value in (None, 1.0, True, "tv", "", np.ones(3), ["binary_tv"]):
        with pytest.raises((TypeError, ValueError), match="divergence"):
            drpo_core.DPPO(delta=0.1, divergence=value)
        ledger(Counter(refused=1))


# --- ids -------------------------------------------------------------------------------------------------------------------

IDS = [
    (subject, name)
    for subject in SUBJECTS
    for name in parameters_of(subject)
    if name in ARRAYS and ARRAYS[name][0] is DType.INT64 and name not in COUNTS
]
ANY_INTEGERS = {"segment_ids", "group_ids"}


def _id_call(subject, name):
    shape = {"shape": Shape.PACKED} if name in ANY_INTEGERS else {}
    return call_of(subject, base_cell(subject, **{name: DType.INT64}, **shape))


@pytest.mark.parametrize(("subject", "name"), IDS, ids=[f"{s} {n}" for s, n in IDS])
def test_ids_outside_the_vocabulary_are_refused_or_give_nan(subject, name, ledger):
    """At a valid token. Ids of sequences and groups are any integers; those of `expand_advantages` are indices."""
    call = _id_call(subject, name)
    index = subject.endswith("expand_advantages")
    wrong, ran = [], Counter()
    right = outputs(call.function(**call.arrays))
    for bad in (-1, 3 if index else VOCABULARY, -100):
        values = exact(call.arrays[name]).copy()
        first = values.reshape(-1)[0]
        if name in ANY_INTEGERS and not index:
            values[values == first] = bad if bad not in values else 77
        else:
            values.reshape(-1)[0] = bad
        array = make(values, DType.INT64, base_cell(subject)["library"])
        ran["held" if name in ANY_INTEGERS and not index else "refused"] += 1
        try:
            result = call.function(**{**call.arrays, name: array})
        except (ValueError, IndexError) as error:
            if name not in str(error):
                wrong.append(f"{bad}: {type(error).__name__}: {error}"[:150])
            continue
        except Exception as error:
            wrong.append(f"{bad}: {type(error).__name__}: {error}"[:150])
            continue
        if subject.endswith("sampled_in_top_k"):
            continue  # ids are compared with each other, whatever they are
        if name in ANY_INTEGERS and not index:
            if outputs(result) != right:
                wrong.append(f"{bad}: another result than with another number for the same sequence")
        elif not any(np.isnan(exact(a).astype(float)).any() for a in flatten(result).values()):
            wrong.append(f"{bad}: a result without NaN")
    ledger(ran)
    assert not wrong, f"{subject} {name}: " + "; ".join(wrong)
