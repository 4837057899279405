"""What a reader of the pages sees, on the site and on GitHub: every sentence, table, link and picture as it was meant."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

from benchmarks.report import PAGES, RESULTS

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
EVERY = [*(page for page in PAGES if page.name != "api.md"), ROOT / "CHANGELOG.md", *sorted(RESULTS.glob("*.md"))]
EQUATION = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)  # on GitHub, and for MathJax
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
BLOCKS = {"p", "li", "td", "th", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "summary", "article"}
HIDDEN = {"pre", "script", "style", "svg"}
FIGURE = re.compile(r"[-+−±]?\d(?!\d* [a-z]{3,}s\b)|[,.;:)]")  # a count and its noun may begin a sentence


@dataclass
class Page(HTMLParser):
    """The parts of a page.

    Attributes:
        prose: texts of blocks, with the tag of each, and without code.
        code: texts of code within lines.
        quotes: what is quoted.
    """

    prose: list[tuple[str, str]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    quotes: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    _open: list[str] = field(default_factory=list)
    _blocks: list[tuple[str, list[str]]] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given["href"]] if tag == "a" and given.get("href") else []
        self.images += [given["src"]] if tag == "img" else []
        if tag not in VOID:
            self._open.append(tag)
        if tag in BLOCKS and "article" in self._open and "td" not in self._open[:-1]:
            self._blocks.append((tag, []))

    def handle_endtag(self, tag):
        if tag not in VOID:
            while self._open and self._open.pop() != tag:
                pass
        if self._blocks and self._blocks[-1][0] == tag:
            self.prose.append((tag, "".join(self._blocks.pop()[1]).strip()))

    def handle_data(self, data):
        if "blockquote" in self._open:
            self.quotes.append(data)
        if not self._blocks or HIDDEN & {*self._open}:
            return
        if "code" in self._open:
            self.code.append(data)
        self._blocks[-1][1].append("§" if "code" in self._open else data)


def read(html):
    page = Page()
    page.feed(html)
    page.close()
    return page


def misread(page):
    """Yield what of a page's Markdown stands in its text, and what of its text stands where none belongs."""
    for tag, text in ((tag, EQUATION.sub("§", text)) for tag, text in page.prose):
        if tag == "article" and text.replace("§", "").strip():
            yield f"text in no paragraph: {text}"
        if tag == "p" and FIGURE.match(text):
            yield f"a paragraph begins in the middle of a sentence: {text}"
        if literal := re.search(
            r"\]\(|\]\[|\\|\*\*|`|<!--|-->|&#?\w+;|:\w+:§|::|\s\|\s|^\s*[-*|] |^#+ ", text, re.MULTILINE
        ):
            yield f"{literal[0]!r} stands in {tag}: {text}"
    yield from (f"a backslash stands in code: {code}" for code in page.code if "\\|" in code)
    yield from (f"an example is quoted: {quote}" for quote in page.quotes if ">>>" in quote or quote.strip())


@pytest.fixture(scope="module")
def site():
    """Every page of the site that ``make docs`` builds, by its path."""
    tools = f"BIN={Path(sys.executable).parent}"
    command = ["make", "--old-file=install", "docs", tools]  # with the packages that are here
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WARNING -" not in made.stdout + made.stderr
    return {path: read(path.read_text()) for path in SITE.glob("**/*.html") if path.name != "404.html"}


def test_the_site_reads_as_it_was_written(site):
    assert len(site) >= len(EVERY)
    assert [f"{path.relative_to(SITE)}: {said}" for path, page in site.items() for said in misread(page)] == []


def test_links_and_pictures_of_the_site_are_there(site):
    missing = []
    for path, page in site.items():
        for link in [*page.links, *page.images]:
            place, _, anchor = unquote(link).partition("#")
            target = (path.parent / place).resolve() if place else path
            target = target / "index.html" if target.is_dir() else target
            if "://" in place or place.startswith("mailto:"):
                continue
            if not target.exists() or (anchor and target in site and anchor not in site[target].anchors):
                missing.append(f"{path.relative_to(SITE)}: {link}")
    assert missing == []


def test_examples_of_the_site_are_code(site):
    [api] = [path for path in site if path.parent.name == "api"]
    assert api.read_text().count('class="doc-section-title">Examples:') > 100
    assert "&gt;&gt;&gt;" in api.read_text()


@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_pages_read_as_they_were_written(path):
    """Also where CommonMark's rules hold: on GitHub, and in the HTML report of all results."""
    html = MarkdownIt("commonmark").enable("table").render(path.read_text())
    assert [*misread(read(f"<article>{html}</article>"))] == []


@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_line_begins_with_a_comment(path):
    """CommonMark ends the paragraph there, and leaves the rest of the line as it is."""
    begun = re.findall(r"^\s*(?:[-*] |\d+\. )?<!--.*?-->.+", path.read_text(), re.MULTILINE)
    assert begun == []  # but for comments that are alone on their lines


@pytest.mark.parametrize("path", [path for path in EVERY if EQUATION.search(path.read_text())], ids=lambda path: path.name)
def test_equations_are_no_markup(path):
    """GitHub reads Markdown before equations: an underscore after a bracket, say, may begin an emphasis."""
    source = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    page = read(f"<article>{MarkdownIt('commonmark').enable('table').render(source)}</article>")
    shown = "".join(text for _, text in page.prose)
    assert [equation for equation in EQUATION.findall(source) if equation not in shown] == []
