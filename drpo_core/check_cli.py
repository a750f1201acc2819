"""The command `drpo check`: the verification kit on a user's own loss.

Nothing of the kit, of typer or of a framework is imported before the command runs: `drpo audit` must not need them. Hence
the imports inside functions, and annotations that are not postponed: typer reads them.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import numpy as np

import drpo_core
from drpo_core import objectives

if TYPE_CHECKING:
    import typer

    from drpo_core.testing.implementation import Implementation
    from drpo_core.testing.runner import CheckResult

__all__ = ["register"]

FRAMEWORKS = ("numpy", "torch", "jax")
RETURNS = {"loss": "", "loss+gradient": "[:2]", "loss+gradient+weight": "[:3]", "tuple-first": "[0]"}
REQUIRED = ("log_prob", "behavior_log_prob", "advantages")
STATUSES = ("passed", "failed", "not applicable", "expected failure", "unexpected pass")
STYLES = dict(zip(STATUSES, ("green", "bold red", "dim", "yellow", "bold red"), strict=True))
LIBRARIES = ("drpo_core", "drpo_torch", "drpo_jax", "torch", "jax", "numpy", "hypothesis", "_pytest")
TAKEN = ("function", "evaluate", "batch", "batches", "names", "np", "sys", "runpy", "torch", "jax", "jnp")
"""Names that a snippet gives to other things before it calls the loss."""


class UsageError(Exception):
    """What was asked for can't be done; the message is one line for the user."""


def register(app: "typer.Typer") -> None:
    """Add the command to an app."""
    import typer  # noqa: PLC0415 -- of the extra `cli`

    names = "log_prob, behavior_log_prob, advantages, mask, segment_ids or normalizer"

    @app.command("check")
    def check_command(
        target: Annotated[
            str, typer.Argument(help="package.module:function or path/to/file.py:function; or the name of an Implementation.")
        ],
        framework: Annotated[
            str | None, typer.Option(help="numpy, torch or jax [default: guessed from annotations and imports].")
        ] = None,
        objective: Annotated[
            str | None, typer.Option(help='What it claims to be, such as "DRPO(delta=0.15)". Without it: structure only.')
        ] = None,
        reduction: Annotated[
            str | None,
            typer.Option(help="none, sum, token_mean, sequence_mean_token_mean or sequence_mean_token_sum [default: none]."),
        ] = None,
        horizon: Annotated[float, typer.Option(help="What sequence_mean_token_sum divides each sequence by.")] = 1.0,
        form: Annotated[
            str, typer.Option(help="ratio: the gradient is the derivative of the value. score: something in it is detached.")
        ] = "ratio",
        renamed: Annotated[
            list[str] | None, typer.Option("--map", help=f"OURS=THEIRS, of {names}; repeatable.", metavar="OURS=THEIRS")
        ] = None,
        constant: Annotated[
            list[str] | None,
            typer.Option("--set", help="Further argument, a Python literal; repeatable.", metavar="NAME=VALUE"),
        ] = None,
        returns: Annotated[
            str, typer.Option(help="loss, loss+gradient, loss+gradient+weight, or tuple-first for (loss, metrics).")
        ] = "loss",
        max_log_ratio: Annotated[
            float | None, typer.Option(help="Largest |log π − log μ| for which it claims anything [default: 20].")
        ] = None,
        dtype: Annotated[
            list[str] | None, typer.Option(help="float64, float32, bfloat16; repeatable [default: the first two].")
        ] = None,
        selected: Annotated[
            list[str] | None, typer.Option("--property", help="P1 to P24, or the name of a check; repeatable.")
        ] = None,
        expect_failure: Annotated[
            list[str] | None, typer.Option(help="Property or check that is known to fail, and why.", metavar="P2=REASON")
        ] = None,
        profile: Annotated[str | None, typer.Option(help="dev, ci or nightly [default: $DRPO_PROFILE, else dev].")] = None,
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
        """Check a policy loss against the properties P1 to P24. Exit code 1 if one fails."""
        declared = _Declared(
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
        try:
            _need_the_kit()
            chosen = _Chosen.parse(selected or [], expect_failure or [], profile)
            with _quiet_stdout(), _warnings_as_lines():
                implementation, about = _implementation(target, declared)
                results = _run(implementation, about, chosen)
        except UsageError as error:
            _stop(str(error))
        if as_json:
            report = _as_dict(target, implementation, about, results)
            sys.stdout.write(json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        else:
            _print(target, implementation, about, results, snippets=snippets)
        raise SystemExit(0 if _ok(results) else 1)


def _stop(line: str) -> NoReturn:
    sys.stderr.write(f"drpo check: {' '.join(line.split())}\n")
    raise SystemExit(2)


def _note(line: str) -> None:
    sys.stderr.write(f"drpo check: note: {line}\n")


def _need_the_kit() -> None:
    try:
        importlib.import_module("drpo_core.testing")
    except ModuleNotFoundError as missing:
        if missing.name not in ("hypothesis", "mpmath"):
            raise
        msg = f"{missing.name} is not installed: pip install 'drpo-core[testing]'"
        raise UsageError(msg) from missing


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keep what the user's code prints out of the report."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Each different warning once, as a line."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        line = f"{category.__name__}: {' '.join(str(message).split())} ({Path(filename).name}, line {lineno})"
        if line not in seen:
            seen.add(line)
            _note(line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# ---- what the user declares


@dataclass(frozen=True, kw_only=True)
class _Declared:
    """The flags that describe a function, as typed."""

    framework: str | None
    objective: str | None
    reduction: str | None
    horizon: float
    form: str
    renamed: list[str]
    constants: list[str]
    returns: str
    max_log_ratio: float | None
    dtypes: list[str]
    boundary_dropped: bool
    not_local: bool

    def given(self) -> list[str]:
        """The flags that differ from their defaults."""
        flags = {
            "--framework": self.framework is not None,
            "--objective": self.objective is not None,
            "--reduction": self.reduction is not None,
            "--horizon": self.horizon != 1.0,
            "--form": self.form != "ratio",
            "--map": bool(self.renamed),
            "--set": bool(self.constants),
            "--returns": self.returns != "loss",
            "--max-log-ratio": self.max_log_ratio is not None,
            "--dtype": bool(self.dtypes),
            "--boundary-dropped": self.boundary_dropped,
            "--not-local": self.not_local,
        }
        return [flag for flag, used in flags.items() if used]

    def claims(self) -> dict[str, Any]:
        """Fields of `Implementation`."""
        from drpo_core.testing.batch import DTYPES  # noqa: PLC0415 -- of the extra `testing`
        from drpo_core.testing.implementation import REDUCTIONS  # noqa: PLC0415 -- of the extra `testing`

        _one_of("--reduction", self.reduction or "none", REDUCTIONS)
        _one_of("--form", self.form, ("ratio", "score"))
        _one_of("--returns", self.returns, RETURNS)
        for dtype in self.dtypes:
            _one_of("--dtype", dtype, DTYPES)
        if not 0.0 < self.horizon < float("inf"):
            msg = f"--horizon: expected a positive number, got {self.horizon:g}"
            raise UsageError(msg)
        if self.max_log_ratio is not None and not self.max_log_ratio > 0.0:
            msg = f"--max-log-ratio: expected a positive number of nats, got {self.max_log_ratio:g}"
            raise UsageError(msg)
        claims: dict[str, Any] = {
            "objective": None if self.objective is None else _parsed_objective(self.objective),
            "reduction": self.reduction or "none",
            "horizon": self.horizon,
            "form": self.form,
            "keeps_boundary": not self.boundary_dropped,
            "local": not self.not_local,
        }
        if self.max_log_ratio is not None:
            claims["max_abs_log_ratio"] = self.max_log_ratio
        if self.dtypes:
            claims["dtypes"] = tuple(self.dtypes)
        return claims


def _one_of(flag: str, value: str, valid: Sequence[str] | Mapping[str, object]) -> None:
    if value not in valid:
        msg = f"{flag}: expected one of {', '.join(valid)}, got {value!r}"
        raise UsageError(msg)


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, each name once."""
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


def _literal(flag: str, text: str | ast.expr) -> object:
    """A Python literal; nothing is ever evaluated."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        shown = text if isinstance(text, str) else ast.unparse(text)
        msg = f"{flag}: expected a Python literal such as 0.2, True or 'mean', got {shown!r}"
        raise UsageError(msg) from None


def _parsed_objective(text: str) -> object:
    """An objective of drpo_core from its repr."""
    exported = {name: getattr(objectives, name) for name in objectives.__all__}
    # a protocol is exported beside them
    known: dict[str, Any] = {name: value for name, value in exported.items() if dataclasses.is_dataclass(value)}
    example = 'such as "DRPO(delta=0.15)"'
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        call = ast.Constant(None)
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        msg = f"--objective: expected one of {', '.join(sorted(known))} with its hyper-parameters, {example}, got {text!r}"
        raise UsageError(msg)
    _one_of("--objective", call.func.id, sorted(known))
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        msg = f"--objective: hyper-parameters are given by name, {example}, got {text!r}"
        raise UsageError(msg)
    values = {str(keyword.arg): _literal("--objective", keyword.value) for keyword in call.keywords}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            objective: object = known[call.func.id](**values)
    except (TypeError, ValueError) as error:
        msg = f"--objective: {text}: {str(error).replace(f'{call.func.id}.__init__() ', '')}"
        raise UsageError(msg) from error
    for warning in caught:
        _note(f"--objective: {warning.message}")
    return objective


@dataclass(frozen=True)
class _Chosen:
    """What to run."""

    checks: tuple[str, ...]
    expected: dict[str, str]
    settings: Callable[[float], Any]

    @staticmethod
    def parse(selected: list[str], expected: list[str], profile: str | None) -> "_Chosen":
        """From the flags."""
        import hypothesis  # noqa: PLC0415 -- of the extra `testing`

        from drpo_core.testing.profiles import settings_for  # noqa: PLC0415 -- of the extra `testing`
        from drpo_core.testing.runner import select  # noqa: PLC0415 -- of the extra `testing`

        def settings(cost: float) -> Any:
            chosen = settings_for(profile, cost=cost)
            # only the nightly profile remembers: a command should leave no folder behind where it is run
            return chosen if chosen.max_examples >= NIGHTLY else hypothesis.settings(chosen, database=None)

        known = {_as_property(name): reason for name, reason in _pairs("--expect-failure", expected).items()}
        names = [_as_property(name) for name in selected]
        try:
            settings(1.0)
            select(list(known))
            checks = tuple(info.name for info in select(names or None))
        except ValueError as error:
            flag, _, text = str(error).partition(": ")
            msg = f"{'--profile' if flag == 'profile' else '--property, --expect-failure'}: {text}"
            raise UsageError(msg) from error
        return _Chosen(checks, known, settings)


NIGHTLY = 10_000


def _as_property(name: str) -> str:
    return name.upper() if re.fullmatch(r"[pP]\d+", name) else name


# ---- finding the loss


@dataclass(frozen=True)
class _Target:
    """What a user named, and how a snippet gets hold of it."""

    thing: object
    label: str
    file: str | None
    search_path: str
    imports: str
    expression: str


def _target(text: str) -> _Target:
    place, colon, path = text.rpartition(":")
    if not (place and colon and path):
        msg = f"expected package.module:function or path/to/file.py:function, got {text!r}"
        raise UsageError(msg)
    is_file = place.endswith(".py") or "/" in place
    module = _module_of_file(Path(place)) if is_file else _module(place)
    thing: object = module
    for part in path.split("."):
        if not hasattr(thing, part):
            raise UsageError(_no_attribute(place, module, path))
        thing = getattr(thing, part)
    search_path = _search_path(place, module, is_file=is_file)
    imports, expression = _import_source(place, path, search_path, is_file=is_file)
    return _Target(thing, path, getattr(module, "__file__", None), search_path, imports, expression)


def _no_attribute(place: str, module: ModuleType, path: str) -> str:
    import difflib  # noqa: PLC0415 -- only for a mistyped name

    close = difflib.get_close_matches(path, [name for name in vars(module) if not name.startswith("__")], n=1)
    return f"{place} has no {path}" + (f"; did you mean {close[0]}?" if close else "")


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with _import_errors(name):
        return importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        msg = f"no file {path}"
        raise UsageError(msg)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # like a script's, unless that would replace a module, or be taken for one, of the same name
    taken = path.stem in sys.stdlib_module_names or path.stem in sys.modules
    name = f"_drpo_check_{path.stem}" if taken or not path.stem.isidentifier() else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"{path} is not a Python file"
        raise UsageError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _import_errors(str(path)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _import_errors(what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name is not None and (what == missing.name or what.startswith(f"{missing.name}.")):
            msg = f"no module named {missing.name!r}, here or among the installed packages"
        else:
            msg = f"{what} can't be imported: {missing}"
        raise UsageError(msg) from missing
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = getattr(error, "lineno", None) or where.lineno
        file = getattr(error, "filename", None) or where.filename
        msg = f"{what} can't be imported: {type(error).__name__}: {error} ({Path(str(file)).name}, line {line})"
        raise UsageError(msg) from error


def _search_path(place: str, module: ModuleType, *, is_file: bool) -> str:
    """Statements that let a snippet import the module, if it isn't installed."""
    file = getattr(module, "__file__", None)
    here = file is not None and Path(file).is_relative_to(Path.cwd()) and "site-packages" not in file
    folder = str(Path(place).parent) if is_file else "." if here else None
    return "" if folder is None else f"import sys\n\nsys.path.insert(0, {folder!r})\n\n"


def _import_source(place: str, path: str, search_path: str, *, is_file: bool) -> tuple[str, str]:
    """Statements that import the target, and the expression that then is it."""
    first, dot, rest = path.partition(".")
    own = f"loss_{first}" if first in TAKEN else first
    if is_file and not Path(place).stem.isidentifier():
        return f"import runpy\n\n{own} = runpy.run_path({place!r})[{first!r}]", f"{own}{dot}{rest}"
    name = Path(place).stem if is_file else place
    return f"{search_path}from {name} import {first if own == first else f'{first} as {own}'}", f"{own}{dot}{rest}"


# ---- wrapping it


@dataclass
class _About:
    """What the report needs beside the implementation; and what the last call was, for failures without a snippet."""

    file: str | None
    framework: str | None = None
    last: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def _implementation(text: str, declared: _Declared) -> "tuple[Implementation, _About]":
    """The target as the kit calls it."""
    from drpo_core.testing.implementation import Implementation  # noqa: PLC0415 -- of the extra `testing`

    claims = declared.claims()
    target = _target(text)
    about = _About(target.file)
    if isinstance(target.thing, Implementation):
        if given := declared.given():
            msg = f"{text} is an Implementation and declares itself: leave out {', '.join(given)}"
            raise UsageError(msg)
        source = target.thing.source
        if source is not None:
            source = replace(source, function=target.search_path + source.function)
        return _recorded(replace(target.thing, source=source), about), about
    if inspect.isclass(target.thing) or not callable(target.thing):
        kind = "a class" if inspect.isclass(target.thing) else f"a {type(target.thing).__name__}"
        msg = f"{text} is {kind}, not a function or an Implementation"
        raise UsageError(msg)
    about.framework = declared.framework or _guessed(target.thing)
    if about.framework is None:
        msg = f"{text}: which framework is it written in? --framework numpy, torch or jax"
        raise UsageError(msg)
    _one_of("--framework", about.framework, FRAMEWORKS)
    implementation = _recorded(_wrapped(target, about.framework, declared, claims), about)
    _probe(implementation, declared)
    if not implementation.takes_mask:
        _note(
            "the loss takes no mask, so masks (P1, P5 and P6) can't be checked; --map mask=NAME if it has one by another name"
        )
    return implementation, about


def _wrapped(target: _Target, framework: str, declared: _Declared, claims: dict[str, Any]) -> "Implementation":
    from drpo_core.testing.implementation import from_function  # noqa: PLC0415 -- of the extra `testing`

    function: Callable[..., Any] = target.thing  # type: ignore[assignment]
    names, constants = _signature(function, target.label, declared)

    def loss(**batch: object) -> object:
        returned = function(**{names[key]: value for key, value in batch.items()}, **constants)
        return _part(returned, declared.returns)

    keyword_only = inspect.Parameter.KEYWORD_ONLY
    loss.__signature__ = inspect.Signature([inspect.Parameter(key, keyword_only) for key in names])  # type: ignore[attr-defined]
    try:
        return from_function(
            loss,
            framework,
            returns_gradient="gradient" in declared.returns,
            name=target.label,
            call_source=_call_source(target, names, constants, RETURNS[declared.returns]),
            **claims,
        )
    except ModuleNotFoundError as missing:
        if missing.name != framework:
            raise
        msg = f"{framework} is not installed: pip install 'drpo-core[{framework}]'"
        raise UsageError(msg) from missing


def _part(returned: Any, returns: str) -> Any:
    """What the kit wants of what a function returned."""
    several = isinstance(returned, (tuple, list))
    if returns == "loss":
        if several or isinstance(returned, dict):
            what = f"a {type(returned).__name__} of {len(returned)}"
            msg = f"the loss returned {what}: --returns tuple-first, loss+gradient or loss+gradient+weight?"
            raise UsageError(msg)
        return returned
    needed = 1 if returns == "tuple-first" else returns.count("+") + 1
    if not several or len(returned) < needed:
        what = f"a tuple of {len(returned)}" if several else f"a {type(returned).__name__}"
        msg = f"--returns {returns}: the loss returned {what}"
        raise UsageError(msg)
    return returned[0] if returns == "tuple-first" else tuple(returned[:needed])


def _signature(function: Callable[..., Any], label: str, declared: _Declared) -> tuple[dict[str, str], dict[str, object]]:
    """The function's name for each of the kit's arguments it takes, and its constants."""
    from drpo_core.testing.implementation import ARGUMENTS  # noqa: PLC0415 -- of the extra `testing`

    mapped = _pairs("--map", declared.renamed)
    for key in mapped:
        _one_of("--map", key, ARGUMENTS)
    constants = {name: _literal("--set", text) for name, text in _pairs("--set", declared.constants).items()}
    parameters = _parameters(function, label)
    called = f"{label}({', '.join(str(p) for p in map(_bare, parameters.values()))})"
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    asked = {key: mapped.get(key, key) for key in ARGUMENTS if key in REQUIRED or key in mapped}
    if absent := [theirs for theirs in asked.values() if theirs not in named and not anything]:
        msg = f"{called} takes no {', '.join(absent)}; name its arguments with --map, such as --map log_prob=THEIRS"
        raise UsageError(msg)
    if unknown := [name for name in constants if name not in named and not anything]:
        msg = f"--set: {called} takes no {', '.join(unknown)}"
        raise UsageError(msg)
    free = {key: key for key in ARGUMENTS if key in named and key not in {*asked, *asked.values(), *constants}}
    names = {key: {**asked, **free}[key] for key in ARGUMENTS if key in asked or key in free}
    if twice := [theirs for theirs, count in Counter([*names.values(), *constants]).items() if count > 1]:
        msg = f"--map, --set: {called} would be given {', '.join(twice)} twice"
        raise UsageError(msg)
    if empty := [name for name, p in named.items() if p.default is p.empty and name not in {*names.values(), *constants}]:
        msg = f"{called}: no value for {', '.join(empty)}; --set {empty[0]}=VALUE, or --map OURS={empty[0]}"
        raise UsageError(msg)
    optional = [names[key] for key in ("segment_ids", "normalizer") if key in names and names[key] in named]
    if needed := [theirs for theirs in optional if named[theirs].default is inspect.Parameter.empty]:
        msg = f"{called}: {', '.join(needed)} needs a default, such as None: most calls come without it"
        raise UsageError(msg)
    return names, constants


def _parameters(function: Callable[..., Any], label: str) -> Mapping[str, inspect.Parameter]:
    """Those of a function that can be called by name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        msg = f"{label}: its signature can't be read; wrap it in a Python function with named arguments"
        raise UsageError(msg) from None
    if hidden := [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
        msg = f"{label}: {', '.join(hidden)} can't be passed by name (positional-only); drop the '/', or wrap the function"
        raise UsageError(msg)
    return parameters


def _bare(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty)


def _call_source(target: _Target, names: Mapping[str, str], constants: Mapping[str, object], part: str) -> str:
    """Statements that define `function`, which takes the kit's arguments."""
    fixed = [f"{name}={value!r}" for name, value in constants.items()]
    if {"segment_ids", "normalizer"} & set(names):
        passed = ", ".join(["**{names[name]: value for name, value in batch.items()}", *fixed])
        body = f"    batch = {{'log_prob': log_prob, **batch}}\n    return {target.expression}({passed}){part}"
        return f"{target.imports}\n\nnames = {dict(names)!r}\n\ndef function(log_prob, **batch):\n{body}"
    passed = ", ".join([*(f"{theirs}={ours}" for ours, theirs in names.items()), *fixed])
    return f"{target.imports}\n\ndef function({', '.join(names)}):\n    return {target.expression}({passed}){part}"


def _recorded(implementation: "Implementation", about: _About) -> "Implementation":
    """The same, remembering its last call and where in the user's code it failed."""

    def call(arguments: dict[str, Any], dtype: str) -> Any:
        about.last = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
        about.error = ""
        try:
            return implementation.call(arguments, dtype)
        except Exception as error:
            about.error = f"raised {type(error).__name__}: {' '.join(str(error).split())} ({_user_line(error, about.file)})"
            raise

    return replace(implementation, call=call)


def _user_line(error: BaseException, file: str | None) -> str:
    """The last line of the user's own in a traceback."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [entry for entry in frames if file is not None and entry[0].f_code.co_filename == file]
    foreign = [entry for entry in frames if str(entry[0].f_globals.get("__name__")).partition(".")[0] not in LIBRARIES]
    frame, line = (own or foreign or frames)[-1]
    code = frame.f_code
    import linecache  # noqa: PLC0415 -- only when a loss raises

    text = linecache.getline(code.co_filename, line).strip()
    return f"{Path(code.co_filename).name}, line {line}, in {code.co_name}: {text}"


def _probe(implementation: "Implementation", declared: _Declared) -> None:
    """Call it once, to say clearly that a declaration can't be right."""
    from drpo_core.testing.batch import TokenBatch  # noqa: PLC0415 -- of the extra `testing`
    from drpo_core.testing.implementation import REDUCTIONS  # noqa: PLC0415 -- of the extra `testing`

    rows, columns = implementation.shape or (2, 3)
    log_prob = -0.25 - 0.125 * np.arange(rows * columns, dtype=float).reshape(rows, columns)
    mask = np.ones((rows, columns), dtype=bool)
    if implementation.takes_mask:
        mask[-1, -1] = False
    advantages = np.where(mask, 1.0, 0.5)
    batch = TokenBatch(log_prob, log_prob.copy(), advantages, mask)
    try:
        result = implementation(batch)
    except UsageError:
        raise
    except Exception:  # noqa: BLE001 -- each check reports it, with the user's line
        return
    reduced, shape = implementation.reduction != "none", result.loss.shape
    if result.loss.size == 1 and not reduced:
        # at π = μ the gradient of each token is −A times what the reduction multiplies it with
        each: dict[str, Any] = {name: replace(implementation, reduction=cast("Any", name)) for name in REDUCTIONS[1:]}
        fits = [name for name, as_if in each.items() if np.allclose(-result.gradient, advantages * as_if.coefficients(batch))]
        told = f"--reduction {fits[0]}, by its gradient" if fits else f"one of {', '.join(REDUCTIONS[1:])}"
        msg = f"{implementation.name} returns one number: say how it reduces tokens ({told})"
        raise UsageError(msg)
    if reduced and result.loss.size != 1:
        msg = f"--reduction {declared.reduction}: {implementation.name} returns a loss of shape {shape}, not one number"
        raise UsageError(msg)
    if not reduced and shape != batch.shape:
        msg = f"{implementation.name} returns a loss of shape {shape} for tokens of shape {batch.shape}"
        raise UsageError(msg)


# ---- guessing the framework

_FAMILIES = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "numpy": "numpy", "drpo_torch": "torch", "drpo_jax": "jax"}
_WORDS = _FAMILIES | {"Tensor": "torch", "jnp": "jax", "np": "numpy", "NDArray": "numpy"}
"""Of annotations that are never evaluated."""


def _guessed(function: Callable[..., Any]) -> str | None:
    """The framework a function is written in: from its annotations, else what it uses, else what its module imports."""
    while hasattr(function, "func"):
        function = function.func
    plain = inspect.unwrap(function)
    plain = getattr(plain, "__func__", plain)
    scope: dict[str, object] = getattr(plain, "__globals__", {})
    annotated = {family for a in getattr(plain, "__annotations__", {}).values() for family in _families_of(a, scope)}
    code = getattr(plain, "__code__", None)
    used = {_family(scope[name]) for name in _names(code) if name in scope} if code is not None else set()
    imported = {_family(value) for value in scope.values() if isinstance(value, ModuleType)}
    for found in (annotated, used, imported):
        frameworks = found & {"torch", "jax"}
        if len(frameworks) == 1:
            return frameworks.pop()
        if not frameworks and "numpy" in found:
            return "numpy"
    return None


def _families_of(annotation: object, scope: Mapping[str, object]) -> set[str]:
    if not isinstance(annotation, str):
        return {_family(annotation)} | {_family(inner) for inner in getattr(annotation, "__args__", ())}
    words = re.findall(r"\w+", annotation)
    return {_family(scope[word]) if word in scope else _WORDS.get(word, "") for word in words}


def _family(thing: object) -> str:
    origin = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", "") or ""
    return _FAMILIES.get(str(origin).partition(".")[0], "")


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


# ---- running


def _run(implementation: "Implementation", about: _About, chosen: _Chosen) -> "list[CheckResult]":
    """Each check in turn, under a progress bar."""
    from rich.console import Console  # noqa: PLC0415 -- of the extra `cli`
    from rich.progress import Progress  # noqa: PLC0415 -- of the extra `cli`

    from drpo_core.testing.checks import CHECKS  # noqa: PLC0415 -- of the extra `testing`
    from drpo_core.testing.runner import as_expected, run_check  # noqa: PLC0415 -- of the extra `testing`

    settings = chosen.settings(implementation.cost)
    console = Console(stderr=True)
    results: list[CheckResult] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking", total=len(chosen.checks))
        for name in chosen.checks:
            progress.update(task, description=name)
            about.last, about.error = {}, ""
            results.append(_completed(run_check(CHECKS[name], implementation, settings), implementation, about))
            progress.advance(task)
    return as_expected(results, chosen.expected)


def _completed(result: "CheckResult", implementation: "Implementation", about: _About) -> "CheckResult":
    """With the user's own line if the loss raised, and a snippet where the kit has none."""
    if result.status != "failed" or result.snippet:
        return result
    return replace(result, reason=about.error or result.reason, snippet=_last_call_source(implementation, about))


def _last_call_source(implementation: "Implementation", about: _About) -> str:
    """Python source of the call that raised."""
    from drpo_core.testing.batch import literal  # noqa: PLC0415 -- of the extra `testing`

    source = implementation.source
    if source is None or not about.error:
        return ""
    lines = ["import numpy as np", "", source.function, ""]
    arrays = [f"    {name!r}: {literal(v) if isinstance(v, np.ndarray) else repr(v)}," for name, v in about.last.items()]
    batch = ["batch = {", *arrays, "}"]
    return "\n".join([*lines, source.evaluate, "", *batch, "evaluate(function, **batch)"]) + "\n"


def _ok(results: "Sequence[CheckResult]") -> bool:
    return not any(result.status in ("failed", "unexpected pass") for result in results)


# ---- telling


def _as_dict(target: str, implementation: "Implementation", about: _About, results: "Sequence[CheckResult]") -> dict[str, Any]:
    """The report as JSON has it."""
    counts = Counter(result.status for result in results)
    return {
        "version": 1,
        "drpo_core": drpo_core.__version__,
        "target": target,
        "declared": {
            "framework": about.framework,
            "objective": None if implementation.objective is None else _describe(implementation.objective),
            "form": implementation.form,
            "reduction": implementation.reduction,
            "dtypes": list(implementation.dtypes),
            # JSON has no infinity
            "max_log_ratio": implementation.max_abs_log_ratio if np.isfinite(implementation.max_abs_log_ratio) else None,
            "keeps_boundary": implementation.keeps_boundary,
            "local": implementation.local,
            "takes_mask": implementation.takes_mask,
            "takes_normalizer": implementation.takes_normalizer,
            "takes_segment_ids": implementation.takes_packed,
        },
        "ok": _ok(results),
        "counts": {status: counts[status] for status in STATUSES},
        "results": [
            {
                name: getattr(result, name)
                for name in ("property", "check", "statement", "status", "reason", "counterexample", "snippet")
            }
            for result in results
        ],
    }


def _describe(objective: object) -> str:
    from drpo_core.testing.implementation import describe  # noqa: PLC0415 -- of the extra `testing`

    return describe(objective)


def _print(
    target: str, implementation: "Implementation", about: _About, results: "Sequence[CheckResult]", *, snippets: bool
) -> None:
    from rich.console import Console  # noqa: PLC0415 -- of the extra `cli`
    from rich.text import Text  # noqa: PLC0415 -- of the extra `cli`

    console = Console(highlight=False)

    def line(*parts: str | tuple[str, str]) -> None:
        # soft_wrap: a report that is piped or copied must not gain line breaks
        console.print(Text.assemble(*parts), soft_wrap=True)

    claim = "no objective" if implementation.objective is None else _describe(implementation.objective)
    framework = f"{about.framework}, " if about.framework else ""
    line((target, "bold"), f": {framework}{claim}, {implementation.form} form, reduction {implementation.reduction}")
    line()
    width = max(len(result.check) for result in results)
    for result in results:
        why = f": {result.reason}" if result.reason and result.status != "failed" else ""
        line(f"{result.property:<3}  {result.check:<{width}}  ", (result.status, STYLES[result.status]), (why, "dim"))
    for result in (result for result in results if result.status == "failed"):
        line()
        line((f"{result.property} {result.check}", "bold red"))
        line(f"  states:         {result.statement}")
        line(f"  found:          {result.reason}")
        if result.counterexample:
            line(f"  counterexample: {result.counterexample}")
        if snippets and result.snippet:
            line()
            line(f"# reproduces {result.property} {result.check}")
            line(result.snippet.rstrip())
            line(f"# end of {result.check}")
    line()
    if implementation.objective is None:
        line(("no objective was declared: only properties of any policy loss were checked", "dim"))
    failures = [result.reason for result in results if result.status == "failed"]
    if len(failures) > 1 and len(set(failures)) == 1 and failures[0].startswith("raised"):
        line(
            f"every failure is one and the same error: is {about.framework} the framework, and is each argument what it takes?"
        )
    counts = Counter(result.status for result in results)
    line(", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status] or status in STATUSES[:3]))
