"""The loss that a user named, and how a snippet gets hold of it."""

from dataclasses import dataclass
from pathlib import Path

from drpo_core.cli.loading import Loaded, load

__all__ = ["Target", "find"]

TAKEN = ("function", "evaluate", "batch", "batches", "names", "np", "sys", "runpy", "torch", "jax", "jnp")
"""Names that a snippet gives to other things before it calls the loss."""


@dataclass(frozen=True)
class Target:
    """The loss that a user named. In a snippet, `expression` is that loss once the statements `imports` have run."""

    thing: object
    label: str
    file: str | None
    search_path: str
    imports: str
    expression: str


def find(text: str) -> Target:
    """Load the target."""
    loaded = load(text)
    search_path = _search_path(loaded)
    imports, expression = _import_source(loaded, search_path)
    return Target(loaded.thing, loaded.path, loaded.file, search_path, imports, expression)


def _search_path(loaded: Loaded) -> str:
    """Return statements that let a snippet import the module, if it isn't installed."""
    file = loaded.file
    here = file is not None and Path(file).is_relative_to(Path.cwd()) and "site-packages" not in file
    folder = str(Path(loaded.place).parent) if loaded.is_file else "." if here else None
    return "" if folder is None else f"import sys\n\nsys.path.insert(0, {folder!r})\n\n"


def _import_source(loaded: Loaded, search_path: str) -> tuple[str, str]:
    """Return statements that import the target, and the expression that then is the target."""
    place = loaded.place
    first, dot, rest = loaded.path.partition(".")
    own = f"loss_{first}" if first in TAKEN else first
    if loaded.is_file and not Path(place).stem.isidentifier():
        return f"import runpy\n\n{own} = runpy.run_path({place!r})[{first!r}]", f"{own}{dot}{rest}"
    name = Path(place).stem if loaded.is_file else place
    return f"{search_path}from {name} import {first if own == first else f'{first} as {own}'}", f"{own}{dot}{rest}"
