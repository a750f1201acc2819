"""Build the site, warnings as errors: ``python docs/build.py [FOLDER]``; then open build/site/index.html.

Needs the extra `docs` and Node.js with npm, from which KaTeX comes with its fonts, in the version that package-lock.json pins.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"


def fetch_katex() -> None:
    """Put KaTeX, its style sheet and fonts into build/katex, unless the pinned version is there."""
    folder = BUILD / "katex"
    lock = HERE / "package-lock.json"
    if (folder / "package-lock.json").is_file() and (folder / "package-lock.json").read_bytes() == lock.read_bytes():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", folder)
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("docs/build.py: npm is not installed (Debian: apt-get install nodejs npm)")
    # the lock file goes last: it says that the rest is there
    shutil.copy(lock, folder)
    try:
        subprocess.run([npm, "ci", "--silent", "--ignore-scripts"], cwd=folder, check=True)  # noqa: S603 - ours
    except subprocess.CalledProcessError:
        (folder / "package-lock.json").unlink()
        raise


def main() -> int:
    """Fetch KaTeX, check the spelling, run sphinx-build with warnings as errors."""
    fetch_katex()
    target = sys.argv[1] if len(sys.argv) > 1 else str(BUILD / "site")
    pages = [*sorted(str(page) for page in HERE.rglob("*.md")), str(HERE.parent / "README.md")]
    # MIS: masked importance sampling
    spelling = [sys.executable, "-m", "codespell_lib", "-L", "mis", *pages]
    site = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-a", "-b", "html", str(HERE), target]
    for command in (spelling, site):
        code = subprocess.run(command, check=False).returncode  # noqa: S603 - ours
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
