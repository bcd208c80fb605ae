"""A report as one folder: index.html, its figures as PNG, its tables as CSV."""

import csv
import html
import os
from pathlib import Path

STYLE = """body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}
.warn{background:#fff3cd;padding:.6em 1em}"""


class Page:
    """Collects what a page says and writes it at once."""

    def __init__(self, title: str):
        self._title, self._parts = title, []

    def say(self, text: str, kind: str = "") -> None:
        """A paragraph; kind "warn" makes it stand out."""
        mark = f' class="{kind}"' if kind else ""
        self._parts.append(f"<p{mark}>{html.escape(text)}</p>")

    def head(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def table(self, head: list[str], rows: list[list], path: Path | None = None) -> None:
        """Numbers are shown with six digits; `path` also gets them whole, as CSV."""

        def line(cells, tag):
            shown = (f"{c:.6g}" if isinstance(c, float) else str(c) for c in cells)
            return "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in shown)

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
        self._parts.append(f"<table><tr>{line(head, 'th')}</tr>{body}</table>")
        if path:
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([head, *rows])

    def figures(self, paths: list[Path]) -> None:
        self._parts += [
            f'<p><img src="{html.escape(path.name)}" alt="{html.escape(path.stem)}"></p>'
            for path in paths
        ]

    def write(self, folder: Path) -> Path:
        """index.html in `folder`, where the figures are already."""
        title, path = html.escape(self._title), folder / "index.html"
        text = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style><h1>{title}</h1>{''.join(self._parts)}</html>\n"
        )
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)
        return path
