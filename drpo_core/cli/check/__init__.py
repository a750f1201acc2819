"""The command `drpo check`: the verification kit on a user's own loss.

The kit and the frameworks are imported when the command runs, because `drpo audit` must not need them.
"""

import importlib
import json
import sys
from typing import Annotated

import typer

from drpo_core.cli.check.notes import warnings_as_lines
from drpo_core.cli.usage import UsageError, quiet_stdout, stop

__all__ = ["check_command"]

NAMES = "log_prob, behavior_log_prob, advantages, mask, segment_ids or normalizer"


def check_command(
    target: Annotated[
        str, typer.Argument(help="package.module:function or path/to/file.py:function; or the name of an Implementation.")
    ],
    framework: Annotated[
        str | None, typer.Option(help="numpy, torch or jax (default: guessed from annotations and imports).")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help='What it claims to be: "DRPO(delta=0.15)", or module:NAME of your own. Without it: structure only.'),
    ] = None,
    reduction: Annotated[
        str | None,
        typer.Option(help="none, sum, token_mean, sequence_mean_token_mean or sequence_mean_token_sum (default: none)."),
    ] = None,
    horizon: Annotated[float, typer.Option(help="What sequence_mean_token_sum divides each sequence by.")] = 1.0,
    form: Annotated[
        str, typer.Option(help="ratio: the gradient is the derivative of the value. score: something in it is detached.")
    ] = "ratio",
    renamed: Annotated[
        list[str] | None, typer.Option("--map", help=f"OURS=THEIRS, of {NAMES}; repeatable.", metavar="OURS=THEIRS")
    ] = None,
    constant: Annotated[
        list[str] | None,
        typer.Option("--set", help="Further argument, a Python literal; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    returns: Annotated[
        str, typer.Option(help="loss, loss+gradient, loss+gradient+weight, or tuple-first for (loss, metrics).")
    ] = "loss",
    max_log_ratio: Annotated[
        float | None, typer.Option(help="Largest |log π − log μ| for which it claims anything (default: 20).")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float64, float32, bfloat16; repeatable (default: the first two).")
    ] = None,
    selected: Annotated[
        list[str] | None, typer.Option("--property", help="P1 to P27, or the name of a check; repeatable.")
    ] = None,
    expect_failure: Annotated[
        list[str] | None, typer.Option(help="Property or check that is known to fail, and why.", metavar="P2=REASON")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="dev, ci or nightly (default: $DRPO_PROFILE, else dev).")] = None,
    *,
    boundary_dropped: Annotated[
        bool, typer.Option("--boundary-dropped", help="A token exactly on the boundary is dropped, by design.")
    ] = False,
    not_local: Annotated[
        bool, typer.Option("--not-local", help="A token's gradient depends on others, by design (sequence ratios).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    snippets: Annotated[bool, typer.Option(help="Print code that reproduces each failure.")] = True,
) -> None:
    """Check a policy loss against the properties P1 to P27. Exit code 1 if one fails."""
    try:
        _need_the_kit()
        from drpo_core.cli.check.declaration import Declared  # noqa: PLC0415 - these need the kit, of the extra `testing`
        from drpo_core.cli.check.run import Chosen, ok, run  # noqa: PLC0415
        from drpo_core.cli.check.show import as_dict, show  # noqa: PLC0415
        from drpo_core.cli.check.wrapping import implementation_of  # noqa: PLC0415

        declared = Declared(
            framework=framework,
            objective=objective,
            reduction=reduction,
            horizon=horizon,
            form=form,
            renamed=renamed or [],
            constants=constant or [],
            returns=returns,
            max_log_ratio=max_log_ratio,
            dtypes=dtype or [],
            boundary_dropped=boundary_dropped,
            not_local=not_local,
        )
        chosen = Chosen.parse(selected or [], expect_failure or [], profile)
        with quiet_stdout(), warnings_as_lines():
            implementation, about = implementation_of(target, declared)
            results = run(implementation, about, chosen)
    except UsageError as error:
        stop(f"drpo check: {error}")
    if as_json:
        report = as_dict(target, implementation, about, results)
        sys.stdout.write(json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    else:
        show(target, implementation, about, results, snippets=snippets)
    raise SystemExit(0 if ok(results) else 1)


def _need_the_kit() -> None:
    try:
        importlib.import_module("drpo_core.testing")
    except ModuleNotFoundError as missing:
        if missing.name not in ("hypothesis", "mpmath"):
            raise
        msg = f"{missing.name} is not installed: pip install 'drpo-core[testing]'"
        raise UsageError(msg) from missing
