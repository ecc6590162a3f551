"""Configuration of the documentation site; `scripts/docs` builds it."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from pkgutil import iter_modules
from typing import Any

import pipeline

project = "volseg"
author = "The volseg developers"
copyright = "The volseg developers, Apache-2.0"
version = release = installed_version("volseg")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = f"volseg {version}"
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False}
html_sidebars = {"*": []}  # pages of the top folder have no sub-pages to list
html_show_sourcelink = False

myst_heading_anchors = 3  # links to headings, as in #train

napoleon_use_ivar = True  # attributes as a list, not as entries of their own
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
suppress_warnings = ["ref.python"]  # a name that two packages export has two targets

# `pipeline` imports its names on first use; autodoc finds only those that are there.
vars(pipeline).update({name: getattr(pipeline, name) for name in pipeline.__all__})


def plain_text_to_rst(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Turn a docstring, which is plain text with names in backticks, into reStructuredText."""
    if what == "module" and hasattr(obj, "__path__"):
        lines[:] = list_of_modules(lines, {module.name for module in iter_modules(obj.__path__)})
    # code stays code; an asterisk, as in the shape (C, *spatial), is no emphasis
    text = re.sub(
        r"``[^`]+``|(?<!:)`([^`]+)`|(?<!\\)\*",
        lambda match: f"``{match[1]}``" if match[1] else match[0].replace("*", r"\*"),
        "\n".join(lines),
    )
    lines[:] = text.split("\n")


def list_of_modules(lines: list[str], modules: set[str]) -> list[str]:
    """Make a bullet list of the lines of a package's docstring that describe its modules."""
    result: list[str] = []
    in_item = False
    for line in lines:
        entry = re.match(r"\s*(?:- )?`?(\w+)`?(?::| {2})\s*(\S.*)", line)
        if entry and entry[1] in modules:
            result += [] if in_item else [""]
            result.append(f"- `{entry[1]}`: {entry[2]}")
            in_item = True
        elif in_item and line.startswith(" "):
            result.append(f"  {line.strip()}")
        else:
            result += [""] if in_item and line else []
            result.append(line)
            in_item = False
    return result


def setup(app: Any) -> None:
    """Register the hook before napoleon's, which runs at priority 500."""
    app.connect("autodoc-process-docstring", plain_text_to_rst, priority=400)
