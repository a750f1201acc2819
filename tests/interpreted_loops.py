"""A compiled loop run by Python instead: everywhere, or where there are few tokens."""

import functools
import operator

import numpy as np

from drpo_core.engines import ordering

MANY = 500
"""Tokens that Python takes a tenth of a second for."""


@functools.cache
def interpreted(source, _, constants, dtype):
    """For `drpo_core.engines.numba_loop._compile`: the loop as a Python function of NumPy scalars."""
    number, integer = dtype.type, ordering.integer(dtype)
    functions = {
        **{name: getattr(np, name) for name in ("empty", "exp", "expm1", "log", "log1p", "sqrt", "tanh")},
        "decay": np.exp,
        "add": lambda total, x: total + x,
        "largest": max,
        "ordered": lambda x: int(ordering.flipped(number(x if x == x else np.nan).view(integer))),
        "unordered": lambda bits: ordering.flipped(np.asarray(bits, integer)).view(dtype)[()],
        "select": lambda condition, x, y: x if condition else y,
        "lowest": ordering.lowest(dtype),
        "negated": operator.not_,
        "wide_vectors": lambda: None,
        "number": number,
        "dtype": dtype,
        "zero": number(0),
        "one": number(1),
        "infinity": number(np.inf),
    }
    namespace = functions | {name: number(value) for name, value in constants}
    exec(source, namespace)  # noqa: S102

    def loop(*arguments):
        with np.errstate(all="ignore"):
            namespace["loop"](*arguments)

    return loop


def interpreted_over_few(compiled):
    """For `_compile` too: interpreted over a few hundred tokens, where compiling takes longer; else what `compiled` makes."""

    @functools.cache
    def made(*program):
        def loop(*arguments):
            (compiled if arguments[0].size > MANY else interpreted)(*program)(*arguments)

        return loop

    return made
