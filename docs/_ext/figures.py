"""The figures of the site, drawn with `drpo_core` while it is built: each function returns HTML."""

from __future__ import annotations

import io
from importlib.resources import as_file
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from study.objectives import Penalised

from drpo_core import DRPO, SPO, Tokens, binary_tv
from drpo_core.audit import BUNDLED, audit, open_rollouts, plots, rows
from drpo_core.audit.palette import colours

if TYPE_CHECKING:
    from drpo_core import Objective
    from drpo_core.audit import Report

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "drpo",
}


def _svg(figure: Figure, alternative: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return f'<div class="drawn" role="img" aria-label="{alternative}">{text[text.index("<svg") :]}</div>'


def _panels(count: int, height: float = 3.2) -> tuple[Figure, list[mpl.axes.Axes]]:
    figure = Figure(figsize=(4.1 * count, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def _report(snapshot: str) -> Report:
    with as_file(BUNDLED) as path:
        rollouts = open_rollouts(path, snapshots=[snapshot])
        return audit(rollouts, rows(delta=[0.15], eps=[0.2], max_ratio=[]), curves=True)


def weights() -> str:
    """Weights of the objectives with a region, for a rare and a common token."""
    return _svg(plots.weight_figure(), "Gradient weight against the trained probability, for a rare and a common token")


def alternatives() -> str:
    """Weights of other penalties."""
    delta, colour = 0.15, colours()
    penalties: dict[str, tuple[Objective, str]] = {
        "DRPO": (DRPO(delta=delta), colour["DRPO"]),
        "χ² (SPO)": (SPO(eps=delta), colour["SPO"]),
        "k1": (Penalised(penalty="k1", delta=delta), "#999999"),
        "k2": (Penalised(penalty="k2", delta=delta), colour["DPPO-KL"]),
        "k3": (Penalised(penalty="k3", delta=delta), colour["Mask-DRPO"]),
        "TV": (Penalised(penalty="tv", delta=delta), colour["PPO-clip"]),
    }
    with mpl.rc_context(STYLE):
        figure, axes = _panels(2)
        for axis, mu in zip(axes, (0.01, 0.5), strict=True):
            pi = np.unique(np.concatenate((np.linspace(0.001, 1, 800), np.geomspace(0.001, 1, 800))))
            tokens = Tokens.checked(np.log(pi), np.full_like(pi, np.log(mu)), np.ones_like(pi))
            for name, (objective, shade) in penalties.items():
                w = objective.weight(tokens)
                axis.plot(pi, w, label=name, color=shade, linewidth=2.4 if name == "DRPO" else 1.4)
            axis.axhline(0, color="#666666", linewidth=0.7)
            axis.axvline(mu, color="#bbbbbb", linewidth=1)
            axis.set(xlim=(0, 1), ylim=(-6, 6), xlabel="π", ylabel="w")
            axis.set_title(f"sampled with μ = {mu:g}", loc="left")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return _svg(figure, "Weights of DRPO, chi squared, k1, k2, k3 and total variation against the trained probability")


def masked_and_corrected() -> str:
    """What each objective makes of the rollouts' tokens, by shift."""
    return _svg(
        plots.audit_figure(_report("lr1e6_step8")), "Mean weight of each objective by shift, over a histogram of shifts"
    )


def shifts() -> str:
    """Share of tokens that moved by more than a threshold, at each snapshot."""
    with mpl.rc_context(STYLE), as_file(BUNDLED) as path, np.load(path) as data:
        figure, (axis,) = _panels(1, 3.4)
        figure.set_figwidth(6.2)
        mask = data["mask"]
        delta = np.geomspace(1e-3, 1.0, 300)
        for name in ("step0", "lr1e6_step1", "lr1e6_step4", "lr1e6_step8", "lr2e5_step1", "lr2e5_step8"):
            shift = binary_tv(data[f"log_prob_{name}"], data["behavior_log_prob"])[mask]
            axis.plot(delta, [np.mean(shift > threshold) for threshold in delta], label=name)
        axis.axvline(0.15, color="#666666", linewidth=0.8, linestyle=":")
        axis.annotate("0.15", (0.15, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points")
        axis.set(xscale="log", yscale="log", ylim=(1e-4, 1), xlabel="δ", ylabel="share of tokens with |π − μ| > δ")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return _svg(figure, "Share of tokens that moved by more than a threshold, at six snapshots of training")
