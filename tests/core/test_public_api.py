"""The public names, how many and how documented, and that adapters have the same ones with the same parameters."""

import dataclasses
import doctest
import inspect
import re

import drpo_jax
import drpo_torch
import numpydoc.docscrape
import numpydoc.validate
import pytest

import drpo_core
from drpo_core import _checks, anchors, corrections, diagnostics, loss, modes, objectives, penalties, reduction, validation

SYMBOLS = {name: getattr(drpo_core, name) for name in drpo_core.__all__ if name != "__version__"}
FUNCTIONS = {name: symbol for name, symbol in SYMBOLS.items() if inspect.isfunction(symbol)}
CLASSES = {name: symbol for name, symbol in SYMBOLS.items() if inspect.isclass(symbol)}
ADAPTERS = {"drpo_torch": drpo_torch, "drpo_jax": drpo_jax}
ADAPTED = {f"{name}.{f}": getattr(module, f) for name, module in ADAPTERS.items() for f in ("token_loss", "policy_loss")}
OBJECTIVES = {family.objective.__name__: family.objective for family in objectives.OBJECTIVES}
PARTS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (anchors, corrections, penalties, modes)
    for name in module.__all__
    if dataclasses.is_dataclass(getattr(module, name))
}
"""What modes are made of, and `Mode` itself."""
# numpydoc's checks of what style.md asks: a summary line, every parameter and no other, a return, an example
CHECKS = {
    "GL03",  # two blank lines
    "GL08",  # no docstring
    "SS01",  # no summary
    "SS06",  # a summary of more than one line
    "PR01",  # parameters not documented
    "PR02",  # documented parameters that do not exist
    "PR03",  # in another order
    "PR07",  # a parameter without a description
    "RT01",  # no Returns section
    "RT03",  # a return without a description
    "EX01",  # no example
}


def parameters(function):
    return inspect.signature(function).parameters


def test_there_are_40_public_names_at_most():
    assert len(SYMBOLS) <= 40


def test_all_is_sorted_and_is_every_public_name():
    assert drpo_core.__all__ == sorted(drpo_core.__all__, key=isort_style)
    assert len(set(drpo_core.__all__)) == len(drpo_core.__all__)
    exported = {name for name, value in vars(drpo_core).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert exported | {"__version__"} == set(drpo_core.__all__)


def isort_style(name):
    """CONSTANTS, then Classes, then functions, each sorted: the order ruff's RUF022 keeps."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name


def test_every_name_comes_from_a_module_that_exports_it():
    for name, symbol in SYMBOLS.items():
        assert symbol.__module__.startswith("drpo_core."), name
        assert name in inspect.getmodule(symbol).__all__, name


def test_the_version_is_a_semantic_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", drpo_core.__version__)


def complaints(path):
    """What numpydoc has against a docstring, of the checks above."""
    errors = numpydoc.validate.validate(path)["errors"]
    # numpydoc wants `*parts` documented under that name and xp's default not repeated; both are ours already
    return [f"{code}: {message}" for code, message in errors if code in CHECKS]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    found = complaints(f"drpo_core.{name}")
    if name == "validate":  # returns nothing
        found = [complaint for complaint in found if not complaint.startswith("RT01")]
    assert found == []


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_documented(name):
    assert complaints(name) == []


@pytest.mark.parametrize("name", [*FUNCTIONS, *ADAPTED])
def test_functions_say_what_they_raise(name):
    function = FUNCTIONS.get(name) or ADAPTED[name]
    raises = [entry.type for entry in numpydoc.docscrape.FunctionDoc(function)["Raises"]]
    if name == "summarize":  # takes what diagnostics returns; there are no shapes or numbers to refuse
        assert raises == ["TypeError"]
    else:
        assert "ValueError" in raises
        assert "TypeError" in raises or name == "merge_diagnostics"


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_their_public_methods_have_docstrings(name):
    symbol = CLASSES[name]
    assert symbol.__doc__
    assert not symbol.__doc__.startswith(f"{name}("), "the docstring that dataclass or NamedTuple made up"
    own = {key: value for key, value in vars(symbol).items() if not key.startswith("_")}
    for key, value in own.items():
        if inspect.isfunction(value) or isinstance(value, (property, classmethod)):
            assert inspect.getdoc(value), f"{name}.{key}"


@pytest.mark.parametrize("name", [*FUNCTIONS, *OBJECTIVES, "Objective", *ADAPTED])
def test_examples_exist_and_run(name):
    symbol = SYMBOLS.get(name) or OBJECTIVES.get(name) or ADAPTED[name]
    (example,) = [d for d in doctest.DocTestFinder(recurse=False).find(symbol, name) if d.name == name]
    assert len(example.examples) >= 2
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
    assert result.attempted == len(example.examples)


def test_a_docstring_without_parameters_would_be_seen():
    """The checks above can fail."""
    assert complaints("drpo_core._checks.check_arrays")


def test_every_objective_of_the_table_is_public():
    """All in `drpo_core.objectives`; in `drpo_core`, those that were there before the table grew."""
    assert all(getattr(objectives, name) is kind and name in objectives.__all__ for name, kind in OBJECTIVES.items())
    public = {name: symbol for name, symbol in CLASSES.items() if dataclasses.is_dataclass(symbol)}
    assert public == {name: OBJECTIVES[name] for name in public}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_field_of_an_objective_is_described(name):
    """With its symbol first, and no other name; a low and a high threshold share a description."""
    documented = numpydoc.docscrape.ClassDoc(OBJECTIVES[name])["Parameters"]
    described = [field for entry in documented for field in entry.name.split(", ")]
    assert described == [field.name for field in dataclasses.fields(OBJECTIVES[name])]
    assert all(" ".join(entry.desc) for entry in documented)


def test_thresholds_have_no_default_value():
    for name, kind in OBJECTIVES.items():
        for field in dataclasses.fields(kind):
            assert field.default in {None, dataclasses.MISSING} or field.name == "divergence", (name, field.name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_these_methods_and_no_others(name):
    public = {key for key in dir(OBJECTIVES[name]) if not key.startswith("_")}
    fields = {field.name for field in dataclasses.fields(OBJECTIVES[name])}
    assert {"loss", "weight"} <= public <= fields | {"loss", "weight", "ratio_weight", "inside", "counts_ratio", "region"}


def test_what_was_public_and_is_a_module_s_own_now():
    """Statistics and masked sums are for those who merge them; no function stands twice, as a loss and as a class."""
    assert {"Mean", "Maximum", "Minimum", "EffectiveSampleSize", "map_diagnostics"} <= set(diagnostics.__all__)
    assert {"MaskedSum", "masked_sum", "reduction_coefficients", "reduction_count"} <= set(reduction.__all__)
    assert {"Problem", "find_problems"} <= set(validation.__all__)
    elsewhere = {*diagnostics.__all__, *reduction.__all__, *validation.__all__, *loss.__all__, *_checks.__all__}
    assert {"MaskedSum", "masked_sum", "Mean", "check_number"} <= elsewhere - set(SYMBOLS)
    assert [name for name in FUNCTIONS if name.endswith(("_loss", "_weight"))] == []


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_mode_is_documented(name):
    """Every field, what is raised where there are fields, and an example that runs (`--doctest-modules` runs it)."""
    part = PARTS[name]
    document = numpydoc.docscrape.ClassDoc(part)
    fields = [field.name for field in dataclasses.fields(part)]
    assert [field for entry in document["Parameters"] for field in entry.name.split(", ")] == fields
    assert all(" ".join(entry.desc) for entry in document["Parameters"])
    assert document["Raises"] or not fields
    (example,) = [d for d in doctest.DocTestFinder(recurse=False).find(part, name) if d.name == name]
    assert len(example.examples) >= 2
    own = {key: value for key, value in vars(part).items() if not key.startswith("_")}
    assert all(inspect.getdoc(value) for value in own.values() if inspect.isfunction(value) or isinstance(value, property))


def test_parts_of_modes_are_not_at_the_top_level():
    names = {name.rpartition(".")[2] for name in PARTS}
    assert not names & set(SYMBOLS)
    assert {"Mode", "Proximal", "ImportanceWeight", "Penalty"} <= names


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_but_the_arrays_is_keyword_only(name):
    arrays = {"objective", "log_prob", "behavior_log_prob", "advantages", "values", "mask", "rewards", "statistics"}
    positional = {p.name for p in parameters(FUNCTIONS[name]).values() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional <= arrays | {"tokens", "top_k_ids"}
    if name not in {"summarize", "merge_diagnostics"}:
        namespace = parameters(FUNCTIONS[name])["xp"]
        assert namespace.kind is namespace.KEYWORD_ONLY
        assert namespace.default is None


TORCH_ONLY = {"engine", "diagnostics", "overwrite_logits", "chunk_vocabulary"}
"""Choices between ways to the same result, which XLA makes itself or which donated buffers and `jit` replace."""

OWN = TORCH_ONLY | {"vocabulary_group", "vocabulary_axis"}
"""These, and who has the other parts of the vocabulary, as each framework names them."""


def test_adapters_export_the_same_names_with_the_same_parameters():
    common = set(drpo_torch.__all__) & set(drpo_jax.__all__)
    assert {"token_loss", "policy_loss"} <= common
    for module in ADAPTERS.values():
        assert all(hasattr(module, name) for name in module.__all__)
    for name in common:
        theirs = [
            [(p.name, p.kind, p.default) for p in parameters(getattr(module, name)).values() if p.name not in OWN]
            for module in ADAPTERS.values()
        ]
        assert theirs[0] == theirs[1], name


def test_adapters_take_arrays_by_keyword_only():
    """Frameworks disagree on the order of the two log-probs."""
    for name, function in ADAPTED.items():
        objective, *rest = parameters(function).values()
        assert objective.name == "objective", name
        assert all(p.kind is p.KEYWORD_ONLY for p in rest), name
        required = [p.name for p in rest if p.default is p.empty]
        assert required[:3] == ["log_prob", "behavior_log_prob", "advantages"], name
