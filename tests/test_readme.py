"""The README keeps what it promises: its figure is the library's own, its commands are those that CI runs."""

import re
from pathlib import Path

from drpo_core.audit import plots

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_figure_is_what_the_library_draws(tmp_path):
    plots.save(plots.weight_figure(), tmp_path / "weights.svg")
    drawn, committed = ((folder / "weights.svg").read_bytes() for folder in (tmp_path, ROOT / "docs" / "figures"))
    assert drawn == committed, "redraw it: python -m drpo_core.audit.plots docs/figures/weights.svg"


def test_both_commands_install_with_the_tested_pins():
    main_job, tests = re.findall(r"```sh\n(.*?)\n```", README, flags=re.DOTALL)
    for command in (main_job, tests):
        assert command.startswith("pip install -c constraints.txt torch==2.13.0 && pip install -c constraints.txt -e ")
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert tests.endswith("&& pytest -n 2 --dist worksteal")


def test_code_stands_within_the_first_ten_lines():
    assert README.splitlines().index("```python") < 10


def test_no_line_is_wider_than_120_characters():
    assert [line for line in README.splitlines() if len(line) > 120] == []


def test_relative_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
