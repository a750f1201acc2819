"""No tests here: `tests/test_mutants.py` runs the mutants."""

collect_ignore_glob = ["*.py"]
