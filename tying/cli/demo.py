"""``tying demo``: train a small network untied and tied, each tie beside a plain network of equal cost."""

import csv
import json
import logging
import platform
import shlex
import statistics
import sys
import time
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from typing_extensions import override

import tying
from tying.callbacks import TyingSummary
from tying.callbacks.base import counted
from tying.data.sample import CLASSES, PER_CLASS
from tying.depth import Residual
from tying.errors import ConfigurationError, check_count
from tying.figures import SMALL, WIDTH, legend_below, line_style, new_figure
from tying.files import atomically, newest_intact, save_figure
from tying.lightning_namespace import pl
from tying.lightning_workarounds import callbacks_of
from tying.weights.derived import count_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package

HELP = "Train a small network untied and tied on embedded images, in under five minutes."
OUT = Path("runs/demo")
EPOCHS = 6
PRECISIONS = ("32-true", "bf16-mixed")
TIMED_STEPS = 4  # of each precision; the fastest counts
UNDECIDED, TOO_SHORT = "undecided", "too short to judge"
DISTURBED = 1.25  # ratio of the times of two runs of equal planned cost
INTERRUPTED = 130  # exit status of shells
TESTED = len(CLASSES) * PER_CLASS["test"]  # images
CONFIGS = Path(tying.__file__).parent / "configs"
QUIET = (
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.devices=1",
)


@dataclass(frozen=True)
class Row:
    """A run of the demo, and the plain run to compare it with.

    Attributes:
        name: the run's name.
        config: name of the file in ``configs/`` that ties the network; empty for a plain run.
        depth: number of layers of the ResNet.
        width: factor on its channels.
        peer: name of the plain run to compare with; empty for a plain run.
        peer_is: the plain run in words.
        judged_by: what the comparison shows; the two runs cost the same in what it names.
        is_as_fast: whether a step of the two runs computes the same number of equally wide blocks, on average.
    """

    name: str
    config: str = ""
    depth: int = 20
    width: float = 1.0
    peer: str = ""
    peer_is: str = ""
    judged_by: str = ""
    is_as_fast: bool = True

    @property
    def network(self) -> str:
        """The network in words."""
        return f"ResNet-{self.depth}, width {self.width:g}"

    @property
    def arguments(self) -> list[str]:
        """The arguments of the run, on top of those of all runs."""
        config = [f"--config={CONFIGS}/{self.config}.yaml"] if self.config else []
        return [*config, f"--model.network.depth={self.depth}", f"--model.network.width={self.width:g}"]


ROWS = (
    Row("untied"),
    Row("soft", "soft", peer="untied", peer_is="the untied network", judged_by="accuracy"),
    Row("narrower", width=0.5),
    Row(
        "hard",
        "hard",
        peer="narrower",
        peer_is="a narrower network of equal size",
        judged_by="accuracy at equal KiB",
        is_as_fast=False,
    ),
    Row(
        "stochastic depth",
        "stochastic_depth",
        depth=26,  # 12 blocks, of which a step computes about 9
        peer="untied",
        peer_is="a shallower network with as many blocks a step",
        judged_by="accuracy at equal blocks / step",
    ),
)


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        accuracy: test accuracy.
        parameters: number of parameters; a shared weight counts once.
        bytes: bytes of the parameters.
        blocks: number of residual blocks that a training step computes, on average: the planned cost.
        epochs: loss, validation accuracy, seconds and, of ties, gap of each epoch.
    """

    accuracy: float
    parameters: int
    bytes: int
    blocks: float
    epochs: list[dict[str, float]]

    @property
    def seconds(self) -> float:
        """The median time of an epoch."""
        return statistics.median(epoch["seconds"] for epoch in self.epochs)


@dataclass
class History(pl.callbacks.Checkpoint):  # Lightning calls checkpoints after other callbacks have logged
    """Record each epoch, keep the record in checkpoints, and print a line of progress for each.

    Args:
        label: the beginning of the lines.
        epochs: the epochs so far.
    """

    label: str
    epochs: list[dict[str, float]] = field(default_factory=list)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epochs": [dict(epoch) for epoch in self.epochs]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._losses = time.perf_counter(), list[float]()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(float(outputs["loss"]))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        epoch = {
            "epoch": trainer.current_epoch + 1.0,
            "loss": statistics.fmean(self._losses),
            "validation accuracy": float(metrics["val/accuracy"]),
            **({"gap": float(metrics["tying/gap"])} if "tying/gap" in metrics else {}),
            "seconds": time.perf_counter() - self._start,
        }
        self.epochs.append(epoch)
        shown = f"loss {epoch['loss']:.3f}, validation accuracy {epoch['validation accuracy']:.3f}"
        print(f"{self.label}, epoch {epoch['epoch']:.0f}/{trainer.max_epochs}: {shown}", flush=True)


def demo_parser() -> pl.cli.LightningArgumentParser:
    """Return the parser of the arguments of :func:`demo`."""
    parser = pl.cli.LightningArgumentParser(description=HELP, exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool, default=False, help=SUPPRESS)  # Lightning requires it
    parser.add_argument("--out", type=Path, default=OUT, help="a folder for table, picture, CSV and the runs")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of each run")
    return parser


def demo(out: Path, epochs: int, parse: Callable[[Sequence[str]], pl.cli.LightningCLI]) -> None:
    """Train every row; print and save the results. Finished rows are kept, and an interrupted row resumes.

    Args:
        out: folder for ``demo.md``, ``demo.png``, ``demo.csv`` and a folder for each run.
        epochs: epochs of each run.
        parse: function from arguments to the command line, which has trainer, model and data.

    Raises:
        ConfigurationError: ``epochs`` is not a positive integer, ``out`` is not a folder or holds runs of other
            settings, or an optional package is missing.
    """
    check_count("epochs", epochs)
    new_figure(1, 1, "")  # without matplotlib, raises before the training
    results = {}
    with without_notices(), _explained_interruption():
        precision = _begin(out, {"epochs": epochs, "version": tying.__version__}, parse)
        common = [*QUIET, f"--trainer.max_epochs={epochs}", f"--trainer.precision={precision}"]
        for number, row in enumerate(ROWS, start=1):
            path = out / row.name / "measured.json"
            if not path.exists():
                arguments = [f"--config={CONFIGS}/base.yaml", *row.arguments, *common]
                _write_json(path, asdict(_train(f"[{number}/{len(ROWS)}] {row.name}", path.parent, parse(arguments))))
            results[row.name] = Result(**json.loads(path.read_text()))
    text = f"{report(results)}\n\n{conditions(precision, out, epochs)}"
    print(f"\n{text}")
    with atomically(out / "demo.md") as partial:
        partial.write_text(f"{text}\n")
    _write_csv(out / "demo.csv", results)
    save_figure(figure(results), out / "demo.png")
    print(f"\nWritten: {', '.join(str(out / f'demo.{kind}') for kind in ('md', 'png', 'csv'))}")


def report(results: Mapping[str, Result]) -> str:
    """Return the tables of runs and comparisons as Markdown, and what they show."""
    rows = {row.name: row for row in ROWS if row.name in results}
    costs = [
        [
            name,
            rows[name].network,
            f"{run.accuracy:.3f}",
            f"{run.parameters:,}",
            f"{run.bytes / 1024:,.0f}",
            f"{run.blocks:.1f}",
            f"{run.seconds:.1f}",
        ]
        for name, run in results.items()
    ]
    tied = {row: compare(results[row.name], results[row.peer]) for row in rows.values() if row.peer}
    judged = [[row.name, row.peer, row.judged_by, *outcome] for row, outcome in tied.items()]
    note = (
        f"One run each. ± is the 95 % interval from the {TESTED:,} test images alone; another seed would change both "
        "runs, too. Results with several seeds are in benchmarks/results of the repository, and in the documentation "
        "under Results."
    )
    return "\n\n".join(
        [
            _table(["run", "network", "test accuracy", "parameters", "KiB", "blocks / step", "s / epoch"], costs),
            _table(["run", "beside", "judged by", "difference", "verdict"], judged),
            conclude({row: verdict for row, (_, verdict) in tied.items()}),
            *_disturbances(results, tied),
            note,
        ]
    )


def conclude(verdicts: Mapping[Row, str]) -> str:
    """Return the verdicts as a sentence.

    Example:
        >>> conclude({ROWS[1]: "undecided", ROWS[3]: "better"})
        'Soft: undecided; hard: better than a narrower network of equal size.'
    """
    if TOO_SHORT in verdicts.values():
        return f"The runs are too short to judge: the demo's own length is {EPOCHS} epochs."
    parts = [
        f"{row.name}: {verdict}" + f" than {row.peer_is}" * (verdict != UNDECIDED) for row, verdict in verdicts.items()
    ]
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _disturbances(results: Mapping[str, Result], tied: Iterable[Row]) -> list[str]:
    """Return a sentence if the times of two runs of equal planned cost differ by more than ``DISTURBED``."""
    pairs = [(row.peer, row.name) for row in tied if row.is_as_fast]
    times = {pair: [results[name].seconds for name in pair] for pair in pairs}
    pair, seconds = max(times.items(), key=lambda item: max(item[1]) / min(item[1]), default=(("", ""), [1.0, 1.0]))
    if max(seconds) <= DISTURBED * min(seconds):
        return []
    return [
        f"Other work on this machine disturbed the times: {pair[0]} and {pair[1]} compute equally many blocks a step, "
        f"and took {seconds[0]:.1f} and {seconds[1]:.1f} s an epoch. No verdict depends on the times."
    ]


def compare(run: Result, peer: Result, tested: int = TESTED) -> tuple[str, str]:
    """Return the difference of two test accuracies with its 95 % interval, and a verdict.

    Example:
        >>> epochs = [{"seconds": 1.0}] * EPOCHS
        >>> low, middle, high = (Result(accuracy, 0, 0, 9, epochs) for accuracy in (0.5, 0.51, 0.6))
        >>> compare(high, low), compare(middle, low)
        (('+0.100 ± 0.043', 'better'), ('+0.010 ± 0.044', 'undecided'))
    """
    difference = run.accuracy - peer.accuracy
    variance = sum(result.accuracy * (1 - result.accuracy) for result in (run, peer)) / tested
    bound = 1.96 * variance**0.5
    verdict = UNDECIDED if abs(difference) <= bound else "better" if difference > 0 else "worse"
    if min(len(run.epochs), len(peer.epochs)) < EPOCHS:
        verdict = TOO_SHORT
    return f"{difference:+.3f} ± {bound:.3f}", verdict


def time_precisions(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> dict[str, float]:
    """Return the seconds of a forward and backward pass in ``"32-true"`` and ``"bf16-mixed"``, the fastest first.

    A processor that supports bfloat16 may be slower in it. The two take turns, and the fastest pass of each counts.

    Args:
        model: a classifier.
        images: a batch of its inputs.
    """
    seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for precision in PRECISIONS * TIMED_STEPS:
        start = time.perf_counter()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = model(images)
        torch.autograd.backward(F.cross_entropy(logits.float(), logits.argmax(dim=1)))
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds[precision].append(time.perf_counter() - start)
    best = {precision: min(times) for precision, times in seconds.items()}
    return dict(sorted(best.items(), key=itemgetter(1)))


def figure(results: Mapping[str, Result]) -> "Figure":
    """Plot validation accuracies over the epochs, and test accuracies with their 95 % intervals."""
    picture = new_figure(WIDTH, 3.6, "Accuracy of tied and plain networks, while and after training")
    over_epochs, tested = picture.subplots(1, 2)
    lines = []
    for number, result in enumerate(results.values()):
        numbers = [epoch["epoch"] for epoch in result.epochs]
        accuracies = [epoch["validation accuracy"] for epoch in result.epochs]
        lines += over_epochs.plot(numbers, accuracies, **line_style(number))
        interval = 1.96 * (result.accuracy * (1 - result.accuracy) / TESTED) ** 0.5
        tested.errorbar(result.accuracy, len(results) - number, xerr=interval, capsize=3, **line_style(number))
    over_epochs.xaxis.get_major_locator().set_params(integer=True)
    over_epochs.set_title("While training", fontsize="small")
    over_epochs.set_xlabel("training time (epochs)", fontsize="small")
    over_epochs.set_ylabel("validation accuracy (fraction correct)", fontsize="small")
    labels = [f"{name}\n{run.bytes / 1024:,.0f} KiB, {run.seconds:.1f} s / epoch" for name, run in results.items()]
    tested.set_yticks(range(len(results), 0, -1), labels, fontsize=SMALL)
    tested.set_title("After training", fontsize="small")
    tested.set_xlabel("test accuracy (fraction correct, 95 % interval)", fontsize="small")
    legend_below(picture, lines, [*results])
    return picture


def _begin(out: Path, settings: dict[str, Any], parse: Callable[[Sequence[str]], pl.cli.LightningCLI]) -> str:
    """Return the precision of the runs in a folder; choose it and write the settings if the folder has none."""
    path = out / "settings.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        if differing := [name for name, value in settings.items() if earlier[name] != value]:
            name = differing[0]
            raise ConfigurationError(
                f"--out: {out} holds runs with {name} {earlier[name]}, not {settings[name]}: give another folder, or "
                "remove this one"
            )
        print(f"Resuming the runs in {out}, in precision {earlier['precision']}.", flush=True)
        return str(earlier["precision"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--out: {out} cannot be a folder: {error.strerror}: give another one") from None
    cli = parse([f"--config={CONFIGS}/base.yaml", *QUIET])
    cli.datamodule.setup("fit")
    device = cli.trainer.strategy.root_device
    loader, validation = cli.datamodule.train_dataloader(), cli.datamodule.val_dataloader()
    images, _ = cli.datamodule.on_after_batch_transfer(next(iter(loader)), 0)
    (precision, step), (slower, slower_step) = time_precisions(cli.model.to(device), images.to(device)).items()
    passes = settings["epochs"] * (len(loader) + len(validation) / 3)  # validation has no backward pass
    minutes = max(1, round(len(ROWS) * passes * step / 60))
    print(
        f"Precision {precision}: a step takes {step:.3f} s, and {slower_step:.3f} s in {slower}.\n"
        f"{counted(len(ROWS), 'run')} of {counted(settings['epochs'], 'epoch')} will take about "
        f"{counted(minutes, 'minute')} in all.",
        flush=True,
    )
    _write_json(path, {**settings, "precision": precision})
    return precision


def _train(label: str, folder: Path, cli: pl.cli.LightningCLI) -> Result:
    """Train and test a run, from the end of its last complete epoch if there is a checkpoint of it."""
    trainer, history = cli.trainer, History(label)
    left_out = pl.callbacks.Checkpoint | TyingSummary
    kept = [callback for callback in callbacks_of(trainer) if not isinstance(callback, left_out)]
    epochs = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_on_train_epoch_end=True)
    callbacks_of(trainer)[:] = [*kept, history, epochs]
    trainer.fit(cli.model, cli.datamodule, ckpt_path=newest_intact(folder.glob("*.ckpt")))
    [metrics] = trainer.test(cli.model, cli.datamodule, verbose=False)
    parameters, _ = count_parameters(cli.model)
    stored = sum(weight.nbytes for weight in cli.model.parameters())
    return Result(metrics["test/accuracy"], parameters, stored, blocks_per_step(cli.model), history.epochs)


def blocks_per_step(model: nn.Module) -> float:
    """Return how many residual blocks of a model a training step computes, on average.

    Example:
        >>> from tying.depth import StochasticDepth
        >>> plain, skipped = Residual(nn.Identity()), Residual(nn.Identity(), merge=StochasticDepth(0.5))
        >>> blocks_per_step(nn.Sequential(plain, skipped))
        1.5
    """
    return sum(getattr(block.merge, "keep", 1.0) for block in model.modules() if isinstance(block, Residual))


@contextmanager
def _explained_interruption() -> Iterator[None]:
    """Say that an interrupted demo can be resumed, in place of a traceback."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Lightning exits when it is interrupted
        print("interrupted: repeat the command to resume", flush=True)
        sys.exit(INTERRUPTED)


@contextmanager
def without_notices() -> Iterator[None]:
    """Silence the notices and warnings of Lightning."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def conditions(precision: str, out: Path, epochs: int) -> str:
    """Return the settings and versions of the runs, the device, and the command that repeats them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else counted(torch.get_num_threads(), "thread")
    command = ["tying", "demo"]
    command += ["--epochs", str(epochs)] * (epochs != EPOCHS) + ["--out", str(out)] * (out != OUT)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tying {tying.__version__}"
    return (
        f"The embedded sample of CIFAR-10, {counted(epochs, 'epoch')}, {precision}, {device}; {versions}. "
        f"Command: `{shlex.join(command)}`."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def _write_json(path: Path, content: object) -> None:
    with atomically(path) as partial:
        partial.write_text(json.dumps(content))


def _write_csv(path: Path, results: Mapping[str, Result]) -> None:
    rows = [{"run": name, **epoch} for name, result in results.items() for epoch in result.epochs]
    with atomically(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "epoch", "loss", "validation accuracy", "gap", "seconds"])
        writer.writeheader()
        writer.writerows(rows)
