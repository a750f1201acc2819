"""The command line: what goes where, and that nothing but one line comes of bad input."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from drpo_core import cli
from drpo_core.audit import plots, rows
from drpo_core.objectives import DPPO, DRPO, OBJECTIVES

# the rows of families that no flag moves
UNMOVED = [row.name for row in rows(delta=[], delta_kl=[], eps=[], max_ratio=[])]
KNOWN = {
    "step0": ("0.00259", "0.00", "0.614", "1.216"),
    "lr1e6_step1": ("0.00557", "0.53", "-1.185", "1.892"),
    "lr1e6_step4": ("0.01427", "2.52", "-4.799", "3.859"),
    "lr1e6_step8": ("0.02691", "3.92", "-5.076", "6.571"),
    "lr2e5_step1": ("0.08465", "12.0", "-4.952", "7.182"),
    "lr2e5_step8": ("0.21753", "27.3", "-5.664", "7.664"),
}


@pytest.fixture
def drpo(monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["drpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return run


def rollouts(path, **more):
    rng = np.random.default_rng(5)
    behavior = -rng.exponential(1.0, (6, 8))
    data = {"log_prob": behavior - rng.random((6, 8)), "behavior_log_prob": behavior, "advantages": rng.normal(size=6)}
    np.savez(path, **(data | more))
    return path


def by_name(report, snapshot):
    return {item["name"]: item for item in report["snapshots"][snapshot]["objectives"]}


def test_the_bundled_rollouts_give_the_known_figures(drpo):
    code, out, err = drpo("audit", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["file"] == "bundled:gemma3_270m_arithmetic.npz"
    assert list(report["snapshots"]) == list(KNOWN)
    for snapshot, (tv, dropped, low, high) in KNOWN.items():
        found = by_name(report, snapshot)
        digits = len(dropped.partition(".")[2])
        dppo, weights = found["DPPO(delta=0.15, divergence='binary_tv')"], found["DRPO(delta=0.15)"]
        assert f"{report['snapshots'][snapshot]['health']['binary_tv_mean']:.5f}" == tv
        assert f"{100 * dppo['dropped_fraction']:.{digits}f}" == dropped
        assert (f"{weights['weight_min']:.3f}", f"{weights['weight_max']:.3f}") == (low, high)


def test_the_json_schema(drpo):
    _, out, _ = drpo("audit", "--json", "--snapshot", "step0", "--at-quantile", "0.02")
    report = json.loads(out, parse_constant=pytest.fail)
    assert list(report) == ["version", "drpo_core", "file", "arrays", "notes", "snapshots"]
    assert report["version"] == 1
    assert report["arrays"] == {
        "log_prob": {"step0": "log_prob_step0"},
        "behavior_log_prob": "behavior_log_prob",
        "advantages": "advantages",
        "mask": "mask",
    }
    snapshot = report["snapshots"]["step0"]
    assert list(snapshot) == ["health", "warnings", "objectives"]
    assert list(snapshot["health"]) == [
        "tokens", "valid_tokens", "masked_tokens", "active_tokens", "diverging_tokens", "masked_nan", "positive_log_prob",
        "infinite", "ratio_mean", "ratio_max", "log_ratio_abs_mean", "k1_mean", "k3_mean", "binary_tv_mean",
        "binary_tv_max", "invalid_fraction", "ratio_standard_error", "active_fraction", "diverging_fraction", "rare_fraction",
    ]  # fmt: skip
    typical, measured = 1 + len(rows()), sum(family.measure is not None for family in OBJECTIVES)
    assert len(snapshot["objectives"]) == typical + measured
    for item in snapshot["objectives"]:
        assert list(item) == [
            "name", "objective", "parameters", "quantile", "warning", "outside_fraction",
            "outside_positive_diverging_fraction", "outside_positive_converging_fraction",
            "outside_negative_diverging_fraction", "outside_negative_converging_fraction", "dropped_fraction",
            "attenuated_fraction", "amplified_fraction", "corrective_fraction", "weight_mean", "weight_min", "weight_max",
            "gradient_mass_kept", "effective_sample_size",
        ]  # fmt: skip
    vacuous = [item["name"] for item in snapshot["objectives"] if item["warning"]]
    assert vacuous == ["DRPO(delta=12.5)"]
    assert [item["quantile"] for item in snapshot["objectives"]] == [None] * typical + [0.02] * measured


def test_the_table(drpo):
    code, out, err = drpo("audit", "--snapshot", "lr2e5_step8")
    assert (code, err) == (0, "")
    assert "bundled:gemma3_270m_arithmetic.npz: lr2e5_step8" in out
    row = next(line for line in out.splitlines() if "DRPO δ=0.15" in line and "Mask" not in line)
    assert re.search(r"0\.00% +31\.79% +40\.94% +27\.27% +-5\.664 … 7\.664 +0\.003 +4\.542", row)
    for text in (
        "6,115 valid of 6,144", "E_μ[r] = 1.2827", "mean |ℓ| = 1.7001", "mean |π − μ| = 0.21753", "7.65% with μ ≤ 0.1",
        "0 NaN", "DRPO δ=12.5 [1]", "[1] DRPO: delta = 12.5 is at least 1",
    ):  # fmt: skip
        assert text in out


def test_a_mean_ratio_below_1_is_explained(drpo, tmp_path):
    page = tmp_path / "a.html"
    _, out, _ = drpo("audit", rollouts(tmp_path / "r.npz"), "--html", page)
    (line,) = [line for line in out.splitlines() if line.startswith("kept:   E_μ[r] = 0.5954 ± ")]
    assert "supports were not recorded" in line
    assert "<dt>kept</dt>" in page.read_text("utf-8")


def test_thresholds_are_lists(drpo, tmp_path):
    path = rollouts(tmp_path / "r.npz")
    options = ("--delta", "0.1,0.2/0.3", "--delta", "0.1", "--eps", "0.3", "--delta-kl", "0.01", "--max-ratio", "2,3")
    _, out, _ = drpo("audit", path, "--json", *options)
    assert list(by_name(json.loads(out), "log_prob")) == [
        "PolicyGradient()", "CISPO(max_ratio=2.0)", "CISPO(max_ratio=3.0)", "PPOClip(eps=0.3)", "SPO(eps=0.3)",
        "DPPO(delta=0.1, divergence='binary_tv')", "DPPO(delta_low=0.2, delta_high=0.3, divergence='binary_tv')",
        "DPPO(delta=0.01, divergence='binary_kl')", "DRPO(delta=0.1)", "DRPO(delta_low=0.2, delta_high=0.3)",
        "MaskDRPO(delta=0.1)", "MaskDRPO(delta_low=0.2, delta_high=0.3)",
        *UNMOVED[:3], "IPO(delta=0.1)", "IPO(delta_low=0.2, delta_high=0.3)", *UNMOVED[3:],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--delta", "x"], "--delta: expected numbers or LOW/HIGH, comma-separated, got 'x'"),
        (["--delta", "0.1,,0.2"], "--delta: expected numbers or LOW/HIGH, comma-separated, got ''"),
        (["--eps", "1/2/3"], "--eps: expected numbers or LOW/HIGH, comma-separated, got '1/2/3'"),
        (["--max-ratio", "1/2"], "--max-ratio: expected numbers, comma-separated, got '1/2'"),
        (["--delta", "0"], "delta: expected a finite number greater than 0, got 0.0"),
        (["--delta", "nan"], "delta: expected a finite number greater than 0, got nan"),
        (["--eps", "-1"], "eps: expected a finite number greater than 0, got -1.0"),
        (["--at-quantile", "1"], "--at-quantile: expected a share between 0 and 1, got 1"),
        (["--plot", "a.bmp"], "--plot: expected a file named .png, .svg, .pdf, got a.bmp"),
        (["--plot", "nowhere/a.png"], "--plot: nowhere/a.png can't be written: no folder nowhere"),
        (["--snapshot", "x"], "no snapshot 'x' (--snapshot); the file has: step0, "),
        (["none.npz"], "none.npz: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(drpo, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = drpo("audit", *options)
    assert (code, out) == (2, "")
    assert err.startswith("drpo audit: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


MINE = """
class Mine:
    def __init__(self, tau=1.0):
        self.tau = tau

    def loss(self, tokens):
        print("a user's print")
        return -tokens.advantages * tokens.ratio

    def weight(self, tokens):
        return 1.0 / (1.0 + self.tau * tokens.ratio)


class Needs(Mine):
    def __init__(self, tau):
        super().__init__(tau)


class NoWeight:
    def loss(self, tokens):
        return tokens.ratio


class Raises(Mine):
    def weight(self, tokens):
        return tokens.ratios


class Shapeless(Mine):
    def weight(self, tokens):
        return 1.0


mine = Mine(tau=3.0)
not_one = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of a user who has objectives of their own."""
    (tmp_path / "own_objectives.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("own_objectives", "_drpo_check_own_objectives"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("own_objectives.py:Mine", "Mine tau=1"),
        ("own_objectives:Mine(tau=2.5)", "Mine tau=2.5"),
        ("own_objectives:mine", "Mine tau=3"),
        ("own_objectives:Needs(tau=4)", "Needs tau=4"),
        ("PPOClip(eps=0.2, dual_clip=3.0)", "PPO-clip ε=0.2 dual_clip=3"),
        (" DRPO( delta = 20 ) ", "DRPO δ=20 [2]"),
    ],
)
def test_an_objective_of_ones_own(drpo, own, text, label):
    rollouts(own / "r.npz")
    code, out, err = drpo("audit", "r.npz", "--objective", text, "--objective", text, "--html", "a.html", "--plot", "a.png")
    assert code == 0
    assert "print" not in out
    assert set(err.splitlines()) <= {"a user's print"}
    last = out.splitlines()[[i for i, line in enumerate(out.splitlines()) if OBJECTIVES[-1].name in line][-1] + 1]
    assert last.strip().startswith(label)
    assert label.partition(" [")[0] in (own / "a.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mine()", f"expected one of {', '.join(sorted({f.objective.__name__ for f in OBJECTIVES}))}, got 'Mine'"),
        ("DRPO", "with its hyper-parameters, such as \"DRPO(delta=0.15)\", or module:NAME, got 'DRPO'"),
        ("DRPO(delta=0)", "DRPO(delta=0): delta: expected a finite number greater than 0"),
        ("DPPO(delta=0.1, divergence='per_token')", "loss raised TypeError: divergence: expected an array, because this"),
        ("own_objectives:Minee", "own_objectives has no Minee; did you mean Mine?"),
        ("own_objectives:", "expected package.module:NAME or path/to/file.py:NAME, got 'own_objectives:'"),
        ("nowhere.py:Mine", "no file nowhere.py"),
        ("own_objectives:Mine(3)", "hyper-parameters are given by name"),
        ("own_objectives:Mine(tau=open('x'))", "expected a Python literal"),
        ("own_objectives:Mine(tau=", "hyper-parameters are given by name"),
        ("own_objectives:Mine(sigma=1)", "own_objectives:Mine(sigma=1): got an unexpected keyword argument 'sigma'"),
        ("own_objectives:mine(tau=1)", "own_objectives:mine is a Mine and takes no hyper-parameters"),
        ("own_objectives:Needs", "own_objectives:Needs: missing 1 required positional argument: 'tau'"),
        ("own_objectives:not_one", "objective: expected methods loss and weight, got int without loss and weight"),
        ("own_objectives:NoWeight", "got NoWeight without weight"),
        ("own_objectives.py:Raises", "(own_objectives.py, line 26, in weight: return tokens.ratios)"),
        ("own_objectives:Shapeless", "Shapeless.weight: expected an array of the tokens' shape, (3,), got float"),
    ],
)  # fmt: skip
def test_what_is_no_objective_is_one_line(drpo, own, text, message):
    rollouts(own / "r.npz")
    code, out, err = drpo("audit", "r.npz", "--objective", text)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line != "a user's print"]
    assert line.startswith("drpo audit: ")
    assert message in line


def test_help_shows_whose_thresholds_a_flag_sets_and_the_defaults(drpo):
    shown = re.sub(r"[│\s]+", " ", drpo("audit", "--help")[1])
    assert "δ of DPPO-TV, DRPO, Mask-DRPO, IPO (default: 0.15,12.5,0.3)" in shown
    assert "ε of PPO-clip, SPO (default: 0.2,0.2/0.28)" in shown
    assert "c of CISPO (default: 5)" in shown


def test_nan_at_a_valid_token(drpo, tmp_path):
    path = rollouts(tmp_path / "r.npz", log_prob=np.full((6, 8), np.nan))
    code, out, err = drpo("audit", path)
    assert (code, out) == (2, "")
    assert err == "drpo audit: log_prob: 48 NaN at valid tokens, the first at index (0, 0)\n"


def test_warnings_go_to_stderr_and_the_figures_to_stdout(drpo, tmp_path):
    path = rollouts(tmp_path / "r.npz", behavior_log_prob=np.full((6, 8), 0.5))
    code, out, err = drpo("audit", path, "--json")
    assert code == 0
    warning = "behavior_log_prob: 48 valid tokens hold a value above 0, which no log-prob has (first at (0, 0))"
    assert err == f"drpo audit: warning: log_prob: {warning}\n"
    assert json.loads(out)["snapshots"]["log_prob"]["warnings"] == [warning]


def test_names_in_brackets_are_not_markup(drpo, tmp_path):
    data = np.load(rollouts(tmp_path / "r.npz"))
    np.savez(tmp_path / "s.npz", **{"log_prob_[red]": data["log_prob"], "mu": data["behavior_log_prob"], "adv": np.ones(6)})
    code, out, _ = drpo("audit", tmp_path / "s.npz", "--behavior-log-prob", "mu")
    assert code == 0
    assert "s.npz: [red]" in out


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_the_plot(drpo, tmp_path, suffix, magic):
    path = tmp_path / f"plot{suffix}"
    code, _, err = drpo("audit", "--snapshot", "lr1e6_step8", "--at-quantile", "0.1", "--plot", path)
    assert (code, err) == (0, "")
    assert path.read_bytes().startswith(magic)


def test_the_plot_has_lines_of_every_colour_for_every_snapshot(drpo, tmp_path):
    path = tmp_path / "plot.png"
    drpo("audit", "--snapshot", "lr1e6_step8", "--snapshot", "lr2e5_step8", "--plot", path)
    pixels = (imread(path)[..., :3] * 255).round().astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    for half in np.array_split(pixels, 2):
        for colour in ("D55E00", "E69F00", "009E73", "56B4E9"):
            assert np.count_nonzero(half == int(colour, 16)) > 100


def test_a_dollar_in_a_name_is_not_mathematics(drpo, tmp_path):
    data = np.load(rollouts(tmp_path / "r.npz"))
    np.savez(tmp_path / "s.npz", **{r"log_prob_$\frac$": data["log_prob"], "mu": data["behavior_log_prob"], "adv": np.ones(6)})
    assert drpo("audit", tmp_path / "s.npz", "--behavior-log-prob", "mu", "--plot", tmp_path / "p.svg")[0] == 0


def test_figures_are_the_same_bytes_every_time(tmp_path):
    for suffix in plots.SUFFIXES:
        written = []
        for i in range(2):
            plots.save(plots.weight_figure(), tmp_path / f"{i}{suffix}")
            written.append((tmp_path / f"{i}{suffix}").read_bytes())
        assert written[0] == written[1]
    assert b"dc:date" not in (tmp_path / "0.svg").read_bytes()
    with pytest.raises(ValueError, match=r"expected a file named \.png, \.svg, \.pdf, got \.bmp"):
        plots.save(plots.weight_figure(), tmp_path / "a.bmp")


def test_the_weight_figure_draws_the_weights():
    figure = plots.weight_figure([DPPO(delta=0.2), DRPO(delta=0.2)], behavior_probs=[0.3], advantage=-1.0)
    dppo, drpo_line = (figure.axes[0].get_lines()[i] for i in (1, 2))
    pi, weight = dppo.get_data()
    np.testing.assert_array_equal(weight, np.where(pi < 0.1, 0.0, 1.0))
    np.testing.assert_allclose(drpo_line.get_ydata(), 1 + (pi - 0.3) / 0.2, atol=1e-9)


def run_python(code, *arguments):
    return subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, encoding="utf-8"
    )


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib", "pyarrow", "safetensors"])
def test_without_the_extra_it_says_how_to_install_it(tmp_path, missing):
    for suffix in ("parquet", "safetensors"):
        (tmp_path / f"r.{suffix}").touch()
    file = {"pyarrow": ["r.parquet"], "safetensors": ["r.safetensors"], "matplotlib": ["--plot", "a.png"]}.get(missing, [])
    code = f"import sys; sys.modules[{missing!r}] = None; from drpo_core import cli; cli.main()"
    found = run_python(f"import os; os.chdir({str(tmp_path)!r}); " + code, "audit", *file)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"drpo: {missing} is not installed: pip install 'drpo-core[cli]'\n"


def test_another_missing_module_is_not_hidden(monkeypatch):
    def broken():
        raise ModuleNotFoundError(name="richer")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


def test_a_plot_that_can_not_be_written(drpo, tmp_path):
    (tmp_path / "a.svg").mkdir()
    code, out, err = drpo("audit", "--snapshot", "step0", "--plot", tmp_path / "a.svg")
    assert (code, out) == (2, "")
    assert err == f"drpo audit: --plot: {tmp_path / 'a.svg'} can't be written: Is a directory\n"


def test_importing_the_package_imports_no_cli_library():
    code = (
        "import sys, drpo_core, drpo_core.cli, drpo_core.audit.explorer, drpo_core.audit.page; "
        "print(sorted({'matplotlib', 'pyarrow', 'rich', 'safetensors', 'typer', 'click'} & set(sys.modules)))"
    )
    assert run_python(code).stdout == "[]\n"
    assert run_python(code.replace("import sys,", "import typer, sys,")).stdout != "[]\n"


def test_a_terminal_without_greek():
    code = "import sys; sys.stdout.reconfigure(encoding='ascii'); from drpo_core import cli; cli.main()"
    found = run_python(code, "audit", "--snapshot", "step0")
    assert (found.returncode, found.stderr) == (0, "")
    assert "DRPO ?=0.15" in found.stdout


def test_the_installed_command_and_its_help(drpo):
    code, out, _ = drpo("--help")
    assert code == 0
    assert "audit" in out
    code, out, _ = drpo("audit", "--help")
    assert code == 0
    for flag in ("--delta", "--eps", "--at-quantile", "--snapshot", "--json", "--plot", "--mask"):
        assert flag in out
    assert drpo("audit", "--nope")[0] == 2


DOCS = Path(__file__).parents[2] / "docs" / "audit.md"
OWN_OBJECTIVE = re.search(
    r"```python\n(.*?)```", (DOCS.parent / "how-to" / "add-an-objective.md").read_text("utf-8"), re.DOTALL
)[1]
EXAMPLES = re.findall(r"```console\n\$ drpo (.*)\n((?:.*\n)*?)```", DOCS.read_text("utf-8"))


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_the_examples_of_the_documentation(drpo, monkeypatch, tmp_path, command, shown):
    monkeypatch.chdir(tmp_path)
    rollouts(tmp_path / "rollouts.npz")
    (tmp_path / "soft_mask.py").write_text(OWN_OBJECTIVE, "utf-8")
    code, out, err = drpo(*shlex.split(command))
    assert code == (2 if shown.startswith("drpo audit:") else 0)
    # columns are as wide as the widest of all tables
    printed = {tuple(line.split()) for line in (out + err).splitlines() if "─" not in line}
    for line in shown.splitlines():
        assert "─" in line or line == "…" or tuple(line.split()) in printed


def test_the_documentation_has_examples_and_every_flag_and_key(drpo):
    assert len(EXAMPLES) >= 5
    text = DOCS.read_text("utf-8")
    flags = set(re.findall(r"--[a-z-]+", drpo("audit", "--help")[1]))
    assert flags - {"--help"} == {flag for flag in flags if f"`{flag}" in text}
    report = json.loads(drpo("audit", "--json", "--snapshot", "step0")[1])
    found = report["snapshots"]["step0"]
    for key in (*report, *found, *found["health"], *found["objectives"][0]):
        assert f"`{key}`" in text or key.startswith("outside_")
