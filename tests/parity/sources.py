"""Import a file of a framework without the framework: its packages run no `__init__`, and other modules are placeholders."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType


class _Anything(type):
    """A class that stands for any name: to import, subclass, subscript, call or decorate with; false, and no number."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder

    def __call__(cls, *arguments, **keywords):
        if len(arguments) == 1 and not keywords and callable(arguments[0]):
            return arguments[0]
        if cls is Placeholder or vars(cls).get("stands_for_another"):
            return Placeholder
        return super().__call__(*arguments, **keywords)

    def __getitem__(cls, _):
        return Placeholder

    def __iter__(cls):
        return iter(())

    def __bool__(cls):
        return False

    def __or__(cls, _):
        return Placeholder

    __ror__ = __or__


class Placeholder(metaclass=_Anything):
    """What is imported from a module that no loss uses. Arithmetic with it fails."""

    def __init__(self, *_arguments, **_keywords):
        """Accept what a base class would."""


class _PlaceholderModule(ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        # a class each, because no class has one base twice
        return _Anything(name, (Placeholder,), {"stands_for_another": True})


class _Finder:
    """Finds the files of a package, and placeholders."""

    def __init__(self, root, package, placeholders):
        self.root, self.package, self.placeholders = root, package, placeholders

    def find_spec(self, name, _path=None, _target=None):
        """The spec of a module of the package, or of a placeholder."""
        if any(name == each or name.startswith(f"{each}.") for each in self.placeholders):
            return ModuleSpec(name, self, is_package=True)
        if name != self.package and not name.startswith(f"{self.package}."):
            return None
        path = self.root.joinpath(*name.split("."))
        if path.is_dir():
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(path)]
            return spec
        file = path.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file, loader=SourceFileLoader(name, str(file)))

    def create_module(self, spec):
        """A placeholder."""
        return _PlaceholderModule(spec.name)

    def exec_module(self, module):
        """Nothing to run."""


def isolate(package, *, root=None, placeholders=(), values=None):
    """Let the files of a package be imported one by one; `values` are what single placeholders have, by module and name.

    `root` is the folder of the package, by default that of the installed distribution.
    """
    if root is None:
        (location,) = importlib.util.find_spec(package).submodule_search_locations
        root = Path(location).parent
    sys.meta_path.insert(0, _Finder(root, package, tuple(placeholders)))
    for module, names in (values or {}).items():
        vars(importlib.import_module(module)).update(names)


def checkout(framework, commit):
    """The folder of a framework's repository at a commit, which PARITY_SOURCES has: it is in no distribution."""
    folder = os.environ.get("PARITY_SOURCES")
    if folder is None or not (Path(folder) / framework).is_dir():
        msg = (
            f"PARITY_SOURCES: expected a folder with the repository of {framework} at {commit} in {framework}, got {folder!r}"
        )
        raise FileNotFoundError(msg)
    return Path(folder) / framework
