"""What a run costs beyond its training, and how long a report takes."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cluster import Cluster
from benchmarks.experiment import draw, prepare, quietly, report
from benchmarks.folder import FILES, Folder
from benchmarks.json_files import write_json
from benchmarks.perform import arguments, perform
from benchmarks.report import table
from benchmarks.speed.timing import race
from tying.cli import parse
from tying.errors import ConfigurationError

EPOCHS = 2
RUNS = 1000
THREADS = 2


def bare(arguments: Sequence[str]) -> None:
    """Train and test as ``tying fit`` and ``tying test`` would."""
    cli = parse(arguments)
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)


def measure(overrides: Sequence[str] = ()) -> str:
    """Run the measurements, and return their results as Markdown; ``overrides`` are those of the run."""
    from distributed import LocalCluster  # an optional package

    with (
        quietly(),
        tempfile.TemporaryDirectory() as temporary,
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Cluster(cluster.scheduler_address, Path(temporary)) as workers,
    ):
        root = Path(temporary)
        short = [f"--trainer.max_epochs={EPOCHS}", *overrides]
        sweep = prepare("soft", root / "runs", only="gradient,strength=0.003,*", overrides=short)
        [run] = sweep.runs
        plain = [*arguments(run, root), f"--trainer.logger.save_dir={root}"]
        folder, task = sweep.folder(run), sweep.task(run, THREADS)

        def by_cluster() -> None:
            shutil.rmtree(folder.path)
            if error := workers.outcome(task, workers.submit(task)):
                raise ConfigurationError(error)

        def by_harness() -> None:
            shutil.rmtree(folder.path, ignore_errors=True)
            perform(task)

        sides = {
            "parse, fit and test": lambda: bare(plain),
            "the same by the harness": by_harness,
            "the same by a worker of a cluster": by_cluster,
        }
        result = race(sides, races=7, rounds=1)
        seconds = _report_many(root, folder)
    rows = [[side, f"{result.median(side):.2f}", result.told(side, "parse, fit and test")] for side in sides]
    return "\n\n".join(
        [
            f"{EPOCHS} epochs of ResNet-20 on the embedded sample, softly tied, in one process:",
            table(["side", "s", "ratio"], rows),
            f"A report over {RUNS:,} runs, with plot and CSV, takes {seconds:.1f} s.",
        ]
    )


def _report_many(root: Path, folder: Folder) -> float:
    """Return the seconds that a report over many copies of a run takes."""
    seeds = RUNS // len(prepare("soft", root / "many").runs)
    sweep = prepare("soft", root / "many", seeds=seeds)
    result = folder.result()
    for run in sweep.runs:
        copy = sweep.folder(run)
        copy.path.mkdir(parents=True)
        for name in FILES:
            shutil.copy(folder.path / name, copy.path / name)
        write_json(copy.path / "result.json", {**result, "name": run.name, "definition": sweep.definition(run)})
    start = time.perf_counter()
    sweep = prepare("soft", root / "many", seeds=seeds)
    report(sweep, "report")
    draw(sweep)
    return time.perf_counter() - start
