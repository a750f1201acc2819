"""SkyRL on Python 3.11, here and in the processes that tests start; worker.py is one of them."""

import runpy
from pathlib import Path

import pytest

collect_ignore = ["worker.py"]
PYTHON311 = Path(__file__).with_name("python311")

runpy.run_path(str(PYTHON311 / "sitecustomize.py"))


@pytest.fixture(autouse=True, scope="session")
def _python311():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PYTHON311), prepend=":")
        yield
