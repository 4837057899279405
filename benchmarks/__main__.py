"""``python -m benchmarks``: experiments, speed tables, and the pages of what is kept."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import evidence, experiment, gallery, hybrid_toy
from benchmarks.archive import pack, unpack
from benchmarks.cluster import Cluster
from benchmarks.declared import suites
from benchmarks.engine import Local
from benchmarks.machine import describe
from benchmarks.plan import plan
from benchmarks.report import PAGES, RESULTS, paste, write
from benchmarks.sizes import remeasure
from benchmarks.speed import FAMILIES as SPEED
from benchmarks.speed import against
from benchmarks.sweep import Sweep
from tying.errors import ConfigurationError, nearest
from tying.files import save_figure

COMPUTED = {"hybrid-toy": hybrid_toy.report}  # experiments without a network to train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 1 where runs failed, 2 for a mistake in what was asked for."""
    parser = _parser()
    known, overrides = parser.parse_known_args(arguments)
    if overrides and known.command not in ("run", "report"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        return _obey(known, overrides)
    except (ConfigurationError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the suites, and how far they are")
    run = commands.add_parser("run", help="do those of a suite's runs that are not done, and report")
    report = commands.add_parser("report", help="table, plot and CSV of a suite's runs")
    speed = commands.add_parser("speed", help="times against named peers, as ratios")
    speed.add_argument("family", nargs="*", metavar="FAMILY", help=f"of {', '.join(SPEED)}; all by default")
    speed.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with another checkout, in turns")
    speed.add_argument("--turns", type=int, default=5, help="measurements of each checkout, with --against")
    restore = commands.add_parser("restore", help="put a suite's kept runs where runs are, to go on from them")
    sizes = commands.add_parser("sizes", help="measure anew the bytes of a suite's models, without training them")
    redraw = commands.add_parser("redraw", help="draw the pictures of kept results again, without running anything")
    redraw.add_argument("results", nargs="*", metavar="RESULTS", help="such as 'soft'; by default, all of suites")
    pictures = commands.add_parser("gallery", help="draw the pictures of docs/gallery.md, in a few minutes")
    pictures.add_argument(
        "picture", nargs="*", metavar="PICTURE", help=f"of {', '.join(gallery.NAMES)}; all by default"
    )
    export = commands.add_parser("export", help="write every epoch of all kept runs as one table")
    export.add_argument("file", type=Path, metavar="FILE", help="a file that ends in .csv or .parquet")
    commands.add_parser("readme", help="paste the kept results into the README and the pages beside them")
    for command in (run, report, restore, sizes):
        command.add_argument("suite", help=f"of {', '.join([*COMPUTED, *suites()])}; or a YAML file")
        command.add_argument("--out", type=Path, help="where the runs are; by default, runs/suites/SUITE")
        command.add_argument("--data", help="the data module's root, or 'sample'; by default, what the suite says")
    for command in (run, report):
        command.add_argument("--only", metavar="PATTERN", help="runs whose name fits, such as 'gradient*,seed=0'")
        command.add_argument("--seeds", type=int, help="replicas of each setting: one, and in a report those begun")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the processor's cores")
    where.add_argument("--executor", metavar="ADDRESS", help="of a dask.distributed scheduler: tcp://host:8786")
    run.add_argument("--shared", action="store_true", help="with --executor: its workers see --out, and work there")
    run.add_argument("--retry", type=int, default=0, metavar="N", help="try a run that fails N more times")
    run.add_argument(
        "--plan", action="store_true", help="only time a few steps of each setting; print hours and memory"
    )
    for command in (run, report, speed):
        command.add_argument("--save", action="store_true", help="keep what comes out under benchmarks/results")
    return parser


def _obey(known: argparse.Namespace, overrides: list[str]) -> int:
    if known.command == "list":
        print(experiment.overview())
    elif known.command == "readme":
        for page in PAGES:
            write(page, paste(page.read_text()))
        write(RESULTS / "README.md", evidence.markdown())
    elif known.command == "export":
        print(f"{evidence.export(known.file)} runs written to {known.file}")
    elif known.command == "redraw":
        for name in known.results or sorted(path.stem for path in RESULTS.glob("*.csv")):
            print("Written:", *experiment.redraw(name))
    elif known.command == "gallery":
        for name in known.picture or gallery.NAMES:
            print("Written:", gallery.draw(name))
    elif known.command == "restore":
        sweep = experiment.prepare(known.suite, known.out, known.data)
        restored = unpack(_archive(sweep), sweep.out)
        print(f"{len(restored)} runs put back in {sweep.out}")
    elif known.command == "sizes":
        print(remeasure(experiment.prepare(known.suite, known.out, known.data, as_begun=True)))
    elif known.command == "run" and known.suite in COMPUTED:
        _present(known.suite, *COMPUTED[known.suite](), f"run {known.suite}", known.save)
    elif known.command == "speed" and known.against:
        print(against.compare(known.against.resolve(), known.family or [*against.SHORTER], known.turns))
    elif known.command == "speed":
        for family in known.family or SPEED:
            if family not in SPEED:
                raise ConfigurationError(
                    f"unknown family {family!r}: there is {', '.join(SPEED)}.{nearest(family, SPEED)}"
                )
            made = SPEED[family]()
            text, figure = made if isinstance(made, tuple) else (made, None)
            _present(f"speed_{family}", text, figure, f"speed {family}", known.save)
    elif known.command == "run":
        return _run(known, overrides)
    else:
        chosen = {"seeds": known.seeds, "only": known.only, "overrides": overrides}
        sweep = experiment.prepare(known.suite, known.out, known.data, **chosen, as_begun=True)
        _report(known, sweep, partial=known.only is not None)
    return 0


def _run(known: argparse.Namespace, overrides: list[str]) -> int:
    where = {"out": known.out, "data": known.data, "overrides": overrides}
    sweep = experiment.prepare(known.suite, **where, seeds=known.seeds, only=known.only)
    with Cluster(known.executor, sweep.out, known.shared) if known.executor else Local(known.jobs) as workers:
        experiment.check(sweep)
        if known.plan:
            print(plan(sweep, workers))
            return 0
        failed = experiment.perform(sweep, workers, known.retry)
    try:
        _report(known, experiment.prepare(known.suite, **where, as_begun=True))  # all there is
    except ConfigurationError:
        if not failed:  # and told already
            raise
    return 1 if failed else 0


def _report(known: argparse.Namespace, sweep: Sweep, partial: bool = False) -> None:
    _keep(sweep.name, experiment.report(sweep, _command(known.suite, sweep)), known.save)
    if known.save:
        pack(sweep.out, _archive(sweep))
    if not partial:
        try:
            print("Written:", *experiment.draw(sweep, RESULTS if known.save else None))
        except OSError as error:
            print(f"CSV and plot could not be written: {error}", file=sys.stderr)


def _archive(sweep: Sweep) -> Path:
    return RESULTS / "runs" / f"{sweep.home}.tar.xz"


def _command(suite: str, sweep: Sweep) -> str:
    """Return the command that does the runs of a report, on any machine."""
    data = ["--data", sweep.label] if sweep.data else []
    seeds = ["--seeds", str(1 + max(run.seed for run in sweep.runs))]
    given = [Path(suite).name, *data, *seeds, *map(_anywhere, sweep.overrides)]
    return shlex.join(["python", "-m", "benchmarks", "run", *given])


def _anywhere(argument: str) -> str:
    """Return an argument without the folders that hold a file on this machine."""
    option, assigned, value = argument.rpartition("=")
    return f"{option}{assigned}{Path(value).name}" if Path(value).is_absolute() else argument


def _present(name: str, text: str, figure: Figure | None, command: str, save: bool) -> None:
    _keep(name, f"{text}\n\n{describe()}. Command: `python -m benchmarks {command}`.", save)
    if figure is not None:
        save_figure(figure, (RESULTS if save else Path("runs")) / f"{name}.png")


def _keep(name: str, text: str, save: bool) -> None:
    print(f"\n{text}")
    if save:
        write(RESULTS / f"{name}.md", text + "\n")


if __name__ == "__main__":
    sys.exit(main())
