"""The scorecard, the integrations and the benchmarks: pinned public releases, each in its own environment.

``pipx run nox -s scorecard`` (nox ≥ 2024.10, Python 3.11) makes the environments, runs the kit in each and writes
docs/scorecard.md. One environment is about 1.4 GB and a few minutes; ``nox -s scorecard-verl scorecard-write`` runs one
of them again and rewrites the page from the results of all. ``nox -s integration-verl`` runs the tests of an integration
against the framework itself. ``nox -s parity`` compares named modes with the frameworks' own functions and writes
docs/data/parity, which docs/reference/named-modes.md shows; ``nox -s parity-verl`` compares those of one. Frameworks that no
distribution has are read from the folder PARITY_SOURCES, which has a repository of each. ``nox -s benchmarks`` times the
library beside its peers and writes docs/benchmarks.md.
``nox -s docs`` builds the site and opens it in a browser.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

FRAMEWORKS = ("drpo", "verl", "trl", "torchrl", "skyrl")
HERE = Path(__file__).parent / "tests" / "scorecard"
INTEGRATIONS = ("skyrl", "tinker", "torchrl", "trl", "tunix", "verl")
WITHOUT_TORCH = ("tunix",)
TESTS = Path(__file__).parent / "tests" / "integrations"
PARITY = (
    "areal", "ms_swift", "nemo_rl", "open_instruct", "openrlhf", "prime_rl", "roll", "skyrl", "slime", "tinker",
    "torchrl", "trl", "tunix", "verl",
)  # fmt: skip
# without what they depend on: their losses need torch alone
BARE = {"areal": "areal==1.0.4", "ms_swift": "ms-swift==4.6.0", "openrlhf": "openrlhf==0.11.2"}
# in no distribution, or not in the version that the modes follow
FROM_SOURCES = ("nemo_rl", "open_instruct", "prime_rl", "roll", "skyrl", "slime")

nox.options.sessions = ["scorecard"]


def _results(session: nox.Session) -> Path:
    return session.cache_dir / "scorecard"


@nox.session(venv_backend="none")
def scorecard(session: nox.Session) -> None:
    """Run the kit on every release, then write docs/scorecard.md."""
    for old in _results(session).glob("*.json"):
        old.unlink()
    for framework in FRAMEWORKS:
        session.notify(f"scorecard-{framework}")
    session.notify("scorecard-write")


def _run(session: nox.Session, framework: str) -> None:
    # torch first and pinned: a bare torch fetches gigabytes of CUDA, and what follows must not replace it
    session.install("-c", "constraints.txt", "torch==2.13.0")
    # complete lists, so nothing is resolved; verl and SkyRL get what importing their losses needs, not all they declare
    session.install("--no-deps", "-r", str(HERE / "requirements" / f"{framework}.txt"))
    session.install("--no-deps", "-e", ".")
    output = _results(session) / f"{framework}.json"
    session.run(
        "python", str(HERE / "run.py"), framework, str(output), env={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    )


for _framework in FRAMEWORKS:

    @nox.session(name=f"scorecard-{_framework}", python="3.11", venv_backend="venv")
    def _session(session: nox.Session, framework: str = _framework) -> None:
        """Run the kit on one release."""
        _run(session, framework)


for _name in INTEGRATIONS:

    @nox.session(name=f"integration-{_name}", python="3.11", venv_backend="venv")
    def _integration(session: nox.Session, name: str = _name) -> None:
        """Test an integration against the pinned release of its framework."""
        if name not in WITHOUT_TORCH:
            session.install("-c", "constraints.txt", "torch==2.13.0")
        session.install("--no-deps", "-r", str(TESTS / name / "requirements.txt"))
        session.install("--no-deps", "-e", ".")
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        # the root is here, or the folder tests/integrations/trl is imported as the package trl and hides TRL's
        options = ("-c", str(TESTS / "pytest.ini"), "--rootdir", ".", "--confcutdir", str(TESTS))
        session.run("pytest", *options, str(TESTS / name), env=environment)


@nox.session(venv_backend="none")
def parity(session: nox.Session) -> None:
    """Compare the modes of every framework with its own functions."""
    for framework in PARITY:
        session.notify(f"parity-{framework}")


for _name in PARITY:

    @nox.session(name=f"parity-{_name}", python="3.11", venv_backend="venv")
    def _parity(session: nox.Session, name: str = _name) -> None:
        """Compare the modes of one framework with its own functions; docs/data/parity has what was found."""
        if name in FROM_SOURCES and "PARITY_SOURCES" not in os.environ:
            session.skip(f"PARITY_SOURCES: expected a folder with the repository of {name} in {name}")
        if name not in WITHOUT_TORCH:
            session.install("-c", "constraints.txt", "torch==2.13.0")
        folder = TESTS / name if name in INTEGRATIONS else Path("tests") / "parity"
        session.install("--no-deps", "-r", str(folder / "requirements.txt"))
        if name in BARE:
            session.install("--no-deps", BARE[name])
        session.install("--no-deps", "-e", ".")
        # what frameworks compile runs eagerly
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        session.run("python", "tests/parity/run.py", name, "docs/data/parity", env=environment)


@nox.session(name="scorecard-write", venv_backend="none")
def write(session: nox.Session) -> None:
    """Write docs/scorecard.md from the results."""
    session.run("python3", str(HERE / "write.py"), str(_results(session)), "docs/scorecard.md", external=True)


@nox.session(python="3.11", venv_backend="venv")
def docs(session: nox.Session) -> None:
    """Build the site into build/site and test it in Chromium, which must be installed, as must Node.js."""
    session.install("-c", "constraints.txt", "torch==2.13.0")
    session.install("-c", "constraints.txt", "-e", ".[dev,docs]")
    session.run("python", "docs/build.py")
    session.run("pytest", "tests/site")


@nox.session(python="3.11", venv_backend="venv")
def benchmarks(session: nox.Session) -> None:
    """Time this library beside its peers, then write docs/benchmarks.md: ``nox -s benchmarks -- --only tokens``."""
    here = Path("benchmarks")
    results = session.cache_dir / "benchmarks"
    session.install("-c", "constraints.txt", "torch==2.13.0")
    # verl and TRL pin different versions of what neither's measured functions use: verl's list, then what it lacks
    session.install("--no-deps", "-r", str(HERE / "requirements" / "verl.txt"))
    session.install("--no-deps", "-r", str(here / "requirements.txt"))
    session.install("--no-deps", "-e", ".")
    session.run("python", str(here / "run.py"), str(results), *session.posargs)
    session.run("python", str(here / "write.py"), str(results), "docs/benchmarks.md")
