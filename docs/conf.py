"""Sphinx configuration. `make docs` builds the site with warnings as errors."""

from __future__ import annotations

from minitron_hf import __version__

project = "minitron-hf"
author = "The minitron-hf authors"
copyright = "the minitron-hf authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]
exclude_patterns = ["_build"]
smartquotes = False  # it would turn the -- of options into a dash

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of dataclasses are documented once, in the class
python_use_unqualified_type_names = True
default_role = "code"  # docstrings write names in single backticks, as Markdown does

html_theme = "furo"
html_title = f"minitron-hf {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
