"""Exact values at a few hundred tokens: `python tests/reference_points.py` writes data/reference_points.npz.

A second source, beside the kit's oracle: written from the equations of the papers, in 60-digit arithmetic, and sharing
no code with drpo_core. Inputs are exact in float32; results are the exact ones, rounded once to float64.
"""

from pathlib import Path
from types import SimpleNamespace

import mpmath
import numpy as np

PATH = Path(__file__).parent / "data" / "reference_points.npz"
mp = mpmath.mp.clone()
mp.dps = 60

# name: class in drpo_core, hyper-parameters
OBJECTIVES = {
    "pg": ("PolicyGradient", {}),
    "pg_truncated": ("PolicyGradient", {"max_ratio": 5.0}),
    "ppo": ("PPOClip", {"eps": 0.2}),
    "ppo_higher": ("PPOClip", {"eps_low": 0.2, "eps_high": 0.28}),
    "ppo_dual": ("PPOClip", {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": 3.0}),
    "cispo": ("CISPO", {"max_ratio": 5.0}),
    "spo": ("SPO", {"eps": 0.2}),
    "spo_sides": ("SPO", {"eps_low": 0.2, "eps_high": 0.4}),
    "dppo_tv": ("DPPO", {"delta": 0.15}),
    "dppo_tv_sides": ("DPPO", {"delta_low": 0.1, "delta_high": 0.3, "max_ratio": 20.0}),
    "dppo_kl": ("DPPO", {"delta": 0.05, "divergence": "binary_kl"}),
    "dppo_kl_sides": ("DPPO", {"delta_low": 0.05, "delta_high": 0.1, "divergence": "binary_kl"}),
    "drpo": ("DRPO", {"delta": 0.15}),
    "drpo_sides": ("DRPO", {"delta_low": 0.1, "delta_high": 0.3}),
    "mask_drpo": ("MaskDRPO", {"delta": 0.15}),
    "mask_drpo_sides": ("MaskDRPO", {"delta_low": 0.1, "delta_high": 0.3}),
}
OUTPUTS = ("loss", "gradient", "weight", "margin")
DIVERGENCES = ("log_ratio", "importance_ratio", "probability_shift", "binary_tv", "binary_kl", "k1", "k2", "k3")
DISTRIBUTION_DIVERGENCES = ("top_k_tv", "top_k_kl", "full_tv", "full_kl")
# what a boundary is drawn on, where, and the sign of the advantage that meets it
BOUNDARIES = [
    *(("shift", d, np.sign(d)) for d in (0.15, -0.15, 0.3, -0.1)),
    *(("ratio", 1 + e, np.sign(e)) for e in (0.2, -0.2, 0.28, 0.4)),
    ("ratio", 3.0, -1.0),
    ("ratio", 5.0, 1.0),
    ("kl", 0.05, 1.0),
    ("kl", 0.05, -1.0),
    ("kl", 0.1, 1.0),
]
VOCABULARY, TOP = 24, 4


def token(log_prob, behavior, advantage=0.0):
    """Log π (x), log μ (b), A (a) and what follows from them, exactly; the ratio saturates at e²⁰."""
    x, b, a = mp.mpf(float(log_prob)), mp.mpf(float(behavior)), mp.mpf(float(advantage))
    return SimpleNamespace(x=x, b=b, a=a, ell=x - b, r=mp.exp(min(x - b, 20)), pi=mp.exp(x), mu=mp.exp(b), sign=mp.sign(a))


def kl(mu, pi):
    """Σ μ log(μ/π) over the outcomes of two distributions."""
    return mp.fsum(q * mp.log(q / p) for q, p in zip(mu, pi, strict=True))


def binary_kl(t):
    return kl([t.mu, 1 - t.mu], [t.pi, 1 - t.pi])


def surrogate(t, c):
    """−A r and 1; beyond r = c the function whose derivative in log π is −A c, and c/r."""
    if c is None or t.r <= c:
        return -t.a * t.r, mp.one
    return -t.a * c * (1 + mp.log(t.r / c)), c / t.r


def ppo(t, bound, c):
    low, high = 1 - bound, 1 + bound
    loss = max(-t.a * t.r, -t.a * min(max(t.r, low), high))
    dropped = (t.a > 0 and t.r > high) or (t.a < 0 and t.r < low)
    margin = min(abs(t.r - low), abs(t.r - high))
    if c is not None and t.a < 0:
        loss, dropped, margin = min(loss, -t.a * c), dropped or t.r > c, min(margin, abs(t.r - c))
    return loss, mp.mpf(not dropped), margin


def dppo(t, bound, divergence, c):
    measured = abs(t.pi - t.mu) if divergence == "binary_tv" else binary_kl(t)
    margin = abs(measured - bound) / bound
    if t.a * t.ell > 0 and measured > bound:
        return mp.zero, mp.zero, margin
    return *surrogate(t, c), margin


def smooth(t, distance, bound):
    """−A r + |A| μ (r − 1)²/(2δ) and 1 − sign(A) d/δ of DRPO; of SPO with d = r − 1, which has no μ."""
    return -t.a * t.r + abs(t.a) * (t.r - 1) * distance / (2 * bound), 1 - t.sign * distance / bound, mp.inf


def mask_drpo(t, bound):
    d = t.pi - t.mu
    loss, weight, _ = smooth(t, d, bound)
    margin = abs(t.sign * d - bound) / bound
    if t.sign * d <= bound:
        return -t.a * t.r, mp.one, margin
    # continuous: without the penalty |A| μ (δ/μ)²/(2δ) at the boundary, where μ = d/(r − 1)
    return loss - abs(t.a) * bound * (t.r - 1) / (2 * d), weight, margin


def objective(name, t):
    """(L, ∂L/∂log π = −A r w, w, relative distance of the token from where w jumps)."""
    kind, given = OBJECTIVES[name]
    c = given.get("max_ratio", given.get("dual_clip"))
    side = "low" if t.a < 0 else "high"
    bounds = (given.get(key) for key in ("eps", "delta", f"eps_{side}", f"delta_{side}"))
    bound = mp.mpf(next((value for value in bounds if value), 0))
    loss, weight, margin = {
        "PolicyGradient": lambda: (*surrogate(t, c), mp.inf),
        "PPOClip": lambda: ppo(t, bound, c),
        "CISPO": lambda: (-min(t.r, c) * t.a * t.x, min(t.r, c) / t.r, mp.inf),
        "SPO": lambda: smooth(t, t.r - 1, bound),
        "DPPO": lambda: dppo(t, bound, given.get("divergence", "binary_tv"), c),
        "DRPO": lambda: smooth(t, t.pi - t.mu, bound),
        "MaskDRPO": lambda: mask_drpo(t, bound),
    }[kind]()
    return loss, -t.a * t.r * weight, weight, margin


def divergences(t):
    """In the order of DIVERGENCES."""
    d = t.pi - t.mu
    # beyond the saturated ratio k3 goes on along its tangent
    k3 = t.r - 1 - min(t.ell, 20) + mp.expm1(20) * max(t.ell - 20, 0)
    return t.ell, t.r, d, abs(d), binary_kl(t), -t.ell, t.ell**2 / 2, k3


def distribution_divergences(log_prob, behavior, sampled, top):
    """In the order of DISTRIBUTION_DIVERGENCES; the outcomes of Top-K are the K, the sampled token and the rest."""
    tokens = [token(x, b) for x, b in zip(log_prob, behavior, strict=True)]
    known = [tokens[i] for i in sorted({*top.tolist(), int(sampled)})]
    pi, mu = ([*masses, 1 - mp.fsum(masses)] for masses in ([t.pi for t in known], [t.mu for t in known]))
    top_tv = mp.fsum(abs(p - q) for p, q in zip(pi, mu, strict=True)) / 2
    full_tv = mp.fsum(abs(t.pi - t.mu) for t in tokens) / 2
    # rounded log-probs don't sum to 1 exactly: KL with the difference of the sums added, as it is defined for masses
    full_kl = mp.fsum(t.mu * (t.b - t.x) + t.pi - t.mu for t in tokens)
    return top_tv, kl(mu, pi), full_tv, full_kl


def with_kl(mu, divergence, up):
    """Π whose Binary KL from μ is given, by bisection."""
    near, far = mu, 1.0 if up else 0.0
    for _ in range(60):
        pi = (near + far) / 2
        inside = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi)) < divergence
        near, far = (pi, far) if inside else (near, pi)
    return near


def beside(rng, kind, value, sign):
    """Eight pairs (log π, log μ) within 1e-2 to 1e-7 of a boundary, on both its sides."""
    value = value * (1 + np.tile([1, -1], 4) * 10 ** rng.uniform(-7, -2, 8))
    mu = rng.uniform(0.31, 0.6, 8) if kind != "ratio" else rng.uniform(1e-4, 0.19, 8)
    pi = {
        "shift": lambda: mu + value,
        "ratio": lambda: mu * value,
        "kl": lambda: [with_kl(m, v, sign > 0) for m, v in zip(mu, value, strict=True)],
    }[kind]()
    return np.log(pi), np.log(mu)


def draw(rng):
    """Inputs in float32: tokens of every kind, and distributions with K of μ's tokens and a sampled one."""
    signs = rng.choice([1, -1], 40)
    larger = -(10.0 ** rng.uniform(-3, 1, 40))
    far = larger - np.linspace(5, 50, 40)
    near = np.log(rng.uniform(1e-6, 0.99, 40))
    tail = rng.uniform(-25, -6, 40)
    pairs = [
        (np.log(rng.uniform(0.2, 0.95, 40)), np.log(rng.uniform(0.2, 0.95, 40))),
        (tail + rng.normal(0, 1, 40), tail),
        (np.log1p(-(10.0 ** rng.uniform(-6, -2, 40))), np.log1p(-(10.0 ** rng.uniform(-6, -2, 40)))),
        (near + signs * 10.0 ** rng.uniform(-6, -3, 40), near),
        (np.where(signs > 0, larger, far), np.where(signs > 0, far, larger)),
    ]
    advantages = [rng.choice([1, -1, 1, -1, 1, -1, 0], 40) * 10.0 ** rng.uniform(-2, 1, 40) for _ in pairs]
    for kind, value, sign in BOUNDARIES:
        pairs.append(beside(rng, kind, value, sign))
        advantages.append(sign * 10.0 ** rng.uniform(-2, 1, 8))
    logits = rng.normal(0, rng.uniform(0.5, 2, (24, 1)), (24, VOCABULARY))
    distributions = (logits + rng.normal(0, 10.0 ** rng.uniform(-3, 0, (24, 1)), logits.shape), logits)
    log_prob, behavior = ((z - np.log(np.exp(z).sum(axis=-1, keepdims=True))).astype(np.float32) for z in distributions)
    ids = np.argsort(-behavior, axis=-1)
    return {
        "log_prob": np.concatenate([x for x, _ in pairs]).astype(np.float32),
        "behavior_log_prob": np.concatenate([b for _, b in pairs]).astype(np.float32),
        "advantages": np.concatenate(advantages).astype(np.float32),
        "full_log_prob": log_prob,
        "full_behavior_log_prob": behavior,
        "top_k_ids": ids[:, :TOP].astype(np.int32),
        "sampled": ids[np.arange(24), np.arange(24) % 12].astype(np.int32),
    }


def exact(inputs, tokens, rows):
    """Results at the given tokens and distributions, by name: a column per output, in the order of its names."""
    scalars = [token(*(inputs[key][i] for key in ("log_prob", "behavior_log_prob", "advantages"))) for i in tokens]
    columns = ("full_log_prob", "full_behavior_log_prob", "sampled", "top_k_ids")
    return {
        **{name: np.array([objective(name, t) for t in scalars], dtype=float) for name in OBJECTIVES},
        "divergences": np.array([divergences(t) for t in scalars], dtype=float),
        "distribution_divergences": np.array(
            [distribution_divergences(*(inputs[key][i] for key in columns)) for i in rows], dtype=float
        ),
    }


if __name__ == "__main__":
    drawn = draw(np.random.default_rng(2602_04879))
    everything = exact(drawn, range(len(drawn["log_prob"])), range(len(drawn["sampled"])))
    np.savez_compressed(PATH, **drawn, **everything)
