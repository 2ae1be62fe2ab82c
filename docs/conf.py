"""Sphinx configuration. Built strictly: a warning is an error (`make docs`)."""

import os
import re
import sys

sys.path.insert(0, os.path.abspath(".."))

import dpfa_jax

project = "DP-Flash-Attention"
author = "The DP-Flash-Attention authors"
copyright = "2026, The DP-Flash-Attention authors"
release = dpfa_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_nb",
]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_custom_sections = ["Formal guarantees"]
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "DP-Flash-Attention"


_LABEL = re.compile(r"^(Returns|Errors[^:]*|Sources?|Cost): +(.*)$")
_BULLET = re.compile(r"^ *[*-] ")


def _as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Make each part that a docstring labels ("Errors: ...") a paragraph of its own."""
    written: list[str] = []
    under_label = in_bullet = False
    for line in lines:
        line = line.replace("|", r"\|")
        label = _LABEL.match(line)
        if label:
            written += ["", f"**{label[1]}.** {label[2]}"]
        elif _BULLET.match(line):
            if written and written[-1].strip() and not _BULLET.match(written[-1]) and not in_bullet:
                written.append("")
            written.append(line.lstrip() if under_label else line)
        elif under_label and not in_bullet:
            written.append(line.lstrip())
        elif under_label:
            written.append("  " + line.lstrip())
        else:
            written.append(line)
        in_bullet = bool(_BULLET.match(line)) or (
            bool(line.strip()) and line[:1] == " " and in_bullet
        )
        under_label = bool(label) or (under_label and bool(line.strip()))
    lines[:] = written


def setup(app) -> None:
    # Before napoleon (500), which reads "Args:" and "Attributes:".
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=400)
