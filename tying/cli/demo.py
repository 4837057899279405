"""``tying demo``: train a small network untied and tied, each tie beside a plain network of equal cost."""

import csv
import json
import logging
import platform
import statistics
import time
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from typing_extensions import override

import tying
from tying.callbacks import TyingSummary
from tying.data.sample import CLASSES, PER_CLASS
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
    """A run of the demo, and the plain run beside which it stands.

    Attributes:
        name: the run's name.
        arguments: its arguments on top of ``configs/base.yaml``.
        peer: name of the plain run to compare with; empty for a plain run.
        judged_by: what the comparison shows; the two runs cost about the same in what it names.
    """

    name: str
    arguments: tuple[str, ...] = ()
    peer: str = ""
    judged_by: str = ""


ROWS = (
    Row("untied"),
    Row("soft", (f"--config={CONFIGS}/soft.yaml",), "untied", "accuracy"),
    Row("narrower", ("--model.network.width=0.5",)),
    Row("hard", (f"--config={CONFIGS}/hard.yaml",), "narrower", "accuracy at equal KiB"),
    Row(
        "stochastic depth",  # 26 layers, of which a step computes about 20
        (f"--config={CONFIGS}/stochastic_depth.yaml", "--model.network.depth=26"),
        "untied",
        "accuracy at equal s / epoch",
    ),
)


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        accuracy: test accuracy.
        parameters: number of parameters; a shared weight counts once.
        bytes: bytes of the parameters.
        epochs: loss, validation accuracy, seconds and, of ties, gap of each epoch.
    """

    accuracy: float
    parameters: int
    bytes: int
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
    """Train every row, and print and write what came out; complete rows are kept, and an interrupted one goes on.

    Args:
        out: folder for ``demo.md``, ``demo.png``, ``demo.csv`` and a folder for each run.
        epochs: epochs of each run.
        parse: function from arguments to the command line, which has trainer, model and data.

    Raises:
        ConfigurationError: ``epochs`` is not a positive integer, ``out`` is no folder or holds runs of other settings,
            or an optional package is missing.
    """
    check_count("epochs", epochs)
    new_figure(1, 1, "")  # without matplotlib, raises before the training
    with without_notices():
        precision = _begin(out, {"epochs": epochs, "version": tying.__version__}, parse)
        common = [*QUIET, f"--trainer.max_epochs={epochs}", f"--trainer.precision={precision}"]
        results = {}
        for number, row in enumerate(ROWS, start=1):
            path = out / row.name / "result.json"
            if not path.exists():
                arguments = [f"--config={CONFIGS}/base.yaml", *row.arguments, *common]
                _write_json(path, asdict(_train(f"[{number}/{len(ROWS)}] {row.name}", path.parent, parse(arguments))))
            results[row.name] = Result(**json.loads(path.read_text()))
    text = f"{report(results)}\n\n{_machine(precision, epochs)}"
    print(f"\n{text}")
    with atomically(out / "demo.md") as partial:
        partial.write_text(f"{text}\n")
    _write_csv(out / "demo.csv", results)
    save_figure(figure(results), out / "demo.png")
    print(f"\nWritten: {', '.join(str(out / f'demo.{kind}') for kind in ('md', 'png', 'csv'))}")


def report(results: Mapping[str, Result]) -> str:
    """Return a table of the runs, and one of each tied run beside its plain peer, as Markdown."""
    costs = [
        [name, f"{run.accuracy:.3f}", f"{run.parameters:,}", f"{run.bytes / 1024:,.0f}", f"{run.seconds:.1f}"]
        for name, run in results.items()
    ]
    judged = [
        [row.name, row.peer, row.judged_by, *compare(results[row.name].accuracy, results[row.peer].accuracy)]
        for row in ROWS
        if row.peer
    ]
    note = (
        f"One run each. ± is the 95 % interval from the {TESTED:,} test images alone; another seed would change both "
        "runs, too. The experiments among the results have several seeds."
    )
    return "\n\n".join(
        [
            _table(["run", "test accuracy", "parameters", "KiB", "s / epoch"], costs),
            _table(["run", "beside", "judged by", "difference", "verdict"], judged),
            note,
        ]
    )


def compare(accuracy: float, peer: float, tested: int = TESTED) -> tuple[str, str]:
    """Return the difference of two accuracies with its 95 % interval, and a verdict.

    Example:
        >>> compare(0.6, 0.5), compare(0.51, 0.5)
        (('+0.100 ± 0.043', 'better'), ('+0.010 ± 0.044', 'undecided'))
    """
    difference = accuracy - peer
    bound = 1.96 * ((accuracy * (1 - accuracy) + peer * (1 - peer)) / tested) ** 0.5
    verdict = "undecided" if abs(difference) <= bound else "better" if difference > 0 else "worse"
    return f"{difference:+.3f} ± {bound:.3f}", verdict


def fastest_precision(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> str:
    """Return the precision, ``"32-true"`` or ``"bf16-mixed"``, in which forward and backward passes are faster here.

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
    print(", ".join(f"{precision}: {value:.3f} s a step" for precision, value in best.items()), flush=True)
    return min(PRECISIONS, key=best.__getitem__)


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
        return str(earlier["precision"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--out: {out} cannot be a folder: {error.strerror}: give another one") from None
    cli = parse([f"--config={CONFIGS}/base.yaml", *QUIET])
    cli.datamodule.setup("fit")
    device = cli.trainer.strategy.root_device
    images, _ = cli.datamodule.on_after_batch_transfer(next(iter(cli.datamodule.train_dataloader())), 0)
    precision = fastest_precision(cli.model.to(device), images.to(device))
    _write_json(path, {**settings, "precision": precision})
    return precision


def _train(label: str, folder: Path, cli: pl.cli.LightningCLI) -> Result:
    """Train and test a run, from the end of its last complete epoch if there is a checkpoint of it."""
    trainer, history = cli.trainer, History(label)
    left_out = pl.callbacks.Checkpoint | TyingSummary
    kept = [callback for callback in callbacks_of(trainer) if not isinstance(callback, left_out)]
    epochs = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_on_train_epoch_end=True)
    callbacks_of(trainer)[:] = [*kept, history, epochs]
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=newest_intact(folder.glob("*.ckpt")))
    except (KeyboardInterrupt, SystemExit):  # Lightning exits when it is interrupted
        print("interrupted: the same command goes on")
        raise
    [metrics] = trainer.test(cli.model, cli.datamodule, verbose=False)
    parameters, _ = count_parameters(cli.model)
    stored = sum(weight.nbytes for weight in cli.model.parameters())
    return Result(metrics["test/accuracy"], parameters, stored, history.epochs)


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


def _machine(precision: str, epochs: int) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    return (
        f"ResNet-20 on the embedded sample, {epochs} epochs, {precision}, {device}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, tying {tying.__version__}. Command: `tying demo`."
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
