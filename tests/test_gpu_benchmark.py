"""The benchmark for GPUs runs in miniature without one, and the page shows what it measured; here nothing is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="kernels for GPUs need the extra `triton`")

ROOT = Path(__file__).parents[1]
SCRIPT, PAGE = ROOT / "benchmarks" / "gpu.py", ROOT / "docs" / "explanation" / "gpu.md"
CASES = {
    "tokens (2, 32)": {
        "autograd of the formula",
        "ours",
        "ours, diagnostics",
        "ours, diagnostics, CUDA graph",
        "ours, arrays",
    },
    "logits": {"autograd of log_softmax", "ours", "ours, arrays", "Liger `triton_grpo_loss`, its own loss"},
    "log-probs": {"log_softmax", "ours", "ours, arrays", "Liger `fused_selective_log_softmax`"},
    "head": {"unfused", "ours", "ours, chunks of 2", "Liger `LigerFusedLinearGRPOLoss`, its own GRPO loss"},
    "divergences": {"two log_softmax", "ours", "ours, arrays"},
    "top-k": {"log_softmax", "ours, with the normaliser"},
}
"""Of the table: functions that a case must have, beside `torch.compile` of the naive one."""
CALLS = (
    "policy_loss, DRPO", "policy_loss, PPOClip", "policy_loss, DPPO", "policy_loss, GSPO", "token_log_prob", "linear_log_prob",
    "logits_policy_loss", "linear_policy_loss", "full_divergences", "top_k_divergences", "CUDA graph of policy_loss",
    "CUDA graph of logits_policy_loss",
)  # fmt: skip


@pytest.fixture(scope="module")
def gpu():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    import gpu  # noqa: PLC0415

    yield gpu
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The file that it leaves."""
    path = tmp_path_factory.mktemp("gpu") / "results.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(path), "--miniature"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)  # noqa: S603 -- ours
    assert done.returncode == 0, done.stderr
    return path


def test_a_miniature_has_every_row_and_no_failure(miniature):
    found = json.loads(miniature.read_text(encoding="utf-8"))
    assert found["failures"] == {}
    assert found["miniature"]
    assert found["probes"].keys() == {"bytes", "flops"}
    assert [call for call in CALLS if not any(name.startswith(call) for name in found["checks"])] == []
    assert all(check["error"] <= check["limit"] for check in found["checks"].values())
    rows = {case["name"]: case["rows"] for case in found["cases"]}
    assert rows.keys() == CASES.keys()
    for case, labels in CASES.items():
        assert labels | {"the same, `torch.compile`"} <= rows[case].keys()
        for label, row in rows[case].items():
            if row["status"] == "not installed":
                assert label.startswith(("Liger", "verl", "torch")), label
                continue
            assert row["status"] == "measured", label
            assert row["times_as_fast"] > 0.0
            assert {"share_of_bytes", "share_of_flops"} & row.keys()


def test_what_fails_is_kept_beside_the_rest(gpu, tmp_path):
    path = tmp_path / "results.json"
    results = gpu.Results(path, seconds=60.0)

    def check(error):
        outcome = SimpleNamespace(error=error, limit=0.1, _asdict=lambda: {"error": error, "limit": 0.1})
        name = f"error of {error}"
        results.part(name, lambda: results.check(name, lambda: outcome))

    for error in (0.2, float("nan"), 0.1):
        check(error)
    results.part("broken", lambda: {}["missing"])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["failures"].keys() == {"error of 0.2", "error of nan", "broken"}
    assert len(found["checks"]) == 3


def test_without_time_a_check_fails(gpu, tmp_path):
    results = gpu.Results(tmp_path / "results.json", seconds=0.0)
    results.part("late", lambda: results.check("late", pytest.fail))
    assert results.found["failures"].keys() == {"late"}


def test_the_page_shows_what_was_measured(gpu, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    gpu.write(page, SCRIPT.parent / "gpu.json")
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    gpu.write(page, tmp_path / "missing.json")
    assert "never timed on a GPU" in page.read_text(encoding="utf-8")


def test_a_page_is_written_of_a_gpu_alone(gpu, miniature, tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit, match="miniature"):
        gpu.write(page, miniature)
    found = json.loads(miniature.read_text(encoding="utf-8"))
    found |= {"miniature": False, "machine": found["machine"] | {"device": "some GPU", "driver": "1.2"}}
    results.write_text(json.dumps(found), encoding="utf-8")
    gpu.write(page, results)
    text = page.read_text(encoding="utf-8")
    assert "some GPU, driver 1.2" in text
    assert "never timed" not in text
    assert all(f"| {label} | " in text for case in found["cases"] for label in case["rows"])
    assert text.endswith(PAGE.read_text(encoding="utf-8").split(gpu.LAST)[1])
