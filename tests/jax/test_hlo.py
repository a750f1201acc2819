"""What XLA makes of the adapter, without running it: temporary memory, kernels, and the reductions that a GPU is given."""

import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hlo():
    """The benchmark's module, a script."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import hlo  # noqa: PLC0415

    yield hlo
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def cases(hlo):
    return {case.name: case for case in hlo.cases()}


def test_the_head_has_no_array_of_all_logits(cases, hlo):
    row = hlo.row(cases["linear_log_prob, ∂"], hlo.device_of("cpu"))
    assert row["written"] == 0
    # a byte of each logit would be 1; the gradient of the hidden states is 4 H bytes a token, in float32, and as much again
    assert row["growth"] < 9.0 * hlo.HIDDEN / hlo.VOCABULARY


def test_an_array_of_all_logits_is_seen(cases, hlo):
    """A CPU's compiler writes converted logits to memory."""
    row = hlo.row(cases["token_log_prob"], hlo.device_of("cpu"))
    assert (row["written"], row["growth"]) == (1, pytest.approx(4.0, abs=0.01))


def test_loss_and_gradient_are_one_kernel(cases, hlo):
    """Beside the count of valid tokens and, on a CPU, the loop that adds up the losses."""
    case = cases["policy_loss, diagnostics=False, ∂"]
    program = hlo.Program.of(jax.jit(case.function).lower(*case.arguments(hlo.TOKENS)).compile().as_text())
    of_tokens = [found for found in program.kernels() if any(hlo.TOKENS in shape for _, shape in found.arrays[:1])]
    assert [found.operation for found in of_tokens] == ["fusion"]


def test_a_gpu_is_given_one_reduction_of_everything(cases, hlo):
    """Loss and diagnostics; others are of the mask, in the reduction's count."""
    case = cases["policy_loss, ∂"]
    lowered = jax.jit(case.function).trace(*case.arguments(hlo.TOKENS)).lower(lowering_platforms=("cuda",)).as_text()
    reduced = [line for line in lowered.splitlines() if "stablehlo.reduce(" in line and f"tensor<{hlo.TOKENS}xf32>" in line]
    assert len(reduced) == 1
    assert lowered.count("stablehlo.while") == 0
