"""Sphinx's configuration; `python docs/build.py` builds the site with it."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent), str(HERE.parent / "studies"), str(HERE.parent / "adapters")]

import drpo_core  # noqa: E402 - found through the line above

project = "drpo-core"
author = "drpo-core"
release = version = drpo_core.__version__
copyright = "drpo-core contributors, Apache-2.0"  # noqa: A001 - Sphinx's name

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "mathematics",
    "citations",
    "pages",
]
exclude_patterns = ["_ext", "examples"]
# everything a page refers to exists
nitpicky = True
# but what numpydoc takes for types in docstrings, which is prose, with shapes; tests/site checks roles and links
nitpick_ignore_regex = [("py:.*", r".*")]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "fieldlist", "attrs_block", "attrs_inline"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_math_renderer = "katex"
html_theme = "furo"
html_title = "drpo-core"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "monokai"
html_theme_options = {"navigation_with_keys": False}
