"""The site as a reader's browser sees it: built with warnings as errors, opened in a headless Chromium, cut off the internet.

Needs the extra `docs`, Node.js with npm, and Chromium: ``pytest tests/site``.
"""

import importlib
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_origin
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from drpo_core import token_loss_and_gradient
from drpo_core.audit.explorer import Grid
from drpo_core.objectives import OBJECTIVES

sync_api = pytest.importorskip("playwright.sync_api", reason="the site is tested where the extra `docs` is installed")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
PUBLIC = (
    "drpo_core", "drpo_core.modes", "drpo_core.anchors", "drpo_core.corrections", "drpo_core.penalties",
    "drpo_core.centering", "drpo_core.testing",
    "drpo_core.audit", "drpo_core.audit.explorer", "drpo_core.audit.page",
    "drpo_core.audit.plots", "drpo_torch", "drpo_torch.distributed", "drpo_torch.testing", "drpo_jax", "drpo_jax.distributed",
    "drpo_jax.testing",
)  # fmt: skip


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built from nothing by its own command."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), str(out)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 -- ours
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="session")
def address(site):
    """Where a server serves it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium."""
    assert CHROMIUM, "Chromium is not installed (Debian: apt-get install chromium)"
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, address):
    """A page that must neither complain, nor miss a file, nor ask for one of another host."""
    page, complaints = browser.new_page(viewport=DESKTOP), []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("response", lambda answer: complaints.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    page.on("request", lambda asked: None if local(asked.url, address) else complaints.append(f"asks for {asked.url}"))
    yield page
    page.close()
    assert complaints == []


def local(url, address):
    return url.startswith((address, "data:", "blob:", "file:"))


def names(site, *, sources=False):
    """All pages, or without those that only show source code."""
    found = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    return [name for name in found if sources or not name.startswith(("source/", "_modules/"))]


# --- the whole site --------------------------------------------------------------------------------------------------


def test_every_page_loads_with_its_mathematics_and_fits_a_phone(site, address, tab):
    tab.set_viewport_size(PHONE)
    wide, formulas = [], 0
    for name in names(site):
        tab.goto(f"{address}/{name}")
        assert name == "search.html" or tab.locator("h1").first.is_visible(), name
        assert tab.locator(".katex-error").count() == 0, name
        formulas += tab.locator(".katex").count()
        width = tab.evaluate("document.documentElement.scrollWidth")
        wide += [f"{name}: {width}"] if width > PHONE["width"] else []
    assert wide == []
    assert formulas > 300


def test_mathematics_is_drawn_in_its_own_fonts(address, tab):
    tab.goto(f"{address}/derivations/drpo.html")
    tab.evaluate("document.fonts.ready.then(() => true)")
    assert tab.evaluate("[...document.fonts].filter(f => f.family.startsWith('KaTeX') && f.status === 'loaded').length") >= 2
    box = tab.locator("div.math .katex-html").first.bounding_box()
    assert box["height"] > 20
    assert box["width"] > 200
    assert "$" not in tab.locator("article").inner_text()


def test_search_finds_a_function(address, tab):
    tab.goto(f"{address}/index.html")
    tab.locator("input[name=q]").first.fill("token_diagnostics")
    tab.keyboard.press("Enter")
    found = tab.locator("ul.search li a", has_text="drpo_core.token_diagnostics").first
    found.wait_for(timeout=10_000)
    found.click()
    tab.wait_for_url("**/reference/core.html*")
    assert tab.locator("[id='drpo_core.token_diagnostics']").is_visible()


def test_it_is_light_or_dark_as_the_reader_likes(address, tab):
    def lightness(page, selector):
        tab.goto(f"{address}/{page}")
        colour = tab.evaluate(f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765

    for page, selector in (("index.html", "body"), ("explorer.html", ".drpo-explorer .controls")):
        tab.emulate_media(color_scheme="light")
        assert lightness(page, selector) > 0.9
        tab.emulate_media(color_scheme="dark")
        assert lightness(page, selector) < 0.2


class Anchors(HTMLParser):
    """Where a page links to, and what in it can be linked to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.loaded = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):  # noqa: D102 - HTMLParser says what it is
        attributes = dict(attrs)
        self.ids |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif attributes.get("src") or (tag == "link" and attributes.get("href")):
            self.loaded.append(attributes.get("src") or attributes["href"])


def test_every_internal_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {name: Anchors((site / name).read_text("utf-8")) for name in names(site, sources=True)}
    broken = []
    for name, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"):
                broken += [f"{name} loads {link}"] if link in page.loaded else []
                continue
            target = (site / name).parent.joinpath(unquote(parts.path)).resolve() if parts.path else site / name
            inside = target.relative_to(site).as_posix()
            misses = parts.fragment and inside in pages and unquote(parts.fragment) not in pages[inside].ids
            broken += [f"{name}: {link}"] if misses or not target.exists() else []
    assert sum(len(page.links) for page in pages.values()) > 2000
    assert broken == []


def test_every_public_name_is_in_the_reference(site):
    ids = set().union(*(Anchors(path.read_text("utf-8")).ids for path in (site / "reference").glob("*.html")))
    wanted = {f"{name}.{symbol}" for name in PUBLIC for symbol in importlib.import_module(name).__all__}
    assert len(wanted) > 110
    assert wanted - {"drpo_core.__version__"} - ids == set()


def test_the_reference_has_every_check(site):
    ids = Anchors((site / "reference" / "testing.html").read_text("utf-8")).ids
    checks = [name for name in importlib.import_module("drpo_core.testing.checks").__all__ if name.startswith("check_")]
    assert len(checks) > 30
    assert {f"drpo_core.testing.checks.{name}" for name in checks} <= ids


def modules():
    """Every module of the three packages but private ones, and those of frameworks that are not installed here."""
    for package in map(importlib.import_module, ("drpo_core", "drpo_torch", "drpo_jax")):
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".integrations." not in found.name and "._" not in found.name:
                yield importlib.import_module(found.name)


def test_no_exported_name_is_undocumented():
    symbols = {f"{m.__name__}.{name}": getattr(m, name) for m in modules() for name in getattr(m, "__all__", ())}
    callables = {name: symbol for name, symbol in symbols.items() if callable(symbol) and get_origin(symbol) is None}
    # Triton's interpreter keeps a kernel's function, and with it what is said of it, to itself
    undocumented = [name for name, symbol in callables.items() if not inspect.getdoc(getattr(symbol, "fn", symbol))]
    assert undocumented == []


def test_claims_link_to_their_proofs(address, tab):
    tab.goto(f"{address}/derivations/drpo.html")
    tab.locator("#d4 a.proof").first.click()
    assert "def test_same_region_as_dppo" in tab.locator("article").inner_text()
    line = tab.evaluate("document.getElementById(location.hash.slice(1)).parentElement.id || location.hash")
    assert line
    tab.goto(f"{address}/derivations/drpo.html")
    tab.locator("#d4 a.property").first.click()
    assert tab.locator("#p11").is_visible()


# --- the explorer ----------------------------------------------------------------------------------------------------

GRID = Grid()

CURVES = "card => [...card.querySelectorAll('.curve')].map(c => ({values: c.values, d: c.getAttribute('d')}))"


def move(tab, slider, stop):
    """Move a slider to a stop with the keyboard."""
    tab.locator(f"#x-{slider}").focus()
    tab.keyboard.press("Home")
    for _ in range(stop):
        tab.keyboard.press("ArrowRight")


@pytest.mark.filterwarnings("ignore::drpo_core.VacuousTrustRegionWarning")
@pytest.mark.parametrize(("mu", "delta", "eps", "sign"), [(1, 3, 2, 1.0), (5, 5, 0, -1.0), (7, 10, 6, 1.0), (4, 0, 3, -1.0)])
def test_the_sliders_set_the_curves_to_what_python_computes(address, tab, mu, delta, eps, sign):
    tab.goto(f"{address}/explorer.html")
    for slider, stop in (("mu", mu), ("delta", delta), ("eps", eps), ("pi", 60)):
        move(tab, slider, stop)
    tab.locator("#x-positive" if sign > 0 else "#x-negative").check()
    pi = GRID.pi(GRID.mu[mu])
    arguments = np.log(pi), np.full_like(pi, np.log(GRID.mu[mu])), np.full_like(pi, sign)
    thresholds = {"delta": GRID.delta[delta], "eps": GRID.eps[eps]}
    assert tab.locator("#x-delta-out").inner_text() == f"{thresholds['delta']:g}"
    # Binary KL's threshold follows δ; test_explorer.py knows how
    for family in (family for family in OBJECTIVES if family.measure != "Binary KL"):
        threshold = thresholds[family.threshold] if family.measure else next(iter(family.typical), None)
        result = token_loss_and_gradient(family.make(threshold), *arguments)
        card = tab.locator(f"[data-family='{family.name}']")
        drawn = card.evaluate(
            "card => [...card.querySelectorAll('.curve')].map(c => ({values: c.values, d: c.getAttribute('d')}))"
        )
        for what, limits, curve in zip(("weight", "loss"), ((-2.6, 3.4), None), drawn, strict=True):
            expected = getattr(result, what)
            np.testing.assert_allclose(curve["values"], expected, rtol=6e-5, atol=1e-12)
            shown = float(card.locator("b.w" if what == "weight" else "b.l").inner_text())
            assert shown == pytest.approx(expected[60], rel=6e-5, abs=1e-12)
            if limits is not None:
                # the path itself: heights on the drawing, from which the axis gives the weights back
                points = np.array([[float(n) for n in point.split()] for point in re.split("[ML]", curve["d"])[1:]])
                weights = limits[0] + (114 - points[:, 1]) / (114 - 6) * (limits[1] - limits[0])
                inside = np.abs(expected) < 20
                np.testing.assert_allclose(weights[inside], expected[inside], atol=1e-3)
                np.testing.assert_allclose((points[:, 0] - 34) / (224 - 34), pi, atol=1e-4)


def test_the_explorer_shows_the_rollouts_as_the_audit_counts_them(address, tab):
    report = subprocess.run(
        [sys.executable, "-m", "drpo_core.cli", "audit", "--snapshot", "lr1e6_step8", "--delta", "0.15", "--json"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = {item["name"]: item for item in json.loads(report)["snapshots"]["lr1e6_step8"]["objectives"]}
    tab.goto(f"{address}/explorer.html")
    tab.locator("#x-snapshot").select_option(label="lr1e6_step8")
    move(tab, "delta", GRID.delta.index(0.15))
    cells = {row.split("\t")[0]: row.split("\t")[1:] for row in tab.locator("#x-table").inner_text().splitlines()}
    dppo, drpo = found["DPPO(delta=0.15, divergence='binary_tv')"], found["DRPO(delta=0.15)"]
    assert cells["DPPO-TV δ=0.15"][0] == f"{dppo['dropped_fraction']:.2%}"
    assert cells["DRPO δ=0.15"][1] == f"{drpo['corrective_fraction']:.2%}"
    for sign in ("positive", "negative"):
        tab.locator(f"#x-{sign}").check()
        assert tab.locator("#x-plane circle.c").count() > 0


def test_controls_have_labels_and_say_their_values(address, tab):
    tab.goto(f"{address}/explorer.html")
    for name in ("μ, when sampled", "π, now", "δ on |π − μ|", "ε on |r − 1|"):
        slider = tab.get_by_role("slider", name=name)
        assert slider.count() == 1
        assert float(slider.get_attribute("aria-valuetext")) > 0
    tab.locator("#x-near").focus()
    tab.keyboard.press("Space")
    assert tab.locator("#x-near").is_checked()


# --- drpo audit --html -----------------------------------------------------------------------------------------------

POISON = "log_prob_</script><img src=x onerror=window.stolen=1><script>window.stolen=1</script>"


def test_an_audit_page_shows_a_poisoned_name_as_text(tab, tmp_path):
    rng = np.random.default_rng(1)
    behavior = -rng.exponential(1.0, (6, 8))
    arrays = {POISON: behavior - 0.3 * rng.random((6, 8)), "</script><b>": behavior, "advantages": rng.normal(size=6)}
    from safetensors.numpy import save_file  # noqa: PLC0415 - its names may hold any character

    save_file(arrays, tmp_path / "r.safetensors")
    command = ["audit", "r.safetensors", "--behavior-log-prob", "</script><b>", "--delta", "0.17", "--html", "page.html"]
    run = [sys.executable, "-m", "drpo_core.cli", *command]
    subprocess.run(run, check=True, cwd=tmp_path, capture_output=True)  # noqa: S603 -- ours
    tab.goto((tmp_path / "page.html").as_uri())
    assert POISON.removeprefix("log_prob_") in tab.locator("h2").first.inner_text()
    assert POISON in tab.locator("dd").first.inner_text()
    assert "μ </script><b>," in tab.locator("dd").first.inner_text()
    assert POISON.removeprefix("log_prob_") in tab.locator("#x-snapshot option").first.inner_text()
    assert tab.evaluate("window.stolen") is None
    assert tab.locator("img").count() == 0
    move(tab, "delta", sorted({*GRID.delta, 0.17}).index(0.17))
    assert tab.locator("[data-family=DRPO] h3").inner_text() == "DRPO δ=0.17"
    tab.set_viewport_size(PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
