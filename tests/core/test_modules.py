"""What the modules of all three packages are called and what they import from each other, read from their source."""

import ast
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"drpo_core": ROOT, "drpo_torch": ROOT / "adapters", "drpo_jax": ROOT / "adapters"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# what a package has where it can be imported at all; the standard library is never reason to wait
REQUIRED = {
    "drpo_core": {"array_api_compat", "numpy"},
    "drpo_torch": {"array_api_compat", "numpy", "torch"},
    "drpo_jax": {"array_api_compat", "numpy", "jax"},
}
DYNAMIC = {
    "drpo_core.cli.check._need_the_kit": "hypothesis and mpmath: the extra testing",
    "drpo_core.cli.loading._module": "a module that the user names",
    "drpo_core.testing.frameworks.NumPy.__init__": "array-api-strict, which the tests bring",
    "drpo_core.testing.frameworks.framework_named": "an adapter, which needs torch or JAX",
    "drpo_core.testing.implementation.from_adapter": "an adapter, which needs torch or JAX",
    "drpo_core.testing.runner.parametrize_with_checks": "pytest, in whose run it is called",
}
"""Calls of `importlib.import_module`, and what they wait for."""


class Import(NamedTuple):
    """A module that one imports, and the function it does so in, or None."""

    target: str
    function: str | None


def name_of(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path, root): path for package, root in PACKAGES.items() for path in (root / package).rglob("*.py")}
EXTRAS = {
    requirement.split(">")[0].split("=")[0].split("[")[0].replace("-", "_")
    for requirements in PROJECT["optional-dependencies"].values()
    for requirement in requirements
} | {"tunix"}  # of google-tunix


@cache
def tree(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def walk(node, scope=()):
    """Every node with the names of the functions and classes around it, but what is imported for type checking only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        inner = (*scope, child) if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else scope
        yield child, scope
        yield from walk(child, inner)


def place(module, scope):
    """Dotted name of the innermost function, or None outside of all."""
    functions = [i for i, node in enumerate(scope) if not isinstance(node, ast.ClassDef)]
    return ".".join((module, *(node.name for node in scope[: functions[-1] + 1]))) if functions else None


@cache
def imports(module):
    found = []
    for node, scope in walk(tree(module)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, place(module, scope)) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            found += [
                Import(inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module, place(module, scope))
                for alias in node.names
            ]
    return found


def at_import(module):
    """Own modules that are executed when this one is: those it imports, and the packages around those that it is not in."""
    own = {entry.target for entry in imports(module) if entry.function is None and entry.target in MODULES}
    around = {".".join(target.split(".")[:n]) for target in own for n in range(1, target.count(".") + 1)}
    return own | {package for package in around if not f"{module}.".startswith(f"{package}.")}


@cache
def brings(module):
    """What an extra has to bring before a module can be imported: it itself, or what it imports at once."""
    if module not in MODULES:
        return {module.split(".")[0]} & EXTRAS
    seen, left = set(), [module]
    while left:
        current = left.pop()
        if current not in seen:
            seen.add(current)
            left += at_import(current)
    tops = {entry.target.split(".")[0] for name in seen for entry in imports(name) if entry.function is None}
    return tops & EXTRAS


def test_no_circles():
    graph = {module: at_import(module) for module in MODULES}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go round: {' → '.join(error.args[1])}")
    assert set(order) == set(MODULES)
    assert order.index("drpo_core.tokens") < order.index("drpo_core.objectives") < order.index("drpo_core.loss")


@pytest.mark.parametrize("module", MODULES)
def test_functions_import_only_what_an_extra_brings(module):
    """Anything else belongs to the top of the file, where it is seen."""
    package = module.split(".")[0]
    late = [entry for entry in imports(module) if entry.function is not None]
    needless = [entry for entry in late if not brings(entry.target) - REQUIRED[package]]
    # what stands beside an import that waits for an extra, in one function, may wait with it
    waiting = {entry.function for entry in late if entry not in needless}
    assert [entry for entry in needless if entry.function not in waiting] == []


def test_imports_by_name_are_declared():
    called = {
        place(module, scope)
        for module in MODULES
        for node, scope in walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}
    }
    assert called == set(DYNAMIC)


def bound(module):
    """Public names of functions, classes and values that a module binds or imports; not of its submodules."""
    names, left = set(), list(tree(module).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.If):
            left += node.body + node.orelse
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names if f"{node.module}.{alias.name}" not in MODULES}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return names


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_no_module_has_the_name_of_what_is_beside_it(package):
    """``from drpo_core import diagnostics`` must not be two things."""
    beside = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package}
    assert beside & bound(package) == set()


def test_every_module_says_what_it_exports():
    silent = [name for name in MODULES if "__all__" not in bound(name) and not name.endswith("__main__")]
    assert silent == []


def test_what_is_exported_is_there():
    for module in MODULES:
        submodules = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == module}
        for node in tree(module).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                assert set(ast.literal_eval(node.value)) - bound(module) - submodules == set(), module


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import drpo_core.loss", {"drpo_core.loss"}),
        ("from drpo_core import loss, DRPO", {"drpo_core.loss", "drpo_core"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import drpo_core.loss", {"typing"}),
        ("def f():\n    import drpo_core.loss", {"drpo_core.loss"}),
    ],
)
def test_what_is_read_here_is_what_is_imported(source, seen, tmp_path, monkeypatch):
    path = tmp_path / "made.py"
    path.write_text(source)
    monkeypatch.setitem(MODULES, "made", path)
    for cached in (tree, imports):
        cached.cache_clear()
    assert {entry.target for entry in imports("made")} == seen
    assert {entry.function for entry in imports("made")} == ({"made.f"} if "def f" in source else {None})
