"""Results that take a program of their own to make, made by one worker of pytest-xdist for all of them."""

import os

from filelock import FileLock


def made_once(tmp_path_factory, name, make):
    """The path of a file that `make` has written, given a path, in this run of the tests."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = path.with_suffix(".part")
            make(unfinished)
            unfinished.rename(path)
    return path
