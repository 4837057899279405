"""What a reader of the built site sees: every page as it was meant, every link and picture in its place."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
BLOCKS = {"p", "li", "td", "th", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "summary", "article"}
CODE = {"pre", "code", "script", "style", "svg"}


@dataclass
class Page(HTMLParser):
    """The parts of a page: texts of its blocks without code, what is linked and shown, and what is quoted."""

    texts: list[tuple[str, str]] = field(default_factory=list)  # tag and text
    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    quotes: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)
    _blocks: list[tuple[str, list[str]]] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given["href"]] if tag == "a" and given.get("href") else []
        self.images += [given["src"]] if tag == "img" else []
        if tag == "code" and self._blocks:
            self._blocks[-1][1].append("‹code›")
        if tag not in VOID:
            self._open.append(tag)
        if tag in BLOCKS and "article" in self._open:
            self._blocks.append((tag, []))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        while self._open and self._open.pop() != tag:
            pass
        if self._blocks and self._blocks[-1][0] == tag:
            name, parts = self._blocks.pop()
            self.texts.append((name, " ".join("".join(parts).split())))

    def handle_data(self, data):
        if "blockquote" in self._open:
            self.quotes.append(data)
        if self._blocks and not CODE & {*self._open}:
            self._blocks[-1][1].append(data)


def read(path):
    page = Page()
    page.feed(path.read_text())
    return page


@pytest.fixture(scope="module")
def pages():
    """Every page of the site that ``make docs`` builds, by its path."""
    tools = f"BIN={Path(sys.executable).parent}"
    command = ["make", "--old-file=install", "docs", tools]  # with the packages that are here
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WARNING" not in made.stdout + made.stderr
    return {path.relative_to(SITE): read(path) for path in SITE.glob("**/*.html") if path.name != "404.html"}
