"""What holds for the modes of every framework, and the table of the docs, which is made of their docstrings."""

import inspect
import json

import pytest
from named_modes import FRAMEWORKS, module_of, rows, table, title

import drpo_core.anchors
import drpo_core.corrections
import drpo_core.objectives
import drpo_core.penalties
from drpo_core import modes
from drpo_core.modes import Mode

ROWS = list(rows())
NAMESPACE = {
    name: getattr(room, name)
    for room in (drpo_core.objectives, drpo_core.anchors, drpo_core.corrections, drpo_core.penalties, modes)
    for name in room.__all__
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_docstring_lists_every_name(framework):
    listed = [row.name for row in ROWS if row.framework == framework]
    if framework == "nemo_rl":
        assert set(listed) - {"none"} <= module_of(framework).DEFAULTS.keys()
    else:
        assert set(listed) == module_of(framework).LOSSES.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.call)
def test_call_and_repr_make_the_value(row):
    for text in (row.call, repr(row.mode)):
        assert eval(text, {"modes": modes, **NAMESPACE}) == row.mode  # noqa: S307 -- our own text
    assert Mode.from_dict(json.loads(json.dumps(row.mode.to_dict()))) == row.mode
    hash(row.mode)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_unknown_names_and_keys_are_errors(framework):
    function = getattr(modes, framework)
    for unknown in ("nothing", None, [], 3):
        with pytest.raises(ValueError, match=r": expected '.*, got "):
            function(unknown)
    name = next(row.name for row in ROWS if row.framework == framework)
    with pytest.raises(ValueError, match=r"nothing: expected keys of .* among "):
        function("ClippedPGLossFn" if framework == "nemo_rl" else name, nothing=1)
    # the name is positional, so that a framework may have a key of that name
    first = next(iter(inspect.signature(function).parameters.values()))
    assert first.kind is inspect.Parameter.POSITIONAL_ONLY


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_documented(framework):
    text = inspect.getdoc(getattr(modes, framework))
    for section in ("Parameters", "Returns", "Raises", "References", "Examples"):
        assert f"\n{section}\n" in text
    assert "https://" in text
    documented = module_of(framework).DEFAULTS
    keys = {key for each in documented.values() for key in each} if framework == "prime_rl" else documented
    assert not [key for key in keys if _shortened(key) not in text]
    assert any(character.isdigit() for character in title(framework))


def _shortened(key):
    """A key as a docstring names it after the first of its kind."""
    for prefix in ("algo.advantage.is_correction", "outlier_token_is_threshold", "token_mask_is_threshold"):
        key = key.removeprefix(prefix)
    return key


def test_table_has_a_line_a_mode():
    lines = table()
    assert len(lines) == len(ROWS) + 2
    assert all(line.count(" | ") == lines[0].count(" | ") for line in lines)
    assert len({row.call for row in ROWS}) == len(ROWS)
