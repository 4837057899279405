"""What a browser makes of the site: `make site-test` opens each of its pages in headless Chromium, in light and dark mode."""

import functools
import http.server
import importlib.util
import shutil
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "build" / "site"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.glob("**/*.html") if "_static" not in path.parts)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

UNSET = """() => [...document.querySelectorAll('article .math')]
    .filter(e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror, [data-mjx-error]')).map(e => e.textContent)"""
CUT = """() => {
    const edge = document.documentElement.clientWidth;
    const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth
        && e.getBoundingClientRect().right <= edge && e.offsetHeight - e.clientHeight > 4;
    const reached = e => e && (scrolls(e) || reached(e.parentElement));
    const wide = [...document.querySelectorAll('article :is(table, pre, img, mjx-container)')]
        .filter(e => e.getBoundingClientRect().right > edge + 1 && !reached(e.parentElement) && !scrolls(e));
    const page = document.documentElement.scrollWidth > edge ? ['the page itself'] : [];
    return [...page, ...wide.map(e => e.outerHTML.slice(0, 200))];
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def address():
    """Serve the site on this machine, as a search and a clipboard need."""
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium or not importlib.util.find_spec("playwright"):
        pytest.exit(
            "make site-test needs a browser: apt-get install chromium, and pip install '.[browser]'", returncode=1
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        flags = {"args": ["--no-sandbox"], "ignore_default_args": ["--hide-scrollbars"]}
        running = driver.chromium.launch(executable_path=chromium, **flags)
        yield running
        running.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens a page; what the page complained of, or loaded from elsewhere, is an error in the end."""
    complaints, contexts = [], []

    def visit(path, **settings):
        contexts.append(browser.new_context(viewport=DESK, **settings))
        page = contexts[-1].new_page()
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("response", lambda answer: complaints.append(answer.url) if answer.status >= 400 else None)
        page.on(
            "request",
            lambda asked: complaints.append(asked.url) if not asked.url.startswith((address, "data:")) else None,
        )
        page.goto(f"{address}/{path}", wait_until="networkidle")
        if page.locator(".math").count():
            page.evaluate("MathJax.startup.promise")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints, complaints


def test_there_are_pages():
    assert len(PAGES) > 50, "build them: make docs"


def unreadable(page, **options):
    """Return what axe finds, of its serious and critical rules."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page, options={"preload": False, **options}).response["violations"]
    serious = [rule for rule in violations if rule["impact"] in ("serious", "critical")]
    return [f"{rule['help']}: {node['html'][:200]}" for rule in serious for node in rule["nodes"]]


@pytest.mark.parametrize("path", PAGES)
def test_page(path, visit):
    """No errors on the console; equations are set; nothing is cut off, on a phone either; anyone can read it."""
    page = visit(path)
    assert not (texts := page.evaluate(UNSET)), texts
    assert not (elements := page.evaluate(CUT)), elements
    assert not (findings := unreadable(page)), "\n".join(findings)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)  # colours fade
    assert not (findings := unreadable(page, runOnly=["color-contrast"])), "\n".join(findings)
    page.set_viewport_size(PHONE)
    assert not (elements := page.evaluate(CUT)), elements


def test_dark_mode_is_the_readers_choice(visit):
    """As the system says, and as the button does."""
    page = visit("docs/index.html")
    mode, colour = "document.documentElement.dataset.theme", "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{mode} == 'dark'")
    assert page.evaluate(colour) != light
    page.locator(".theme-switch-button:visible").click()
    page.locator(".theme-change-button[data-mode=light]:visible").click()
    page.wait_for_function(f"{mode} == 'light'")


def test_search_finds_a_class(visit):
    page = visit("search.html?q=RelaxedTying")
    page.wait_for_selector("#search-results li a")
    assert any(
        "callbacks.html#tying.callbacks.RelaxedTying" in link.get_attribute("href")
        for link in page.locator("#search-results a").all()
    )


def test_copied_examples_have_no_prompts(visit):
    page = visit("docs/api/soft.html", permissions=["clipboard-read", "clipboard-write"])
    example = page.locator("div.highlight", has_text=">>>").first
    example.hover()
    example.locator("button.copybtn").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert ">>>" in example.inner_text()
    assert copied
    assert ">>>" not in copied
