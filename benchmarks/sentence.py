"""What half of the weights of a pretrained sentence transformer costs: ties, relaxed ties and low rank.

The blocks of a transformer of sentences are changed to a share of their weights, and then distilled: a copy learns to
give the embeddings of the original. Texts are docstrings of Python's standard library; those it is measured on are held
out. Embeddings, biases and norms stay as they are. Relaxed ties and low rank start from the nearest weights as the
inputs of the layers see them (``calibration``).
"""

from __future__ import annotations

import ast
import copy
import itertools
import json
import math
import sys
import sysconfig
import time
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.program import Outcome, Progress
from tying.advice import Plan, advise
from tying.advice.candidates import as_ties, families, tieable_weights
from tying.advice.distil import distil
from tying.advice.plans import rank_of_share
from tying.errors import ConfigurationError, check_range
from tying.hard import LowRankResidual, lower_rank, relax, tie
from tying.hard.factorization import factorize
from tying.selection.resolve import select
from tying.weights.calibration import input_scales, undisturbed

Method = Literal["hard", "relaxed", "low rank", "advised"]
Batch = dict[str, Tensor]
SHORTEST = 40  # characters of a docstring: shorter ones say little
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3"}  # folders
MEASURED_EVERY = 50  # steps
BLOCKS = "transformer.encoder.layer"
MATRICES, NORMS = f"{BLOCKS}.**.weight", f"!{BLOCKS}.**.LayerNorm.weight"


class Encoder:
    """A pretrained transformer and its tokenizer."""

    description: str

    def load(self) -> nn.Module:
        """Return the transformer, which maps ``input_ids`` and ``attention_mask`` to a ``last_hidden_state``."""
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str], length: int) -> Batch:
        """Return the keyword arguments of the transformer for some texts of at most ``length`` tokens."""
        raise NotImplementedError


class MiniLM(Encoder):
    """The six-layer sentence transformer all-MiniLM-L6-v2, as its wheel on PyPI holds it.

    Raises:
        ConfigurationError: the wheel is not installed.

    Source: W. Wang et al., MiniLM: deep self-attention distillation for task-agnostic compression of pre-trained
    transformers, 2020; N. Reimers and I. Gurevych, Sentence-BERT, 2019.
    """

    description = "all-MiniLM-L6-v2"

    def __init__(self) -> None:
        spec = find_spec("all_minilm_l6_v2")  # importing it would only print
        if spec is None or spec.origin is None or find_spec("transformers") is None:
            raise ConfigurationError("the sentence transformer is not installed: pip install 'tying[sentence]'")
        self._files = zipfile.ZipFile(Path(spec.origin).with_name("model.zip"))

    @override
    def load(self) -> nn.Module:
        from safetensors.torch import load
        from transformers import BertConfig, BertModel

        model = BertModel(BertConfig(**json.loads(self._files.read("config.json"))), add_pooling_layer=False)
        missing = model.load_state_dict(load(self._files.read("model.safetensors")), strict=False).missing_keys
        assert not missing, missing
        return model

    @override
    def tokenize(self, texts: Sequence[str], length: int) -> Batch:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._files.read("tokenizer.json").decode())
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
        encoded = tokenizer.encode_batch([*texts])
        mask = torch.tensor([text.attention_mask for text in encoded])
        return {"input_ids": torch.tensor([text.ids for text in encoded]), "attention_mask": mask}


class Embedding(nn.Module):
    """The embedding of a text: the mean of the transformer's hidden states over its tokens.

    Args:
        transformer: see :meth:`Encoder.load`.

    Shape: input_ids and attention_mask (batch, tokens); (batch, width).
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        mean: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return mean


@cache
def docstrings() -> tuple[str, ...]:
    """Return the docstrings of the modules, classes and functions of Python's standard library, each once, sorted."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = set[str]()
    for path in library.rglob("*.py"):
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):  # files that test the parser
                continue
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            texts |= {ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)}
    return (*sorted(text for text in texts if len(text) >= SHORTEST),)


def run(
    progress: Progress,
    encoder: Encoder,
    method: Method,
    budget: float = 0.5,
    group: int = 6,
    steps: int = 150,
    batch_size: int = 32,
    length: int = 64,
    held_out: int = 16,
    calibration: int = 8,
    advised_on: int = 2,
    advised_steps: int = 30,
    rate: float = 5e-4,
    seed: int = 0,
) -> Outcome:
    """Change the blocks of a sentence transformer to a share of their weights, distil, and measure.

    Args:
        progress: of the run.
        encoder: the transformer.
        method: ``"hard"``: the means of consecutive blocks; ``"relaxed"``: the same, with residuals; ``"low rank"``;
            ``"advised"``: the first plan of ``advise``, which compares hard and relaxed ties, low rank and mixtures.
        budget: share of the weights of the blocks that may remain.
        group: number of consecutive blocks that share a relaxed weight; for hard ties it is the smallest that fits.
        steps: of distillation.
        batch_size: docstrings in a batch.
        length: tokens of a docstring, at most.
        held_out: number of batches to measure on.
        calibration: number of training batches by which inputs are weighed.
        advised_on: number of training batches on which advise compares outputs.
        advised_steps: of distillation of each plan that advise compares, on other training batches.
        rate: largest learning rate of the distillation.
        seed: of the choice and the order of docstrings.
    """
    check_range("budget", budget, "(0, 1)")
    texts = docstrings()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [[texts[number] for number in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    count = held_out + max(steps, calibration, advised_on + advised_steps)
    batches = [encoder.tokenize(part, length) for part in parts[:count]]
    measured, training = batches[:held_out], batches[held_out:]
    teacher = Embedding(encoder.load()).eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    student.get_submodule(BLOCKS).requires_grad_(True)
    before = count_of(student)
    errors: dict[str, float] = {}
    if method == "advised":
        out = progress.folder.path / "advice"
        advice = advise(
            student,
            training[:advised_on],
            budget,
            advised_steps,
            out=out,
            progress=False,
            parameters=[MATRICES, NORMS],
            training=training[advised_on:],
            rate=rate,
        )
        print(advice)
        plan = advice.best
        places = dict(zip(("first", "second"), advice.plans, strict=False))
        errors = {f"advice/{name}": row.error for name, row in places.items()}
        errors |= {f"advice/{row.plan.kind}": row.error for row in advice.plans}
    else:
        plan = plan_of(method, student, budget, group)
    apply(plan, student, training[:calibration])
    remaining = {"remaining": count_of(student) / before}
    healed = distil_and_measure(progress, teacher, student, measured, training, steps, rate)
    data = {
        "description": f"{encoder.description}; {len(texts):,} docstrings of Python {sys.version.split()[0]}",
        "key": f"{zlib.crc32(chr(0).join(texts).encode()):08x}",
    }
    return Outcome(progress.rows, {**errors, **remaining, **healed}, student, data)


def count_of(model: nn.Module) -> int:
    """Return the number of parameters in the matrices of the blocks, shared ones counted once."""
    blocks = model.get_submodule(BLOCKS)
    return sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim > 1)


def plan_of(method: str, model: nn.Module, budget: float, group: int) -> Plan:
    """Return the plan that leaves every block the same share of each of its weights.

    Args:
        method: ``"hard"``, ``"relaxed"`` or ``"low rank"``.
        model: the model.
        budget: the share.
        group: see :func:`run`.

    Raises:
        ConfigurationError: the shared weights, or residuals or factors of rank 1, are more than the share.
    """
    weights = tieable_weights(model, [MATRICES])
    changes: dict[int, list[str]] = {}  # ties or names, by rank
    for family in families(weights):
        depth = len(family)
        size = next((size for size in range(2, depth) if math.ceil(depth / size) <= budget * depth), depth)
        size = group if method == "relaxed" else size
        shared = math.ceil(depth / size) / depth
        share = budget if method == "low rank" else budget - shared
        rank = rank_of_share(weights[family[0]], share)
        if share < 0 or (rank < 1 and method != "hard"):
            raise ConfigurationError(f"budget={budget:g} is too small for {method} of {depth} blocks, {size} at a time")
        runs = [family[at : at + size] for at in range(0, depth, size)]
        ties = [tie for run in runs if len(run) > 1 for tie in as_ties(run, None, model)]
        changes.setdefault(rank, []).extend(family if method == "low rank" else ties)
    ranked = {rank: (*names,) for rank, names in changes.items()}
    if method == "hard":
        return Plan(method, ties=(*itertools.chain(*ranked.values()),))
    return Plan(method, relaxed=ranked) if method == "relaxed" else Plan(method, low_rank=ranked)


def apply(plan: Plan, model: nn.Module, batches: Sequence[Batch]) -> None:
    """Apply a plan, with residuals and low rank that are nearest as the inputs over some batches see them."""
    if plan.ties:
        tie(model, plan.ties, init="mean")
    for rank, ties in plan.relaxed.items():
        relax(model, ties, LowRankResidual(rank), calibration=batches)
    ranks = {name: rank for rank, patterns in plan.low_rank.items() for name in select(model, patterns)}
    scales = input_scales(model, ranks, batches) if ranks else {}
    for rank, patterns in plan.low_rank.items():
        for name, weight in select(model, patterns).items():
            left, right = factorize(weight.detach(), rank, scales[name])
            weight.data.copy_(left @ right)  # of that rank, so that lower_rank keeps it
        lower_rank(model, patterns, rank)


def distil_and_measure(
    progress: Progress,
    teacher: nn.Module,
    student: nn.Module,
    measured: Sequence[Batch],
    training: Sequence[Batch],
    steps: int,
    rate: float,
) -> dict[str, float]:
    """Distil a student, log how near it is to its teacher on the way, and return what it was before."""
    targets, counter, begun = embed(teacher, measured), itertools.count(), time.perf_counter()

    def advance() -> None:
        nonlocal begun
        step = next(counter)
        if step % MEASURED_EVERY == 0 or step == steps:
            progress.log(step, time.perf_counter() - begun, **compare(embed(student, measured), targets))
            progress.tell(step / max(1, steps))
            begun = time.perf_counter()

    advance()
    distil(teacher, student, training, steps, rate, advance=advance)
    first = {name.replace("test/", "before/"): progress.rows[0][name] for name in progress.rows[0] if "/" in name}
    return first | {"training seconds": sum(row["seconds"] for row in progress.rows)}


def embed(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return the embeddings of all texts in some batches, (texts, width)."""
    with undisturbed(model):
        return torch.cat([model(**batch) for batch in batches])


def compare(embeddings: Tensor, targets: Tensor) -> dict[str, float]:
    """Return how near embeddings are to what they should be, both (texts, width).

    Returns:
        ``test/cosine``, the mean cosine; ``test/neighbour``, the share of texts whose nearest other text is the same;
        and ``test/error``, the relative squared error.

    Example:
        >>> compare(2 * torch.eye(3), torch.eye(3))
        {'test/cosine': 1.0, 'test/neighbour': 1.0, 'test/error': 1.0}
    """
    cosine = F.cosine_similarity(embeddings, targets).mean()
    kept = (nearest_other(embeddings) == nearest_other(targets)).float().mean()
    error = (embeddings - targets).square().sum() / targets.square().sum()
    return {"test/cosine": float(cosine), "test/neighbour": float(kept), "test/error": float(error)}


def nearest_other(embeddings: Tensor) -> Tensor:
    """Return the index of the nearest other embedding of each, by cosine."""
    unit = F.normalize(embeddings)
    return (unit @ unit.mT).fill_diagonal_(-math.inf).argmax(dim=1)
