"""The .parquet format: one token a row in flat columns, or one sequence a row in columns of lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from drpo_core.audit.readers.base import Chunk, RolloutError, Stored, as_mask

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from drpo_core.audit.readers.base import Roles, Values

__all__ = ["Parquet"]


class Parquet:
    """A .parquet file."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet  # noqa: PLC0415 - of the extra `cli`

        self.path, self.problems = path, dict[str, str]()
        with path.open("rb"), parquet.ParquetFile(path) as file:
            fields, rows, metadata = list(file.schema_arrow), file.metadata.num_rows, file.metadata
            sizes = dict.fromkeys((field.name for field in fields), 0)
            for group in range(metadata.num_row_groups):
                values = _column_sizes(metadata.row_group(group))
                if values.keys() != sizes.keys():
                    msg = "damaged: its row groups have other columns than its schema"
                    raise RolloutError(msg)
                for name in sizes:
                    sizes[name] += values[name]
        if len(sizes) != len(fields):
            msg = "several columns have one name"
            raise RolloutError(msg)
        self.arrays = {field.name: _stored_column(field.type, rows, sizes[field.name]) for field in fields}

    def chunks(self, roles: Roles, chunk_tokens: int) -> Iterator[Chunk]:
        """Yield the tokens of one batch of rows after another, at most `chunk_tokens` at a time."""
        from pyarrow import parquet  # noqa: PLC0415 - of the extra `cli`

        columns = sorted({name for name in roles if name is not None})
        first_row = 0
        with parquet.ParquetFile(self.path) as file:
            for group in range(file.metadata.num_row_groups):
                metadata = file.metadata.row_group(group)
                tokens_a_row = max(1, _column_sizes(metadata)[roles.log_prob] // max(1, metadata.num_rows))
                batch_size = max(1, chunk_tokens // tokens_a_row)
                for batch in file.iter_batches(batch_size, row_groups=[group], columns=columns, use_threads=False):
                    yield from self._of_batch(batch, roles, first_row, chunk_tokens)
                    first_row += batch.num_rows

    def _of_batch(self, batch: Any, roles: Roles, first_row: int, chunk_tokens: int) -> Iterator[Chunk]:
        # a flat column is read as a ragged one with one token a row
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
        # a null in a mask arrives as None or NaN, neither of which is 0 or 1
        mask = np.ones(len(numbers[0]), np.bool_) if roles.mask is None else as_mask(flat(roles.mask), roles.mask, index)
        for start in range(0, len(mask), chunk_tokens):
            part = slice(start, start + chunk_tokens)

            def locate(i: int, start: int = start) -> tuple[int, ...]:
                return index(start + i)

            yield Chunk.of((array[part] for array in numbers), mask[part], locate)


def _column_sizes(row_group: Any) -> dict[str, int]:
    """Return how many numbers each column of a row group has, by the column's name."""
    leaves = (row_group.column(i) for i in range(row_group.num_columns))
    return {leaf.path_in_schema.partition(".")[0]: leaf.num_values for leaf in leaves}


def _stored_column(kind: Any, rows: int, size: int) -> Stored:
    """Describe a column; one of lists is a ragged array."""
    from pyarrow import types  # noqa: PLC0415 - of the extra `cli`

    nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    inner = kind.value_type if nested else kind
    numeric = types.is_floating(inner) or types.is_integer(inner) or types.is_boolean(inner)
    dtype = np.dtype(inner.to_pandas_dtype()).name if numeric else str(inner)
    return Stored((rows, None) if nested else (rows,), dtype, size)


def _lengths(batch: Any, name: str, first_row: int) -> Values:
    """Return the length of each row's list."""
    from pyarrow import compute  # noqa: PLC0415 - of the extra `cli`

    column = batch.column(name)
    if column.null_count:
        row = first_row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        msg = f"{name}: expected a list in every row, got null in row {row}"
        raise RolloutError(msg)
    return np.asarray(compute.list_value_length(column).to_numpy(zero_copy_only=False), np.int64)


def _to_numpy(column: Any) -> Values:
    """Convert a flat column; a null among floats becomes NaN."""
    return np.asarray(column.to_numpy(zero_copy_only=False))
