"""How Sphinx builds these pages; the tutorials are executed on the way, and a failing cell fails the build."""

import tomllib
from pathlib import Path
from typing import Any

_project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _project["name"]
author = "The foveate authors"
copyright = f"2026, {author}"
version = release = _project["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute"]
default_role = "code"  # single backticks in docstrings hold code

html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # a cache would not notice that the library has changed
nb_execution_timeout = 900  # seconds for a cell; a busy machine may need ten times what an idle one does
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # the fields of a NamedTuple or dataclass are described once, in its own docstring
napoleon_custom_sections = [("Convention", "notes_style")]


def _skip_tuple_fields(app: Any, what: str, name: str, member: object, skip: bool, options: Any) -> bool | None:
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Leave out the "Alias for field number 0" of NamedTuple fields."""
    app.connect("autodoc-skip-member", _skip_tuple_fields)
