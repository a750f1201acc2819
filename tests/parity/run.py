"""Compare a framework's modes with its own functions: ``python tests/parity/run.py verl docs/data/parity``.

Runs in the framework's own environment, which ``nox -s parity-verl`` makes, writes ``verl.json``, and fails where a difference
is no rounding.
"""

import argparse
import json
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/modes", "tests/parity", "docs/_ext")]

from measure import LIMITS, Difference, difference, made  # noqa: E402 -- found through the line above
from named_modes import rows  # noqa: E402

from drpo_core import modes  # noqa: E402


def main() -> None:
    """Write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", help="a module compare_<framework> beside this file")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    # deprecations inside the frameworks are not what is measured
    warnings.simplefilter("ignore")
    framework = arguments.framework
    compared = import_module(f"compare_{framework}")
    precision = getattr(compared, "PRECISION", "float64")
    result = {
        "framework": framework,
        "release": getattr(compared, "RELEASE", None) or version(compared.PACKAGES[0]),
        "function": compared.FUNCTION,
        "precision": precision,
        "packages": {name: version(name) for name in compared.PACKAGES},
        "placeholders": list(getattr(compared, "PLACEHOLDERS", ())),
        "modes": [measured(compared, row, LIMITS[precision]) for row in rows() if row.framework == framework],
    }
    text = json.dumps(result, ensure_ascii=False, indent=1)
    (arguments.folder / f"{framework}.json").write_text(text + "\n", encoding="utf-8")


def measured(compared, row, limit):
    """One mode: at the call that the docs show, and at the module's settings."""
    found = Difference()
    own_value = getattr(compared, "own_value", lambda _name, _keys: False)
    settings = [row.keys, *({**row.keys, **keys} for name, keys in compared.SETTINGS if name == row.name)]
    for keys in settings:
        mode = made(getattr(modes, row.framework), row.names, keys)
        try:
            theirs = compared.theirs(row.name, keys)
            value = not own_value(row.name, keys)
            difference(mode, theirs, found, value=value, limit=limit)
            found.check(limit)
        except Exception as error:
            error.add_note(f"{row.framework} {row.name} {keys}")
            raise
    print(f"{row.call}: {found}", flush=True)  # noqa: T201
    formula = row.name in getattr(compared, "FORMULAS", ())
    return {
        "name": row.name,
        "compared": "formula" if formula else "ran",
        "settings": found.settings,
        "cases": found.cases,
        "loss": rounded(found.loss),
        "gradient": rounded(found.gradient),
        "empty": sorted(found.empty),
    }


def rounded(number):
    """One digit: more are not the same on each machine."""
    return None if number is None else float(f"{number:.0e}")


if __name__ == "__main__":
    main()
