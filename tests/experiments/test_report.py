"""Reports: valid, readable without scripts, and complete without a network."""

import re
from html.parser import HTMLParser
from pathlib import Path

import torch

from foveate.experiments.figures import Sheet, sheets_figure
from foveate.experiments.outputs import save_figure
from foveate.experiments.report import Report

EMPTY = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a page is made of, tags checked for being closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def check_self_contained(text: str) -> Page:
    """Assert that a page is well-formed and needs nothing but itself."""
    page = Page(text)
    assert page.open == []
    assert text.startswith("<!DOCTYPE html>")
    for tag, attributes in page.found:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), f"<{tag}> reaches outside: {attributes}"
        if tag == "img":
            assert attributes["alt"]
    assert not re.search(r"https?://|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]*", "", text))
    return page


def _figure() -> object:
    return sheets_figure([Sheet("t", torch.rand(2, 5, 5))])


def test_a_report_is_one_well_formed_page_that_needs_no_network(tmp_path: Path) -> None:
    report = Report("Faces & <gazes>")
    report.heading("A section")
    report.paragraph("1 < 2 & so on")
    report.figure(_figure(), "small images", "what they are")
    save_figure(_figure(), tmp_path / "p.png")
    report.picture(tmp_path / "p.png", 'said in "words"')
    report.table(("score", "value"), [("a<b", 0.123456), ("n", 3)])
    report.table(("score", "value"), [("x", 1.0)], folded="more")
    report.write(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert [tag for tag, _ in page.found].count("img") == 2
    assert "1 &lt; 2 &amp; so on" in text
    assert "<td>a&lt;b</td><td>0.1235</td>" in text
    assert "<details><summary>more</summary>" in text


def test_writing_a_report_replaces_the_old_one_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "report.html"
    Report("one").write(target)
    Report("two").write(target)
    assert "two" in target.read_text(encoding="utf-8")
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]
