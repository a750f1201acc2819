"""Open a file of any format: find its arrays, check them, and stream its tokens."""

from __future__ import annotations

import struct
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from drpo_core.audit.readers import names as by_name
from drpo_core.audit.readers.base import CHUNK_TOKENS, Roles, RolloutError
from drpo_core.audit.readers.npz import Npz
from drpo_core.audit.readers.parquet import Parquet
from drpo_core.audit.readers.safetensors import SafeTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from drpo_core.audit.readers.base import Chunk, Source, Stored

__all__ = ["Rollouts", "open_rollouts"]

FORMATS: Mapping[str, Callable[[Path], Source]] = {".npz": Npz, ".safetensors": SafeTensors, ".parquet": Parquet}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


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
    source: Source
    chunk_tokens: int = CHUNK_TOKENS

    def chunks(self, snapshot: str) -> Iterator[Chunk]:
        """Yield the tokens of one snapshot, at most `chunk_tokens` at a time, in the same chunks on every call.

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
            If the file is damaged, or the mask holds anything but 0 and 1.
        """
        roles = Roles(self.snapshots[snapshot], self.behavior_log_prob, self.advantages, self.mask)
        with _one_line_errors(self.path):
            yield from self.source.chunks(roles, self.chunk_tokens)

    def tolerance(self, snapshot: str) -> float:
        """Nats by which rounding in the stored dtypes may leave a log-prob above 0, as in `drpo_core.validate`."""
        stored = (self.source.arrays[self.snapshots[snapshot]], self.source.arrays[self.behavior_log_prob])
        return max(1e-5, *(16.0 * EPS[array.dtype] for array in stored))


def open_rollouts(
    path: str | Path,
    *,
    log_prob: str | None = None,
    behavior_log_prob: str | None = None,
    advantages: str | None = None,
    mask: str | None = None,
    snapshots: Sequence[str] = (),
    chunk_tokens: int = CHUNK_TOKENS,
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
    chunk_tokens
        The largest number of tokens in memory at once.

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
    >>> from drpo_core.audit import BUNDLED, open_rollouts
    >>> rollouts = open_rollouts(BUNDLED, snapshots=["step0"])
    >>> rollouts.snapshots, rollouts.tokens
    ({'step0': 'log_prob_step0'}, 6144)
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        msg = f"{path}: expected a file named {', '.join(FORMATS)}, got {path.suffix or 'no suffix'}"
        raise RolloutError(msg)
    with _one_line_errors(path):
        source = FORMATS[suffix](path)
        names = by_name.Names(source.arrays)
        mu = names.find(
            "behaviour policy's log-probs", "--behavior-log-prob", behavior_log_prob, by_name.BEHAVIOR, by_name.OLD
        )
        a = names.find("advantages", "--advantages", advantages, by_name.ADVANTAGES)
        m = names.find_optional("mask", "--mask", mask, by_name.MASK)
        found = names.find_snapshots(log_prob, taken=mu)
        chosen = by_name.choose(found, snapshots)
        for name in chosen.values():
            _check_dtypes(source, Roles(name, mu, a, m))
            _check_shapes(source.arrays, Roles(name, mu, a, m))
    size = source.arrays[next(iter(chosen.values()))].size
    notes: tuple[str, ...] = ()
    if behavior_log_prob is None and by_name.normal(mu) in by_name.OLD:
        notes = (f"{mu} is taken for μ: right only if it comes from the engine that sampled the tokens",)
    return Rollouts(path, chosen, mu, a, m, size, notes, source, chunk_tokens)


def _check_dtypes(source: Source, roles: Roles) -> None:
    """Refuse, from the headers alone, arrays that can't be read or whose dtype can't hold what they should."""
    arrays = source.arrays
    for name in roles:
        if name in source.problems:
            msg = f"{name}: {source.problems[name]}"
            raise RolloutError(msg)
    for name in (roles.log_prob, roles.behavior_log_prob, roles.advantages):
        if arrays[name].dtype not in EPS:
            msg = f"{name}: expected float16, bfloat16, float32 or float64, got {arrays[name]}"
            raise RolloutError(msg)
    if roles.mask is not None and np.dtype(_numpy_name(arrays[roles.mask].dtype)).kind not in "biuf":
        msg = f"{roles.mask}: expected a mask of booleans or of 0 and 1, got {arrays[roles.mask]}"
        raise RolloutError(msg)


def _check_shapes(arrays: dict[str, Stored], roles: Roles) -> None:
    """Refuse token arrays of differing shapes; advantages may have one number a sequence."""
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


def _numpy_name(dtype: str) -> str:
    """Return the dtype's name in NumPy; "object", which no mask may have, for one that NumPy does not know."""
    if dtype == "bfloat16":
        return "float32"
    try:
        return np.dtype(dtype).name
    except TypeError:
        return "object"


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn every error that a damaged file causes in its reader into one line that names the file."""
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
        # an encrypted zip member, or a feature that the reader lacks
        msg = f"{path}: can't be read: {error}"
        raise RolloutError(_line(msg)) from error


def _line(text: object) -> str:
    """Escape what can't be printed: names come from the file and must not break the line or control the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
