"""What is shipped, that it imports from where it is installed, and that importing it stays cheap. No network."""

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("drpo_core", "drpo_torch", "drpo_jax")
# what `import drpo_core` must not import: frameworks, and what only an extra installs
HEAVY = ("torch", "jax", "matplotlib", "rich", "typer", "pyarrow", "safetensors", "hypothesis", "mpmath", "jaxtyping")
IMPORT_ALL = "import drpo_core, drpo_torch, drpo_jax; print(drpo_core.__file__, drpo_torch.__file__, drpo_jax.__file__)"


def run(*command, cwd):
    command = [str(part) for part in command]
    result = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)  # noqa: S603 -- ours
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the distribution is built from, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("drpo_core", "adapters", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    shutil.copytree(ROOT / "tests" / "data", copy / "tests" / "data")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory):
    """(wheel, sdist), the wheel built from the sdist as an index would."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_has_three_packages_at_top_level_and_nothing_else(distributions):
    names = zipfile.ZipFile(distributions[0]).namelist()
    top = {name.split("/")[0] for name in names}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {*PACKAGES, info}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name or "test_" in name]


def _files(root):
    """Those of the checkout: a test that imports from the copy leaves bytecode there."""
    return (file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def test_the_wheel_has_every_module_and_data_file_of_the_checkout(source, distributions):
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    roots = [source / "drpo_core", source / "adapters" / "drpo_torch", source / "adapters" / "drpo_jax"]
    expected = {f.relative_to(root.parent).as_posix() for root in roots for f in _files(root)}
    assert expected <= names
    assert {f"drpo_core/audit/data/gemma3_270m_{n}.npz" for n in ("arithmetic", "teacher_forced_topk")} <= names


def test_the_metadata_needs_numpy_and_the_compat_layer_only(distributions):
    archive = zipfile.ZipFile(distributions[0])
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requires = [line for line in archive.read(metadata).decode().splitlines() if line.startswith("Requires-Dist:")]
    assert sorted(line.split(":")[1].split(">")[0].strip() for line in requires if "extra ==" not in line) == [
        "array-api-compat",
        "numpy",
    ]


def test_the_sdist_has_sources_and_licence(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml", "drpo_core/__init__.py", "adapters/drpo_torch/loss.py"} <= names
    assert "tests/data/reference_losses.npz" in names


def test_the_installed_wheel_imports(distributions, tmp_path):
    """From a folder of its own, ahead of the editable install of this checkout."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", distributions[0], cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {IMPORT_ALL}"
    files = run(sys.executable, "-c", code, cwd=tmp_path).split()
    assert [Path(file).parent for file in files] == [tmp_path / "site" / package for package in PACKAGES]


def test_the_editable_install_imports(source, tmp_path):
    """A fresh environment with this one's packages beneath it, and the copied source installed in place."""
    environment = tmp_path / "environment"
    venv.create(environment, system_site_packages=False, with_pip=False, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    # beneath: the packages of the environment the tests run in, but not its editable install of this checkout
    for path in sys.path:
        if path.endswith("site-packages"):
            with (site / "beneath.pth").open("a") as beneath:
                beneath.write(f"import sys; sys.path.append({path!r})\n")
    python = environment / "bin" / "python"
    options = ("--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(python, "-m", "pip", "install", *options, "--editable", source, cwd=tmp_path)
    # -I: not what PYTHONPATH may lead to
    files = run(python, "-I", "-c", IMPORT_ALL, cwd=tmp_path).split()
    expected = [source / "drpo_core", source / "adapters" / "drpo_torch", source / "adapters" / "drpo_jax"]
    assert [Path(file).parent for file in files] == expected


def imported_with(code):
    """Which of the heavy packages a fresh interpreter has after running the code."""
    listing = f"{code}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    return run(sys.executable, "-c", listing, cwd=ROOT.parent).split()


def test_importing_the_core_imports_no_framework_and_no_extra():
    assert imported_with("import drpo_core") == []


def test_using_the_core_imports_no_framework_and_no_extra():
    use = """
import numpy as np
from drpo_core import DRPO, policy_loss_and_gradient, summarize, token_diagnostics, token_loss_and_gradient, token_mean
x, mask = np.log([[0.5, 0.2]]), np.ones((1, 2), dtype=bool)
loss = token_loss_and_gradient(DRPO(delta=0.5), x, x, np.ones((1, 2)), mask=mask).loss
token_mean(loss, mask)
summarize(token_diagnostics(DRPO(delta=0.5), x, x, np.ones((1, 2)), mask=mask))
policy_loss_and_gradient(DRPO(delta=0.5), x, x, np.ones((1, 2)), mask=mask, engine="arrays")
"""
    assert imported_with(use) == []


@pytest.mark.parametrize("name", ["mpmath", "jaxtyping", "rich"])
def test_the_import_test_can_fail(name):
    assert name in imported_with(f"import {name}\nimport drpo_core")


def test_adapters_is_a_folder_not_a_package():
    """PyPI has an unrelated `adapters`: nothing here may be imported by that name."""
    assert not (ROOT / "adapters" / "__init__.py").exists()
    files = [*ROOT.glob("drpo_core/**/*.py"), *ROOT.glob("adapters/**/*.py"), *ROOT.glob("tests/**/*.py")]
    assert len(files) > 20
    lines = [line.strip() for file in files if file != Path(__file__) for line in file.read_text().splitlines()]
    assert not [line for line in lines if line.startswith(("import adapters", "from adapters"))]


def test_lint_bans_importing_adapters(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("import adapters.drpo_torch\nfrom adapters import drpo_jax\n")
    command = [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", "--select", "TID251", "--no-cache"]
    result = subprocess.run([*command, module], check=False, capture_output=True, text=True, cwd=tmp_path)  # noqa: S603 -- ours
    assert result.returncode == 1
    assert result.stdout.count("TID251") == 2
    module.write_text("import drpo_torch\n")
    run(*command, module, cwd=tmp_path)
