"""A new objective is one file and its line in the table: then it is in the audit, the explorer, the plots and `drpo check`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import drpo_core

TOY = '''
"""The surrogate with a weight that falls with abs(π − μ)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Toy:
    """w = δ / (δ + abs(π − μ)), with the surrogate's loss."""

    delta: float

    def loss(self, tokens):
        return -tokens.advantages * tokens.ratio * self.weight(tokens)

    def weight(self, tokens):
        return self.delta / (self.delta + tokens.xp.abs(tokens.shift))
'''
LINE = 'Family("Toy", Toy, "delta", (0.3, 0.7), "abs(π − μ)"),'

LOSS = """
import numpy as np


def loss(log_prob, behavior_log_prob, advantages, mask):
    pi, mu = (np.exp(np.where(mask, array, 0.0)) for array in (log_prob, behavior_log_prob))
    value = np.where(mask, -advantages * pi / mu * WEIGHT, 0.0)
    return value, value  # a surrogate with a detached weight is its own gradient
"""
RIGHT, WRONG = "0.3 / (0.3 + abs(pi - mu))", "0.4 / (0.4 + abs(pi - mu))"


@pytest.fixture(scope="module")
def landed(tmp_path_factory):
    """A copy of the package in which the toy has landed, and a user's loss beside it."""
    folder = tmp_path_factory.mktemp("landed")
    shutil.copytree(Path(drpo_core.__file__).parent, folder / "drpo_core", ignore=shutil.ignore_patterns("__pycache__"))
    objectives = folder / "drpo_core" / "objectives"
    (objectives / "toy.py").write_text(TOY, "utf-8")
    table = (objectives / "__init__.py").read_text("utf-8")
    (last,) = re.findall(r'^    Family\("Mask-DRPO".*\n', table, re.MULTILINE)
    table = table.replace(last, f"{last}    {LINE}\n").replace(
        "\nif TYPE_CHECKING:", "\nfrom drpo_core.objectives.toy import Toy\n\nif TYPE_CHECKING:", 1
    )
    (objectives / "__init__.py").write_text(table, "utf-8")
    for name, weight in (("right", RIGHT), ("wrong", WRONG)):
        (folder / f"{name}.py").write_text(LOSS.replace("WEIGHT", weight), "utf-8")
    return folder


def python(folder, *arguments):
    """Run an interpreter that imports the copy: stdout."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "check": False, "encoding": "utf-8"}
    done = subprocess.run([sys.executable, *arguments], **options)  # noqa: S603, PLW1510 - ours; `check` is an option
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def report(landed):
    """What `drpo audit` prints; its page and its plot lie in the folder."""
    options = ("--snapshot", "lr1e6_step8", "--at-quantile", "0.1", "--html", "page.html", "--plot", "plot.svg")
    return json.loads(python(landed, "-m", "drpo_core.cli", "audit", "--json", *options))


def test_the_audit_has_its_rows(report):
    (snapshot,) = report["snapshots"].values()
    rows = [item for item in snapshot["objectives"] if item["objective"] == "Toy"]
    assert [row["name"] for row in rows[:2]] == ["Toy(delta=0.3)", "Toy(delta=0.7)"]
    assert [row["quantile"] for row in rows] == [None, None, 0.1]
    found = {row["name"]: row for row in snapshot["objectives"]}
    assert found["Toy(delta=0.3)"]["attenuated_fraction"] == pytest.approx(1.0, abs=0.02)
    # it has no `inside`, so nothing is outside
    assert found["Toy(delta=0.3)"]["outside_fraction"] == 0.0
    # its threshold is on abs(π − μ), as DPPO's is
    dppo = next(row for row in snapshot["objectives"] if row["objective"] == "DPPO" and row["quantile"] == 0.1)
    assert rows[2]["parameters"]["delta"] == dppo["parameters"]["delta"]


def test_flags_move_its_threshold(landed):
    table = python(landed, "-m", "drpo_core.cli", "audit", "--snapshot", "step0", "--delta", "0.25")
    assert re.findall(r"Toy δ=\S+", table) == ["Toy δ=0.25"]
    assert "Toy" in python(landed, "-m", "drpo_core.cli", "audit", "--help")


def test_the_page_has_its_rows_and_its_card(landed, report):
    assert report["snapshots"]
    page = (landed / "page.html").read_text("utf-8")
    assert page.count('<th scope="row">Toy δ=0.3</th>') == 1
    data = json.loads(re.search(r'id="x-data">(.*?)</script>', page, re.DOTALL)[1])
    cards = {card["family"]: card for card in data["objectives"]}
    toy, others = cards.pop("Toy"), cards
    assert toy["slider"] == "delta"
    assert toy["labels"][data["delta"].index(0.15)] == "Toy δ=0.15"
    assert toy["colour"] not in {card["colour"] for card in others.values()}
    on_policy = data["pi"][0].index(data["mu"][0])
    assert {weight[on_policy] for weight in toy["weight"][0][0]} == {1.0}
    (snapshot,) = data["snapshots"]
    toy_index = [card["family"] for card in data["objectives"]].index("Toy")
    assert snapshot["figures"][toy_index][0]["attenuated"] > 0.9


def test_the_plots_have_its_lines(landed, report):
    assert report["snapshots"]
    # text is drawn as paths, so the figures are asked
    code = """
import json
from drpo_core.audit import BUNDLED, audit, open_rollouts
from drpo_core.audit.palette import colours
from drpo_core.audit.plots import audit_figure, weight_figure
figures = weight_figure(), audit_figure(audit(open_rollouts(BUNDLED, snapshots=["step0"]), curves=True))
lines = [{line.get_label(): line for axis in figure.axes for line in axis.get_lines()} for figure in figures]
found = [[name, line.get_color(), line.get_linestyle()] for each in lines for name, line in each.items() if "Toy" in name]
print(json.dumps([colours()["Toy"], found]))
"""
    colour, lines = json.loads(python(landed, "-W", "ignore", "-c", code).splitlines()[-1])
    assert [line[0] for line in lines] == ["Toy δ=0.3", "Toy δ=0.3", "Toy δ=0.7"]
    assert {line[1] for line in lines} == {colour}
    # the weight is a function of the shift, which nobody declared: a line, not points
    assert "None" not in {line[2] for line in lines}
    assert colour.lower() in (landed / "plot.svg").read_text("utf-8").lower()


@pytest.mark.parametrize(("name", "status"), [("right", "passed"), ("wrong", "failed")])
def test_drpo_check_takes_it_as_a_claim(landed, name, status):
    options = ("--objective", "Toy(delta=0.3)", "--returns", "loss+gradient", "--property", "P3", "--json")
    found = json.loads(python(landed, "-m", "drpo_core.cli", "check", f"{name}.py:loss", *options))
    assert found["declared"]["objective"] == "Toy(delta=0.3)"
    results = {result["check"]: result["status"] for result in found["results"]}
    assert results["check_gradient_matches_the_formula"] == results["check_loss_matches_the_formula"] == status
