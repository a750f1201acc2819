"""Recorded rollouts as a stream of tokens: .npz, .safetensors and .parquet files, read in chunks of bounded size.

Whatever the format, a file becomes `Chunk`s of flat arrays. Nothing in a file is ever executed or trusted: array
headers are checked against the bytes that are there before anything is allocated, and pickles are refused.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Values = np.ndarray[Any, Any]

__all__ = ["CHUNK_TOKENS", "Chunk", "RolloutError", "Rollouts", "open_rollouts"]

CHUNK_TOKENS = 1 << 16

# what the arrays are called in drpo_core, verl, TRL, SkyRL, prime-rl, NeMo-RL, AReaL, slime, tinker and tunix
_PI = (
    "log_prob", "log_probs", "logprob", "logprobs", "logps", "policy_log_prob", "policy_log_probs", "policy_logprobs",
    "current_log_probs", "current_logprobs", "new_log_probs", "new_logprobs", "per_token_logps", "per_token_logprobs",
    "trainer_log_probs", "trainer_logprobs", "training_logprobs", "train_log_probs", "target_logprobs",
)  # fmt: skip
_MU = (
    "behavior_log_prob", "behavior_log_probs", "behavior_logprobs", "behaviour_log_prob", "behaviour_log_probs",
    "behaviour_logprobs", "behave_logprobs", "rollout_log_prob", "rollout_log_probs", "rollout_logprobs",
    "inference_log_probs", "inference_logprobs", "sampling_log_probs", "sampling_logprobs", "sampling_per_token_logps",
    "sampler_log_probs", "sampler_logprobs", "sample_log_prob", "generation_logprobs", "vllm_logprobs", "mu_log_prob",
)  # fmt: skip
# the trainer's own log-probs at the start of the step: μ if the file has nothing better, else π before any update
_OLD = ("old_log_prob", "old_log_probs", "old_logprobs", "old_per_token_logps", "prev_logprobs", "proximal_logprobs")
_ADVANTAGES = ("advantages", "advantage", "adv", "advs", "token_advantages")
_MASK = (
    "mask", "masks", "response_mask", "completion_mask", "loss_mask", "loss_masks", "action_mask", "token_mask", "valid_mask",
)  # fmt: skip

_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
# deflate can't expand a byte into more than this
_MOST_DEFLATED = 1032


class RolloutError(ValueError):
    """What is wrong with a file of rollouts or with what was asked of it, in one line."""


class Chunk(NamedTuple):
    """Some consecutive tokens: float64 arrays and a boolean mask, all of shape (tokens,)."""

    log_prob: Values
    behavior_log_prob: Values
    advantages: Values
    mask: Values
    locate: Callable[[int], tuple[int, ...]]
    """Index, in the file's arrays, of the chunk's i-th token."""

    @classmethod
    def of(cls, numbers: Iterable[Values], mask: Values, locate: Callable[[int], tuple[int, ...]]) -> Chunk:
        """A chunk of log π, log μ and A of any floating dtype."""
        log_prob, behavior_log_prob, advantages = (np.asarray(array, np.float64) for array in numbers)
        return cls(log_prob, behavior_log_prob, advantages, mask, locate)


class Stored(NamedTuple):
    """An array as its file describes it. A ragged list has None for its tokens axis."""

    shape: tuple[int | None, ...]
    dtype: str
    size: int

    def __str__(self) -> str:
        """Shape and dtype, for messages."""
        inner = ", ".join("…" if n is None else str(n) for n in self.shape)
        return f"({inner}{',' if len(self.shape) == 1 else ''}) {self.dtype}"


class _Roles(NamedTuple):
    """Which array of a file plays which part."""

    log_prob: str
    behavior_log_prob: str
    advantages: str
    mask: str | None


class _Source(Protocol):
    """A file of one format."""

    arrays: dict[str, Stored]
    problems: dict[str, str]
    """Arrays that can't be read, and why; they matter only if they are asked for."""

    def chunks(self, roles: _Roles) -> Iterator[Chunk]:
        """The tokens, at most `CHUNK_TOKENS` at a time."""
        ...


@dataclass(frozen=True, slots=True)
class Rollouts:
    """An opened file: its snapshots of the policy, and a stream of tokens for each.

    `snapshots` maps each snapshot's name to the array that holds its log π; see `open_rollouts`.
    """

    path: Path
    snapshots: dict[str, str]
    behavior_log_prob: str
    advantages: str
    mask: str | None
    tokens: int
    notes: tuple[str, ...]
    source: _Source

    def chunks(self, snapshot: str) -> Iterator[Chunk]:
        """Tokens of one snapshot, at most `CHUNK_TOKENS` at a time, in the same chunks on every call.

        Parameters
        ----------
        snapshot
            A key of `snapshots`.

        Yields
        ------
        Chunk
            Flat float64 arrays.

        Raises
        ------
        RolloutError
            If the file is damaged, or the mask holds something else than 0 and 1.
        """
        with _one_line_errors(self.path):
            yield from self.source.chunks(_Roles(self.snapshots[snapshot], self.behavior_log_prob, self.advantages, self.mask))

    def tolerance(self, snapshot: str) -> float:
        """Nats by which rounding in the stored dtypes may leave a log-prob above 0, as in `drpo_core.validate`."""
        stored = (self.source.arrays[self.snapshots[snapshot]], self.source.arrays[self.behavior_log_prob])
        return max(1e-5, *(16.0 * _EPS[array.dtype] for array in stored))


def open_rollouts(
    path: str | Path,
    *,
    log_prob: str | None = None,
    behavior_log_prob: str | None = None,
    advantages: str | None = None,
    mask: str | None = None,
    snapshots: Sequence[str] = (),
) -> Rollouts:
    """Open a file of recorded rollouts, find its arrays and check their names, dtypes and shapes.

    Token arrays are (sequences, tokens) or (tokens,), in parquet one list or one number a row; `advantages` may have one
    number a sequence instead. Log-probs and advantages are float16, bfloat16, float32 or float64.

    Parameters
    ----------
    path
        A .npz, .safetensors or .parquet file.
    log_prob
        Name of log π, or the common start NAME of several snapshots NAME_<snapshot>. None: guessed, as are the others.
    behavior_log_prob, advantages, mask
        Names of log μ, A and the mask. A file may have no mask: then every token counts.
    snapshots
        Which snapshots to keep; all of them if empty.

    Returns
    -------
    Rollouts
        To be read with `Rollouts.chunks`.

    Raises
    ------
    RolloutError
        If the file can't be read, or an array is missing, ambiguous, or of a wrong dtype or shape.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from drpo_core.rollouts import open_rollouts
    >>> rollouts = open_rollouts(files("drpo_core") / "data" / "gemma3_270m_arithmetic.npz", snapshots=["step0"])
    >>> rollouts.snapshots, rollouts.tokens
    ({'step0': 'log_prob_step0'}, 6144)
    """
    path = Path(path)
    formats: dict[str, Callable[[Path], _Source]] = {
        ".npz": _Npz,
        ".safetensors": _SafeTensors,
        ".parquet": _Parquet,
    }
    if path.suffix.lower() not in formats:
        msg = f"{path}: expected a file named {', '.join(formats)}, got {path.suffix or 'no suffix'}"
        raise RolloutError(msg)
    with _one_line_errors(path):
        source = formats[path.suffix.lower()](path)
        names = _Names(source.arrays)
        mu = names.find("behaviour policy's log-probs", "--behavior-log-prob", behavior_log_prob, _MU, _OLD)
        a = names.find("advantages", "--advantages", advantages, _ADVANTAGES)
        m = names.find_optional("mask", "--mask", mask, _MASK)
        found = names.find_snapshots(log_prob, taken=mu)
        chosen = _choose(found, snapshots)
        for name in chosen.values():
            _check_dtypes(source, _Roles(name, mu, a, m))
            _check_shapes(source.arrays, _Roles(name, mu, a, m))
    size = source.arrays[next(iter(chosen.values()))].size
    notes: tuple[str, ...] = ()
    if behavior_log_prob is None and _normal(mu) in _OLD:
        notes = (f"{mu} is taken for μ: right only if it comes from the engine that sampled the tokens",)
    return Rollouts(path, chosen, mu, a, m, size, notes, source)


class _Names:
    """Finds the arrays of a file by given or guessed names."""

    def __init__(self, arrays: dict[str, Stored]) -> None:
        self.arrays = arrays

    def find(self, what: str, flag: str, given: str | None, *guesses: tuple[str, ...]) -> str:
        """The array of that name, else the only one with a name of the first group of guesses that has any."""
        name = self.find_optional(what, flag, given, *guesses)
        if name is None:
            self.fail(f"no array found for the {what}; name it with {flag}")
        return name

    def find_optional(self, what: str, flag: str, given: str | None, *guesses: tuple[str, ...]) -> str | None:
        """As `find`, but None if nothing fits."""
        if given is not None:
            if given not in self.arrays:
                self.fail(f"no array {given!r} ({flag})")
            return given
        for group in guesses:
            hits = [name for name in self.arrays if _normal(name) in group]
            if len(hits) > 1:
                self.fail(f"{' and '.join(map(repr, hits))} could each be the {what}; name one with {flag}")
            if hits:
                return hits[0]
        return None

    def find_snapshots(self, given: str | None, *, taken: str) -> dict[str, str]:
        """Array of log π by snapshot; a lone array is its own snapshot."""
        what, flag = "training policy's log-probs", "--log-prob"
        free = {name: stored for name, stored in self.arrays.items() if name != taken}
        if given is not None and given in self.arrays:
            return {given: given}
        stems = _PI if given is None else (given,)
        exact = _Names(free).find_optional(what, flag, None, stems)
        # the longest stem, so that `log_probs_a` is snapshot `a` of `log_probs` and nothing else
        several = {
            name[len(stem) + 1 :]: name
            for name in free
            for stem in stems
            if name != exact and (name if given else _normal(name)).startswith(f"{stem}_") and len(name) > len(stem) + 1
        }
        if several:
            return ({exact: exact} if exact else {}) | several
        if given is not None:
            self.fail(f"no array {given!r} and none named {given}_<snapshot> ({flag})")
        if exact:
            return {exact: exact}
        old = self.find(what, flag, None, tuple(name for name in _OLD if name != _normal(taken)))
        return {old: old}

    def fail(self, problem: str) -> NoReturn:
        """Raise the problem, with what the file has."""
        listing = "; ".join(f"{name} {stored}" for name, stored in self.arrays.items()) or "nothing"
        msg = f"{problem}. The file has: {listing}"
        raise RolloutError(msg)


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


def _choose(found: dict[str, str], wanted: Sequence[str]) -> dict[str, str]:
    """The wanted snapshots, by their own name or their array's."""
    by_array = {array: name for name, array in found.items()}
    chosen = {}
    for given in wanted:
        name = by_array.get(given, given)
        if name not in found:
            msg = f"no snapshot {given!r} (--snapshot); the file has: {', '.join(found)}"
            raise RolloutError(msg)
        chosen[name] = found[name]
    return chosen or found


def _check_dtypes(source: _Source, roles: _Roles) -> None:
    """Readable arrays of floats, and a mask of what can be 0 and 1: from the headers alone."""
    arrays = source.arrays
    for name in roles:
        if name in source.problems:
            msg = f"{name}: {source.problems[name]}"
            raise RolloutError(msg)
    for name in (roles.log_prob, roles.behavior_log_prob, roles.advantages):
        if arrays[name].dtype not in _EPS:
            msg = f"{name}: expected float16, bfloat16, float32 or float64, got {arrays[name]}"
            raise RolloutError(msg)
    if roles.mask is not None and np.dtype(_numeric(arrays[roles.mask].dtype)).kind not in "biuf":
        msg = f"{roles.mask}: expected a mask of booleans or of 0 and 1, got {arrays[roles.mask]}"
        raise RolloutError(msg)


def _check_shapes(arrays: dict[str, Stored], roles: _Roles) -> None:
    """Token arrays of one shape; advantages may have one number a sequence."""
    shape = arrays[roles.log_prob].shape
    if len(shape) not in (1, 2):
        msg = f"{roles.log_prob}: expected (sequences, tokens) or (tokens,), got {arrays[roles.log_prob]}"
        raise RolloutError(msg)
    for name in filter(None, (roles.behavior_log_prob, roles.mask, roles.advantages)):
        if arrays[name].shape == shape or (name == roles.advantages and arrays[name].shape == shape[:1]):
            continue
        allowed = f"the shape of {roles.log_prob}, {arrays[roles.log_prob]}"
        if name == roles.advantages and len(shape) == 2:
            allowed += ", or one number a sequence"
        msg = f"{name}: expected {allowed}, got {arrays[name]}"
        raise RolloutError(msg)
    if arrays[roles.log_prob].size == 0:
        msg = f"{roles.log_prob}: holds no token, its shape is {arrays[roles.log_prob]}"
        raise RolloutError(msg)


def _numeric(dtype: str) -> str:
    """A name NumPy knows; what it doesn't know is as unfit as an object."""
    if dtype == "bfloat16":
        return "float32"
    try:
        return np.dtype(dtype).name
    except TypeError:
        return "object"


def _as_mask(values: Values, name: str, locate: Callable[[int], tuple[int, ...]]) -> Values:
    """Booleans; 0 and 1 of any dtype will do."""
    if values.dtype == np.bool_:
        return values
    strange = (values != 0) & (values != 1)
    if np.any(strange):
        first = int(np.argmax(strange))
        msg = f"{name}: expected only 0 and 1 in a mask, got {values[first]} at index {locate(first)}"
        raise RolloutError(msg)
    return np.asarray(values != 0)


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into one line that names the file."""
    try:
        yield
    except RolloutError as error:
        raise RolloutError(_line(error if str(error).startswith(str(path)) else f"{path}: {error}")) from None
    except FileNotFoundError:
        msg = f"{path}: no such file"
        raise RolloutError(_line(msg)) from None
    except OSError as error:
        msg = f"{path}: can't be read: {error.strerror or error}"
        raise RolloutError(_line(msg)) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError) as error:
        msg = f"{path}: damaged, or not what its suffix says: {error}"
        raise RolloutError(_line(msg)) from error
    except RuntimeError as error:
        # an encrypted zip member, or what a reader has not implemented
        msg = f"{path}: can't be read: {error}"
        raise RolloutError(_line(msg)) from error


def _line(text: object) -> str:
    """Names come from the file: no line break or terminal escape among them may reach the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


# --- .npz and .safetensors: rectangular arrays, each a run of bytes --------------------------------------------------


class _Run:
    """Reads an array front to back from the bytes of a file."""

    def __init__(self, stream: Any, name: str, dtype: str, *, bfloat16: bool = False) -> None:
        self.stream, self.name, self.bfloat16 = stream, name, bfloat16
        self.dtype = np.dtype(dtype)

    def take(self, count: int) -> Values:
        """The next `count` elements."""
        data = self.stream.read(count * self.dtype.itemsize)
        if len(data) != count * self.dtype.itemsize:
            msg = f"{self.name}: the file ends before its array does"
            raise RolloutError(msg)
        values: Values = np.frombuffer(data, self.dtype)
        if self.bfloat16:
            # the upper half of a float32
            values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values


class _OnePerSequence:
    """Reads one number a sequence and hands out one a token."""

    def __init__(self, run: _Run, width: int) -> None:
        self.run, self.width = run, width
        self.token = self.first = 0
        self.held = np.empty(0)

    def take(self, count: int) -> Values:
        """The numbers of the next `count` tokens."""
        rows = np.arange(self.token, self.token + count) // self.width
        still_needed = self.held[rows[0] - self.first :]
        missing = int(rows[-1]) + 1 - int(rows[0]) - len(still_needed)
        self.held = np.concatenate((still_needed, self.run.take(missing))) if missing else still_needed
        self.first, self.token = int(rows[0]), self.token + count
        return self.held[rows - self.first]


class _Rectangular(ABC):
    """What .npz and .safetensors have in common: arrays in C order that are read side by side."""

    arrays: dict[str, Stored]
    problems: dict[str, str]

    @abstractmethod
    def run(self, name: str, stack: ExitStack) -> _Run:
        """Open an array for reading front to back."""

    def chunks(self, roles: _Roles) -> Iterator[Chunk]:
        """The tokens, at most `CHUNK_TOKENS` at a time, whatever the length of a sequence."""
        shape = tuple(n or 0 for n in self.arrays[roles.log_prob].shape)
        with ExitStack() as stack:
            pi, mu = self.run(roles.log_prob, stack), self.run(roles.behavior_log_prob, stack)
            a = self.run(roles.advantages, stack)
            mask = None if roles.mask is None else self.run(roles.mask, stack)
            advantages = a if self.arrays[roles.advantages].shape == shape else _OnePerSequence(a, shape[1])
            for start in range(0, math.prod(shape), CHUNK_TOKENS):
                count = min(CHUNK_TOKENS, math.prod(shape) - start)

                def locate(i: int, start: int = start) -> tuple[int, ...]:
                    return tuple(int(n) for n in np.unravel_index(start + i, shape))

                yield Chunk.of(
                    (run.take(count) for run in (pi, mu, advantages)),
                    np.ones(count, np.bool_) if mask is None else _as_mask(mask.take(count), mask.name, locate),
                    locate,
                )


class _Npz(_Rectangular):
    """A zip of .npy members, read through zipfile: np.load would allocate whatever a header claims."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays, self.problems = {}, {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    name = info.filename.removesuffix(".npy")
                    self.arrays[name], problem = self._describe(archive, info)
                    if problem:
                        self.problems[name] = problem

    def run(self, name: str, stack: ExitStack) -> _Run:
        """Open a member, past its header."""
        archive = stack.enter_context(zipfile.ZipFile(self.path))
        stream = stack.enter_context(archive.open(f"{name}.npy"))
        return _Run(stream, name, _npy_header(stream)[2].str)

    @staticmethod
    def _describe(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[Stored, str]:
        """What the header says, and what is wrong with it, if anything."""
        problem = _why_not_inflate(info)
        if problem:
            return Stored((), "unreadable", 0), problem
        try:
            with archive.open(info) as stream:
                shape, fortran, dtype = _npy_header(stream)
                header = stream.tell()
        except (ValueError, EOFError, SyntaxError, RecursionError, MemoryError):
            return Stored((), "unreadable", 0), "not a .npy array of version 1.0"
        stored = Stored(shape, dtype.name, math.prod(shape))
        claimed = header + stored.size * dtype.itemsize
        if dtype.hasobject:
            problem = "an object array, which is a pickle and is never loaded"
        elif claimed != info.file_size:
            problem = f"its header claims {claimed} bytes, the file has {info.file_size}"
        elif fortran and len(shape) > 1:
            problem = "stored in Fortran order; save np.ascontiguousarray of it"
        return stored, problem


def _why_not_inflate(info: zipfile.ZipInfo) -> str:
    """Why a member should not even be opened; empty if it may."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed in a way that .npz files are not"
    if info.file_size > _MOST_DEFLATED * info.compress_size + 1024:
        return "claims to expand more than deflate can: a zip bomb"
    return ""


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype; a literal is parsed, nothing is evaluated."""
    # versions 2 and 3 exist for structured dtypes and let a header claim 4 GB
    if np.lib.format.read_magic(stream) != (1, 0):
        msg = "not version 1.0"
        raise ValueError(msg)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if any(n < 0 for n in shape):
        msg = "a negative size"
        raise ValueError(msg)
    return shape, fortran, dtype


class _SafeTensors(_Rectangular):
    """A .safetensors file: the library checks it, and the bytes are read from the offsets in its header.

    The library's own slices are by row and can't hold bfloat16 in NumPy.
    """

    dtypes = {  # noqa: RUF012 - a table of the format, never changed
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
        "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
    }  # fmt: skip

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - of the extra `cli`

        self.path, self.arrays, self.problems = path, {}, {}
        # a directory or a missing file is an OSError here, and clearer than what the library says
        with path.open("rb") as file:
            prefix = file.read(8)
        try:
            with safe_open(path, framework="np") as checked:
                for name in checked.offset_keys():
                    tensor = checked.get_slice(name)
                    shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
                    dtype = "bfloat16" if kind == "BF16" else np.dtype(self.dtypes.get(kind, object)).name
                    self.arrays[name] = Stored(shape, dtype if kind in self.dtypes else kind, math.prod(shape))
        except SafetensorError as error:
            msg = f"damaged, or not what its suffix says: {error}"
            raise RolloutError(msg) from error
        (header_size,) = struct.unpack("<Q", prefix)
        with path.open("rb") as file:
            file.seek(8)
            self.header = json.loads(file.read(header_size))
        self.start = 8 + header_size

    def run(self, name: str, stack: ExitStack) -> _Run:
        """Open the file at a tensor."""
        kind, (begin, _) = self.header[name]["dtype"], self.header[name]["data_offsets"]
        file = stack.enter_context(self.path.open("rb"))
        file.seek(self.start + begin)
        return _Run(file, name, self.dtypes[kind], bfloat16=kind == "BF16")


# --- .parquet: a row is a token or a sequence ------------------------------------------------------------------------


class _Parquet:
    """A .parquet file: one token a row in flat columns, or one sequence a row in columns of lists."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet  # noqa: PLC0415 - of the extra `cli`

        self.path, self.problems = path, dict[str, str]()
        with path.open("rb"), parquet.ParquetFile(path) as file:
            fields, rows, metadata = list(file.schema_arrow), file.metadata.num_rows, file.metadata
            sizes = dict.fromkeys((field.name for field in fields), 0)
            for group in range(metadata.num_row_groups):
                values = _values(metadata.row_group(group))
                if values.keys() != sizes.keys():
                    msg = "damaged: its row groups have other columns than its schema"
                    raise RolloutError(msg)
                for name in sizes:
                    sizes[name] += values[name]
        if len(sizes) != len(fields):
            msg = "several columns have one name"
            raise RolloutError(msg)
        self.arrays = {field.name: _stored_column(field.type, rows, sizes[field.name]) for field in fields}

    def chunks(self, roles: _Roles) -> Iterator[Chunk]:
        """The tokens of one batch of rows after another, at most `CHUNK_TOKENS` at a time."""
        from pyarrow import parquet  # noqa: PLC0415 - of the extra `cli`

        columns = sorted({name for name in roles if name is not None})
        first_row = 0
        with parquet.ParquetFile(self.path) as file:
            for group in range(file.metadata.num_row_groups):
                metadata = file.metadata.row_group(group)
                tokens_a_row = max(1, _values(metadata)[roles.log_prob] // max(1, metadata.num_rows))
                batch_size = max(1, CHUNK_TOKENS // tokens_a_row)
                for batch in file.iter_batches(batch_size, row_groups=[group], columns=columns, use_threads=False):
                    yield from self._of_batch(batch, roles, first_row)
                    first_row += batch.num_rows

    def _of_batch(self, batch: Any, roles: _Roles, first_row: int) -> Iterator[Chunk]:
        # a flat column is a ragged one with one token a row
        ragged = len(self.arrays[roles.log_prob].shape) == 2
        lengths = _lengths(batch, roles.log_prob, first_row) if ragged else np.ones(batch.num_rows, np.int64)
        ends = np.cumsum(lengths)

        def flat(name: str) -> Values:
            column = batch.column(name)
            if len(self.arrays[name].shape) == 1:
                return np.repeat(_to_numpy(column), lengths)
            own = _lengths(batch, name, first_row)
            if not np.array_equal(own, lengths):
                row = int(np.argmax(own != lengths))
                msg = (
                    f"{name}: expected the length of {roles.log_prob} in every row, {lengths[row]} in row "
                    f"{first_row + row}, got {own[row]}"
                )
                raise RolloutError(msg)
            return _to_numpy(column.flatten())

        def index(i: int) -> tuple[int, ...]:
            row = int(np.searchsorted(ends, i, side="right"))
            return (first_row + row, i - int(ends[row] - lengths[row])) if ragged else (first_row + row,)

        numbers = [flat(name) for name in (roles.log_prob, roles.behavior_log_prob, roles.advantages)]
        # a null turns the column into objects or floats with NaN: neither 0 nor 1
        mask = np.ones(len(numbers[0]), np.bool_) if roles.mask is None else _as_mask(flat(roles.mask), roles.mask, index)
        for start in range(0, len(mask), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)

            def locate(i: int, start: int = start) -> tuple[int, ...]:
                return index(start + i)

            yield Chunk.of((array[part] for array in numbers), mask[part], locate)


def _values(row_group: Any) -> dict[str, int]:
    """Numbers in each column of a row group, by the column's name."""
    leaves = (row_group.column(i) for i in range(row_group.num_columns))
    return {leaf.path_in_schema.partition(".")[0]: leaf.num_values for leaf in leaves}


def _stored_column(kind: Any, rows: int, size: int) -> Stored:
    """A column as an array; of lists, as a ragged one."""
    from pyarrow import types  # noqa: PLC0415 - of the extra `cli`

    nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    inner = kind.value_type if nested else kind
    plain = types.is_floating(inner) or types.is_integer(inner) or types.is_boolean(inner)
    dtype = np.dtype(inner.to_pandas_dtype()).name if plain else str(inner)
    return Stored((rows, None) if nested else (rows,), dtype, size)


def _lengths(batch: Any, name: str, first_row: int) -> Values:
    """Length of each row's list."""
    from pyarrow import compute  # noqa: PLC0415 - of the extra `cli`

    column = batch.column(name)
    if column.null_count:
        row = first_row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        msg = f"{name}: expected a list in every row, got null in row {row}"
        raise RolloutError(msg)
    return np.asarray(compute.list_value_length(column).to_numpy(zero_copy_only=False), np.int64)


def _to_numpy(column: Any) -> Values:
    """A flat column; a null among floats becomes NaN."""
    return np.asarray(column.to_numpy(zero_copy_only=False))
