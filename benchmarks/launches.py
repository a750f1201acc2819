"""What a GPU is given to do, counted where there is none: ``python benchmarks/launches.py [--json] [--all] [--page PAGE]``.

1. Function → kernel launches and waits for the host, forward and backward, of 2,048 tokens, after a first call; kernels
   count as tried. `device.py` says what is counted, and how CPU tensors come to take the path of a GPU's.
2. Kernel × architecture → registers a thread and bytes spilt, from Triton's own compilation to machine code (`kernels.py`).

Nothing is timed. Each part has a process of its own: in the first Triton's kernels are run by its interpreter, in the second
they are compiled, and Triton decides which when it is imported. ``--all`` compiles the kernels of every objective of the
library and of every mode that it names, instead of a few.

The vocabulary of the first part is 1,187, a 128th of 151,936, and the budgets of bytes that decide how many rows are taken at
a time are divided by as much, so that there are as many steps as at the vocabulary's true size. A limit is a goal: printed
beside the number, not asserted here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from device import Recording

TOKENS, WIDTH = 2048, 128
"""Of all sequences, and of each."""
VOCABULARY, SCALE = 1187, 128
MEMORY = 80 << 30
"""Bytes of the GPU, of which budgets are a share."""
HIDDEN = 16
CHUNK = 256
"""Tokens of a chunk of the head, by default."""
TOP_K = 20
DTYPES = ("float32", "bfloat16", "float64")
"""Of the tensors; those of 16 bits are computed with in float32."""


class Limit(NamedTuple):
    """Launches of both passes, apart from those of the reduction's count; no function is to wait for the host."""

    launches: int
    about: str


OF_TOKENS = Limit(4, "loss, gradient and diagnostics of each token")
OF_LOGITS = Limit(6, "two row kernels, the per-token loss between them")
OF_HEAD = Limit(11, "6, and 5 a chunk")
OF_CHUNKS = Limit(6 + 5 * (TOKENS // CHUNK), OF_HEAD.about)
OF_LOG_PROBS = Limit(2, "1 forward and 1 backward")


class Case(NamedTuple):
    """A call whose results are differentiated with respect to some tensors.

    `per_token`: nothing in it has the vocabulary's size.
    """

    name: str
    forward: Callable[[], Any]
    of: tuple[torch.Tensor, ...]
    limit: Limit | None = None
    per_token: bool = False


def main() -> None:
    """Run one part, or start a process for each and show what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--all", action="store_true", help="the kernels of every objective and named mode")
    parser.add_argument("--part", choices=("functions", "kernels"), help="only one of the two")
    parser.add_argument("--page", type=Path, help="put the tables into this page, in the place of those with the same columns")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    parts = (arguments.part,) if arguments.part else ("functions", "kernels")
    if arguments.inside:
        (part,) = parts
        print(json.dumps(functions() if part == "functions" else _kernels(every=arguments.all)))
        return
    found = {part: _of_process(part, ["--all"] * arguments.all) for part in parts}
    if arguments.page:
        for part, rows in found.items():
            _replace_table(arguments.page, _SHOWN[part](rows))
    if arguments.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(_SHOWN[part](rows) for part, rows in found.items()))


def _of_process(part: str, options: list[str]) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if part == "functions" else {}
    command = [sys.executable, __file__, "--inside", "--part", part, *options]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


# --- launches and waits ---


def functions() -> list[dict[str, Any]]:
    """A row a function."""
    from device import Recording  # noqa: PLC0415 -- torch takes a second

    rows = []
    with _scaled(), tried(), warnings.catch_warnings():
        # what the interpreter's NumPy says of IEEE arithmetic
        warnings.simplefilter("ignore", RuntimeWarning)
        for case in (*of_tokens(), *of_vocabulary()):
            _recorded(case, Recording(execute=False))
            recordings = _recorded(case, Recording(execute=False))
            # where the host learns no value, none decides what is launched
            if any(recording.waits for recording in recordings):
                recordings = _recorded(case, Recording(execute=True))
            rows.append(_row(case, *recordings))
    return rows


def _recorded(case: Case, forward: Recording) -> tuple[Recording, Recording, Recording]:
    """What is asked of a GPU in the forward pass, in its reduction's coefficients, and in the backward pass."""
    import torch  # noqa: PLC0415

    from device import Recording  # noqa: PLC0415

    reduction, backward = (Recording(execute=forward.execute) for _ in range(2))
    with _apart(forward, reduction), forward.entered():
        results = [result for result in case.forward() if result is not None and result.requires_grad]
    # a step of a training run has its own cotangent, such as 1/accumulation steps
    cotangents = [torch.ones_like(result) for result in results]
    # arguments of kernels would keep what is done with
    forward.kernels.clear()
    backward.memory = forward.memory
    with backward.entered():
        torch.autograd.grad(results, case.of, cotangents)
    return forward, reduction, backward


@contextmanager
def _apart(forward: Recording, reduction: Recording) -> Iterator[None]:
    """Count what makes a reduction's coefficients on its own, with what finds the tokens that a compiled mode counts."""
    import drpo_torch.loss  # noqa: PLC0415
    import drpo_torch.vocabulary.batch  # noqa: PLC0415

    def moving(make: Callable[..., Any], since: Recording | None = None) -> Callable[..., Any]:
        def moved(*arguments: Any, **options: Any) -> Any:
            start = since or forward.copy()
            result = make(*arguments, **options)
            forward.move(start, reduction)
            return result

        return moved

    def mode(run: Callable[..., Any], which: Any, tensors: Any, make: Callable[..., Any], *rest: Any, **options: Any) -> Any:
        return run(which, tensors, moving(make, since=forward.copy()), *rest, **options)

    of_loss, of_batch = drpo_torch.loss, drpo_torch.vocabulary.batch
    with ExitStack() as stack:
        for module in (of_loss, of_batch):
            made = moving(module.reduction_coefficients)
            stack.enter_context(mock.patch.object(module, "reduction_coefficients", made))
        stack.enter_context(mock.patch.object(of_loss, "run_mode", partial(mode, of_loss.run_mode)))
        yield


def _row(case: Case, forward: Recording, reduction: Recording, backward: Recording) -> dict[str, Any]:
    parts = {"forward": forward, "reduction": reduction, "backward": backward}
    return {
        "function": case.name,
        "per_token": case.per_token,
        "launches": {name: recording.launches.total() for name, recording in parts.items()},
        "waits": {name: recording.waits.total() for name, recording in parts.items()},
        # beside one array of the logits' size
        "memory": None if case.per_token else forward.memory.peak / (2 * TOKENS * VOCABULARY),
        "limit": None if case.limit is None else case.limit._asdict(),
        "operations": {name: dict(recording.launches.most_common()) for name, recording in parts.items()},
        "of_waits": dict((forward.waits + reduction.waits + backward.waits).most_common()),
    }


@contextmanager
def _scaled() -> Iterator[None]:
    """Budgets and blocks that are of the vocabulary's size, divided as the vocabulary is."""
    from drpo_torch.vocabulary import head, softmax  # noqa: PLC0415

    budget = int(MEMORY * softmax._DEVICE_SHARE) // SCALE  # noqa: SLF001
    with (
        mock.patch.object(softmax, "_device_bytes", return_value=budget),
        mock.patch.object(head, "_WEIGHT_ROWS", head._WEIGHT_ROWS // SCALE),  # noqa: SLF001
    ):
        yield


@contextmanager
def tried() -> Iterator[None]:
    """Kernels count as tried: they are not run here, and have no results to compare."""
    from drpo_core.engines import recording  # noqa: PLC0415
    from drpo_torch.engines import trial  # noqa: PLC0415
    from drpo_torch.vocabulary import triton_trial  # noqa: PLC0415

    with (
        mock.patch.object(trial, "_finding", return_value=None),
        mock.patch.object(triton_trial, "_compared", return_value=None),
        mock.patch.dict(triton_trial._findings),  # noqa: SLF001
        # what is found here must not be believed afterwards
        mock.patch.object(recording, "_programs", {}),
    ):
        yield


def tokens(dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """`TOKENS` log-probs of sequences of which a tenth is masked, and all that a loss may need beside them."""
    import torch  # noqa: PLC0415

    shape, generator = (TOKENS // WIDTH, WIDTH), torch.Generator().manual_seed(0)
    log_prob = -5.0 * torch.rand(shape, generator=generator)

    def moved() -> torch.Tensor:
        return (log_prob + 0.1 * torch.randn(shape, generator=generator)).clamp(max=0.0)

    found = {
        "log_prob": log_prob,
        "behavior_log_prob": moved(),
        "proximal_log_prob": moved(),
        "reference_log_prob": moved(),
        "advantages": torch.randn(shape, generator=generator),
        "divergence": 0.3 * torch.rand(shape, generator=generator),
    }
    found = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in found.items()}
    found["log_prob"].requires_grad_()
    return found | {"mask": torch.rand(shape, generator=generator) < 0.9}


def of_tokens() -> Iterator[Case]:
    """Functions of log-probs."""
    from drpo_core import DRPO, modes  # noqa: PLC0415
    from drpo_torch import policy_loss, token_loss  # noqa: PLC0415

    found, objective = tokens(), DRPO(delta=0.15)

    def loss(objective: Any, **options: Any) -> Callable[[], Any]:
        return lambda: policy_loss(objective, **arguments_for(objective, found), **options)[:1]

    of_token = arguments_for(objective, found)
    gspo, of = modes.verl("gspo"), (found["log_prob"],)
    yield Case("policy_loss", loss(objective), of, OF_TOKENS, per_token=True)
    yield Case("policy_loss, diagnostics=False", loss(objective, diagnostics=False), of, OF_TOKENS, per_token=True)
    yield Case("policy_loss of GSPO", loss(gspo), of, OF_TOKENS, per_token=True)
    yield Case("policy_loss of a mode with everything", loss(with_everything()), of, OF_TOKENS, per_token=True)
    yield Case("policy_loss, engine='arrays'", loss(objective, engine="arrays"), of, per_token=True)
    yield Case("policy_loss of GSPO, engine='arrays'", loss(gspo, engine="arrays"), of, per_token=True)
    yield Case("token_loss", lambda: [token_loss(objective, **of_token)], of, per_token=True)


def of_vocabulary() -> Iterator[Case]:
    """Functions of logits, or of hidden states and the head."""
    import drpo_torch  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from drpo_core import DRPO  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)

    def bfloat16(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    logits, behavior = (bfloat16(TOKENS, VOCABULARY) for _ in range(2))
    ids, objective = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator), DRPO(delta=0.15)
    of_token = {name: tensor.detach().flatten() for name, tensor in arguments_for(objective, tokens()).items()}
    del of_token["log_prob"]
    mask = of_token["mask"]
    top_ids = bfloat16(TOKENS, VOCABULARY).topk(TOP_K).indices
    recorded = behavior.float().log_softmax(-1)
    top = {
        "log_normalizer": logits.float().logsumexp(-1),
        "tokens": ids,
        "behavior_log_prob": recorded.gather(-1, ids[:, None])[:, 0],
        "top_k_ids": top_ids,
        "top_k_behavior_log_prob": recorded.gather(-1, top_ids),
    }
    logits.requires_grad_()
    linear = {"hidden": bfloat16(TOKENS, HIDDEN).requires_grad_(), "weight": bfloat16(VOCABULARY, HIDDEN).requires_grad_()}
    loss = {"tokens": ids, **of_token}
    log_prob = {"tokens": ids, "mask": mask}
    call = lambda name, *arguments, **options: partial(getattr(drpo_torch, name), *arguments, **options)
    first = lambda found: lambda: found()[:1]
    of_logits, of_head = (logits,), (*linear.values(),)
    yield Case("token_log_prob", first(call("token_log_prob", logits=logits, **log_prob)), of_logits, OF_LOG_PROBS)
    yield Case("linear_log_prob", first(call("linear_log_prob", **linear, **log_prob)), of_head, OF_HEAD)
    chunks = {"chunk_tokens": CHUNK}
    of_chunks = call("linear_log_prob", **linear, **log_prob, **chunks)
    yield Case("linear_log_prob, 8 chunks", first(of_chunks), of_head, OF_CHUNKS)
    yield Case("logits_policy_loss", first(call("logits_policy_loss", objective, logits=logits, **loss)), of_logits, OF_LOGITS)
    yield Case("linear_policy_loss", first(call("linear_policy_loss", objective, **linear, **loss)), of_head, OF_HEAD)
    of_chunks = call("linear_policy_loss", objective, **linear, **loss, **chunks)
    yield Case("linear_policy_loss, 8 chunks", first(of_chunks), of_head, OF_CHUNKS)
    yield Case("full_divergences", call("full_divergences", logits=logits, behavior_logits=behavior), of_logits)
    yield Case("top_k_divergences", call("top_k_divergences", logits=logits, **top), of_logits)


def arguments_for(objective: Any, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of `tokens` that an objective or a mode takes."""
    names = ["log_prob", "behavior_log_prob", "advantages", "mask", *getattr(objective, "arguments", ())]
    said = repr(objective)
    names += ["divergence"] if "per_token" in said or "DivergenceMask" in said else []
    return {name: found[name] for name in names}


def with_everything() -> Any:
    """A mode with an anchor of sequences, corrections of each kind and a penalty."""
    from drpo_core import PPOClip  # noqa: PLC0415
    from drpo_core.anchors import Proximal, Sequence  # noqa: PLC0415
    from drpo_core.corrections import ImportanceWeight, RatioMask, Veto  # noqa: PLC0415
    from drpo_core.modes import Mode  # noqa: PLC0415
    from drpo_core.penalties import Penalty  # noqa: PLC0415

    corrections = (ImportanceWeight(high=2.0), Veto(low=0.1, high=10.0), RatioMask(level="geometric", low=0.9, high=1.1))
    return Mode(
        PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0),
        anchor=Sequence(Proximal()),
        corrections=corrections,
        penalties=(Penalty(coefficient=0.1),),
        reduction="sequence_mean_token_mean",
        count_masked=False,
    )


# --- registers and spills ---


def kernels_of(
    calls: dict[str, Callable[[str], object]], dtypes: tuple[str, ...] = DTYPES, **options: Any
) -> Iterator[dict[str, Any]]:
    """A row a kernel, architecture and dtype of the tensors that a call makes; `options` are those of `kernels.compiled`."""
    from device import Recording  # noqa: PLC0415
    from kernels import compiled  # noqa: PLC0415

    with _scaled(), tried(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, call in calls.items():
            for dtype in dtypes:
                with Recording(execute=False).entered() as recording:
                    call(dtype)
                elsewhere = ELSEWHERE.get(name, ())
                recording.kernels = [launch for launch in recording.kernels if launch[0].__name__ not in elsewhere]
                for kernel in compiled([recording], **options):
                    yield {"of": name, "dtype": dtype, **kernel._asdict()}


def _kernels(*, every: bool) -> list[dict[str, Any]]:
    objectives = _all() if every else _some()
    return list(kernels_of({name: partial(_loss_of, objective) for name, objective in objectives.items()} | ROWS))


def _loss_of(objective: Any, dtype: str) -> object:
    import torch  # noqa: PLC0415
    from drpo_torch import policy_loss  # noqa: PLC0415

    return policy_loss(objective, **arguments_for(objective, tokens(getattr(torch, dtype))))


def _rows_of_logits(dtype: str, **options: Any) -> object:
    import torch  # noqa: PLC0415
    from drpo_core import DRPO  # noqa: PLC0415
    from drpo_torch import logits_policy_loss  # noqa: PLC0415

    logits = torch.randn((TOKENS, VOCABULARY)).to(getattr(torch, dtype)).requires_grad_()
    return logits_policy_loss(DRPO(delta=0.15), logits=logits, **_beside(), **options).loss


def _rows_of_a_head(dtype: str) -> object:
    """With all that may come between the head's output and the policy's logits."""
    import torch  # noqa: PLC0415
    from drpo_core import DRPO  # noqa: PLC0415
    from drpo_torch import Support, linear_policy_loss  # noqa: PLC0415

    hidden, weight = (torch.randn((n, HIDDEN)).to(getattr(torch, dtype)).requires_grad_() for n in (TOKENS, VOCABULARY))
    support = Support(bits=torch.full((TOKENS, -(-VOCABULARY // 32)), -1, dtype=torch.int32))
    step = {"temperature": torch.full((TOKENS,), 0.7), "logit_softcap": 30.0, "support": support}
    head = {"hidden": hidden, "weight": weight, "entropy_coefficient": 0.01}
    return linear_policy_loss(DRPO(delta=0.15), **head, **_beside(), **step).loss


def _pairs_of_rows(dtype: str) -> object:
    """Full divergences with their gradient."""
    import torch  # noqa: PLC0415
    from drpo_torch import Support, full_divergences  # noqa: PLC0415

    logits, behavior = (torch.randn((TOKENS, VOCABULARY)).to(getattr(torch, dtype)) for _ in range(2))
    support = Support(bits=torch.full((TOKENS, -(-VOCABULARY // 32)), -1, dtype=torch.int32))
    step = {"temperature": torch.full((TOKENS,), 0.7), "support": support}
    found = full_divergences(logits=logits.requires_grad_(), behavior_logits=behavior, **step)
    return torch.autograd.grad(found, logits, [torch.ones_like(each) for each in found])


def _most_probable(dtype: str) -> object:
    import torch  # noqa: PLC0415
    from drpo_torch import token_log_prob  # noqa: PLC0415

    logits = torch.randn((TOKENS, VOCABULARY)).to(getattr(torch, dtype))
    return token_log_prob(logits=logits, tokens=_beside()["tokens"], top_k=TOP_K)


def _beside() -> dict[str, torch.Tensor]:
    """The arguments of `TOKENS` tokens that go with logits."""
    import torch  # noqa: PLC0415

    found = {name: tensor.flatten() for name, tensor in tokens().items()}
    names = ("behavior_log_prob", "advantages", "mask")
    return {"tokens": torch.zeros(TOKENS, dtype=torch.int64)} | {name: found[name] for name in names}


ROWS: dict[str, Callable[[str], object]] = {
    "rows of logits": _rows_of_logits,
    "the same, entropy": partial(_rows_of_logits, entropy_coefficient=0.01),
    "the same, soft-capped, tempered, in a support": _rows_of_a_head,
    "rows of two policies, tempered, in a support": _pairs_of_rows,
    "the 20 most probable": _most_probable,
}
"""What makes kernels over rows of logits."""
ELSEWHERE = dict.fromkeys(ROWS, ("tokens", "finish")) | dict.fromkeys([*ROWS][-2:], ("softmaxes",))
"""Kernels that are in other rows of the table."""


def _some() -> dict[str, Any]:
    from drpo_core import CISPO, DPPO, DRPO, PPOClip, modes  # noqa: PLC0415
    from drpo_core.objectives import KLBounds, TokenwiseClip  # noqa: PLC0415

    return {
        "DRPO": DRPO(delta=0.15),
        "PPOClip": PPOClip(eps=0.2, dual_clip=3.0),
        "DPPO": DPPO(delta=0.1),
        "CISPO": CISPO(max_ratio=5.0),
        "TokenwiseClip": TokenwiseClip(bounds=KLBounds(delta=0.05)),
        "GSPO": modes.verl("gspo"),
        "a mode with everything": with_everything(),
    }


def _all() -> dict[str, Any]:
    """Every objective at its first typical threshold, and every named mode once."""
    from drpo_core.objectives import OBJECTIVES, label  # noqa: PLC0415

    # the table of named modes is the documentation's
    sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "_ext"))
    from named_modes import rows  # noqa: PLC0415

    objectives = [family.make(family.typical[0] if family.typical else None) for family in OBJECTIVES]
    named = {row.mode: row.call for row in reversed([*rows()])}
    return {label(objective): objective for objective in objectives} | {call: mode for mode, call in named.items()}


# --- tables ---


def table_of_functions(rows: Iterable[dict[str, Any]]) -> str:
    """A line a function."""
    head = ("function", "forward", "reduction", "backward", "limit", "waits", "memory")
    lines = [
        (
            row["function"],
            *(row["launches"][part] for part in ("forward", "reduction", "backward")),
            f"limit {row['limit']['launches']}" if row["limit"] else "–",
            sum(row["waits"].values()),
            "–" if row["memory"] is None else f"{row['memory']:.2f}",
        )
        for row in rows
    ]
    return _table("Kernel launches, and waits for the host (limit 0)", head, lines)


def table_of_kernels(rows: list[dict[str, Any]]) -> str:
    """A line a kernel, with what is spilt beside the registers."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        spilt = f" ({row['spills']} B spilt)" if row["spills"] else ""
        of_kernel = cells.setdefault((row["of"], row["kernel"]), {})
        of_kernel.setdefault(row["dtype"], []).append(f"{row['registers']}{spilt}")
    dtypes, architectures = (list(dict.fromkeys(row[key] for row in rows)) for key in ("dtype", "architecture"))
    lines = [(*key, *(", ".join(found.get(dtype, ["–"])) for dtype in dtypes)) for key, found in cells.items()]
    title = f"Registers a thread on {', '.join(architectures)} (limit 0 B spilt)"
    return _table(title, ("objective", "kernel", *dtypes), lines)


def _replace_table(page: Path, shown: str) -> None:
    head, *rows = (line for line in shown.splitlines() if line.startswith("|"))
    lines = page.read_text(encoding="utf-8").splitlines()
    first = last = lines.index(head)
    while lines[last].startswith("|"):
        last += 1
    page.write_text("\n".join([*lines[:first], head, *rows, *lines[last:]]) + "\n", encoding="utf-8")


def _table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Markdown."""
    lines = [head, tuple("---" if i == 0 else "--:" for i in range(len(head))), *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(map(str, line))} |" for line in lines)])


_SHOWN = {"functions": table_of_functions, "kernels": table_of_kernels}


if __name__ == "__main__":
    main()
