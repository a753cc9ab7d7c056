"""Write the page: one HTML file with everything in it, which loads nothing and runs no script but its own."""

import base64
import hashlib
import html
import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from qwen3vl_train.inspect.findings import CHECKS
from qwen3vl_train.inspect.recipe import Inspection
from qwen3vl_train.outputs import write_text

# The charts are drawn by charts.js: plotly's script would add several MB to every page, for a handful of bar charts.
_SCRIPTS = ("dom.js", "charts.js", "facts.js", "packs.js", "images.js", "samples.js", "main.js")


def write_page(inspection: Inspection, out: Path) -> None:
    """Write the page. Raises OutputError if `out` cannot be written."""
    write_text(out, render_page(inspection))


def render_page(inspection: Inspection) -> str:
    """Return the page as HTML.

    Data reaches the page as JSON in which no tag can begin, and the script writes it as text nodes and attributes
    only. The policy in its head lets no other script or style run, whatever the data holds.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(_part(name) for name in _SCRIPTS) + "})();\n"
    style = _part("page.css")
    data = {
        "facts": inspection.facts.to_json(),
        "samples": inspection.samples,
        "pack": inspection.pack,
        "checks": {name: check.message for name, check in CHECKS.items()},
    }
    return Template(_part("page.html")).substitute(
        title=html.escape(f"Data of {inspection.facts.recipe}"),
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        data=embedded_json(data),
    )


def embedded_json(data: Any) -> str:
    """Return JSON that is safe inside a script element: pure ASCII, without <, > and &."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return (resources.files("qwen3vl_train.inspect") / "page" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
