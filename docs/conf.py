"""How the documentation's site is built: ``make docs``, which takes warnings as errors."""

project = "fedsplit"
copyright = "the fedsplit authors, Apache-2.0"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "fedsplit"
html_theme_options = {"source_directory": "docs/"}
# Nothing is fetched from anywhere when a page is read.
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False
