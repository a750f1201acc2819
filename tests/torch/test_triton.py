"""The engine for GPUs, run by Triton's interpreter over CPU tensors: the core's numbers, and what happens where it fails."""

import dataclasses
import functools
import os
import warnings

import pytest
import torch
from drpo_torch import engines, policy_loss
from drpo_torch.engines import trial, triton_loop
from mode_oracles import arguments_for
from mode_oracles import batch as batch_of_a_mode
from torch_cases import assert_same, awkward, batch, each_reduction, evaluated, of_the_core
from variants import FULL, MEASURED, label
from whole_modes import EVERYTHING, distinct, needs_arrays

from drpo_core import DRPO, SlowEngineWarning, UntraceableError, loss, token_mean
from drpo_core.engines import recording, triton_source
from drpo_core.reduction import prompt_mean
from drpo_core.testing import from_adapter, parametrize_with_checks

pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    # NumPy says of the interpreter's operations what is no error in IEEE arithmetic
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

SUBJECT = DRPO(delta_low=0.1, delta_high=0.2)


@pytest.fixture
def on_triton(monkeypatch):
    """CPU tensors are taken for those of a GPU."""
    monkeypatch.setattr(engines, "TRITON_DEVICES", {"cpu"})


@pytest.fixture
def ran(monkeypatch):
    """The passes that kernels have run."""
    passes, checked = [], trial.checked

    def watched(policy_pass, *arguments, **options):
        result = checked(policy_pass, *arguments, **options)
        passes.append(policy_pass)
        return result

    monkeypatch.setattr(trial, "checked", watched)
    return passes


@pytest.fixture
def no_trial(monkeypatch):
    """Kernels count as tried, where what they give is looked at anyway."""
    monkeypatch.setattr(trial, "_finding", lambda *_, **__: None)


# --- the core's numbers ---


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("objective", [*FULL, MEASURED], ids=label)
def test_the_core_in_float64(objective):
    """In float64, where an argument or a constant that is rounded to float32 on its way shows."""
    data = awkward((3, triton_loop.BLOCK + 2))
    assert_same(evaluated(objective, data, "compiled"), of_the_core(objective, data))


@pytest.mark.usefixtures("no_trial")
@each_reduction
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (2, 0), (3 * triton_loop.BLOCK,)], ids=str)
def test_any_shape_and_reduction(shape, reduction):
    if not shape and reduction is not token_mean:
        pytest.skip("a number has no sequence")
    data = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch(shape).items()}
    found = evaluated(SUBJECT, data, "auto", reduction=reduction)
    assert_same(found, of_the_core(SUBJECT, data, reduction=reduction), torch.float32)


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("mode", distinct(), ids=repr)
def test_modes(mode, ran):
    """Compiled as a whole, except what numba's loop leaves to arrays too."""
    arrays = {name: torch.tensor(array) for name, array in batch_of_a_mode(seed=3).items()}
    arrays["mask"][2] = False
    data = arguments_for(mode, arrays)
    reduction = {"reduction": prompts(arrays["mask"])} if mode.reduction == "prompt_mean" else {}
    found = evaluated(mode, data, "auto", **reduction)
    assert (loss.mode_pass in ran) == (not needs_arrays(mode))
    assert_same(found, evaluated(mode, data, "arrays", **reduction))


def prompts(mask):
    return functools.partial(prompt_mean, group_ids=torch.arange(len(mask)) // 2)


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_tensors_are_read_where_they_lie(layout, dtype, ran):
    """With any strides, in their own dtypes; the gradient has that of log π."""
    data = {name: tensor.detach().to(dtype) for name, tensor in batch((3, 150)).items() if name != "mask"}
    data["mask"] = torch.arange(450).reshape(3, 150) % 5 > 0
    strided = {
        "expanded": data | {"advantages": data["advantages"][:, :1].expand(3, 150)},
        "transposed": {name: tensor.T.contiguous().T for name, tensor in data.items()},
        "sliced": {name: torch.stack((tensor, tensor), -1)[..., 0] for name, tensor in data.items()},
    }[layout]
    found, expected = (evaluated(MEASURED, strided, engine, diagnostics=False) for engine in ("compiled", "arrays"))
    assert ran == [loss.policy_pass]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    # the interpreter cuts a bfloat16 off where a GPU rounds it
    torch.testing.assert_close(found[1], expected[1], rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)


# --- one kernel for all thresholds, and none for what has changed ---


@pytest.mark.usefixtures("no_trial")
def test_a_schedule_of_thresholds_is_one_kernel(monkeypatch):
    monkeypatch.setattr(recording, "_programs", {})
    triton_loop.module_of.cache_clear()
    for delta in (0.1, 0.15, 0.2):
        data = batch((2, 5))
        assert_same(evaluated(DRPO(delta=delta), data, "compiled"), of_the_core(DRPO(delta=delta), data))
    assert triton_loop.module_of.cache_info().misses == 1


@pytest.mark.usefixtures("no_trial")
def test_a_class_of_one_s_own(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Soft:
        """SAPO's gate, from its formula: 4 σ(τ(r − 1)) (1 − σ(τ(r − 1)))."""

        tau: float = 2.0

        def weight(self, tokens):
            gate = 1.0 / (1.0 + tokens.xp.exp(-self.tau * (tokens.ratio - 1.0)))
            return 4.0 * gate * (1.0 - gate)

        def loss(self, tokens):
            return -tokens.advantages * 4.0 / self.tau / (1.0 + tokens.xp.exp(-self.tau * (tokens.ratio - 1.0)))

    data = batch((2, 5))
    assert_same(evaluated(Soft(), data, "compiled"), evaluated(Soft(), data, "arrays"))
    monkeypatch.setattr(Soft, "weight", lambda _, tokens: tokens.xp.ones_like(tokens.ratio))
    assert_same(evaluated(Soft(), data, "compiled"), evaluated(Soft(), data, "arrays"))


# --- where a kernel fails ---


def broken(monkeypatch, old, new):
    """Kernels whose source says something else."""
    monkeypatch.setattr(recording, "_programs", {})
    made = triton_source.kernels

    def spoilt(*arguments):
        found = made(*arguments)
        assert old in found.source
        return found._replace(source=found.source.replace(old, new))

    monkeypatch.setattr(triton_loop, "kernels", spoilt)


FAULTS = {
    "a sum": ("tl.sum(tl.load(sums_at", "0.5 * tl.sum(tl.load(sums_at", "gives another .*loss"),
    "the gradient": ("tl.store(gradient_at + row", "tl.store(gradient_at + 0 * row", "gives another gradient"),
    "not a program": ("tl.program_id(0)", "tl.no_such_thing(0)", "fails with"),
    "not a source": ("program = ", "program := ", "fails with SyntaxError"),
}


@pytest.mark.parametrize(("old", "new", "finding"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("objective", [SUBJECT, EVERYTHING], ids=["objective", "mode"])
def test_a_kernel_that_does_not_hold_is_not_used(objective, old, new, finding, monkeypatch):
    """Said once: what was found, and how to report it. Asked for, it is an error."""
    broken(monkeypatch, old, new)
    arrays = {name: torch.tensor(array) for name, array in batch_of_a_mode(seed=1).items()}
    data = arguments_for(objective, arrays) if objective is EVERYTHING else batch((2, 5))
    with pytest.warns(SlowEngineWarning, match=f"Triton kernel of .* {finding}.*report.*DRPO_COMPILED=0"):
        found = evaluated(objective, data, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = evaluated(objective, data, "auto")
    expected = evaluated(objective, data, "arrays")
    assert_same(found, expected)
    assert_same(again, expected)
    if objective is SUBJECT:
        with pytest.raises(UntraceableError, match=f"a Triton kernel {finding}"):
            evaluated(objective, data, "compiled")


def test_right_kernels_are_tried_once_a_kind_of_tensors(monkeypatch):
    monkeypatch.setattr(recording, "_programs", {})
    tried, finding = [], trial._finding  # noqa: SLF001 -- to count

    def watched(*arguments, **options):
        tried.append(finding(*arguments, **options))
        return tried[-1]

    monkeypatch.setattr(trial, "_finding", watched)
    data = batch((2, 5))
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in data.items()}
    for given in (data, data, single, data):
        evaluated(SUBJECT, given, "auto")
    assert tried == [None, None]


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(recording, "_programs", {})
    monkeypatch.setattr(trial, "is_captured", lambda _: True)
    data = batch((2, 5))
    assert_same(evaluated(SUBJECT, data, "auto"), of_the_core(SUBJECT, data))
    with pytest.raises(UntraceableError, match="CUDA graph"):
        evaluated(SUBJECT, data, "compiled")


def test_compiled_engines_can_be_turned_off(monkeypatch, ran):
    monkeypatch.setenv("DRPO_COMPILED", "0")
    data = batch((2, 5))
    assert_same(evaluated(SUBJECT, data, "auto"), of_the_core(SUBJECT, data))
    assert not ran
    with pytest.raises(ValueError, match="'compiled' is turned off by the environment variable DRPO_COMPILED=0"):
        evaluated(SUBJECT, data, "compiled")


def test_without_triton(monkeypatch):
    scope = loss.may_compile.__globals__
    monkeypatch.setitem(scope, "_is_installed", lambda package: package != "triton")
    data = batch((2, 5))
    assert_same(evaluated(SUBJECT, data, "auto"), of_the_core(SUBJECT, data))
    with pytest.raises(ImportError, match=r"needs triton: pip install 'drpo-core\[triton\]'"):
        evaluated(SUBJECT, data, "compiled")


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("objective", [*FULL, MEASURED], ids=label)
def test_diagnostics_do_not_decide_the_loss(objective):
    """Without them an objective may have no threshold, and so no argument, at all."""
    data = {name: tensor for name, tensor in batch((2, 5)).items() if name != "divergence" or objective is MEASURED}
    found = [policy_loss(objective, **data, engine="compiled", diagnostics=some) for some in (True, False)]
    assert found[1][1] is None
    torch.testing.assert_close(found[0][0], found[1][0])


# --- the kit ---


@pytest.mark.usefixtures("no_trial")
@parametrize_with_checks(
    [from_adapter(SUBJECT, "torch", reduction="token_mean", cost=50.0)],
    settings=os.environ.get("DRPO_PROFILE", "ci"),
)
def test_every_property(check, ran):
    """In one case each, because the interpreter takes its time; `DRPO_PROFILE=nightly` has more."""
    check()
    assert ran
