"""The notebooks of ``docs/notebooks`` run, download nothing, and show what their cells print.

``python tests/test_notebooks.py [NAME ...]`` runs notebooks in Jupyter, all by default, and stores their outputs.
"""

import base64
import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.ipynb"))}
QUICK = {  # in place of the values in the cell with the tag "parameters"
    "autoencoder_pca": {"epochs": 1},
    "finetune_with_anchors": {"pretraining_epochs": 1, "epochs": 1, "draws": 1, "strengths": [float("inf")]},
    "share_a_transformer": {"steps": 2, "test_batches": 1},
    "shrink_by_hashing_and_clustering": {"epochs": 1, "clustering_epochs": 1},
    "what_may_i_tie": {"steps": 20, "distillation_steps": 5},
}
EXACT = {  # holds however briefly a notebook trains
    "autoencoder_pca": "models['hard'].decoder.weight.T.equal(models['hard'].encoder.weight)"
    " and measured['hard'][0] * 2 == measured['untied'][0]",
    "finetune_with_anchors": "distances['anchored, inf'] == [0] and distances['fine-tuned'][0] > 0",
    "share_a_transformer": "plain(example).equal(network(example))"
    " and (folder / 'separate.pt2').stat().st_size - (folder / 'shared.pt2').stat().st_size > 390_000",
    "shrink_by_hashing_and_clustering": "equal and results['clustered'][0] < 0.2 * results['dense'][0]",
    "what_may_i_tie": "first.names == ('blocks.1.up.weight', 'blocks.4.up.weight')",
}
TRAINED = {  # what the text says of the results
    "autoencoder_pca": "measured['hard'][2] < 1 and measured['soft'][2] < 1 and measured['untied'][2] > 10"
    " and all(ratio < 1.001 for _, ratio, *_ in measured.values()) and measured['hard'][4] < 1e-3"
    " and cosines.min() > 0.999",
    "finetune_with_anchors": "all(sum(accuracies[way]) > sum(accuracies['from scratch']) for way in ways if way != 'from scratch')"
    " and min(sum(accuracies[f'anchored, {s}']) for s in ('0.3', '3')) > sum(accuracies['fine-tuned'])",
    "share_a_transformer": "accuracies['shared layers'] > 0.98 and accuracies['single layer'] < 0.7 < accuracies['narrow layers']",
    "shrink_by_hashing_and_clustering": "min(results[way][1] for way in ('hashed', 'clustered')) > results['narrow'][1]"
    " and results['hashed'][0] < 1.05 * results['narrow'][0]",
    "what_may_i_tie": "advice.plans[0].error < 0.2 * advice.plans[0].error_before",
}


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [(cell, output) for cell in code_cells(notebook) for output in cell["outputs"]]


def words(notebook):
    """Return what each cell prints, without what differs from run to run: numbers, and what pads them."""
    printed = ["".join("".join(output.get("text", [])) for output in cell["outputs"]) for cell in code_cells(notebook)]
    return [re.sub(r"\s+", " ", re.sub(r"[-+]?\d[\d,.]*(e-?\d+)?", "0", text)) for text in printed]


def test_every_notebook_has_its_checks():
    assert NOTEBOOKS.keys() == QUICK.keys() == EXACT.keys() == TRAINED.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_run_on_small_sizes_without_a_network(name, monkeypatch, caplog):
    def refuse(*_):
        raise AssertionError("a notebook reaches for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of processes that a notebook starts
    caplog.set_level(logging.WARNING, "lightning.pytorch")  # as the notebooks do; the level is restored afterwards
    scope = {}
    for cell in code_cells(NOTEBOOKS[name]):
        exec("".join(line for line in cell["source"] if not line.startswith("%")), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            assert QUICK[name].keys() <= scope.keys()
            scope |= QUICK[name]
    plt.close("all")
    assert eval(EXACT[name], scope)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_are_complete_and_small(name):
    cells = code_cells(NOTEBOOKS[name])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [(cell, output) for cell, output in outputs(NOTEBOOKS[name]) if "image/png" in output.get("data", {})]
    assert pictures
    for cell, output in pictures:
        assert len(base64.b64decode("".join(output["data"]["image/png"]))) <= 40_000
        assert len(cell["metadata"]["mystnb"]["image"]["alt"]) > 40
    for _, output in outputs(NOTEBOOKS[name]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert len(output.get("text", [])) <= 60


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_somewhere(name):
    texts = ["".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "markdown"]
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", "\n".join(texts)):
        assert (FOLDER / link).exists(), link


def run_in_jupyter(name, *checks):
    """Return a notebook after a run in a kernel, in an empty folder; every check must hold at its end."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    count = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(f"assert {check}") for check in checks]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
    notebook.cells = notebook.cells[:count]
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("default")  # of Jupyter's own packages
def test_a_run_in_jupyter_shows_what_is_stored_within_a_minute(name):
    start = time.monotonic()
    notebook = run_in_jupyter(name, EXACT[name], TRAINED[name])
    assert time.monotonic() - start < 60
    assert words(notebook) == words(NOTEBOOKS[name])


def store(name):
    """Run a notebook and write it back with its outputs."""
    import nbformat

    notebook = run_in_jupyter(name, EXACT[name], TRAINED[name])
    notebook.metadata.language_info = {"name": "python"}  # without the version of this Python
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    for name in sys.argv[1:] or NOTEBOOKS:
        store(name)
        print(name)
