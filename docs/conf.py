"""Settings of the documentation: Sphinx, MyST for Markdown, and the theme Furo. `make docs` builds it into `site/`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from scconv_jax import __version__  # noqa: E402

project = "scconv_jax"
author = "the authors of scconv_jax"
copyright = "2026, the authors of scconv_jax. MIT licence"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.napoleon", "sphinx_copybutton", "reference", "sources", "figures", "narrow"]
exclude_patterns = ["extensions", "figures", "static", "drawing"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "mailto": None, "page": "{{path}}#{{fragment}}"}

# Docstrings: a single backtick marks code and, if it is a public name, links to its entry.
default_role = "py:obj"
add_module_names = False
python_maximum_signature_line_length = 78
toc_object_entries_show_parents = "hide"
napoleon_custom_sections = [("Attributes", "params_style"), ("Example", "example")]
napoleon_use_rtype = False

html_theme = "furo"
html_title = "scconv_jax"
html_static_path = ["static"]
html_extra_path = ["extra"]  # draw/, a page that Sphinx copies as it is
html_css_files = ["site.css"]
html_js_files = ["search_from_disk.js"]
html_logo = "static/logo.svg"
html_favicon = "static/logo.svg"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1d4ed8", "color-brand-content": "#1d4ed8"},
    "dark_css_variables": {"color-brand-primary": "#8fb4ff", "color-brand-content": "#8fb4ff"},
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp"
html_math_renderer = "none"  # Sphinx's own loads a script from another site


def setup(app):
    app.add_html_math_renderer("none", (lambda *_: None, None), (lambda *_: None, None))
