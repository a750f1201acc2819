"""The table of parity: every named mode was compared, with what frameworks are in now, and is no further than rounding."""

import ast
import inspect
from pathlib import Path

import parity
import pytest
import sizes
from named_modes import FRAMEWORKS, module_of, rows

from drpo_core import modes

ROWS = list(rows())
# float32's rounding, over sums that cancel
LARGEST = {"float64": 1e-6, "float32": 1e-4}


def test_every_mode_is_compared_and_no_other():
    named = {(row.framework, row.name) for row in ROWS}
    assert named - parity.found().keys() == set(), "run nox -s parity-<framework>"
    assert parity.found().keys() - named == set(), "results of modes that no framework names"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_results_are_well_formed(framework):
    result = parity.results()[framework]
    assert result["framework"] == framework
    # the release that ran is the one that the mode follows
    follows = f"{inspect.getdoc(module_of(framework))}{inspect.getdoc(getattr(modes, framework))}"
    major_and_minor = ".".join(result["release"].split(".")[:2])
    assert f" {major_and_minor}" in follows or f"/{major_and_minor}" in follows or f"v{major_and_minor}" in follows
    assert result["function"]
    assert all(number[0].isdigit() for number in result["packages"].values())
    for each in result["modes"]:
        assert each["compared"] in ("ran", "formula")
        assert 0 < each["settings"] < each["cases"]
        numbers = [each["gradient"], *([] if each["loss"] is None else [each["loss"]])]
        assert all(0.0 <= number <= LARGEST[result["precision"]] for number in numbers)
        assert each["empty"]
        assert set(each["empty"]) <= {"same", "counted"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_declaration_is_that_of_the_results(framework):
    """What a module says of the framework without importing it is what the results say."""
    tree = ast.parse(Path(__file__).with_name(f"compare_{framework}.py").read_text(encoding="utf-8"))
    said = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign) and _named(node)}
    result = parity.results()[framework]
    assert ast.literal_eval(said["FUNCTION"]) == result["function"]
    assert set(ast.literal_eval(said["PACKAGES"])) == result["packages"].keys()
    formulas = set(ast.literal_eval(said["FORMULAS"])) if "FORMULAS" in said else set()
    assert formulas == {each["name"] for each in result["modes"] if each["compared"] == "formula"}
    placeholders = list(ast.literal_eval(said["PLACEHOLDERS"])) if "PLACEHOLDERS" in said else []
    assert placeholders == result["placeholders"]


def _named(node):
    return isinstance(node.targets[0], ast.Name)


def test_table_has_a_line_a_mode():
    lines = parity.table()
    assert len(lines) == len(ROWS) + 2
    assert len(parity.functions()) == len(FRAMEWORKS) + 2
    assert all(line.count(" | ") == lines[0].count(" | ") for line in lines)
    assert "not compared" not in "".join(lines)


def test_a_mode_without_a_comparison_is_shown(monkeypatch):
    monkeypatch.setattr(parity, "found", dict)
    assert all("| not compared |" in line for line in parity.table()[2:])


def test_lines_of_code():
    code = ("def f(x):", '    """Doc."""', "    # why", '    text = """a', '    b"""', "    return (", "        x", "    )")
    source = "\n".join(('"""Of a', "", 'module."""', "", *code, ""))
    assert sizes.lines_of(source) == 6
    assert len(sizes.table()) == 8
