"""Work on torch's threads: all of it is done once, by any of the ways, and errors arrive."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from drpo_torch.engines.threads import in_threads

WAYS = ["torch's", "a pool's"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    scope = inspect.unwrap(in_threads).__globals__
    if request.param == "a pool's":
        monkeypatch.setitem(scope, "_openmp", lambda: None)
    elif scope["_openmp"]() is None:
        pytest.skip("this torch has no GNU OpenMP")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_index_is_covered_once(count, threads):
    done = []
    in_threads(lambda first, last: done.extend(range(first, last)), count, threads)
    assert sorted(done) == list(range(count))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_arrives(threads):
    def run(first, _last):
        if first == 0:
            msg = "no"
            raise KeyError(msg)

    with pytest.raises(KeyError, match="no"):
        in_threads(run, 9, threads)


def test_torch_has_gnu_openmp_on_linux():
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("another platform, or torch without OpenMP")
    assert in_threads.__globals__["_openmp"]() is not None


def test_fewer_threads_than_asked_for_do_all_of_the_work():
    script = (
        "import torch\nfrom drpo_torch.engines.threads import in_threads\ndone = []\n"
        "in_threads(lambda first, last: done.extend(range(first, last)), 100, 4)\nprint(sorted(done) == list(range(100)))"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script], env=os.environ | {"OMP_THREAD_LIMIT": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
