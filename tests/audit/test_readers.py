"""Readers of recorded rollouts: formats, names, shapes, damage and hostility, memory."""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

from drpo_core.audit import CHUNK_TOKENS, RolloutError, open_rollouts

RNG = np.random.default_rng(7)
SHAPE = (5, 7)


def arrays(shape=SHAPE, dtype=np.float32, **more):
    """Rollouts with per-sequence advantages and a mask."""
    return {
        "log_prob": -RNG.exponential(1.0, shape).astype(dtype),
        "behavior_log_prob": -RNG.exponential(1.0, shape).astype(dtype),
        "advantages": RNG.normal(size=shape[0]).astype(dtype),
        "mask": RNG.random(shape) < 0.8,
    } | more


def write(path, data):
    """Write arrays in the format of the path's suffix; in parquet, rows of 2-D arrays become lists."""
    if path.suffix == ".npz":
        np.savez(path, **data)
    elif path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(array) for name, array in data.items()}, path)
    else:
        columns = {name: pa.array(list(array)) for name, array in data.items()}
        parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


def read(path, snapshot="log_prob", **options):
    """Every chunk, joined."""
    chunks = list(open_rollouts(path, **options).chunks(snapshot))
    return [np.concatenate([chunk[i] for chunk in chunks]) for i in range(4)]


def expanded(data):
    """The flat arrays that reading must give."""
    shape = data["log_prob"].shape
    advantages = data["advantages"]
    if advantages.shape != shape:
        advantages = np.broadcast_to(advantages[:, None], shape)
    mask = data.get("mask", np.ones(shape, bool))
    wide = [np.asarray(array, np.float64).ravel() for array in (data["log_prob"], data["behavior_log_prob"], advantages)]
    return [*wide, np.asarray(mask, bool).ravel()]


def check_same(found, wanted):
    for got, expected in zip(found, wanted, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


FORMATS = [".npz", ".safetensors", ".parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_format_gives_the_same_tokens(tmp_path, suffix, dtype):
    data = arrays(dtype=dtype)
    check_same(read(write(tmp_path / f"r{suffix}", data)), expanded(data))


@pytest.mark.parametrize("suffix", FORMATS)
def test_packed_tokens_without_a_mask(tmp_path, suffix):
    data = arrays((11,))
    del data["mask"]
    check_same(read(write(tmp_path / f"r{suffix}", data)), expanded(data))


@pytest.mark.parametrize("suffix", FORMATS)
def test_token_advantages_and_an_integer_mask(tmp_path, suffix):
    data = arrays(advantages=RNG.normal(size=SHAPE).astype(np.float32))
    data["mask"] = data["mask"].astype(np.int64)
    check_same(read(write(tmp_path / f"r{suffix}", data)), expanded(data))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 10, 1000])
def test_chunks_that_cut_sequences_anywhere(tmp_path, suffix, chunk_tokens):
    data = arrays()
    path = write(tmp_path / f"r{suffix}", data)
    check_same(read(path, chunk_tokens=chunk_tokens), expanded(data))
    start = 0
    for chunk in open_rollouts(path, chunk_tokens=chunk_tokens).chunks("log_prob"):
        assert 1 <= len(chunk.mask) <= chunk_tokens
        assert chunk.locate(len(chunk.mask) - 1) == divmod(start + len(chunk.mask) - 1, SHAPE[1])
        start += len(chunk.mask)


def test_ragged_parquet(tmp_path):
    lengths = [3, 0, 5, 1]
    lists = {name: [RNG.normal(size=n) - 9 for n in lengths] for name in ("log_prob", "behavior_log_prob")}
    table = pa.table({name: pa.array(rows) for name, rows in lists.items()} | {"advantages": pa.array([1.0, 2.0, 3.0, 4.0])})
    parquet.write_table(table, tmp_path / "r.parquet", row_group_size=3)
    found = read(tmp_path / "r.parquet")
    np.testing.assert_array_equal(found[0], np.concatenate(lists["log_prob"]))
    np.testing.assert_array_equal(found[2], np.repeat([1.0, 2.0, 3.0, 4.0], lengths))
    (chunk, last) = open_rollouts(tmp_path / "r.parquet").chunks("log_prob")
    assert [chunk.locate(i) for i in (2, 3)] == [(0, 2), (2, 0)]
    assert last.locate(0) == (3, 0)


def test_bfloat16_safetensors(tmp_path):
    bits = np.array([0xBF80, 0xC049, 0x8000], np.uint16)
    header, body = {}, b""
    for name in ("log_prob", "behavior_log_prob", "advantages"):
        header[name] = {"dtype": "BF16", "shape": [3], "data_offsets": [len(body), len(body) + 6]}
        body += bits.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "r.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    np.testing.assert_array_equal(read(tmp_path / "r.safetensors")[0], [-1.0, -3.140625, -0.0])
    assert open_rollouts(tmp_path / "r.safetensors").tolerance("log_prob") == 16 * 2.0**-7


def test_big_endian_npz(tmp_path):
    data = arrays(dtype=">f4")
    check_same(read(write(tmp_path / "r.npz", data)), expanded(data))


def read_all(path, **options):
    """Every chunk of every snapshot."""
    rollouts = open_rollouts(path, **options)
    for name in rollouts.snapshots:
        yield from rollouts.chunks(name)


def refused(path, message, **options):
    """The one line with which a file is refused."""
    with pytest.raises(RolloutError) as error:
        list(read_all(path, **options))
    line = str(error.value)
    assert message in line
    assert line.startswith(str(path))
    assert line.isprintable()
    return line


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("missing", ["log_prob", "behavior_log_prob", "advantages"])
def test_a_missing_array_lists_what_there_is(tmp_path, suffix, missing):
    data = arrays(other=np.zeros(SHAPE[0], np.int32))
    del data[missing]
    flag = f"--{missing.replace('_', '-')}"
    assert "other (5,) int32" in refused(write(tmp_path / f"r{suffix}", data), flag)


def test_a_named_array_that_is_not_there(tmp_path):
    path = write(tmp_path / "r.npz", arrays())
    refused(path, "no array 'nope' (--mask)", mask="nope")
    refused(path, "no array 'nope' and none named nope_<snapshot>", log_prob="nope")
    refused(path, "no snapshot 'nope' (--snapshot); the file has: log_prob", snapshots=["nope"])


def test_an_ambiguous_name(tmp_path):
    path = write(tmp_path / "r.npz", arrays(response_mask=np.ones(SHAPE, bool)))
    refused(path, "'mask' and 'response_mask' could each be the mask; name one with --mask")
    check_same(read(path, mask="response_mask")[3:], [np.ones(35, bool)])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("log_probs", "old_log_probs"), ("log_probs", "old_log_probs")),
        (("old_log_probs", "rollout_log_probs"), ("old_log_probs", "rollout_log_probs")),
        (("log_probs", "old_log_probs", "rollout_log_probs"), ("log_probs", "rollout_log_probs")),
        (("per_token_logps", "sampling_per_token_logps"), ("per_token_logps", "sampling_per_token_logps")),
        (("trainer_logprobs", "inference_logprobs"), ("trainer_logprobs", "inference_logprobs")),
        (("log_probs", "old_log_probs", "infer_logprobs"), ("log_probs", "infer_logprobs")),
        (("Log-Probs", "generation_logprobs"), ("Log-Probs", "generation_logprobs")),
    ],
)
def test_guessed_names(tmp_path, names, expected):
    data = {name: -np.ones(3) for name in names} | {"adv": np.ones(3), "loss_mask": np.ones(3)}
    found = open_rollouts(write(tmp_path / "r.npz", data))
    assert (*found.snapshots, found.behavior_log_prob, found.advantages, found.mask) == (*expected, "adv", "loss_mask")
    assert bool(found.notes) == (found.behavior_log_prob == "old_log_probs")


def test_snapshots(tmp_path):
    data = arrays()
    data["log_prob_a"] = data.pop("log_prob")
    data["log_prob_b"] = data["log_prob_a"] - 1
    path = write(tmp_path / "r.npz", data)
    assert open_rollouts(path).snapshots == {"a": "log_prob_a", "b": "log_prob_b"}
    assert open_rollouts(path, snapshots=["b"]).snapshots == {"b": "log_prob_b"}
    assert open_rollouts(path, snapshots=["log_prob_b"]).snapshots == {"b": "log_prob_b"}
    assert open_rollouts(path, log_prob="log_prob_a").snapshots == {"log_prob_a": "log_prob_a"}
    for name in "ab":
        np.testing.assert_array_equal(read(path, name)[0], data[f"log_prob_{name}"].ravel())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("behavior_log_prob", (7, 5)),
        ("behavior_log_prob", (35,)),
        ("mask", (5,)),
        ("advantages", (7,)),
        ("advantages", (5, 1)),
    ],
)
def test_wrong_shapes(tmp_path, suffix, name, shape):
    data = arrays()
    data[name] = np.ones(shape, np.float32)
    refused(write(tmp_path / f"r{suffix}", data), f"{name}: expected the shape of log_prob, (5, 7) float32")


def test_wrong_ranks_and_sizes(tmp_path):
    three = {name: np.zeros((2, 3, 1)) for name in ("log_prob", "behavior_log_prob", "advantages")}
    refused(write(tmp_path / "a.npz", three), "expected (sequences, tokens) or (tokens,), got (2, 3, 1) float64")
    refused(write(tmp_path / "b.npz", arrays((0, 7))), "holds no token")


@pytest.mark.parametrize("suffix", FORMATS)
def test_wrong_dtypes(tmp_path, suffix):
    data = arrays(log_prob=np.zeros(SHAPE, np.int32))
    refused(write(tmp_path / f"r{suffix}", data), "log_prob: expected float16, bfloat16, float32 or float64, got (5, ")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("strange", [2.0, np.nan, 0.5, -1.0])
def test_a_mask_that_is_not_one(tmp_path, suffix, strange):
    mask = np.ones(SHAPE, np.float32)
    mask[3, 2] = strange
    refused(
        write(tmp_path / f"r{suffix}", arrays(mask=mask)),
        f"mask: expected only 0 and 1 in a mask, got {strange} at index (3, 2)",
    )


def test_a_mask_of_text(tmp_path):
    refused(write(tmp_path / "r.npz", arrays(mask=np.full(SHAPE, "yes"))), "mask: expected a mask of booleans or of 0 and 1")


def test_parquet_lists_of_differing_length_and_nulls(tmp_path):
    lists = {"log_prob": [[-1.0], [-1.0, -2.0]], "behavior_log_prob": [[-1.0], [-1.0]], "advantages": [1.0, 1.0]}
    parquet.write_table(pa.table(lists), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "behavior_log_prob: expected the length of log_prob in every row, 2 in row 1, got 1")
    lists["log_prob"], lists["behavior_log_prob"] = [[-1.0], None], [[-1.0], [-1.0]]
    parquet.write_table(pa.table(lists), tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", "log_prob: expected a list in every row, got null in row 1")
    flat = {"log_prob": [-1.0, None], "behavior_log_prob": [-1.0, -2.0], "advantages": [1.0, 1.0], "mask": [True, False]}
    parquet.write_table(pa.table(flat), tmp_path / "c.parquet")
    assert np.isnan(read(tmp_path / "c.parquet")[0]).tolist() == [False, True]
    parquet.write_table(pa.table(flat | {"mask": [True, None]}), tmp_path / "d.parquet")
    refused(tmp_path / "d.parquet", "mask: expected only 0 and 1 in a mask, got None at index (1,)")


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """Open for writing."""
        return open, (str(self.path), "w")


def test_pickles_are_never_executed(tmp_path):
    touched = tmp_path / "touched"
    pickle.loads(pickle.dumps(Payload(touched))).close()  # noqa: S301 - the payload does work
    touched.unlink()
    objects = np.full(SHAPE, Payload(touched), dtype=object)
    path = tmp_path / "objects.npz"
    np.savez(path, **arrays(log_prob=objects))
    refused(path, "log_prob: an object array, which is a pickle and is never loaded")
    for suffix in FORMATS:
        path = tmp_path / f"pickle{suffix}"
        path.write_bytes(pickle.dumps(Payload(touched)))
        refused(path, "")
    assert not touched.exists()


def test_an_object_array_nobody_asks_for_is_left_alone(tmp_path):
    touched = tmp_path / "touched"
    data = arrays()
    np.savez(tmp_path / "r.npz", **data, prompts=np.array([Payload(touched)], dtype=object))
    check_same(read(tmp_path / "r.npz"), expanded(data))
    assert not touched.exists()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_truncated_files(tmp_path, suffix, share):
    path = write(tmp_path / f"r{suffix}", arrays((50, 70)))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit(tmp_path, compressed):
    path = tmp_path / "r.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays((50, 70)))
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 0x10
    path.write_bytes(content)
    refused(path, "")


def hostile_npz(path, header, body=b""):
    """A file whose log_prob member is what it is told to be."""
    np.savez(path, **{name: array for name, array in arrays().items() if name != "log_prob"})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log_prob.npy", header + body)
    return path


def npy_header(shape, descr="<f4", *, fortran=False):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(10**12,), (5, 8), (5, 6), (-5, -7), (10**400,)])
def test_headers_that_lie_are_refused_before_allocation(tmp_path, shape):
    path = hostile_npz(tmp_path / "r.npz", npy_header(shape), bytes(4 * 35))
    tracemalloc.start()
    refused(path, "log_prob: ")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_header_of_four_gigabytes_is_refused(tmp_path):
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)
    refused(hostile_npz(tmp_path / "r.npz", header), "log_prob: not a .npy array of version 1.0")


def test_a_zip_bomb_is_refused_before_it_expands(tmp_path):
    path = hostile_npz(tmp_path / "r.npz", npy_header((5, 7)), bytes(4 * 35))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**31)
    path.write_bytes(content)
    refused(path, "log_prob: claims to expand more than deflate can: a zip bomb")


def test_fortran_order_is_refused_and_says_what_to_do(tmp_path):
    np.savez(tmp_path / "r.npz", **arrays(log_prob=np.asfortranarray(-np.ones(SHAPE, np.float32))))
    refused(tmp_path / "r.npz", "log_prob: stored in Fortran order; save np.ascontiguousarray of it")


def test_unusual_compression_is_refused(tmp_path):
    data = arrays()
    np.savez(tmp_path / "r.npz", **data)
    stream = io.BytesIO()
    np.save(stream, -np.ones(SHAPE, np.float32))
    with zipfile.ZipFile(tmp_path / "r.npz", "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("log_prob_x.npy", stream.getvalue())
    refused(tmp_path / "r.npz", "log_prob_x: compressed in a way that .npz files are not", snapshots=["x"])


def test_paths_that_are_not_rollouts(tmp_path):
    refused(tmp_path / "none.npz", "no such file")
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path / "none.parquet", "no such file")
    refused(tmp_path / "r.csv", "expected a file named .npz, .safetensors, .parquet, got .csv")
    (tmp_path / "folder.parquet").mkdir()
    refused(tmp_path / "folder.parquet", "can't be read")


def test_names_can_not_break_the_line(tmp_path):
    write(tmp_path / "r.npz", {"a\n\x1b[31mb": np.zeros(2)})
    assert r"a\n\x1b[31mb" in refused(tmp_path / "r.npz", "no array found")


@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    peaks = []
    for sequences in (1000, 8000):
        data = arrays((sequences, 256))
        if suffix == ".parquet":
            flat = {name: np.repeat(a, 256) if a.ndim == 1 else a.ravel() for name, a in data.items()}
            parquet.write_table(pa.table(flat), tmp_path / "r.parquet", row_group_size=CHUNK_TOKENS)
        else:
            write(tmp_path / f"r{suffix}", data)
        del data
        pool = pa.default_memory_pool()
        before = pool.bytes_allocated()
        tracemalloc.start()
        tokens = arrow = 0
        for chunk in open_rollouts(tmp_path / f"r{suffix}").chunks("log_prob"):
            tokens += len(chunk.mask)
            arrow = max(arrow, pool.bytes_allocated() - before)
        assert tokens == sequences * 256
        peaks.append(tracemalloc.get_traced_memory()[1] + arrow)
        tracemalloc.stop()
    # three float64 arrays and a mask of a chunk are 25 bytes a token; Arrow holds a row group besides
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < (8 if suffix == ".parquet" else 4) * 25 * CHUNK_TOKENS
