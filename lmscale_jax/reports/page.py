"""Writes a report: index.html with its figures inside, tables also as CSV."""

import base64
import csv
import html
from pathlib import Path

from lmscale_jax.files import atomic_write

CSS = """body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:1.5em auto;padding:0 1em;
color:#222;background:#fff}h1{font-size:1.5em;line-height:1.25}h2{font-size:1.15em;margin-top:2em}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:.8em 0;font-size:.88em}
td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}img{max-width:100%;height:auto}
.warn{background:#fff3cd;padding:.6em 1em}.answer{font-size:1.2em;background:#eef4fb;
padding:.8em 1em;border-left:4px solid #2a6fb0}pre{background:#f5f5f5;padding:.8em;overflow-x:auto;
font-size:.85em}.wide td{white-space:normal;text-align:left}"""


class Page:
    """An HTML page under construction: parts are appended, then written together."""

    def __init__(self, title: str):
        self._title, self._parts = title, []

    def say(self, text: str, kind: str = "") -> None:
        """Appends a paragraph; `kind` is its CSS class: "", "warn" or "answer"."""
        mark = f' class="{kind}"' if kind else ""
        self._parts.append(f"<p{mark}>{html.escape(text)}</p>")

    def head(self, text: str) -> None:
        """Appends a heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def code(self, text: str) -> None:
        """Appends preformatted text, such as a command to copy."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(
        self, head: list[str], rows: list[list], path: Path | None = None, kind: str = ""
    ) -> None:
        """Appends a table; floats are shown with six digits.

        Args:
          path: a CSV file that gets the same rows with all digits.
          kind: CSS class; "wide" wraps long text in cells.
        """

        def line(cells, tag):
            shown = (f"{c:.6g}" if isinstance(c, float) else str(c) for c in cells)
            return "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in shown)

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
        mark = f' class="{kind}"' if kind else ""
        self._parts.append(
            f'<div class="scroll"><table{mark}><tr>{line(head, "th")}</tr>{body}</table></div>'
        )
        if path:
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([head, *rows])

    def figures(self, paths: list[Path]) -> None:
        """Appends PNG files as data in the page, so that it is complete as one file."""
        for path in paths:
            image = base64.b64encode(path.read_bytes()).decode()
            self._parts.append(
                f'<p><img src="data:image/png;base64,{image}" alt="{html.escape(path.stem)}"></p>'
            )

    def write(self, folder: Path) -> Path:
        """Writes index.html in `folder`; returns its path."""
        title, path = html.escape(self._title), folder / "index.html"
        text = (
            f'<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{title}</title><style>{CSS}</style><h1>{title}</h1>{''.join(self._parts)}</html>\n"
        )
        atomic_write(path, text)
        return path
