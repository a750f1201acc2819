"""Shared by the commands: errors of usage in one line, and values of flags."""

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

__all__ = ["UsageError", "literal", "one_of", "pairs", "quiet_stdout", "stop"]


class UsageError(Exception):
    """The command can't do what was asked; the message is one line for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def stop(line: str) -> NoReturn:
    """Write a line to stderr and exit with 2."""
    sys.stderr.write(line + "\n")
    raise SystemExit(2)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what the user's code prints to stderr, so that it stays out of the report."""
    with redirect_stdout(sys.stderr):
        yield


def one_of(flag: str, value: str, valid: Sequence[str] | Mapping[str, object]) -> None:
    """Refuse a value that is not among the valid ones."""
    if value not in valid:
        msg = f"{flag}: expected one of {', '.join(valid)}, got {value!r}"
        raise UsageError(msg)


def pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Parse NAME=VALUE, each name once."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            msg = f"{flag}: expected NAME=VALUE, got {text!r}"
            raise UsageError(msg)
        if name in found:
            msg = f"{flag}: {name} is given twice"
            raise UsageError(msg)
        found[name] = value
    return found


def literal(flag: str, text: str | ast.expr) -> object:
    """Parse a Python literal; nothing is ever evaluated."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        shown = text if isinstance(text, str) else ast.unparse(text)
        msg = f"{flag}: expected a Python literal such as 0.2, True or 'mean', got {shown!r}"
        raise UsageError(msg) from None
