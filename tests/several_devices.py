"""Programs that see several JAX devices, which exist only in a process that asks for them at its start."""

import os
import subprocess
import sys

# other tests keep the processors busy: a device that waits for the others must not take them for stuck and end the process
_PATIENCE = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600 --xla_cpu_collective_call_terminate_timeout_seconds=600"


def run(*arguments, devices=4, timeout=300, optimised=False, variables=None):
    """What this interpreter prints, given these arguments. Not optimised: compiling takes most of the time otherwise."""
    flags = f"--xla_force_host_platform_device_count={devices} {_PATIENCE}"
    environment = {**os.environ, **(variables or {}), "JAX_PLATFORMS": "cpu"}
    if not optimised:
        flags += " --xla_backend_optimization_level=0"
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    finished = subprocess.run(  # noqa: S603 -- this interpreter, our own programs
        [sys.executable, *map(str, arguments)],
        env=environment | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout
