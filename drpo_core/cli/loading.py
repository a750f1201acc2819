"""Get hold of what a user names as package.module:NAME or path/to/file.py:NAME."""

import difflib
import importlib
import importlib.util
import linecache
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from drpo_core.cli.usage import UsageError

__all__ = ["Loaded", "load", "user_line"]

LIBRARIES = ("drpo_core", "drpo_torch", "drpo_jax", "torch", "jax", "numpy", "hypothesis", "_pytest")


@dataclass(frozen=True)
class Loaded:
    """An object of a user's module, and where it was found."""

    thing: object
    module: ModuleType
    place: str
    path: str
    is_file: bool

    @property
    def file(self) -> str | None:
        """The module's file, if it has one."""
        return getattr(self.module, "__file__", None)


def load(text: str, wanted: str = "function") -> Loaded:
    """Import the module or run the file, and look up the name; `wanted` says what for, in messages."""
    place, colon, path = text.rpartition(":")
    if not (place and colon and path):
        msg = f"expected package.module:{wanted} or path/to/file.py:{wanted}, got {text!r}"
        raise UsageError(msg)
    is_file = place.endswith(".py") or "/" in place
    module = _module_of_file(Path(place)) if is_file else _module(place)
    thing: object = module
    for part in path.split("."):
        if not hasattr(thing, part):
            raise UsageError(_no_attribute(place, module, path))
        thing = getattr(thing, part)
    return Loaded(thing, module, place, path, is_file)


def user_line(error: BaseException, file: str | None) -> str:
    """Return the last line of the user's own in a traceback."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [entry for entry in frames if file is not None and entry[0].f_code.co_filename == file]
    foreign = [entry for entry in frames if str(entry[0].f_globals.get("__name__")).partition(".")[0] not in LIBRARIES]
    frame, line = (own or foreign or frames)[-1]
    code = frame.f_code
    text = linecache.getline(code.co_filename, line).strip()
    return f"{Path(code.co_filename).name}, line {line}, in {code.co_name}: {text}"


def _no_attribute(place: str, module: ModuleType, path: str) -> str:
    close = difflib.get_close_matches(path, [name for name in vars(module) if not name.startswith("__")], n=1)
    return f"{place} has no {path}" + (f"; did you mean {close[0]}?" if close else "")


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with _import_errors(name):
        return importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        msg = f"no file {path}"
        raise UsageError(msg)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # named like a script's module, unless that would replace, or be taken for, a module of the same name
    taken = path.stem in sys.stdlib_module_names or path.stem in sys.modules
    name = f"_drpo_check_{path.stem}" if taken or not path.stem.isidentifier() else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"{path} is not a Python file"
        raise UsageError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _import_errors(str(path)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _import_errors(what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name is not None and (what == missing.name or what.startswith(f"{missing.name}.")):
            msg = f"no module named {missing.name!r}, here or among the installed packages"
        else:
            msg = f"{what} can't be imported: {missing}"
        raise UsageError(msg) from missing
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = getattr(error, "lineno", None) or where.lineno
        file = getattr(error, "filename", None) or where.filename
        msg = f"{what} can't be imported: {type(error).__name__}: {error} ({Path(str(file)).name}, line {line})"
        raise UsageError(msg) from error
