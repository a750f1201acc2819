"""Whatever bytes a file holds and whatever values an array holds: an answer or one clear error, in bounded memory."""

import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pyarrow import parquet
from safetensors.numpy import save

from drpo_core import DPPO, DRPO, summarize, token_diagnostics, token_loss_and_gradient, validate
from drpo_core.audit import RolloutError, audit, open_rollouts, rows

FUZZ = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    print_blob=True,
    # a loaded machine is not a finding
    suppress_health_check=[HealthCheck.too_slow],
)
MEMORY = 64 * 2**20
"""Bytes, more than any chunk and every library's own buffers need: beyond it memory grows with what a file claims."""

RNG = np.random.default_rng(3)
DATA = {
    "log_prob": -RNG.exponential(1.0, (4, 6)).astype(np.float32),
    "behavior_log_prob": -RNG.exponential(1.0, (4, 6)).astype(np.float32),
    "advantages": RNG.normal(size=4).astype(np.float32),
    "mask": RNG.random((4, 6)) < 0.8,
}


def npz(*, compressed):
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **DATA)
    return stream.getvalue()


def parquet_file():
    stream = io.BytesIO()
    parquet.write_table(pa.table({name: pa.array(list(array)) for name, array in DATA.items()}), stream, row_group_size=2)
    return stream.getvalue()


VALID = {
    ".npz": npz(compressed=False),
    ".compressed.npz": npz(compressed=True),
    ".safetensors": save(DATA),
    ".parquet": parquet_file(),
}
HEADER_OF_4_GB = struct.pack("<Q", 4 << 30) + b"{"


@st.composite
def damaged(draw, whole):
    """A valid file after a few edits: bytes overwritten, removed, repeated or inserted, mostly near either end."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        size = len(content)
        near_an_end = st.integers(0, min(128, size)) | st.integers(max(0, size - 256), size)
        at = draw(near_an_end | st.integers(0, size))
        edit = draw(st.sampled_from(["overwrite", "cut", "insert", "repeat", "truncate"]))
        extreme = st.sampled_from([b"\x00" * 8, b"\xff" * 8, struct.pack("<q", 2**62), struct.pack("<i", 2**31 - 1)])
        piece = draw(extreme | st.binary(min_size=1, max_size=8))
        if edit == "overwrite":
            content[at : at + len(piece)] = piece
        elif edit == "cut":
            del content[at : at + len(piece)]
        elif edit == "insert":
            content[at:at] = piece
        elif edit == "repeat":
            content[at:at] = content[at : at + 64]
        else:
            del content[at:]
    return bytes(content)


def answers(path):
    """Whether the file could be audited; anything but an answer or a `RolloutError` escapes."""
    try:
        report = audit(open_rollouts(path), rows(delta=[0.15], delta_kl=[0.05], eps=[(0.2, 0.2)]))
    except RolloutError as error:
        refusal = str(error)
    else:
        json.dumps(report.as_dict(), allow_nan=False)
        return True
    assert "\n" not in refusal
    assert path.name in refusal
    return False


@pytest.mark.parametrize("suffix", VALID)
def test_the_files_that_are_damaged_here_are_valid(tmp_path, suffix):
    path = tmp_path / f"rollouts{suffix}"
    path.write_bytes(VALID[suffix])
    assert answers(path)


@pytest.mark.parametrize("suffix", VALID)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, suffix):
    path = tmp_path / f"rollouts{suffix}"

    @FUZZ
    @given(content=damaged(VALID[suffix]))
    @example(content=b"")
    @example(content=HEADER_OF_4_GB)
    def search(content):
        path.write_bytes(content)
        tracemalloc.start()
        try:
            answers(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MEMORY

    search()


@FUZZ
@given(header=st.binary(max_size=64) | st.text(max_size=64).map(str.encode), claimed=st.integers(0, 2**63))
def test_a_header_of_anything_is_refused(tmp_path_factory, header, claimed):
    path = tmp_path_factory.mktemp("fuzz") / "rollouts.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + header)
    assert not answers(path)
    archive = path.with_suffix(".npz")
    with zipfile.ZipFile(archive, "w") as members:
        for name in DATA:
            members.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", claimed % 2**16) + header)
    assert not answers(archive)


ANY_FLOAT = st.floats(width=32) | st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, -1e-45, 88.8, -104.0])
ANY_TOKENS = hnp.arrays(np.float32, (3, 5), elements=ANY_FLOAT)


@FUZZ
@given(x=ANY_TOKENS, b=ANY_TOKENS, a=ANY_TOKENS, mask=hnp.arrays(bool, (3, 5)))
def test_validation_finds_exactly_what_is_bad(x, b, a, mask):
    bad = ~np.isfinite(a)
    for one, other in ((x, b), (b, x)):
        bad |= ~np.isfinite(one) | (one > 1e-5) | (one < -1000.0) | ((one == 0.0) & (other < -1.0))
    if not np.any(bad & mask):
        validate(x, b, a, mask=mask)
        return
    first = tuple(int(i) for i in np.argwhere(bad & mask)[0])
    with pytest.raises(ValueError, match="at valid tokens") as error:
        validate(x, b, a, mask=mask)
    assert str(first) in str(error.value) or str(error.value).count("index") > 1


@FUZZ
@given(x=ANY_TOKENS, b=ANY_TOKENS, a=ANY_TOKENS, mask=hnp.arrays(bool, (3, 5)))
def test_any_values_give_masked_zeros_and_finite_values_finite_gradients(x, b, a, mask):
    x, b, a = np.minimum(x, 0.0), np.minimum(b, 0.0), np.clip(a, -1e6, 1e6)
    with np.errstate(all="ignore"):
        for objective in (DRPO(delta=0.15), DPPO(delta=0.05, divergence="binary_kl", max_ratio=5.0)):
            result = token_loss_and_gradient(objective, x, b, a, mask=mask)
            assert all(np.all(array[~mask] == 0.0) for array in result)
            sane = mask & ~np.isnan(x) & ~np.isnan(b) & ~np.isnan(a)
            assert np.all(np.isfinite(result.gradient[sane]))
            invalid = summarize(token_diagnostics(objective, x, b, a, mask=mask))["invalid_fraction"]
            expected = np.isnan(x) | ~np.isfinite(b) | np.isnan(a)
            if mask.any():
                assert invalid == pytest.approx(np.mean(expected[mask]), rel=1e-6)
