"""The explorer's numbers are the functions' own; what a file holds stays text in the page."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from drpo_core import cli, token_loss_and_gradient
from drpo_core.audit import open_rollouts
from drpo_core.audit.explorer import Grid, explorer_data
from drpo_core.audit.page import explorer_html
from drpo_core.objectives import DPPO, DRPO, OBJECTIVES, PPOClip

SMALL = Grid(mu=(0.05, 0.6), delta=(0.15, 12.5), eps=(0.2,))
POISON = "step</script><script>window.stolen=1</script><img src=x onerror='window.stolen=1'>&\"@EXPLORER@"


def rollouts(path, snapshot="a", n=60):
    rng = np.random.default_rng(0)
    behavior = np.log(rng.uniform(0.01, 0.99, (n, 8)))
    policy = np.minimum(behavior + rng.normal(0, 0.4, (n, 8)), 0.0)
    advantages = rng.normal(size=n)
    np.savez(path, **{f"log_prob_{snapshot}": policy}, behavior_log_prob=behavior, advantages=advantages)
    return path


@pytest.mark.filterwarnings("ignore::drpo_core.VacuousTrustRegionWarning")
def test_curves_are_those_of_the_objectives():
    data = explorer_data(grid=SMALL)
    assert [o["family"] for o in data["objectives"]] == [family.name for family in OBJECTIVES]
    # a threshold on Binary KL follows δ by Pinsker's inequality
    stops = {"abs(π − μ)": SMALL.delta, "abs(r − 1)": SMALL.eps, "Binary KL": [2 * delta**2 for delta in SMALL.delta]}
    for family, objective in zip(OBJECTIVES, data["objectives"], strict=True):
        thresholds = stops.get(family.measure, family.typical or [None])
        assert len(objective["labels"]) == len(thresholds)
        for i, sign in enumerate((1.0, -1.0)):
            for m, mu in enumerate(data["mu"]):
                pi = SMALL.pi(mu)
                arguments = np.log(pi), np.full_like(pi, np.log(mu)), np.full_like(pi, sign)
                for t, threshold in enumerate(thresholds):
                    expected = token_loss_and_gradient(family.make(threshold), *arguments)
                    np.testing.assert_allclose(objective["loss"][i][m][t], expected.loss, rtol=6e-5, atol=1e-12)
                    np.testing.assert_allclose(objective["weight"][i][m][t], expected.weight, rtol=6e-5, atol=1e-12)


class Mine:
    """An objective of the user's own, without a trust region."""

    def loss(self, tokens):  # noqa: D102
        return -tokens.advantages * tokens.ratio

    def weight(self, tokens):  # noqa: D102
        return 1.0 / (1.0 + tokens.ratio)


def test_other_objectives_have_a_card_each_and_the_first_is_shown(tmp_path):
    rollouts_of = open_rollouts(rollouts(tmp_path / "r.npz"))
    data = explorer_data(rollouts_of, SMALL, [Mine(), PPOClip(eps=0.2, dual_clip=3.0)])
    mine, clip = data["objectives"][-2:]
    assert (mine["family"], mine["slider"], mine["labels"]) == ("Mine", None, ["Mine"])
    assert (clip["family"], clip["labels"]) == ("PPO-clip", ["PPO-clip ε=0.2 dual_clip=3"])
    at_mu = data["pi"][0].index(data["mu"][0])
    assert mine["weight"][0][0][0][at_mu] == 0.5
    assert data["start"]["objective"] == len(OBJECTIVES)
    assert len({card["colour"] for card in data["objectives"]}) == len(OBJECTIVES) + 1
    assert set(data["snapshots"][0]["kinds"][-2][0]) == {"a"}
    assert explorer_data(grid=SMALL)["start"]["objective"] == [family.name for family in OBJECTIVES].index("DRPO")


def test_edges_are_where_the_weight_reaches_zero():
    data = explorer_data(grid=SMALL)
    edge = {o["family"]: o["edge"] for o in data["objectives"]}
    plane = np.array(data["plane"])
    for family in ("DPPO-TV", "DRPO", "Mask-DRPO"):
        np.testing.assert_allclose(edge[family][0][0], np.minimum(plane + 0.15, 1.0), atol=2e-5)
        np.testing.assert_allclose(edge[family][1][0], np.maximum(plane - 0.15, 0.0), atol=2e-5)
    for family in ("PPO-clip", "SPO"):
        np.testing.assert_allclose(edge[family][0][0], np.minimum(1.2 * plane, 1.0), atol=2e-5)
    assert set(edge["PG-IS"][0][0]) == {1.0}


def test_tokens_and_figures_are_those_of_the_file(tmp_path):
    data = explorer_data(open_rollouts(rollouts(tmp_path / "r.npz")), SMALL)
    (snapshot,) = data["snapshots"]
    assert snapshot["active"] == len(snapshot["mu"]) == len(snapshot["positive"]) == 480
    stored = np.load(tmp_path / "r.npz")
    np.testing.assert_allclose(snapshot["pi"], np.exp(stored["log_prob_a"].ravel()), rtol=6e-5)
    families = [o["family"] for o in data["objectives"]]
    for family, figure, letter in (("DPPO-TV", "dropped", "d"), ("DRPO", "corrective", "c"), ("SPO", "amplified", "m")):
        i = families.index(family)
        share = snapshot["kinds"][i][0].count(letter) / 480
        assert share > 0
        assert snapshot["figures"][i][0][figure] == pytest.approx(share, rel=1e-4)


def test_a_long_file_is_sampled_evenly(tmp_path):
    data = explorer_data(open_rollouts(rollouts(tmp_path / "r.npz", n=700)), SMALL)
    (snapshot,) = data["snapshots"]
    assert snapshot["active"] == 5600
    np.testing.assert_allclose(snapshot["pi"], np.exp(np.load(tmp_path / "r.npz")["log_prob_a"].ravel()[::3]), rtol=6e-5)


@pytest.mark.parametrize(
    ("policy", "advantage"),
    [(800.0, 1.0), (0.1, 1.0), (-0.5, 0.0), (-np.inf, 1.0)],
    ids=["overflows", "above 1", "nothing active", "impossible"],
)
def test_odd_files_give_pages_too(tmp_path, policy, advantage):
    log_prob = np.array([[-0.5, policy, -0.2]])
    arrays = {"log_prob": log_prob, "behavior_log_prob": np.full((1, 3), -0.4), "advantages": np.full((1, 3), advantage)}
    np.savez(tmp_path / "r.npz", **arrays)
    (snapshot,) = json.loads(json.dumps(explorer_data(open_rollouts(tmp_path / "r.npz"), SMALL), allow_nan=False))["snapshots"]
    assert snapshot["active"] == (3 if advantage else 0)
    assert all(0.0 <= pi <= 1.0 for pi in snapshot["pi"])


def test_the_sliders_stop_at_thresholds_given():
    grid = Grid().including([DRPO(delta=0.17), PPOClip(eps=0.33), PPOClip(eps_low=0.2, eps_high=0.4), DPPO(delta=0.05)])
    assert 0.17 in grid.delta
    assert 0.33 in grid.eps
    assert 0.4 not in grid.eps
    nats = Grid(delta=(0.1,)).including([DPPO(delta=0.7, divergence="binary_kl")])
    assert nats.delta == (0.1,)


class Reader(HTMLParser):
    """Tags, and the text outside of scripts."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):  # noqa: D102 - HTMLParser says what it is
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):  # noqa: D102
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text.append(data)


def test_the_audit_page_holds_what_the_file_holds_as_text(tmp_path, monkeypatch):
    path = rollouts(tmp_path / "r<b>.npz", POISON.replace("/", "\u2215"))  # a zip's member names take no slash
    monkeypatch.setattr(sys, "argv", ["drpo", "audit", str(path), "--html", str(tmp_path / "a.html")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    reader = Reader()
    page = (tmp_path / "a.html").read_text("utf-8")
    reader.feed(page)
    assert [tag for tag, _ in reader.tags if tag in ("img", "b", "link", "iframe")].count("img") == 0
    assert [a.get("type") for tag, a in reader.tags if tag == "script"] == ["application/json", None]
    assert not [a for tag, a in reader.tags if tag in ("script", "img") and "src" in a]
    assert any("onerror='window.stolen=1'" in text for text in reader.text)
    (embedded,) = re.findall(r'<script type="application/json" id="x-data">(.*?)</script>', page, re.DOTALL)
    assert "onerror" in json.loads(embedded)["snapshots"][0]["name"]
    assert page.count("@EXPLORER@") == 2 + page.count('id="x-data"')  # heading, arrays, data: a name, never filled in


@pytest.mark.parametrize("character", ["<", ">", "&"])
def test_nothing_in_the_data_can_end_its_element(character):
    data = explorer_data(grid=Grid(mu=(0.5,), delta=(0.2,), eps=(0.2,)))
    fragment = explorer_html(data | {"name": f"{character}/script{character}"})
    assert f"\\u{ord(character):04x}/script" in fragment


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("a.txt", "--html: expected a file named .html, got a.txt"),
        ("nowhere/a.html", "--html: nowhere/a.html can't be written: no folder nowhere"),
    ],
)
def test_a_page_that_can_not_be_written(monkeypatch, capsys, name, complaint):
    monkeypatch.setattr(sys, "argv", ["drpo", "audit", "--html", name])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"drpo audit: {complaint}\n"
