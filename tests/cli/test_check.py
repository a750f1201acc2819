"""`drpo check`, through the command itself: what it prints, what it returns, and that what it prints is true."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drpo_core import cli
from drpo_core.cli.objective import parse_objective
from drpo_core.objectives import PSPO
from drpo_core.testing.checks import CHECKS

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"(P\d+) +(check_\w+) +(passed|failed|not applicable|expected failure|unexpected pass)(?:: (.*))?$", re.MULTILINE
)
SNIPPET = re.compile(r"^# reproduces (P\d+) (check_\w+)\n(.*?)^# end of \2$", re.MULTILINE | re.DOTALL)

EXAMPLE = [
    *("--objective", "DPPO(delta=0.25)", "--reduction", "token_mean", "--returns", "tuple-first"),
    *("--map", "log_prob=logprobs", "--map", "behavior_log_prob=rollout_logprobs"),
    *("--map", "mask=response_mask", "--map", "normalizer=num_items_in_batch", "--profile", "ci"),
]
WRONG = ["docs/examples/wrong_loss.py:policy_loss", *EXAMPLE]
RIGHT = ["docs/examples/right_loss.py:policy_loss", *EXAMPLE]

# mistake → what finds it
MASK_MULTIPLIED_IN = {"check_masked_inputs_are_inert"}
P1 = [name for name, info in CHECKS.items() if info.property == "P1"]
STRICT_BOUNDARY = {"check_boundary_is_kept"}
LOCAL_DENOMINATOR = {"check_micro_batches_sum_to_the_batch"}

NUMPY_LOSS = """
    import numpy as np

    def loss(log_prob, behavior_log_prob, advantages, mask):
        print("a user's print")
        ratio = np.exp(np.where(mask, log_prob - behavior_log_prob, 0.0))
        return np.where(mask, -advantages * ratio, 0.0)
"""


def run(*arguments):
    """The command in this process: exit code, stdout, stderr."""
    result = CliRunner().invoke(cli.app(), ["check", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def python(*arguments):
    """Another interpreter: the finished process."""
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)  # noqa: S603


def failing(source):
    """Execute a snippet here: what it raises."""
    sys.modules.pop("mine", None)
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        exec(compile(source, "snippet", "exec"), {})  # noqa: S102 -- to see it fail
    return raised.value


def statuses(text):
    return {check: status for _, check, status, _ in LINE.findall(text)}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("mine", "stubs", "broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def write(tmp_path):
    """A file of the user's: its path."""

    def write(source, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def wrong():
    """What the command says of the wrong loss."""
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        return run(*WRONG)
    finally:
        os.chdir(here)


# ---- the loss written wrong for the docs


def test_the_wrong_loss_fails_where_its_three_mistakes_are(wrong):
    code, out, err = wrong
    assert (code, err) == (1, "")
    found = statuses(out)
    assert list(found) == list(CHECKS)
    failed = {name for name, status in found.items() if status == "failed"}
    assert failed == MASK_MULTIPLIED_IN | STRICT_BOUNDARY | LOCAL_DENOMINATOR
    counts = [list(found.values()).count(status) for status in ("passed", "failed", "not applicable")]
    assert out.splitlines()[-1] == "{} passed, {} failed, {} not applicable".format(*counts)
    # every failure comes with what was found and a case; every property that does not apply, with the reason
    assert out.count("  found: ") == out.count("  counterexample: TokenBatch(") == out.count("  states: ") == len(failed)
    assert all(reason for _, _, status, reason in LINE.findall(out) if status == "not applicable")


def test_each_snippet_of_the_report_fails_alone_and_not_for_the_mended_loss(wrong, tmp_path):
    snippets = {name: source for _, name, source in SNIPPET.findall(wrong[1])}
    assert snippets.keys() == MASK_MULTIPLIED_IN | STRICT_BOUNDARY | LOCAL_DENOMINATOR
    for name, source in snippets.items():
        (tmp_path / f"wrong_{name}.py").write_text(source, encoding="utf-8")
        (tmp_path / f"right_{name}.py").write_text(source.replace("wrong_loss", "right_loss"), encoding="utf-8")
    alone = python(tmp_path / "wrong_check_boundary_is_kept.py")
    assert alone.returncode == 1
    assert "AssertionError: a token exactly on the boundary" in alone.stderr
    # the others in one process, which imports torch once
    program = """
        import pathlib, runpy, sys
        for path in sorted(pathlib.Path(sys.argv[1]).glob("*_check_*.py")):
            try:
                runpy.run_path(str(path))
                print(path.stem, "passes")
            except AssertionError as error:
                print(path.stem, "fails")
    """
    together = python("-c", textwrap.dedent(program), tmp_path)
    assert set(together.stdout.splitlines()) == {
        line for name in snippets for line in (f"wrong_{name} fails", f"right_{name} passes")
    }


def test_the_mended_loss_passes_all_that_applies():
    """In a process of its own, as a user runs it."""
    done = python("-m", "drpo_core.cli", "check", *RIGHT, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout, parse_constant=pytest.fail)
    assert report["ok"] is True
    assert {result["status"] for result in report["results"]} == {"passed", "not applicable"}
    assert report["counts"]["passed"] > report["counts"]["not applicable"]


def test_the_docs_show_what_the_command_prints(wrong):
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    shown = page.partition("drpo check docs/examples/wrong_loss.py")[2]
    assert LINE.findall(shown.partition("```text\n")[2].partition("\n```")[0]) == LINE.findall(wrong[1])
    assert f"\n{wrong[1].splitlines()[-1]}\n" in shown
    for flag in (flag for flag in WRONG if flag.startswith("--") and flag != "--no-snippets"):
        assert flag in shown


def test_the_docs_quote_the_wrong_loss():
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    quoted = textwrap.indent(page.partition("```py\n")[2].partition("```")[0], "    ", predicate=str.strip)
    assert quoted in (ROOT / "docs" / "examples" / "wrong_loss.py").read_text(encoding="utf-8")
    assert all(f"# mistake {number}" in quoted for number in (1, 2, 3))


def test_the_docs_list_every_check_in_its_own_words():
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| P\d+ \|", line)]
    assert rows == [f"| {info.property} | `{info.name}` | {info.statement} |" for info in CHECKS.values()]
    assert {info.property for info in CHECKS.values()} == {f"P{n}" for n in range(1, 28)}


# ---- targets


def test_a_numpy_loss_needs_no_flags(write):
    code, out, err = run(f"{write(NUMPY_LOSS)}:loss", "--property", "P1", "--property", "check_on_policy_gradient")
    assert code == 0
    assert "numpy, no objective, ratio form, reduction none" in out
    assert statuses(out) == dict.fromkeys([*P1, "check_on_policy_gradient"], "passed")
    assert "a user's print" not in out
    assert "a user's print" in err


def test_a_jax_loss_with_jit_and_a_mask_applied_too_late(write):
    source = """
        import functools

        import jax
        import jax.numpy as jnp

        @functools.partial(jax.jit, static_argnames="delta")
        def loss(logits_lp, old_lp, advantages, *, mask, delta):
            ratio = jnp.exp(logits_lp - old_lp)
            weight = 1.0 - jnp.sign(advantages) * (jnp.exp(logits_lp) - jnp.exp(old_lp)) / delta
            return jnp.where(mask, -advantages * jax.lax.stop_gradient(weight) * ratio, 0.0)
    """
    code, out, _ = run(
        f"{write(source)}:loss", "--objective", "DRPO(delta=0.5)", "--form", "score", "--set", "delta=0.5",
        *("--map", "log_prob=logits_lp", "--map", "behavior_log_prob=old_lp"),
        *("--property", "P1", "--property", "P10", "--property", "P18"),
    )  # fmt: skip
    assert code == 1
    assert statuses(out) == {
        "check_masked_inputs_are_inert": "failed",
        "check_nan_at_a_valid_token_is_not_hidden": "passed",
        "check_weight_bounds": "passed",
        "check_weight_is_continuous": "passed",
    }
    assert "masked inputs" in str(failing(SNIPPET.search(out)[3]))


@pytest.mark.parametrize(("returns", "extra"), [("loss+gradient", ""), ("loss+gradient+weight", ", weight")])
def test_a_loss_that_returns_its_gradient_from_a_module_here(write, monkeypatch, returns, extra):
    source = f"""
        from drpo_core import DRPO, token_loss_and_gradient

        def loss(x, b, a, keep):
            loss, gradient, weight = token_loss_and_gradient(DRPO(delta=0.15), x, b, a, mask=keep)
            return loss, gradient{extra}
    """
    path = write(source, f"own_gradient_{len(extra)}.py")
    monkeypatch.chdir(path.parent)
    maps = [f"--map={pair}" for pair in ("log_prob=x", "behavior_log_prob=b", "advantages=a", "mask=keep")]
    code, out, _ = run(
        f"{path.stem}:loss", "--framework", "numpy", "--objective", "DRPO(delta=0.15)", "--returns", returns, *maps,
        *("--property", "P3", "--property", "P14", "--property", "p20"),
    )  # fmt: skip
    assert code == 0
    assert "failed" not in statuses(out).values()


def test_a_declaration_in_the_users_own_module(write):
    source = """
        import numpy as np
        from drpo_core import PolicyGradient
        from drpo_core.testing import from_function

        def loss(lp, behavior_log_prob, advantages, mask):
            ratio = np.exp(lp - behavior_log_prob) * mask
            return -advantages * ratio

        MINE = from_function(loss, objective=PolicyGradient(), arguments={"log_prob": "lp"})
    """
    path = write(source)
    code, out, _ = run(f"{path}:MINE", "--property", "P1", "--property", "P14")
    assert code == 1
    assert out.startswith(f"{path}:MINE: PolicyGradient(), ratio form, reduction none\n")
    assert statuses(out) == dict(zip([*P1, "check_weight_symmetries"], ["failed", "passed", "not applicable"], strict=True))
    snippet = path.with_name("snippet.py")
    snippet.write_text(SNIPPET.search(out)[3], encoding="utf-8")
    assert "AssertionError: masked inputs of nan are inert" in python(snippet).stderr
    assert run(f"{path}:MINE", "--reduction", "sum")[::2] == (
        2,
        f"drpo check: {path}:MINE is an Implementation and declares itself: leave out --reduction\n",
    )


@pytest.mark.parametrize(
    ("annotation", "imports", "guess"),
    [
        ("torch.Tensor", "import torch\nimport numpy as np", "torch"),
        ("'jax.Array'", "import numpy as np", "jax"),
        ("'np.ndarray'", "import numpy as np\nimport torch", "numpy"),
        ("float", "import jax.numpy as jnp", "jax"),
        ("float", "from torch import exp", None),
        ("float", "import torch\nimport jax", None),
    ],
)
def test_the_framework_is_guessed_or_asked_for(write, annotation, imports, guess):
    source = f"{imports}\n\ndef loss(log_prob: {annotation}, behavior_log_prob, advantages, mask):\n    return log_prob\n"
    code, out, err = run(f"{write(source)}:loss", "--property", "P24")
    if guess is None:
        assert code == 2
        assert err.endswith("loss: which framework is it written in? --framework numpy, torch or jax\n")
    else:
        assert f": {guess}, no objective" in out


def test_a_reduced_numpy_loss_is_allowed_the_rounding_of_its_differences(write):
    source = """
        import numpy as np

        def loss(log_prob, behavior_log_prob, advantages, mask):
            ratio = np.exp(np.where(mask, log_prob - behavior_log_prob, 0.0))
            return np.where(mask, -advantages * ratio, 0.0).sum() / max(mask.sum(), 1)
    """
    flags = ["--objective", "PolicyGradient()", "--reduction", "token_mean", "--profile", "ci"]
    code, out, err = run(f"{write(source)}:loss", *flags, "--property", "P4", "--property", "P6", "--property", "P8")
    assert (code, set(statuses(out).values())) == (0, {"passed"})
    assert err == ""


# ---- failures that are not a wrong number


def test_an_exception_in_the_loss_is_a_failure_with_the_users_line(write):
    source = """
        import torch

        def helper(x):
            return torch.stack([x, x[:, :0]])

        def loss(log_prob, behavior_log_prob, advantages, mask):
            return helper(log_prob)
    """
    path = write(source)
    code, out, _ = run(f"{path}:loss", "--property", "P9", "--property", "P24")
    assert code == 1
    assert statuses(out)["check_on_policy_gradient"] == "failed"
    assert "raised RuntimeError: stack expects each tensor to be equal size" in out
    assert "(mine.py, line 5, in helper: return torch.stack([x, x[:, :0]]))" in out
    assert "every failure is one and the same error: is torch the framework" in out
    assert "stack expects" in str(failing(SNIPPET.search(out)[3]))


def test_inputs_changed_in_place_are_shown_by_a_snippet_too(write):
    source = """
        import torch

        def loss(log_prob, behavior_log_prob, advantages, mask):
            advantages[~mask] = 0.0
            log_ratio = torch.where(mask, log_prob - behavior_log_prob, 0.0)
            return torch.where(mask, -advantages * log_ratio.exp(), 0.0)
    """
    code, out, _ = run(f"{write(source)}:loss", "--property", "check_inputs_are_not_changed")
    assert code == 1
    assert "the call changed its inputs advantages in place" in out
    assert "advantages" in str(failing(SNIPPET.search(out)[3]))


def test_expected_failures_and_those_that_no_longer_fail():
    flags = ["--property", "P1", "--property", "P9", "--no-snippets"]
    code, out, _ = run(*WRONG, *flags, "--expect-failure", "P1=issue 12")
    assert code == 0
    assert re.search("check_masked_inputs_are_inert +expected failure: issue 12", out)
    assert out.splitlines()[-1] == "2 passed, 0 failed, 0 not applicable, 1 expected failure"
    code, out, _ = run(*WRONG, *flags, "--expect-failure", "P1=issue 12", "--expect-failure", "p9=was wrong once")
    assert code == 1
    assert "unexpected pass: expected to fail: was wrong once" in out


def test_json_is_strict_and_complete():
    code, out, err = run(*WRONG, "--json", "--property", "P1", "--property", "P11")
    assert (code, err) == (1, "")
    report = json.loads(out, parse_constant=pytest.fail)
    assert list(report) == ["version", "drpo_core", "target", "declared", "ok", "counts", "results"]
    assert report["declared"] == {
        "framework": "torch", "objective": "DPPO(delta=0.25)", "form": "ratio", "reduction": "token_mean",
        "dtypes": ["float64", "float32"], "max_log_ratio": 20.0, "keeps_boundary": True, "local": True,
        "takes_mask": True, "takes_normalizer": True, "takes_segment_ids": False,
    }  # fmt: skip
    assert report["counts"] == {"passed": 2, "failed": 2, "not applicable": 1, "expected failure": 0, "unexpected pass": 0}
    first = report["results"][0]
    assert list(first) == ["property", "check", "statement", "status", "reason", "counterexample", "snippet"]
    assert (first["property"], first["status"]) == ("P1", "failed")
    assert first["snippet"].startswith("import numpy as np")


def test_without_snippets_there_are_none():
    code, out, _ = run(*WRONG, "--no-snippets", "--property", "P1")
    assert code == 1
    assert "counterexample: " in out
    assert "import" not in out


def test_declared_capabilities_change_what_applies():
    flags = ["--property", "P4", "--property", "check_boundary_is_kept", "--property", "P20"]
    _, out, _ = run(*WRONG, *flags, "--boundary-dropped", "--not-local", "--dtype", "float32", "--max-log-ratio", "5")
    found = {name: reason for _, name, _, reason in LINE.findall(out)}
    assert found["check_boundary_is_kept"].startswith("declared not local")
    assert found["check_tokens_do_not_interact"].startswith("declared not local")
    _, out, _ = run(*WRONG, *flags[2:4], "--boundary-dropped")
    assert "not applicable: declared strict: a token exactly on the boundary is dropped" in out


def test_a_loss_without_a_mask_is_said_to_have_none(write):
    source = "import numpy as np\ndef loss(log_prob, behavior_log_prob, advantages, m=1.0):\n    return -advantages\n"
    _, out, err = run(f"{write(source)}:loss", "--property", "P1")
    assert "not applicable: takes no mask" in out
    assert err == (
        "drpo check: note: the loss takes no mask, so masks (P1, P5 and P6) can't be checked; "
        "--map mask=NAME if it has one by another name\n"
    )


# ---- bad input

STUBS = """
    import numpy as np

    CONSTANT = 3
    unreadable = max

    class Loss:
        pass

    def good(log_prob, behavior_log_prob, advantages, mask): return log_prob * mask
    def mapped(lp, old, adv, mask): return lp
    def more(log_prob, behavior_log_prob, advantages, mask, beta): return log_prob
    def positional(log_prob, behavior_log_prob, /, advantages, mask): return log_prob
    def anything(*arrays): return arrays[0]
    def needs(log_prob, behavior_log_prob, advantages, mask, normalizer): return log_prob
    def pair(log_prob, behavior_log_prob, advantages, mask): return log_prob, {}
    def mean(log_prob, behavior_log_prob, advantages, mask):
        return np.where(mask, -advantages * np.exp(log_prob - behavior_log_prob), 0.0).sum() / mask.sum()
    def rows(log_prob, behavior_log_prob, advantages, mask): return log_prob.sum(axis=-1)
"""
USAGE = {
    ("good", "--objective", "DRPO"): "--objective: expected one of",
    ("good", "--objective", "Drpo(delta=1)"): "--objective: expected one of ASPO, CISPO, DPPO, DRPO, GPPO, IPO,",
    ("good", "--objective", "DRPO(0.15)"): "--objective: hyper-parameters are given by name",
    ("good", "--objective", "DRPO(**{'delta': 1})"): "--objective: hyper-parameters are given by name",
    ("good", "--objective", "DRPO(delta=open('x'))"): "--objective: expected a Python literal such as 0.2,",
    ("good", "--objective", "__import__('os').system('x')"): "--objective: expected one of",
    ("good", "--objective", "DRPO(delta=-1)"): "--objective: DRPO(delta=-1): delta",
    ("good", "--objective", "DRPO(eps=0.2)"): "--objective: DRPO(eps=0.2): got an unexpected keyword argument 'eps'",
    ("good", "--objective", "DRPO("): "--objective: expected one of",
    ("good", "--reduction", "mean"): "--reduction: expected one of none, sum, token_mean",
    ("good", "--reduction", "sum"): "--reduction sum: good returns a loss of shape (2, 3), not one number",
    ("good", "--form", "value"): "--form: expected one of ratio, score, got 'value'",
    ("good", "--returns", "both"): "--returns: expected one of loss, loss+gradient",
    ("good", "--returns", "tuple-first"): "--returns tuple-first: the loss returned a ndarray",
    ("good", "--dtype", "float16"): "--dtype: expected one of float64, float32, bfloat16, got 'float16'",
    ("good", "--framework", "tensorflow"): "--framework: expected one of numpy, torch, jax, got 'tensorflow'",
    ("good", "--profile", "fast"): "--profile: expected one of dev, ci, nightly, got 'fast'",
    ("good", "--property", "P28"): "--property, --expect-failure: expected names of checks or properties (P1 to P27), got P28",
    ("good", "--expect-failure", "P28=x"): "--property, --expect-failure: expected names of checks",
    ("good", "--expect-failure", "P2"): "--expect-failure: expected NAME=VALUE, got 'P2'",
    ("good", "--map", "log_prob"): "--map: expected NAME=VALUE, got 'log_prob'",
    ("good", "--map", "logprob=lp"): "--map: expected one of log_prob, behavior_log_prob",
    ("good", "--map", "mask=valid"): "good(log_prob, behavior_log_prob, advantages, mask) takes no valid; name its arguments",
    ("good", "--map", "log_prob=mask", "--map", "mask=mask"): "would be given mask twice",
    ("good", "--set", "beta=1"): "--set: good(log_prob, behavior_log_prob, advantages, mask) takes no beta",
    ("good", "--set", "mask=one"): "--set: expected a Python literal such as 0.2, True or 'mean', got 'one'",
    ("good", "--set", "a=1", "--set", "a=2"): "--set: a is given twice",
    ("good", "--max-log-ratio", "-1"): "--max-log-ratio: expected a positive number of nats, got -1",
    ("good", "--horizon", "0"): "--horizon: expected a positive number, got 0",
    ("mapped",): "mapped(lp, old, adv, mask) takes no log_prob, behavior_log_prob, advantages; name its arguments with --map",
    ("more",): "no value for beta; --set beta=VALUE, or --map OURS=beta",
    ("positional",): "positional: log_prob, behavior_log_prob can't be passed by name (positional-only); drop the '/'",
    ("anything",): "anything(*arrays) takes no log_prob, behavior_log_prob, advantages",
    ("needs",): "normalizer needs a default, such as None: most calls come without it",
    ("pair",): "the loss returned a tuple of 2: --returns tuple-first, loss+gradient or loss+gradient+weight?",
    ("mean",): "mean returns one number: say how it reduces tokens (--reduction token_mean, by its gradient)",
    ("rows",): "rows returns a loss of shape (2,) for tokens of shape (2, 3)",
    ("CONSTANT",): "CONSTANT is a int, not a function or an Implementation",
    ("Loss",): "Loss is a class, not a function or an Implementation",
    ("gold",): "stubs.py has no gold; did you mean good?",
    ("unreadable", "--framework", "numpy"): "unreadable: its signature can't be read; wrap it in a Python function",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "line"), USAGE.items(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_usage_error_is_one_clear_line(write, arguments, line):
    path = write(STUBS, "stubs.py")
    code, out, err = run(f"{path}:{arguments[0]}", *arguments[1:])
    assert (code, out) == (2, "")
    assert err.startswith("drpo check: ")
    assert line in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("target", "source", "line"),
    [
        ("loss", None, "drpo check: expected package.module:function or path/to/file.py:function, got 'loss'\n"),
        ("no_such_package.losses:loss", None, "drpo check: no module named 'no_such_package', here or among the installed"),
        ("no/such/file.py:loss", None, "drpo check: no file no/such/file.py\n"),
        ("{}:loss", "import no_such_library\n", "broken.py can't be imported: No module named 'no_such_library'\n"),
        ("{}:loss", "x = 1\n1 / 0\n", "can't be imported: ZeroDivisionError: division by zero (broken.py, line 2)\n"),
        ("{}:loss", "def loss(:\n", "broken.py can't be imported: SyntaxError: invalid syntax"),
        ("{}:loss", "raise SystemExit(1)\n", "broken.py can't be imported: SystemExit: 1 (broken.py, line 1)\n"),
    ],
)  # fmt: skip
def test_a_target_that_can_not_be_loaded_is_one_clear_line(write, target, source, line):
    path = write(source or "", "broken.py")
    code, out, err = run(target.format(path))
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1


def test_a_vacuous_threshold_is_noted(write):
    _, _, err = run(f"{write(NUMPY_LOSS)}:loss", "--objective", "DRPO(delta=1.5)", "--property", "P24")
    assert "drpo check: note: --objective: DRPO: delta = 1.5 is at least 1" in err


# ---- what it costs others


def test_the_command_line_alone_imports_neither_the_kit_nor_a_framework():
    program = """
        import sys
        from drpo_core import cli
        cli.app()
        print(sorted({"hypothesis", "mpmath", "torch", "jax", "drpo_core.testing"} & set(sys.modules)))
    """
    done = python("-c", textwrap.dedent(program))
    assert done.stdout == "[]\n"


def test_without_hypothesis_it_says_how_to_install_it(monkeypatch, write):
    for name in [name for name in sys.modules if name.startswith("drpo_core.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    code, _, err = run(f"{write(NUMPY_LOSS)}:loss")
    assert (code, err) == (2, "drpo check: hypothesis is not installed: pip install 'drpo-core[testing]'\n")


def test_a_mode_is_claimed_by_a_framework_s_keys_or_as_it_prints(write):
    """Log-probs of the third policy arrive by the loss's own name for them."""
    source = """
        import torch

        def gspo(logprobs, behavior_log_prob, advantages, mask, old):
            x = torch.where(mask, logprobs, 0.0)
            ell, lengths = x - torch.where(mask, old, 0.0), mask.sum(-1, keepdim=True).clamp(min=1)
            mean = torch.where(mask, ell, 0.0).sum(-1, keepdim=True) / lengths
            ratio, a = (mean.detach() + x - x.detach()).clamp(max=20.0).exp(), torch.where(mask, advantages, 0.0)
            losses = torch.where(mask, -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a), 0.0)
            return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / (mask.sum(-1) > 0).sum().clamp(min=1)
    """
    target = f"{write(source)}:gspo"
    flags = ("--map", "log_prob=logprobs", "--map", "proximal_log_prob=old", "--property", "P25")
    for mode in (
        "modes.verl('gspo', loss_agg_mode='seq-mean-token-mean')",
        "Mode(PPOClip(eps=0.2), anchor=Sequence(Proximal()), reduction='sequence_mean_token_mean')",
    ):
        code, out, _ = run(target, *flags, "--objective", mode)
        assert (code, "P25  check_mode_gradient_matches_the_formula  passed" in out) == (0, True)
    code, out, _ = run(target, *flags, "--objective", "modes.verl('vanilla')")
    assert code == 1
    assert "the gradient is −c K A R w plus that of the penalties" in out
    for wrong, message in {
        "modes.verl('nothing')": "nothing",
        "modes.none()": "areal",
        "Mode(open('x'))": "open is no class",
        "Mode(PPOClip(eps=0.2), anchor=Proximal(), penalties=(Penalty(coefficient=0.1),))": "reference_log_prob",
    }.items():
        code, _, err = run(target, *flags, "--objective", wrong)
        assert (code, message in err) == (2, True), err


def test_a_file_of_one_s_own_may_be_called_modes(write, monkeypatch):
    path = write("from drpo_core.objectives import PSPO\n\ndef mine(alpha):\n    return PSPO(alpha=alpha)\n", "modes.py")
    monkeypatch.chdir(path.parent)
    assert parse_objective("modes.py:mine(alpha=0.2)").objective == PSPO(alpha=0.2)
