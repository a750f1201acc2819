"""Recorded rollouts as a stream of tokens: .npz, .safetensors and .parquet files, read in chunks of bounded size.

Whatever the format, a file becomes `Chunk`s of flat arrays. A file is never trusted and nothing in it is executed: array
headers are checked against the bytes that are there before anything is allocated, and pickles are refused.
"""

from drpo_core.audit.readers.base import CHUNK_TOKENS, Chunk, RolloutError
from drpo_core.audit.readers.rollouts import Rollouts, open_rollouts

__all__ = ["CHUNK_TOKENS", "Chunk", "RolloutError", "Rollouts", "open_rollouts"]
