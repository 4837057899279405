"""All kept results on one page: as Markdown with pictures beside it, and as HTML that holds everything."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from markdown_it import MarkdownIt

from benchmarks import report
from benchmarks.report import PAGES, table

SECTIONS = {
    "One network, every family": ["demo", "cifar10", "cifar10@cifar10-jpeg"],
    "Soft tying": ["soft", "transfer", "coupling", "two-domains", "hybrid-toy", "mixture@mnist"],
    "Hard tying": ["hard", "autoencoder", "survival"],
    "Hashed layers": [
        *(f"arbnet-{suite}@mnist" for suite in ("fig2", "fig3", "fig4", "density")),
        "arbnet-cifar10",
        "hashednets@mnist",
        "clustering@mnist",
    ],
    "Depth": ["depth", "depth@cifar10-jpeg"],
    "Recurrent networks": ["text", "permuted-mnist@mnist"],
    "Speed": [
        f"speed_{family}"
        for family in ("soft", "hard", "hashing", "depth", "recurrent", "growth", "scale", "data", "harness")
    ],
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
    kept = [name for name in every if (folder / f"{name}.md").exists()]
    other = sorted({path.stem for path in folder.glob("*.md")} - {*every, "README"})
    parts = ["# Results", INTRODUCTION]
    if missing := [name for name in every if name not in kept]:
        parts.append(f"Not kept yet: {', '.join(missing)}.")
    sections = {**SECTIONS, **({"Others": other} if other else {})}
    counts = {title: len({*names} & {*kept, *other}) for title, names in sections.items()}
    contents = [[f"[{title}](#{_anchor(title)})", str(count)] for title, count in counts.items()]
    parts.append(table(["section", "results"], contents))
    for title, names in sections.items():
        parts.append(f"## {title}")
        for name in names:
            if name in kept or name in other:
                parts += [f"### {name}", (folder / f"{name}.md").read_text().strip()]
                parts += [f"![{path.stem}]({path.name})" for path in _pictures(folder, name)]
    return "\n\n".join(parts) + "\n"


def html() -> str:
    """Return the pages of guidance and papers, and that of results, as one that needs no other file."""
    renderer = MarkdownIt("commonmark").enable("table")
    body = "\n".join(renderer.render(text) for text in (*(page.read_text() for page in PAGES[1:]), markdown()))
    body = re.sub(r"<h([123])>(.*?)</h\1>", lambda m: f'<h{m[1]} id="{_anchor(m[2])}">{m[2]}</h{m[1]}>', body)
    body = re.sub(r'href="(?:\.\./|results/)?([\w@-]+)\.md"', lambda m: f'href="#{m[1].lower()}"', body)
    body = re.sub(r'src="(?:results/)?([^"/:]+\.png)"', lambda m: f'src="{_inline(report.RESULTS / m[1])}"', body)
    return f"{HEAD}<body>\n{body}</body></html>\n"


def _pictures(folder: Path, name: str) -> list[Path]:
    return [*sorted(folder.glob(f"{name}.png")), *sorted(folder.glob(f"{name}_*.png"))]


def _anchor(title: str) -> str:
    return re.sub(r"[^\w@ -]", "", title).strip().lower().replace(" ", "-")


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
