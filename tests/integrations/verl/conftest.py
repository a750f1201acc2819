"""worker.py runs in a process of its own, in the environment that has verl."""

collect_ignore = ["worker.py"]
