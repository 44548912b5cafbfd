"""Settings of the documentation site: sphinx-build -W docs build/site, then open build/site/index.html."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "hooks")]

project = "warp_jax"
version = release = version_of(project)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "config_table", "docstrings", "flag_tables"]
exclude_patterns = ["hooks"]
suppress_warnings = ["myst.header"]  # results/README.md and others start sections where GitHub shows them best
myst_heading_anchors = 4  # links to headings are checked
default_role = "code"  # docstrings have `name` for code
autodoc_member_order = "bysource"
napoleon_use_param = napoleon_use_rtype = False  # one list of arguments; modules have such lists too
smartquotes = False  # flags begin with two hyphens
html_theme = "furo"  # brings its fonts, icons and scripts: no page loads anything from another server
html_title = f"warp_jax {version}"
html_show_copyright = html_show_sphinx = html_copy_source = False


def setup(app):
    """Let links to the README lead to the first page, which includes its beginning."""

    def replace(_, name, source):
        source[0] = source[0].replace("(../README.md)", "(index.md)")

    app.connect("source-read", replace)
