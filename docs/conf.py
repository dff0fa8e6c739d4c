"""Sphinx configuration: `make docs`."""

import tether

project = "Tether"
author = "The Tether authors"
version = release = tether.__version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Tether"
