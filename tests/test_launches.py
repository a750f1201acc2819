"""What a GPU would be given to do: launches, waits for the host, registers and spills, without one."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels for GPUs need the extra `triton`")

import torch

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "float64")
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules, which are scripts beside each other."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import device  # noqa: PLC0415
    import launches  # noqa: PLC0415

    yield launches, device
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def rows(modules):
    """What the command prints of functions."""
    launches, _ = modules
    return {row["function"]: row for row in json.loads(json.dumps(launches.functions()))}


def test_functions_meet_their_limits(rows):
    limited = {name: row for name, row in rows.items() if row["limit"] and "chunks" not in name}
    assert len(limited) > 7
    for name, row in limited.items():
        assert 0 < row["launches"]["forward"] + row["launches"]["backward"] <= row["limit"]["launches"], name
        kernels = {operation for operation in row["operations"]["forward"] if operation.startswith("triton")}
        assert kernels >= ({"triton tokens"} if row["per_token"] else {"triton softmaxes"}), name


def test_nothing_waits(rows):
    """The array expression neither, which runs where there is no Triton."""
    assert rows["policy_loss, engine='arrays'"]["launches"]["forward"] > 100
    assert {name: row["of_waits"] for name, row in rows.items() if row["of_waits"]} == {}


def test_beside_the_logits_there_is_no_more_than_their_gradient(rows):
    """Nor, of a head, more than a chunk of logits; the rest is a few numbers a token and weight."""
    of_logits = {name: row["memory"] for name, row in rows.items() if not row["per_token"] and "chunks" not in name}
    # torch's backward of gather is in place where no mode watches it
    assert 2.0 <= of_logits.pop("top_k_divergences") < 2.1
    assert {name: memory for name, memory in of_logits.items() if not 1.0 <= memory < 1.1} == {}
    of_chunks = {name: row["memory"] for name, row in rows.items() if "chunks" in name}
    assert {name: memory for name, memory in of_chunks.items() if not 1 / 8 <= memory < 1 / 8 + 0.1} == {}


def test_nothing_is_refused_in_the_deterministic_mode(rows):
    """Of what is asked of a GPU, no operation is one that torch says it throws for."""
    _, refused = (torch.use_deterministic_algorithms.__doc__ or "").split(
        "will throw a\n    :class:`RuntimeError` when ``mode=True``"
    )
    names = {name.lower().rstrip("_") for name in re.findall(r"(?:func|class):`torch\.(?:\w+\.)*(\w+)`", refused)}
    assert {"histc", "cumsum"} <= names
    used = {name.rstrip("_") for row in rows.values() for part in row["operations"].values() for name in part}
    # of numbers that are not whole
    assert used & names <= {"cumsum"}


def test_the_page_shows_these_counts(rows, modules):
    launches, _ = modules
    page = (ROOT / "docs" / "explanation" / "gpu.md").read_text(encoding="utf-8").splitlines()
    shown = [line for line in launches.table_of_functions(rows.values()).splitlines() if line.startswith("|")]
    assert len(shown) > 6
    assert [line for line in shown if line not in page] == []


WAITING = {
    "item": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0.0).any()),
    "nonzero": lambda x: x.nonzero(),
    "an index of truth values": lambda x: x[x > 0.0],
    "an assignment to some": lambda x: x.__setitem__(x > 0.0, x.new_zeros(())),
    "to the host": lambda x: x.to("cpu"),
    "tolist": lambda x: x.tolist(),
    "from the host": lambda x: torch.tensor([1.0], device=x.device),
}


@pytest.mark.parametrize("waiting", WAITING.values(), ids=WAITING)
def test_a_wait_is_seen(waiting, modules):
    _, device = modules
    x = torch.ones(3)
    with device.Recording(execute=True).entered() as recording:
        waiting(x)
    assert recording.waits.total() > 0


def test_views_and_allocations_are_no_launches(modules):
    _, device = modules
    x = torch.ones(3, 4, requires_grad=True)
    with device.Recording(execute=True).entered() as recording:
        assert x.device.type == "cuda"
        y = x.T[1:].reshape(3, 3).detach().expand(2, 3, 3)
        torch.empty(3, device=x.device).new_empty(4)
        y[:, 3:].zero_()
    assert not recording.launches
    with recording.entered():
        # in a backward pass too
        torch.autograd.grad(x.exp().sum(), x)
    assert recording.launches["exp"] == recording.launches["sum"] == recording.launches["mul"] == 1


@pytest.fixture(scope="module")
def compiled():
    """Kernels with every operation that there may be, compiled in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(ROOT / "tests" / "compiled_operations.py")]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)  # noqa: S603 -- ours
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_compiles_for_every_architecture(dtype, compiled):
    found = {(row["kernel"], row["architecture"]) for row in compiled[dtype] if row["registers"] > 0}
    architectures = ARCHITECTURES if dtype == "float32" else {"sm_90"}
    of_rows = {"softmaxes", "gradients", "divergences", "divergence_gradients"}
    # of float64 there is none
    of_rows |= {"most_probable"} if dtype == "float32" else set()
    assert found == {*product(("tokens", "finish"), ARCHITECTURES), *product(of_rows, architectures)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_overwritten_when_all_warps_have_read_what_they_need(dtype, compiled):
    """The few columns with more to them are read before the row's loop of loads and a store, and stored after it."""
    accesses = {row["accesses"] for row in compiled[dtype] if row["kernel"] == "gradients"}
    assert accesses
    assert all(re.fullmatch("L+BL+SBS+", order) for order in accesses), accesses


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_register_is_spilt(dtype, compiled):
    assert {(row["kernel"], row["architecture"]): row["spills"] for row in compiled[dtype] if row["spills"]} == {}
