"""Only what is committed is tested here: the other modules need a framework and run in its environment (see noxfile.py)."""

collect_ignore_glob = ["compare_*.py", "measure.py", "run.py", "sources.py", "tensors.py"]
