"""The benchmarks' command runs and its page has its tables; how long anything takes is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

HERE = Path(__file__).parents[1] / "benchmarks"


def run(*arguments):
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment)  # noqa: S603 -- the command itself


def test_the_command_leaves_seconds_of_every_round_and_the_page_shows_them(tmp_path):
    run(HERE / "run.py", tmp_path, "--only", "smoke")
    result = json.loads((tmp_path / "smoke.json").read_text(encoding="utf-8"))
    assert result["machine"]["threads"] == 1
    (case,) = result["cases"]
    rounds = {len(seconds) for seconds in case["seconds"].values()}
    assert len(rounds) == 1
    assert rounds.pop() >= 3
    assert all(second > 0 for seconds in case["seconds"].values() for second in seconds)
    (tmp_path / "named.json").write_text(json.dumps(result | {"group": "named"}), encoding="utf-8")
    run(HERE / "write.py", tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "<!--" not in page
    assert "| torch auto |" in page
