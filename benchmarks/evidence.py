"""All kept results on one page, and each on its own."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from benchmarks import report
from benchmarks.report import table
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
        parts += [f"### {name}\n\n{with_pictures(name)}" for name in names]
    return "\n\n".join(parts) + "\n"


def with_pictures(name: str) -> str:
    """Return a kept result with its pictures."""
    folder = report.RESULTS
    pictures = [*sorted(folder.glob(f"{name}.png")), *sorted(folder.glob(f"{name}_*.png"))]
    return "\n\n".join(
        [(folder / f"{name}.md").read_text().strip(), *(f"![{description(path)}]({path.name})" for path in pictures)]
    )


def description(picture: Path) -> str:
    """Return what a picture shows: the title in its file, see :func:`tying.files.save_figure`, or else its name."""
    with Image.open(picture) as image:
        return str(image.info.get("Title") or f"The picture of {picture.stem}")


def _anchor(title: str) -> str:
    return re.sub(r"[^\w@ -]", "", title).strip().lower().replace(" ", "-")
