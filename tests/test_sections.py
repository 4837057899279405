"""Each section of a feature says what it costs, when not to use it and what it refuses, and shows a picture."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES = ("soft", "hard", "hashing", "depth")
PARTS = {
    "its cost": r"\*\*What (it costs|they cost)\.\*\*|^## What it costs",
    "its limits": r"\*\*When not to use (it|them)\.\*\*|^## When not to use it",
    "its errors": r"\*\*What (it refuses|they refuse)\.\*\*|^## What it refuses",
    "a picture": r"^!\[",
}


def sections():
    """Yield each feature and its text: a section with a configuration, subsections included; the page of advice is one."""
    yield "advice", (DOCS / "advice.md").read_text()
    for family in FAMILIES:
        for section in (DOCS / f"{family}.md").read_text().split("\n## ")[1:]:
            if "```yaml" in section:
                yield f"{family}: {section.splitlines()[0]}", section


@pytest.mark.parametrize(("title", "text"), [pytest.param(*section, id=section[0]) for section in sections()])
def test_a_section_has_the_parts_of_its_kind(title, text):
    missing = [part for part, pattern in PARTS.items() if not re.search(pattern, text, re.MULTILINE)]
    assert not missing, title


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_a_page_links_to_its_features(family):
    """So that none of the sections above is missed, for want of a configuration."""
    page = (DOCS / f"{family}.md").read_text()
    top, *_ = page.split("\n## ")
    linked = {*re.findall(r"\]\(#(.+?)\)", top)}
    subsections = {_anchor(title) for title in re.findall(r"^### (.+)$", page, re.MULTILINE)}
    features = {_anchor(title.removeprefix(f"{family}: ")) for title, _ in sections() if title.startswith(family)}
    assert features == linked - subsections


def _anchor(title):
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
