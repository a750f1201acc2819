"""No tests here: `tests/core/testing/test_mutants.py` runs the mutants."""

collect_ignore_glob = ["*.py"]
