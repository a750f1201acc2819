"""On Python 3.11 pydantic refuses typing.TypedDict, which SkyRL's request types use; no loss depends on it."""

import sys
import typing

import typing_extensions

if sys.version_info < (3, 12):
    typing.TypedDict = typing_extensions.TypedDict
