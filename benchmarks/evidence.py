"""All kept results on one page: as Markdown with pictures beside it, and as HTML that holds everything."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from markdown_it import MarkdownIt

from benchmarks import report
from benchmarks.report import GUIDANCE, table
from benchmarks.speed import FAMILIES

SECTIONS = {
    "One network, every family": ["cifar10", "full@cifar10-jpeg"],
    "Soft tying": [
        "soft",
        "transfer",
        "coupling",
        "two-domains",
        "hybrid-toy",
        "mixture@mnist",
        "continual@mnist",
        "continual-search@mnist",
    ],
    "Hard tying": ["hard", "autoencoder", "relaxed", "sentence"],
    "What ties live through": ["survival", "lightning_features", "strangers", "zoo", "fuzz"],
    "Hashed layers": [
        *(f"arbnet-{suite}@mnist" for suite in ("fig2", "fig3", "fig4", "density")),
        "arbnet-cifar10",
        "hashednets@mnist",
        "clustering@mnist",
    ],
    "Depth": ["depth"],
    "Recurrent networks": ["text", "permuted-mnist@mnist"],
    "Speed": [f"speed_{family}" for family in FAMILIES],
}
INTRODUCTION = """Each table names the command that prints it. What they say: [which tie for which problem](../GUIDE.md)
and [what the papers said](../PAPERS.md)."""
HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>tying: results</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px; }
td, th { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; }
</style>
"""


def markdown() -> str:
    """Return the page over :data:`SECTIONS`: what is kept, its pictures, and what is not kept yet."""
    folder = report.RESULTS
    every = [name for names in SECTIONS.values() for name in names]
    kept = {path.stem for path in folder.glob("*.md")} - {"README"}
    parts = ["# Results", INTRODUCTION]
    if missing := [name for name in every if name not in kept]:
        parts.append(f"Not kept yet: {', '.join(missing)}.")
    asked = {**SECTIONS, "Others": sorted(kept - {*every})}
    sections = {title: [name for name in names if name in kept] for title, names in asked.items()}
    sections = {title: names for title, names in sections.items() if names}
    contents = [[f"[{title}](#{_anchor(title)})", str(len(names))] for title, names in sections.items()]
    parts.append(table(["section", "results"], contents))
    for title, names in sections.items():
        parts.append(f"## {title}")
        for name in names:
            parts += [f"### {name}", (folder / f"{name}.md").read_text().strip()]
            pictures = [*sorted(folder.glob(f"{name}.png")), *sorted(folder.glob(f"{name}_*.png"))]
            parts += [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def html() -> str:
    """Return the pages of guidance and papers, and that of results, as one that needs no other file."""
    guidance = [_rendered(page.read_text(), page.stem.lower()) for page in GUIDANCE]
    body = "\n".join([*guidance, _rendered(markdown(), "readme", of_results=True)])
    body = re.sub(r'href="(?:\.\./|results/)?([\w@-]+)\.md"', lambda m: f'href="#{m[1].lower()}"', body)
    body = re.sub(r'src="(?:results/)?([^"/:]+\.png)"', lambda m: f'src="{_inline(report.RESULTS / m[1])}"', body)
    return f"{HEAD}<body>\n{body}</body></html>\n"


def _rendered(text: str, page: str, of_results: bool = False) -> str:
    """Return a page as HTML whose first heading has its name as id, and others of results their own."""

    def heading(match: re.Match[str]) -> str:
        own = page if match[1] == "1" else _anchor(match[2]) if of_results else f"{page}-{_anchor(match[2])}"
        return f'<h{match[1]} id="{own}">{match[2]}</h{match[1]}>'

    return re.sub(r"<h([123])>(.*?)</h\1>", heading, MarkdownIt("commonmark").enable("table").render(text))


def _anchor(title: str) -> str:
    return re.sub(r"[^\w@ -]", "", title).strip().lower().replace(" ", "-")


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
