"""Wrong policy losses, each a correct one of `correct.py` with one change, after failures reported in public trackers.

A mutant names the failure it seeds (a key of `FAILURES`, the rows of the table of failures, or a misreading of the
mathematics), the change, and the property that must kill it. `test_mutants.py` runs them; `matrix.py` runs every check on
every mutant and writes `killers.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import correct
import numpy as np

from drpo_core import CISPO, DPPO, DRPO, SPO, MaskDRPO, PolicyGradient, PPOClip
from drpo_core.testing import from_function, oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from drpo_core import Objective
    from drpo_core.testing import Implementation

FAILURES = {
    "SkyRL #1633": "NaN loss or gradient: the mask multiplied in, or applied after exp",
    "verl #2377": "NaN gradient: the mask selected in the forward pass only",
    "OpenRLHF #1314": "one token → NaN: inf·0, unclamped log-ratio",
    "TRL #5001": "NaN or missing rollout log-prob from the engine",
    "verl #782": "0/0: fully masked row or batch",
    "TRL #2647": "loss scales with the number of micro-batches: local denominator",
    "Liger #1082": "fused path mis-scaled: forgotten importance ratio",
    "prime-rl #2562": "rank-dependent weighting: data-parallel mean not undone",
    "verl #5417": "depends on pad width: horizon = padded width, masked tokens in the denominator",
    "prime-rl 8d77a2cd9": "silent broadcast: rank promotion",
    "rllm #81": "clip computed and unused; ε not forwarded; dual clip for A > 0",
    "open-instruct #1269": "value right, gradient wrong: CISPO not detached, k1 ≈ 0",
    "prime-rl #1525": "log-probs off by one token, or of another token",
    "TRL #4159": "ratio ≠ 1 on-policy: temperature",
    "TRL #6789": "ratio = kept mass: sampler renormalised by top-p",
    "OpenRLHF #634": "ratio noise: bf16 log-probs",
    "verl #2484": "corrupted buffer: in-place operation",
    "TRL #3506": "wrong metrics: local denominator, padding averaged in",
    "TRL #5854": "cross-sample term when packed: segment starts not gated",
}

NOT_ABOUT_THE_LOSS = {
    "verl #6699": "memory growth, metrics kept on the graph: what the kit calls returns no metrics; "
    "tests/torch/test_loss.py::test_only_log_prob_needs_a_graph",
}
"""Rows of the table of failures that no policy loss can have, and where they are tested."""


@dataclass(frozen=True)
class Correct:
    """A correct loss and what it claims to be; a mutant claims the same of its own function."""

    function: Callable[..., Any]
    objective: Objective | None
    framework: str = "torch"
    returns_gradient: bool = False
    families: Mapping[type, Correct] = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)

    def implementation(self, function: Callable[..., Any] | None = None, **claims: Any) -> Implementation:
        """The loss, or a mutant of it, as the kit wants it."""
        function = function or self.function
        claims = {"objective": self.objective, **self.claims, **claims}
        make_divergences = claims.pop("make_divergences", None)
        if make_divergences is not None:
            function, claims["divergences"] = self.function, make_divergences()
        if claims.pop("has_family", bool(self.families)):
            claims["family"] = lambda objective: self._for(objective, function)
        return from_function(
            function,
            self.framework,
            returns_gradient=self.returns_gradient,
            constants=_constants(self.function, claims["objective"]),
            # one name for all mutants: the same cases, so that the reference computes them once
            name=self.function.__name__,
            call_source="",
            **claims,
        )

    def _for(self, objective: Objective, function: Callable[..., Any]) -> Implementation:
        if isinstance(objective, type(self.objective)):
            return self.implementation(function, objective=objective, has_family=False)
        return self.families[type(objective)].implementation(objective=objective, has_family=False)


def _constants(function: Callable[..., Any], objective: Any) -> dict[str, float]:
    """Hyper-parameters of the objective that are keyword-only parameters of the function."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if not names:
        return {}
    low_high = oracle.thresholds(objective) or (None, None)
    known = {
        "low": low_high[0],
        "high": low_high[1],
        "max_ratio": getattr(objective, "max_ratio", None),
        "dual_clip": getattr(objective, "dual_clip", None),
    }
    return {name: known[name] for name in names}


_NUMPY = {"framework": "numpy", "returns_gradient": True}
_TOKEN_MEAN = {"reduction": "token_mean"}
_NUMPY_DPPO = Correct(correct.numpy_dppo, DPPO(delta_low=0.25, delta_high=0.5), **_NUMPY)
_JAX_EAGER = Correct(correct.jax_surrogate, None, framework="jax")

CORRECT = {
    "numpy_drpo": Correct(
        correct.numpy_drpo,
        DRPO(delta_low=0.1, delta_high=0.2),
        **_NUMPY,
        families={DRPO: _NUMPY_DPPO, DPPO: _NUMPY_DPPO},
        claims=_TOKEN_MEAN | {"max_abs_log_ratio": np.inf},
    ),
    "numpy_drpo_symmetric": Correct(
        correct.numpy_drpo,
        DRPO(delta=0.2),
        **_NUMPY,
        families={DRPO: _NUMPY_DPPO, DPPO: _NUMPY_DPPO},
        claims=_TOKEN_MEAN,
    ),
    "numpy_drpo_reciprocal": Correct(
        correct.numpy_drpo, DRPO(delta=0.47), **_NUMPY, families={DRPO: _NUMPY_DPPO, DPPO: _NUMPY_DPPO}, claims=_TOKEN_MEAN
    ),
    "numpy_dppo": _NUMPY_DPPO,
    "numpy_truncated": Correct(correct.numpy_truncated, PolicyGradient(max_ratio=3.0), framework="numpy"),
    "numpy_surrogate": Correct(correct.numpy_surrogate, PolicyGradient(), framework="numpy"),
    "numpy_packed": Correct(
        correct.numpy_packed, PolicyGradient(), **_NUMPY, claims={"reduction": "sequence_mean_token_mean"}
    ),
    "numpy_horizon": Correct(
        correct.numpy_horizon,
        PolicyGradient(),
        **_NUMPY,
        # a test whose batches are as wide as the horizon
        claims={"reduction": "sequence_mean_token_sum", "horizon": 5.0, "shape": (4, 5)},
    ),
    "torch_surrogate": Correct(correct.torch_surrogate, PolicyGradient(), claims=_TOKEN_MEAN),
    "torch_custom": Correct(correct.torch_surrogate, None, claims=_TOKEN_MEAN),
    "torch_drpo": Correct(correct.torch_drpo, DRPO(delta_low=0.25, delta_high=0.5), claims=_TOKEN_MEAN),
    "torch_drpo_score": Correct(correct.torch_drpo_score, DRPO(delta_low=0.25, delta_high=0.5), claims={"form": "score"}),
    "torch_mask_drpo": Correct(correct.torch_mask_drpo, MaskDRPO(delta_low=0.25, delta_high=0.5), claims={"form": "score"}),
    "torch_spo": Correct(correct.torch_spo, SPO(eps=0.5)),
    "torch_ppo": Correct(
        correct.torch_ppo, PPOClip(eps_low=0.2, eps_high=0.28), families={PPOClip: _NUMPY_DPPO}, claims=_TOKEN_MEAN
    ),
    "torch_ppo_fixed": Correct(correct.torch_ppo, PPOClip(eps_low=0.2, eps_high=0.28), claims=_TOKEN_MEAN),
    "torch_dual_clip": Correct(correct.torch_dual_clip, PPOClip(eps_low=0.2, eps_high=0.28, dual_clip=3.0)),
    "torch_dppo": Correct(correct.torch_dppo, DPPO(delta_low=0.25, delta_high=0.5), claims=_TOKEN_MEAN),
    "torch_dppo_score": Correct(
        correct.torch_dppo_score, DPPO(delta_low=0.25, delta_high=0.5, max_ratio=3.0), claims={"form": "score"}
    ),
    "torch_dppo_kl": Correct(correct.torch_dppo_kl, DPPO(delta_low=0.03, delta_high=0.05, divergence="binary_kl")),
    "torch_cispo": Correct(
        correct.torch_cispo,
        CISPO(max_ratio=3.0),
        families={CISPO: _NUMPY_DPPO},
        claims=_TOKEN_MEAN | {"form": "score"},
    ),
    "torch_cispo_fixed": Correct(correct.torch_cispo, CISPO(max_ratio=3.0), claims=_TOKEN_MEAN | {"form": "score"}),
    "torch_sequence_mean": Correct(
        correct.torch_sequence_mean, PolicyGradient(), claims={"reduction": "sequence_mean_token_mean"}
    ),
    "torch_sequence_mean_square": Correct(
        correct.torch_sequence_mean, PolicyGradient(), claims={"reduction": "sequence_mean_token_mean", "shape": (4, 4)}
    ),
    "jax_jit": Correct(
        correct.jax_surrogate, None, framework="jax", claims={"transform": "jit", "reference": _JAX_EAGER.implementation()}
    ),
    "jax_custom": Correct(
        correct.jax_custom, PolicyGradient(), framework="jax", claims={"transform": "jit", "second_order": "derivative"}
    ),
    "numpy_divergences": Correct(
        correct.numpy_surrogate, None, framework="numpy", claims={"make_divergences": correct.numpy_divergences}
    ),
}
"""The correct losses, by the name that mutants refer to."""


@dataclass(frozen=True)
class Mutant:
    """A correct loss with a change.

    `seeds` is a key of `FAILURES` or says what was misread. `killed_by` is the property that must kill it. With
    `shared`, the kit's reference contains the same mistake (the objective it reads instead): what then kills the mutant
    owes nothing to that reference.
    """

    name: str
    seeds: str
    of: str
    was: str
    now: str
    killed_by: str
    shared: Callable[[Any], Any] | None = None

    def implementation(self) -> Implementation:
        """The wrong loss, with the claims of the correct one."""
        original = CORRECT[self.of]
        if "make_divergences" in original.claims:
            return original.implementation(make_divergences=self._changed(correct.numpy_divergences))
        return original.implementation(self._changed(original.function))

    def digest(self) -> str:
        """Of the changed source: whether stored results are of this mutant."""
        original = CORRECT[self.of]
        function = correct.numpy_divergences if "make_divergences" in original.claims else original.function
        claims = f"{self.of} {original.objective} {self._source(function)}"
        return hashlib.sha256(claims.encode()).hexdigest()[:12]

    def _source(self, function: Callable[..., Any]) -> str:
        source = inspect.getsource(function)
        if source.count(self.was) != 1:
            msg = f"{self.name}: {self.was!r} occurs {source.count(self.was)} times in {function.__name__}, expected once"
            raise ValueError(msg)
        return source.replace(self.was, self.now)

    def _changed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        namespace = dict(vars(correct))
        exec(compile(self._source(function), f"<mutant {self.name}>", "exec"), namespace)  # noqa: S102
        return namespace[function.__name__]

    @contextlib.contextmanager
    def world(self) -> Iterator[None]:
        """Where the kit's reference shares the mistake, if the mutant says so."""
        if self.shared is None:
            yield
            return
        right = oracle.reference
        oracle.reference = lambda objective, *token: right(self.shared(objective), *token)
        try:
            yield
        finally:
            oracle.reference = right


def _as_spo(objective: Any) -> Any:
    """DRPO read without its μ."""
    return SPO(eps_low=objective.delta_low, eps_high=objective.delta_high) if isinstance(objective, DRPO) else objective


def _cap_plus_one(objective: Any) -> Any:
    """CISPO's cap c read as the ε of 1 + ε."""
    return CISPO(max_ratio=1.0 + objective.max_ratio) if isinstance(objective, CISPO) else objective


def _exchanged(objective: Any) -> Any:
    """DPPO with δ_low and δ_high exchanged."""
    if isinstance(objective, DPPO) and objective.delta is None:
        return DPPO(delta_low=objective.delta_high, delta_high=objective.delta_low)
    return objective


MUTANTS = (
    # what masked positions hold
    Mutant(
        "mask multiplied in",
        "SkyRL #1633",
        "numpy_dppo",
        "    x = np.where(mask, log_prob, 0.0)\n"
        "    b = np.where(mask, behavior_log_prob, 0.0)\n"
        "    a = np.where(mask, advantages, 0.0)\n",
        "    x, b, a = log_prob * mask, behavior_log_prob * mask, advantages * mask\n",
        "P1",
    ),
    Mutant(
        "mask multiplied into the loss",
        "SkyRL #1633",
        "torch_custom",
        "    loss = -a * ratio\n",
        "    loss = -advantages * torch.exp((log_prob - behavior_log_prob).clamp(max=20.0)) * mask\n",
        "P1",
    ),
    Mutant(
        "mask applied after exp",
        "SkyRL #1633",
        "torch_surrogate",
        "    ratio = torch.exp((x - b).clamp(max=20.0))\n",
        "    ratio = torch.where(mask, torch.exp(log_prob - behavior_log_prob), 0.0)\n",
        "P1",
    ),
    Mutant(
        "mask multiplied in, except where nothing is valid",
        "SkyRL #1633",
        "torch_custom",
        "    loss = -a * ratio\n",
        "    loss = -a * ratio if not mask.any() else -a * torch.exp((log_prob - behavior_log_prob).clamp(max=20.0)) * mask\n",
        "P1",
    ),
    Mutant(
        "where in the forward pass only",
        "verl #2377",
        "torch_surrogate",
        "    loss = -a * ratio\n",
        "    loss = torch.where(mask, -advantages * torch.exp(log_prob - behavior_log_prob), 0.0)\n",
        "P1",
    ),
    Mutant(
        "single where, advantages not selected",
        "verl #2377",
        "torch_drpo_score",
        "    a = torch.where(mask, advantages, 0.0)\n",
        "    a = advantages\n",
        "P1",
    ),
    Mutant(
        "single where, rollout log-probs not selected",
        "TRL #5001",
        "torch_ppo_fixed",
        "    b = torch.where(mask, behavior_log_prob, 0.0)\n",
        "    b = behavior_log_prob\n",
        "P1",
    ),
    Mutant(
        "NaN replaced, infinity not",
        "TRL #5001",
        "numpy_drpo",
        "    b = np.where(mask, behavior_log_prob, 0.0)\n",
        "    b = np.where(np.isnan(behavior_log_prob), 0.0, behavior_log_prob)\n",
        "P1",
    ),
    Mutant(
        "mask rebuilt from lengths",
        "TRL #5001",
        "torch_sequence_mean",
        "    x = torch.where(mask, log_prob, 0.0)\n",
        "    mask = torch.arange(mask.shape[-1]) < mask.sum(-1, keepdim=True)\n    x = torch.where(mask, log_prob, 0.0)\n",
        "P1",
    ),
    # a NaN at a valid token
    Mutant(
        "nan_to_num of the log-probs",
        "TRL #5001",
        "torch_drpo",
        "    x = torch.where(mask, log_prob, 0.0)\n",
        "    x = torch.nan_to_num(torch.where(mask, log_prob, 0.0))\n",
        "P1",
    ),
    Mutant(
        "nan_to_num of the advantages",
        "TRL #5001",
        "numpy_drpo",
        "    a = np.where(mask, advantages, 0.0)\n",
        "    a = np.nan_to_num(np.where(mask, advantages, 0.0))\n",
        "P1",
    ),
    # one token that overflows
    Mutant(
        "log-ratio not clamped",
        "OpenRLHF #1314",
        "torch_surrogate",
        "torch.exp((x - b).clamp(max=20.0))",
        "torch.exp(x - b)",
        "P2",
    ),
    Mutant(
        "dropped by multiplication, inf·0",
        "OpenRLHF #1314",
        "numpy_dppo",
        "    ratio = np.exp(np.minimum(ell, 20.0))\n",
        "    ratio = np.exp(ell)\n",
        "P2",
    ),
    Mutant(
        "clamp ±20 that zeroes gradients",
        "OpenRLHF #1314",
        "numpy_drpo",
        "    gradient = -a * ratio * weight\n",
        "    gradient = -a * ratio * weight * (np.abs(ell) < 20.0)\n",
        "P3",
    ),
    Mutant(
        "clamp ±10 that zeroes gradients",
        "OpenRLHF #1314",
        "torch_surrogate",
        ".clamp(max=20.0)",
        ".clamp(-10.0, 10.0)",
        "P3",
    ),
    Mutant(
        "ratio floored at 6e-6, which zeroes gradients",
        "OpenRLHF #1314",
        "numpy_truncated",
        "    ratio = np.exp(np.minimum(ell, np.log(max_ratio)))\n",
        "    ratio = np.exp(np.clip(ell, -12.0, np.log(max_ratio)))\n",
        "P3",
    ),
    Mutant(
        "NaN divergence kept by a mask written with >",
        "TRL #5001",
        "torch_dppo_kl",
        "torch.where(rest > 0.0, rest * (log_rest_b - log_rest_x), 0.0)",
        "rest.to(x) * (torch.log1p(-torch.exp(b)) - torch.log1p(-torch.exp(x.detach())))",
        "P20",
    ),
    # differentiated twice
    Mutant(
        "custom rule that stops the second derivative",
        "misread: a gradient with stop_gradient is a gradient",
        "jax_custom",
        "        gradient = surrogate(*primals)\n",
        "        gradient = jax.lax.stop_gradient(surrogate(*primals))\n",
        "P3",
    ),
    # empty and short
    Mutant(
        "0/0 where nothing is valid",
        "verl #782",
        "torch_surrogate",
        "mask.sum().clamp(min=1) if",
        "mask.sum() if",
        "P5",
    ),
    Mutant(
        "0/0 at a row without valid tokens",
        "verl #782",
        "torch_sequence_mean",
        "lengths.clamp(min=1)",
        "lengths",
        "P5",
    ),
    Mutant(
        "an empty micro-batch returns a constant, so backward fails",
        "verl #782",
        "torch_custom",
        "    loss = -a * ratio\n",
        "    loss = -a * ratio if mask.any() else torch.zeros(())\n",
        "P5",
    ),
    Mutant(
        "an empty micro-batch returns 0 · log π to keep its graph",
        "verl #782",
        "jax_jit",
        "    return -a * jnp.exp(jnp.minimum(x - b, 20.0))",
        "    return jnp.where(mask.any(), -a * jnp.exp(jnp.minimum(x - b, 20.0)), 0.0 * jnp.where(mask.any(), x, log_prob))",
        "P1",
    ),
    # denominators
    Mutant(
        "normalizer accepted and ignored",
        "TRL #2647",
        "torch_surrogate",
        "mask.sum().clamp(min=1) if normalizer is None else normalizer",
        "mask.sum().clamp(min=1)",
        "P7",
    ),
    Mutant(
        "micro-batch mean of means",
        "TRL #2647",
        "torch_sequence_mean",
        "(lengths > 0).sum().clamp(min=1) if normalizer is None else normalizer",
        "(lengths > 0).sum().clamp(min=1) * (1.0 if normalizer is None else normalizer / mask.shape[0])",
        "P7",
    ),
    Mutant(
        "gradient with the global denominator, loss with the local one",
        "TRL #3506",
        "numpy_drpo",
        "    return loss.sum() / count, gradient",
        "    return loss.sum() / max(mask.sum(), 1), gradient",
        "P7",
    ),
    Mutant(
        "data-parallel mean over 2 ranks not undone",
        "prime-rl #2562",
        "torch_ppo_fixed",
        "if normalizer is None else normalizer\n",
        "if normalizer is None else 2 * normalizer\n",
        "P7",
    ),
    Mutant(
        "shards weighted by their own number of tokens",
        "prime-rl #2562",
        "torch_drpo",
        "if normalizer is None else normalizer\n",
        "if normalizer is None else normalizer * normalizer / mask.sum().clamp(min=1)\n",
        "P7",
    ),
    Mutant(
        "masked tokens in the denominator",
        "verl #5417",
        "torch_dppo",
        "mask.sum().clamp(min=1) if normalizer",
        "mask.numel() if normalizer",
        "P6",
    ),
    Mutant(
        "horizon is the padded width",
        "verl #5417",
        "numpy_horizon",
        "    horizon = 5.0\n",
        "    horizon = mask.shape[-1]\n",
        "P6",
    ),
    Mutant(
        "empty rows counted as sequences",
        "verl #5417",
        "torch_sequence_mean",
        "(lengths > 0).sum().clamp(min=1) if",
        "mask.shape[0] if",
        "P6",
    ),
    Mutant(
        "padding averaged into the reported loss",
        "TRL #3506",
        "numpy_drpo",
        "    return loss.sum() / count, gradient",
        "    return loss.mean() / (count / max(mask.sum(), 1)), gradient",
        "P6",
    ),
    Mutant(
        "batch variance in the denominator, n − 1",
        "TRL #3506",
        "torch_custom",
        "mask.sum().clamp(min=1) if",
        "(mask.sum() - 1).clamp(min=1) if",
        "P8",
    ),
    # shapes and alignment
    Mutant(
        "lengths (B,) without keepdim, B == T",
        "prime-rl 8d77a2cd9",
        "torch_sequence_mean_square",
        "    lengths = mask.sum(-1, keepdim=True)\n",
        "    lengths = mask.sum(-1)\n",
        "P8",
    ),
    Mutant(
        "advantage of the first token (B,) broadcast over tokens",
        "prime-rl 8d77a2cd9",
        "torch_sequence_mean_square",
        "    a = torch.where(mask, advantages, 0.0)\n",
        "    a = torch.where(mask, advantages[:, 0], 0.0)\n",
        "P4",
    ),
    Mutant(
        "(B, T) × (B, 1, T)",
        "prime-rl 8d77a2cd9",
        "torch_surrogate",
        "    loss = -a * ratio\n",
        "    loss = -a * ratio * mask[:, None, :]\n",
        "P9",
    ),
    Mutant(
        "the ratio of the sequence in place of the token's",
        "prime-rl 8d77a2cd9",
        "torch_custom",
        "    ratio = torch.exp((x - b).clamp(max=20.0))\n",
        "    ratio = torch.exp((x - b).mean(-1, keepdim=True).clamp(max=20.0) * mask.shape[-1]).expand_as(x)\n",
        "P4",
    ),
    Mutant(
        "GSPO-token, not declared as such",
        "prime-rl 8d77a2cd9",
        "torch_custom",
        "    ratio = torch.exp((x - b).clamp(max=20.0))\n",
        "    mean = (x - b).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)\n"
        "    ratio = torch.exp(mean.clamp(max=20.0)).detach() * torch.exp(x - x.detach())\n",
        "P4",
    ),
    Mutant(
        "log π shifted by one token",
        "prime-rl #1525",
        "torch_surrogate",
        "torch.where(mask, log_prob, 0.0)",
        "torch.where(mask, torch.roll(log_prob, 1, -1), 0.0)",
        "P9",
    ),
    Mutant(
        "log μ of another token",
        "prime-rl #1525",
        "torch_custom",
        "torch.where(mask, behavior_log_prob, 0.0)",
        "torch.where(mask, behavior_log_prob.amax(-1, keepdim=True), 0.0)",
        "P4",
    ),
    Mutant(
        "advantages normalised over the batch inside the loss",
        "prime-rl #2562",
        "torch_custom",
        "    loss = -a * ratio\n",
        "    loss = -(a - a.mean()) * ratio\n",
        "P4",
    ),
    Mutant(
        "threshold that shrinks with the position",
        "rllm #81",
        "torch_custom",
        "    loss = -a * ratio\n",
        "    loss = -a * ratio.clamp(max=1.0 + 5.0 / (1.0 + torch.arange(mask.shape[-1])))\n",
        "P8",
    ),
    # the ratio
    Mutant(
        "temperature divides log π only",
        "TRL #4159",
        "torch_custom",
        "torch.exp((x - b)",
        "torch.exp((x / 0.7 - b)",
        "P9",
    ),
    Mutant(
        "sampler renormalised by top-p",
        "TRL #6789",
        "torch_surrogate",
        "torch.exp((x - b)",
        "torch.exp((x - b + float(np.log(0.95)))",
        "P23",
    ),
    Mutant(
        "forgotten importance ratio",
        "Liger #1082",
        "torch_surrogate",
        "    loss = -a * ratio\n",
        "    loss = -a * x\n",
        "P23",
    ),
    Mutant(
        "ratio detached",
        "Liger #1082",
        "torch_dppo",
        "    loss = torch.where(kept, -a * ratio, 0.0)\n",
        "    loss = torch.where(kept, -a * (ratio.detach() + x - x.detach()), 0.0)\n",
        "P3",
    ),
    Mutant(
        "ratio in bfloat16",
        "OpenRLHF #634",
        "torch_surrogate",
        "torch.exp((x - b).clamp(max=20.0))",
        "torch.exp((x - b).bfloat16().clamp(max=20.0)).to(x)",
        "P20",
    ),
    Mutant(
        "log-probs rounded to float32",
        "OpenRLHF #634",
        "torch_custom",
        "torch.exp((x - b)",
        "torch.exp((x.float().to(x) - b.float().to(x))",
        "P9",
    ),
    Mutant(
        "ratio as expm1 + 1",
        "OpenRLHF #634",
        "numpy_dppo",
        "np.exp(np.minimum(ell, 20.0))",
        "np.expm1(np.minimum(ell, 20.0)) + 1.0",
        "P20",
    ),
    Mutant(
        "shift as a difference of exponentials",
        "OpenRLHF #634",
        "numpy_drpo",
        "np.sign(ell) * np.exp(np.maximum(x, b)) * -np.expm1(-np.abs(ell))",
        "(np.exp(x) - np.exp(b)).astype(np.float32)",
        "P20",
    ),
    # wiring
    Mutant(
        "clip computed and not used",
        "rllm #81",
        "torch_ppo_fixed",
        "torch.maximum(-a * ratio, -a * clipped)",
        "-a * ratio",
        "P11",
    ),
    Mutant(
        "clipped ratio without the maximum",
        "rllm #81",
        "torch_ppo_fixed",
        "torch.maximum(-a * ratio, -a * clipped)",
        "-a * clipped",
        "P12",
    ),
    Mutant(
        "minimum in place of maximum",
        "rllm #81",
        "torch_ppo_fixed",
        "torch.maximum(",
        "torch.minimum(",
        "P12",
    ),
    Mutant(
        "ε_high not forwarded",
        "rllm #81",
        "torch_ppo",
        "1.0 + high)",
        "1.28)",
        "P17",
    ),
    Mutant(
        "cap not forwarded",
        "rllm #81",
        "torch_cispo",
        ".clamp(max=max_ratio)",
        ".clamp(max=3.0)",
        "P17",
    ),
    Mutant(
        "clip-higher lost",
        "rllm #81",
        "torch_ppo_fixed",
        "1.0 + high)",
        "1.0 + low)",
        "P13",
    ),
    Mutant(
        "dual clip for A > 0 as well",
        "rllm #81",
        "torch_dual_clip",
        "torch.where((a < 0.0) & (ratio > dual_clip)",
        "torch.where(ratio > dual_clip",
        "P3",
    ),
    Mutant(
        "dual clip with the wrong sign of A",
        "rllm #81",
        "torch_dual_clip",
        "(a < 0.0) &",
        "(a > 0.0) &",
        "P11",
    ),
    Mutant(
        "a dropped token is pushed back, if only by a trace",
        "misread: a mask corrects",
        "torch_dppo",
        "torch.where(kept, -a * ratio, 0.0)",
        "torch.where(kept, -a * ratio, 1e-18 * a * ratio)",
        "P19",
    ),
    Mutant(
        "inputs changed in place",
        "verl #2484",
        "torch_custom",
        "    x = torch.where(mask, log_prob, 0.0)\n",
        "    x = torch.where(mask, log_prob, 0.0)\n    advantages *= mask\n",
        "P24",
    ),
    Mutant(
        "log μ overwritten with the log-ratio",
        "verl #2484",
        "numpy_packed",
        "np.exp(np.minimum(x - b, 20.0))",
        "np.exp(np.minimum(np.subtract(x, behavior_log_prob, out=behavior_log_prob, where=mask), 20.0), where=mask, out=x)",
        "P24",
    ),
    # the gradient behind a right value
    Mutant(
        "CISPO not detached",
        "open-instruct #1269",
        "torch_cispo_fixed",
        ".clamp(max=max_ratio).detach()",
        ".clamp(max=max_ratio)",
        "P3",
    ),
    Mutant(
        "weight not detached",
        "open-instruct #1269",
        "torch_drpo_score",
        "(torch.exp(ell) * weight).detach()",
        "torch.exp(ell).detach() * weight",
        "P3",
    ),
    Mutant(
        "mask not detached",
        "open-instruct #1269",
        "torch_dppo_score",
        "    return torch.where(kept, -truncated * a * x, 0.0)\n",
        "    soft = torch.sigmoid(1e3 * (delta - torch.sign(a) * (torch.exp(x) - torch.exp(b))))\n"
        "    return -truncated * a * x * (soft + (kept.to(x) - soft).detach())\n",
        "P19",
    ),
    Mutant(
        "k1 as the penalty",
        "open-instruct #1269",
        "torch_spo",
        "a.abs() * (ratio - 1.0) ** 2 / (2.0 * eps)",
        "a.abs() * -ell / eps",
        "P9",
    ),
    Mutant(
        "k2 as the penalty",
        "open-instruct #1269",
        "torch_drpo",
        "(ratio - 1.0) ** 2",
        "ell**2",
        "P23",
    ),
    Mutant(
        "k3 as the penalty, the gradient of the forward KL",
        "open-instruct #1269",
        "torch_drpo",
        "mu * (ratio - 1.0) ** 2 / (2.0 * delta)",
        "(ratio - 1.0 - ell) / delta",
        "P23",
    ),
    Mutant(
        "a k3 term on every token",
        "open-instruct #1269",
        "torch_custom",
        "    loss = -a * ratio\n",
        "    loss = torch.where(mask, -a * ratio + 0.01 * (ratio - 1.0 - (x - b).clamp(max=20.0)), 0.0)\n",
        "P16",
    ),
    Mutant(
        "reported −A (r − 1)",
        "TRL #3506",
        "numpy_surrogate",
        "-a * np.exp(np.minimum(ell, 20.0))",
        "-a * np.expm1(np.minimum(ell, 20.0))",
        "P3",
    ),
    Mutant(
        "truncated tokens reported as −A c log r",
        "TRL #3506",
        "numpy_truncated",
        "(ratio + max_ratio * beyond)",
        "np.where(beyond > 0.0, max_ratio * ell, ratio)",
        "P3",
    ),
    # packed, compiled
    Mutant(
        "segment starts not gated",
        "TRL #5854",
        "numpy_packed",
        "    starts = np.diff(ids.ravel(), prepend=-1) != 0\n",
        "    starts = np.diff(ids.ravel(), prepend=-1) != 0\n"
        "    starts = starts if segment_ids is None else np.arange(ids.size) == 0\n",
        "P24",
    ),
    Mutant(
        "a token's length is that of the next segment",
        "TRL #5854",
        "numpy_packed",
        "lengths[sequence]",
        "lengths[sequence if segment_ids is None else np.minimum(sequence + 1, len(lengths) - 1)]",
        "P24",
    ),
    Mutant(
        "a clamp that only the compiled path has",
        "compiled ≠ eager",
        "jax_jit",
        "jnp.minimum(x - b, 20.0)",
        "jnp.minimum(x - b, 5.0)",
        "P24",
    ),
    # the objective, misread
    Mutant(
        "missing abs(A)",
        "misread: penalty without abs(A)",
        "torch_drpo",
        "a.abs() * mu",
        "mu",
        "P16",
    ),
    Mutant(
        "A in place of abs(A)",
        "misread: penalty with A",
        "torch_drpo",
        "a.abs() * mu",
        "a * mu",
        "P12",
    ),
    Mutant(
        "missing μ",
        "misread: SPO's penalty",
        "torch_drpo",
        "a.abs() * mu *",
        "a.abs() *",
        "P10",
    ),
    Mutant(
        "missing ½",
        "misread: penalty twice as large",
        "torch_drpo",
        "/ (2.0 * delta)",
        "/ delta",
        "P15",
    ),
    Mutant(
        "divided by δ²",
        "misread: penalty over δ²",
        "torch_drpo",
        "/ (2.0 * delta)",
        "/ (2.0 * delta**2)",
        "P15",
    ),
    Mutant(
        "½ missing from the value alone",
        "misread: penalty twice as large, in the value",
        "numpy_drpo",
        "/ (2.0 * delta)",
        "/ delta",
        "P3",
    ),
    Mutant(
        "penalty weight doubled in the gradient alone",
        "misread: penalty twice as large, in the gradient",
        "numpy_drpo",
        "    gradient = -a * ratio * weight\n",
        "    gradient = -a * ratio * (2.0 * weight - 1.0)\n",
        "P3",
    ),
    Mutant(
        "sign of the surrogate dropped",
        "misread: maximised in place of minimised",
        "torch_surrogate",
        "    loss = -a * ratio\n",
        "    loss = a * ratio\n",
        "P9",
    ),
    Mutant(
        "sign of A dropped",
        "misread: weight 1 − d/δ",
        "torch_drpo_score",
        "delta - torch.sign(a) * shift",
        "delta - shift",
        "P12",
    ),
    Mutant(
        "abs(d) in place of sign(A) d",
        "misread: converging tokens damped",
        "torch_drpo_score",
        "delta - torch.sign(a) * shift",
        "delta - shift.abs()",
        "P12",
    ),
    Mutant(
        "mask drops converging tokens too",
        "misread: symmetric mask",
        "torch_dppo",
        "kept = torch.sign(a) * shift <= delta",
        "kept = shift.abs() <= delta",
        "P12",
    ),
    Mutant(
        "outside the region the weight is 0",
        "misread: DPPO under the name of Mask-DRPO",
        "torch_mask_drpo",
        "(delta - outward) / delta)",
        "0.0)",
        "P3",
    ),
    Mutant(
        "inside the region DRPO's weight",
        "misread: DRPO under the name of Mask-DRPO",
        "torch_mask_drpo",
        "torch.where(outward <= delta, 1.0, (delta - outward) / delta)",
        "(delta - outward) / delta",
        "P10",
    ),
    Mutant(
        "weight 0 outside, as of a mask",
        "misread: DRPO's weight clamped at 0",
        "torch_drpo_score",
        "weight = (delta - torch.sign(a) * shift) / delta",
        "weight = ((delta - torch.sign(a) * shift) / delta).clamp(min=0.0)",
        "P15",
    ),
    Mutant(
        "weight not 1 on-policy",
        "misread: δ − d − 0.01",
        "numpy_drpo",
        "weight = (delta - np.sign(a) * shift) / delta",
        "weight = (delta - np.sign(a) * (shift + 0.01)) / delta",
        "P9",
    ),
    Mutant(
        "sign(A) = +1 at A = 0",
        "misread: A = 0 not inert in the weight",
        "numpy_drpo",
        "delta - np.sign(a) * shift",
        "delta - np.where(a >= 0.0, 1.0, -1.0) * shift",
        "P20",
    ),
    Mutant(
        "A = 0 not inert",
        "misread: abs(A) floored at 0.01",
        "torch_drpo",
        "a.abs() * mu",
        "a.abs().clamp(min=0.01) * mu",
        "P16",
    ),
    Mutant(
        "advantage clipped",
        "misread: not homogeneous in A",
        "torch_custom",
        "    loss = -a * ratio\n",
        "    loss = -a.clamp(-2.0, 2.0) * ratio\n",
        "P16",
    ),
    Mutant(
        "δ_low and δ_high exchanged",
        "misread: thresholds exchanged",
        "torch_dppo",
        "torch.where(a < 0.0, low,",
        "torch.where(a > 0.0, low,",
        "P13",
    ),
    Mutant(
        "δ_low and δ_high exchanged, tested with equal ones",
        "misread: thresholds exchanged",
        "numpy_drpo_symmetric",
        "np.where(a < 0.0, low, high)",
        "np.where(a < 0.0, high, low)",
        "P13",
    ),
    Mutant(
        "strict boundary",
        "misread: < in place of ≤",
        "torch_dppo",
        "kept = torch.sign(a) * shift <= delta",
        "kept = torch.sign(a) * shift < delta",
        "P11",
    ),
    Mutant(
        "weight as 1 − x/δ with a reciprocal",
        "misread: sign of the weight near the boundary",
        "numpy_drpo_reciprocal",
        "(delta - np.sign(a) * shift) / delta",
        "1.0 - np.sign(a) * shift * (1.0 / delta)",
        "P11",
    ),
    Mutant(
        "threshold floored at 1e-6",
        "misread: limit in δ",
        "numpy_drpo",
        "np.where(a < 0.0, low, high)",
        "np.maximum(np.where(a < 0.0, low, high), 1e-6)",
        "P17",
    ),
    # divergences
    Mutant(
        "Binary KL with an offset of 1e-8",
        "misread: verl's and TRL's Binary KL",
        "torch_dppo_kl",
        "    log_rest_x, log_rest_b = torch.log(-torch.expm1(wide_x)), torch.log(-torch.expm1(wide_b))\n",
        "    log_rest_x, log_rest_b = torch.log(-torch.expm1(wide_x) + 1e-8), torch.log(-torch.expm1(wide_b) + 1e-8)\n",
        "P11",
    ),
    Mutant(
        "threshold rounded to float32",
        "OpenRLHF #634",
        "torch_dppo_kl",
        "torch.where(a < 0.0, low, torch.full_like(kl, high))",
        "torch.where(a < 0.0, low, high)",
        "P11",
    ),
    Mutant(
        "KL(π‖μ) in the mask",
        "misread: KL reversed",
        "torch_dppo_kl",
        "mu, rest = torch.exp(wide_b), -torch.expm1(wide_b)\n",
        "mu, rest = torch.exp(wide_x), -torch.expm1(wide_x)\n"
        "    wide_x, wide_b, log_rest_x, log_rest_b = wide_b, wide_x, log_rest_b, log_rest_x\n",
        "P3",
    ),
    Mutant(
        "KL threshold of √δ, beyond what Pinsker allows",
        "misread: a threshold in TV on a KL",
        "torch_dppo_kl",
        "kl <= delta",
        "kl <= delta**0.5",
        "P22",
    ),
    Mutant(
        "Binary KL compared with TV's mask at δ",
        "misread: TV under the name of KL",
        "torch_dppo_kl",
        "kl <= delta",
        "(torch.exp(wide_x) - mu).abs() <= delta",
        "P3",
    ),
    Mutant(
        "an offset of 1e-8 in every KL",
        "misread: verl's and TRL's Binary KL",
        "numpy_divergences",
        "np.log(np.maximum(mu, 1e-300)) - np.log(np.maximum(pi, 1e-300))",
        "np.log(mu + 1e-8) - np.log(pi + 1e-8)",
        "P21",
    ),
    Mutant(
        "binary KL reversed",
        "misread: KL reversed",
        "numpy_divergences",
        "return lambda x, b: divergence(two(x), two(b))",
        "return lambda x, b: divergence(two(b), two(x))",
        "P21",
    ),
    Mutant(
        "sampled token not forced into the top K",
        "misread: Top-K without the sampled token",
        "numpy_divergences",
        "np.where(sampled_in_top_k, 0.0, np.exp(sampled))",
        "0.0 * np.exp(sampled)",
        "P21",
    ),
    Mutant(
        "sampled token counted twice",
        "misread: Top-K with the sampled token always added",
        "numpy_divergences",
        "np.where(sampled_in_top_k, 0.0, np.exp(sampled))",
        "np.exp(sampled)",
        "P21",
    ),
    Mutant(
        "no bucket for the rest",
        "misread: Top-K over K outcomes",
        "numpy_divergences",
        "return np.concatenate([shown, rest], axis=-1)",
        "return shown",
        "P21",
    ),
    Mutant(
        "½ missing from TV",
        "misread: TV in [0, 2]",
        "numpy_divergences",
        "0.5 * np.abs(pi - mu)",
        "np.abs(pi - mu)",
        "P22",
    ),
    Mutant(
        "binary KL halved",
        "misread: Pinsker violated",
        "numpy_divergences",
        "return lambda x, b: divergence(two(x), two(b))",
        "return lambda x, b: divergence(two(x), two(b)) * (0.5 if divergence is kl else 1.0)",
        "P22",
    ),
    # mistakes that the kit's reference shares: what kills these owes nothing to it
    Mutant(
        "cap c read as 1 + ε, by the reference too",
        "misread: CISPO's cap",
        "torch_cispo_fixed",
        ".clamp(max=max_ratio)",
        ".clamp(max=1.0 + max_ratio)",
        "P23",
        shared=_cap_plus_one,
    ),
    Mutant(
        "missing μ, in the reference too",
        "misread: SPO's penalty",
        "torch_drpo",
        "a.abs() * mu *",
        "a.abs() *",
        "P10",
        shared=_as_spo,
    ),
    Mutant(
        "δ_low and δ_high exchanged, in the reference too",
        "misread: thresholds exchanged",
        "torch_dppo",
        "torch.where(a < 0.0, low,",
        "torch.where(a > 0.0, low,",
        "P15",
        shared=_exchanged,
    ),
)
