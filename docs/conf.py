"""Sphinx configuration. Built strictly: a warning is an error (`make docs`)."""

import os
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
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "DP-Flash-Attention"
