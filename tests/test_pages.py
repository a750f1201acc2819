"""What the pages show of the objectives is the one table of them: a new objective stands everywhere, or a test fails."""

import inspect
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import drpo_jax
import drpo_torch
import families
import pytest

from drpo_core import objectives
from drpo_core.objectives import OBJECTIVES, Family

ROOT = Path(__file__).parent.parent
DERIVATIONS, PROOFS = ROOT / "docs" / "derivations", ROOT / "tests" / "proofs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.compile(r"(?<![\w/.-])(?:drpo_core|adapters|tests|benchmarks|studies)/[\w./-]*[\w/](?![\w*<-])")
CLASSES = list(dict.fromkeys(family.objective.__name__ for family in OBJECTIVES))


def rows(page):
    """The rows of a page's tables: cells, by line."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    named = set(NAMED.findall(page.read_text(encoding="utf-8")))
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("family", OBJECTIVES, ids=lambda family: family.name)
def test_an_objective_has_a_file_a_page_and_proofs_of_one_name(family):
    name = families.name_of(family)
    assert family.objective.__module__ == f"drpo_core.objectives.{name}"
    page = (DERIVATIONS / f"{name}.md").read_text(encoding="utf-8")
    assert f"](../../drpo_core/objectives/{name}.py)" in page
    assert f"`{family.objective.__name__}(" in page
    assert (PROOFS / f"test_{name}.py").is_file()
    assert f"`test_{name}.py::" in page


def test_the_readme_has_a_row_for_each_objective():
    header = rows("README.md").index(["objective", "weight w", "trust region"])
    table = rows("README.md")[header + 2 :][: len(CLASSES)]
    assert [re.match(r"`(\w+)\(", row[0])[1] for row in table] == CLASSES
    named = {name for row in rows("README.md")[header + 2 + len(CLASSES) :] for name in re.findall(r"`(\w+)\(", row[0])}
    assert not named & set(CLASSES)


def test_the_page_of_jax_names_the_arguments_that_only_torch_has():
    def arguments(module, name):
        return set(inspect.signature(getattr(module, name)).parameters)

    assert set(drpo_jax.__all__) == set(drpo_torch.__all__)
    only = {argument for name in drpo_jax.__all__ for argument in arguments(drpo_torch, name) - arguments(drpo_jax, name)}
    of_jax = {argument for name in drpo_jax.__all__ for argument in arguments(drpo_jax, name) - arguments(drpo_torch, name)}
    assert of_jax == {"vocabulary_axis"}
    page = (ROOT / "docs" / "reference" / "jax.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"that only torch has:([^.]*)\.", page)
    assert set(re.findall(r"`(\w+)`", named)) == only


def test_integrations_measure_objectives_that_exist():
    (header,) = [row for row in rows("docs/integrations/index.md") if "`DRPO`" in row]
    assert {re.match(r"`(\w+)`", cell)[1] for cell in header[1:]} <= set(CLASSES)


def test_classes_of_the_reference_are_found_where_it_says():
    found = [pkgutil.resolve_name(name) for name in families.classes()]
    assert found == list(dict.fromkeys(family.objective for family in OBJECTIVES))


@dataclass(frozen=True)
class Toy:
    """Toy: L = −A r, w = 1 | a second sentence."""

    edge: float


def test_a_new_objective_stands_in_the_tables_by_a_line(monkeypatch):
    toy = Family("Toy-RL", Toy, "edge", (0.5, (0.25, 0.75)), "abs(r − 1)")
    monkeypatch.setattr(objectives, "OBJECTIVES", (*OBJECTIVES, toy))
    head, line, *body = families.table()
    assert head.count("|") == line.count("|") == 6
    assert len(body) == len(OBJECTIVES) + 1
    page = f"/derivations/{Toy.__module__.rpartition('.')[2]}.md"
    assert body[-1] == (
        rf"| [Toy-RL]({page}) | `Toy` | L = −A r, w = 1 \| a second sentence. | `edge` = 0.5, 0.25/0.75 | abs(r − 1) |"
    )
    assert families.classes()[-1] == "drpo_core.objectives.Toy"
