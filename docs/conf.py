"""How Sphinx builds the documents: `make docs`. Warnings are errors there."""

import gemma_tuner

project = "gemma_tuner"
author = "the gemma_tuner authors"
release = gemma_tuner.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = "gemma_tuner"
html_copy_source = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

toc_object_entries = False  # each name has a heading of its own
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes, units and dtypes, which types do not
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every reference to a name of ours must be found; those of other projects have no address here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!gemma_tuner\.).*")]
