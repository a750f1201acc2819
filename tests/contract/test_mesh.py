"""Sharded JAX arrays: every function on four devices gives what it gives on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter


def test_every_function_on_four_devices(ledger):
    # compiling takes all the time, so compile without optimisation
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(  # noqa: S603 -- this interpreter, a module of ours
        [sys.executable, "-W", "ignore", "-m", "contract.mesh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    ledger(Counter(held=found["ran"] - len(found["failures"])))
    assert not found["failures"], "\n".join(found["failures"])
