"""One pre-fitted policy for all tests of the study: stopped as early as a reward can be told from 0."""

import pytest
import torch
from study import prefit
from study.task import Task


@pytest.fixture(autouse=True)
def one_thread():
    """As the runner has it: sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling a trainer costs more than the few steps of a test; `test_runner.py` compiles those that it compares."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # in processes that a test starts
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def start():
    """Parameters, and what the pre-fit says of itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = prefit.prefit("dense", 100, Task())
    torch.set_num_threads(threads)
    return found
