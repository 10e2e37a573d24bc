"""A report: one HTML file with its pictures inside, for any browser, without scripts and without a network."""

import base64
import html
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from foveate.experiments.outputs import write_text
from foveate.inference.posterior import Posterior

__all__ = ["Report", "add_summary"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
figure { margin: 1rem 0; } figcaption { color: #444; font-size: .9rem; max-width: 60rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e3e3e3; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
.scroll { overflow: auto; max-height: 30rem; } summary { cursor: pointer; }
""".strip()


class Report:
    """Grows by what is added, in order.

    Args:
        title: of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def figure(self, figure: Figure, alt: str, caption: str = "") -> None:
        """A figure, drawn as PNG into the page; `alt` says in words what is to be seen."""
        held = io.BytesIO()
        with warnings.catch_warnings():
            # Pictures are named in all the world's scripts, of which a font has a few.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(held, format="png", dpi=110)
        self._picture(held.getvalue(), alt, caption)

    def picture(self, path: Path, alt: str, caption: str = "") -> None:
        """A PNG file, copied into the page."""
        self._picture(path.read_bytes(), alt, caption)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], *, folded: str = "") -> None:
        """A table, floats with four significant digits; with `folded`, its summary, it opens on a click."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(_written(cell))}</td>" for cell in row) + "</tr>" for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
        if folded:
            table = f'<details><summary>{html.escape(folded)}</summary><div class="scroll">{table}</div></details>'
        self._parts.append(table)

    def html(self) -> str:
        """The whole page."""
        body = "\n".join(self._parts)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page whole or not at all."""
        write_text(path, self.html())

    def _picture(self, png: bytes, alt: str, caption: str) -> None:
        data = base64.b64encode(png).decode("ascii")
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">{below}</figure>')


def add_summary(report: Report, posterior: Posterior) -> None:
    """Add ArviZ' table of a posterior to a report, folded: a row for every scene and part of its gaze."""
    table = posterior.summary()
    rows = [[name, *values] for name, values in zip(table.index, table.to_numpy().tolist(), strict=True)]
    report.paragraph(
        "Within the heaviest mode of each scene. Positions in scene pixels, scale in scene pixels per canonical pixel, "
        "rotation in radians. R-hat near 1 says that the chains agree; ESS counts independent draws."
    )
    report.table(["", *map(str, table.columns)], rows, folded=f"ArviZ summary ({len(rows)} rows)")


def _written(value: object) -> str:
    """A cell of a table: four significant digits of a float, everything else as it prints."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.0f}"
    return str(value)
