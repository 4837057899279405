"""The site: `make docs` builds it from the Markdown of the repository where it lies, so that relative links hold."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

from sphinx.addnodes import desc_parameter, desc_parameterlist
from sphinx.writers.html5 import HTML5Translator

from benchmarks import evidence
from tying import __version__

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT.get("urls", {}).get("Repository")  # without one, no page has a link to edit it
[MATHJAX] = find_spec("sphinx-mathjax-offline").submodule_search_locations

project, release = PROJECT["name"], __version__
author = project_copyright = "The tying developers"
root_doc = "docs/index"
include_patterns = ["*.md", "benchmarks/*.md", "benchmarks/results/*.md", "docs/**"]
exclude_patterns = ["README.md"]  # whose place docs/index.md takes
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 6
nb_execution_mode = "off"  # the tests execute them, and write their outputs
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = project
html_theme_options = {
    "navbar_center": [],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc", "edit-this-page"],
    "use_edit_page_button": REPOSITORY is not None,
}
html_context = {
    "default_mode": "auto",
    "edit_page_url_template": f"{REPOSITORY}/edit/main/{{{{ file_name }}}}",
    "edit_page_provider_name": None,
}
html_sidebars = {"**": ["navigation"]}
templates_path = ["_templates"]
html_static_path = ["_static", f"{MATHJAX}/static"]
html_extra_path = ["_extra"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = html_use_index = False
mathjax_path = "mathjax/tex-chtml.js"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


class Translator(HTML5Translator):
    """Write the arguments of a signature as a list, since they define no terms."""

    def starttag(self, node, tagname, *arguments, **attributes):
        """Write a tag, with its role where another one stood for it."""
        if isinstance(node, desc_parameterlist | desc_parameter) and tagname in ("dl", "dd"):
            attributes["role"] = {"dl": "list", "dd": "listitem"}[tagname]
        return super().starttag(node, tagname, *arguments, **attributes)


def setup(app):
    """Complete pages that have another form elsewhere."""
    app.set_translator("html", Translator)
    app.connect("source-read", present_results)
    app.connect("autodoc-process-docstring", list_names)


def present_results(app, docname, source):
    """Give a kept result its title and pictures, and list it below the page of all results."""
    folder, _, name = docname.rpartition("/")
    if folder == "benchmarks/results":
        pages = "\n\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"
        source[0] = source[0] + pages if name == "README" else f"# {name}\n\n{evidence.with_pictures(name)}\n"


def list_names(app, what, name, module, options, lines):
    """End a module's docstring with a table of what it defines or exports."""
    if what == "module":
        defined = (key for key, value in vars(module).items() if getattr(value, "__module__", None) == name)
        names = getattr(module, "__all__", [key for key in defined if not key.startswith("_")])
        lines += ["", ".. autosummary::", "   :nosignatures:", "", *(f"   {public}" for public in names), ""]
