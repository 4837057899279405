"""What a reader of the pages sees, on the site and on GitHub: every sentence, table, link and picture as it was meant."""

import importlib
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
ABOUT = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")]
EVERY = [*(page for page in PAGES if page.name != "index.md"), *ABOUT, *sorted(RESULTS.glob("*.md"))]
API = ["soft", "hard", "hashing", "depth", "advice", "callbacks", "mixins", "models", "data"]
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
        loaded: addresses of scripts, styles and pictures.
        without_alt: pictures without a text in their place.
    """

    prose: list[tuple[str, str]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    quotes: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    without_alt: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    _open: list[tuple[str, str]] = field(default_factory=list)
    _blocks: list[tuple[str, list[str]]] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given["href"]] if tag == "a" and given.get("href") else []
        self.images += [given["src"]] if tag == "img" else []
        self.without_alt += [given["src"]] if tag == "img" and not (given.get("alt") or "").strip() else []
        self.loaded += [given[key] for key in ("src", "href") if tag in {"img", "script", "link"} and given.get(key)]
        around = self.inside()
        block = tag in BLOCKS or "sd-card-title" in (given.get("class") or "")
        if block and "article" in around | {tag} and not {"td", "th"} & around:
            self._blocks.append((tag, []))
        if tag not in VOID:
            self._open.append((tag, self.kind(tag, given.get("class") or "")))

    def kind(self, tag, classes):
        """Return what an element is to a reader: code, also of a signature or a type; nothing, where it is not shown."""
        typed = tag == "em" and "dd" in self.inside()
        return "code" if "sig-object" in classes or typed else "svg" if "sd-hide-link-text" in classes else tag

    def inside(self):
        return {kind for _, kind in self._open}

    def handle_endtag(self, tag):
        if tag not in VOID:
            while self._open and self._open.pop()[0] != tag:
                pass
        if self._blocks and self._blocks[-1][0] == tag:
            self.prose.append((tag, "".join(self._blocks.pop()[1]).strip()))

    def handle_data(self, data):
        around = self.inside()
        if "blockquote" in around:
            self.quotes.append(data)
        if not self._blocks or HIDDEN & around:
            return
        if "code" in around:
            self.code.append(data)
        self._blocks[-1][1].append("§" if "code" in around else data)


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
    command = ["make", "--old-file=tools", "docs", tools]  # with the packages that are here
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WARNING" not in made.stdout + made.stderr
    return {path: read(path.read_text()) for path in SITE.glob("**/*.html") if "_static" not in path.parts}


def test_the_site_reads_as_it_was_written(site):
    assert {path.with_suffix(".html").relative_to(ROOT) for path in EVERY} - {Path("README.html")} <= {
        path.relative_to(SITE) for path in site
    }
    assert [f"{path.relative_to(SITE)}: {said}" for path, page in site.items() for said in misread(page)] == []


def test_links_and_pictures_of_the_site_are_there(site):
    missing = []
    for path, page in site.items():
        for link in [*page.links, *page.images]:
            place, _, anchor = unquote(link).partition("#")
            target = (path.parent / place).resolve() if place else path
            if "://" in place or place.startswith("mailto:"):
                continue
            if not target.is_file() or (anchor and target in site and anchor not in site[target].anchors):
                missing.append(f"{path.relative_to(SITE)}: {link}")
    assert missing == []


def test_pictures_say_what_they_show(site):
    assert [f"{path.relative_to(SITE)}: {src}" for path, page in site.items() for src in page.without_alt] == []


def test_pages_load_nothing_from_elsewhere(site):
    """Styles, scripts and pictures, MathJax among them, come with the site."""
    assert {src for page in site.values() for src in page.loaded if "//" in src} == set()


@pytest.mark.parametrize("family", ["selection", *API])
def test_the_api_describes_each_name_once_with_its_example(family, site):
    module = importlib.import_module("tying" if family == "selection" else f"tying.{family}")
    page = SITE / "docs" / "api" / f"{family}.html"
    public = getattr(module, "__all__", [name for name in vars(module) if name.endswith("Mixin")])
    for name in public:
        assert [path for path in site if f"{module.__name__}.{name}" in site[path].anchors] == [page], name
    examples = sum((getattr(module, name).__doc__ or "").count(">>>") for name in public)
    assert page.read_text().count('<span class="gp">&gt;&gt;&gt; </span>') >= examples > 0
    assert not any(">>>" in text for _, text in site[page].prose)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_pages_read_as_they_were_written(path):
    """Also where CommonMark's rules hold, as on GitHub."""
    html = MarkdownIt("commonmark").enable("table").render(path.read_text())
    assert [*misread(read(f"<article>{html}</article>"))] == []


@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_line_begins_with_a_comment(path):
    """CommonMark ends the paragraph there, and leaves the rest of the line as it is."""
    begun = re.findall(r"^\s*(?:[-*] |\d+\. )?<!--.*?-->.+", path.read_text(), re.MULTILINE)
    assert begun == []  # but for comments that are alone on their lines


@pytest.mark.parametrize(
    "path", [path for path in EVERY if EQUATION.search(path.read_text())], ids=lambda path: path.name
)
def test_equations_are_no_markup(path):
    """GitHub reads Markdown before equations: an underscore after a bracket, say, may begin an emphasis."""
    source = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    page = read(f"<article>{MarkdownIt('commonmark').enable('table').render(source)}</article>")
    shown = "".join(text for _, text in page.prose)
    assert [equation for equation in EQUATION.findall(source) if equation not in shown] == []
