"""Recurrent networks that classify sequences or predict the next character."""

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.depth import HMLSTM, HMState
from tying.errors import ConfigurationError, check_choice, check_counts, check_range
from tying.lightning_namespace import pl
from tying.models.classifier import Classification
from tying.weights.sharding import all_gather_object

Task = Literal["classification", "language"]


class SequenceModel(Classification):
    """Train a recurrent network to classify sequences or, as a language model, to predict the next character.

    ``network`` has the interface of ``nn.LSTM``: called with inputs (steps, batch, features) and an optional state, it
    returns outputs (steps, batch, size) and a state. The parts are ``embedding`` (of a language model), ``network`` and
    ``head``; if the embedding is as large as the output, ``"head.weight ~ embedding.weight"`` ties both.

    A language model logs bits per character, ``…/bits``. It carries the detached state from batch to batch, and starts
    each epoch and each evaluation without a state. Checkpoints contain the state of each process; a run that resumes
    with another number of processes warns and starts without a state.

    Args:
        network: the recurrent network.
        size: size of the network's outputs.
        task: ``"classification"``: classify the last output; ``"language"``: predict the next character at each output.
        embedding: size of the embedding of characters, for ``"language"``; default: ``size``.
        embedding_std: standard deviation of the embedding's initial values; GPT-2's is 0.02.
        dropout: probability of zeroing a feature of the network's inputs, and of its outputs, in training (W. Zaremba,
            I. Sutskever and O. Vinyals, Recurrent neural network regularization, 2014).
        options: further arguments of :class:`tying.models.classifier.Classification`; for ``"language"``,
            ``num_classes`` is the size of the vocabulary.

    Shape: for classification, batches of inputs (batch, steps, features) and labels (batch,); for language, batches of
    characters (batch, steps) and of the characters that follow them, int64.

    Raises:
        ConfigurationError: the task is unknown, an embedding is given for classification, ``embedding_std`` or
            ``dropout`` is out of range, the network has ``batch_first``, the network is bidirectional for
            ``"language"``, or ``test_samples`` is above 1; in use, outputs have another size, or the vocabulary is
            larger than ``num_classes``.

    Example:
        >>> model = SequenceModel(nn.LSTM(16, 16), size=16, task="language", num_classes=50)
        >>> model(torch.zeros(2, 7, dtype=torch.long)).shape
        torch.Size([2, 7, 50])
        >>> SequenceModel(nn.GRU(1, 8), size=8)(torch.zeros(2, 7, 1)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        size: int,
        task: Task = "classification",
        embedding: int | None = None,
        embedding_std: float = 1.0,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_choice("task", task, get_args(Task))
        check_counts(size=size, embedding=size if embedding is None else embedding)
        if embedding is not None and task != "language":
            raise ConfigurationError("an embedding of characters needs task='language'")
        check_range("embedding_std", embedding_std, "[0, inf)")
        check_range("dropout", dropout, "[0, 1)")
        if getattr(network, "batch_first", False):
            raise ConfigurationError("the network must take (steps, batch, features): make it with batch_first=False")
        if task == "language" and getattr(network, "bidirectional", False):
            raise ConfigurationError("a bidirectional language model reads what it must predict: use one direction")
        if self.hparams["test_samples"] > 1:
            raise ConfigurationError("SequenceModel tests by one pass: test_samples must be 1")
        self.task = task
        classes = self.hparams["num_classes"]
        self.embedding = nn.Embedding(classes, embedding or size) if task == "language" else nn.Identity()
        with torch.no_grad():
            for weight in self.embedding.parameters():
                weight.mul_(embedding_std)
        self.network = network
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(size, classes)
        self._carried: dict[str, Any] = {}  # states by stage
        self._restored: list[list[Tensor]] = []  # of each process, from a checkpoint

    def run(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the logits and the state after the last step."""
        steps = self.embedding(x.t()) if self.task == "language" else x.transpose(0, 1)
        result = self.network(self.dropout(steps), *([] if state is None else [state]))
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigurationError(
                f"{type(self.network).__name__} must return a pair of outputs and a state, as nn.LSTM does: set "
                "outputs='top' in an HMLSTM, or use tying.models.HMNetwork"
            )
        outputs, state = result
        if outputs.shape[-1] != self.head.in_features:
            raise ConfigurationError(f"size={self.head.in_features}, and the network's outputs are {outputs.shape[-1]}")
        outputs = self.dropout(outputs.transpose(0, 1) if self.task == "language" else outputs[-1])
        return self.head(outputs), state

    @override
    def logits(self, x: Tensor) -> Tensor:
        return self.run(x)[0]

    @override
    def setup(self, stage: str) -> None:
        vocabulary = getattr(self.trainer.datamodule, "vocabulary", None)  # type: ignore[attr-defined]  # untyped
        classes = self.hparams["num_classes"]
        if self.task == "language" and isinstance(vocabulary, int) and vocabulary > classes:
            raise ConfigurationError(
                f"num_classes={classes}, and the data's vocabulary is {vocabulary}: set it to {classes} or fewer"
            )

    @override
    def step(self, stage: str, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits, y = self._run_on(stage, x, batch_idx).flatten(0, -2), y.flatten()
        if self.task == "language":
            bits = F.cross_entropy(logits.detach(), y) / math.log(2)
            self.log(f"{stage}/bits", bits, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True)
        return self.log_loss(stage, logits, y)

    def _run_on(self, stage: str, x: Tensor, batch_idx: int) -> Tensor:
        """Return logits. A language model starts from the state after the previous batch of the epoch, if any."""
        carried = self._carried.get(stage) if batch_idx else None
        fits = carried is not None and _leaves(carried)[0].shape[1] == len(x)
        logits, state = self.run(x, carried if fits else None)
        if self.task == "language":
            self._carried[stage] = pl.utilities.memory.recursive_detach(state)
        return logits

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] if isinstance(batch, list | tuple) else batch
        return self._run_on("predict", x, batch_idx).softmax(dim=-1)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (state := self._carried.get("train")) is not None:
            checkpoint["carried_states"] = all_gather_object([leaf.cpu() for leaf in _leaves(state)])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("carried_states", [])

    @override
    def on_train_start(self) -> None:
        processes, self._restored = self._restored, []
        if len(processes) == self.trainer.world_size:
            leaves = [leaf.to(self.device) for leaf in processes[self.global_rank]]
            self._carried["train"] = leaves[0] if len(leaves) == 1 else tuple(leaves)
        elif processes:
            pl.utilities.rank_zero_warn(
                f"the checkpoint holds states of {len(processes)} processes, not of {self.trainer.world_size}: "
                "training continues from a state of zeros"
            )


def _leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [*state]


class HMNetwork(nn.Module):
    """An :class:`tying.depth.HMLSTM` with one output: ``ReLU(Σ_k g_k W_k h_k)`` of all layers, ``g_k = σ(w_k · h)``.

    Args:
        input_size: size of the input.
        hidden_size: size of each layer and of the output.
        layers: number of layers.
        slope: slope of the boundary detectors.

    Shape: see ``nn.LSTM``: inputs (steps, batch, features) to outputs (steps, batch, size), and a state.

    Example:
        >>> outputs, state = HMNetwork(4, 8)(torch.zeros(5, 2, 4))
        >>> outputs.shape
        torch.Size([5, 2, 8])

    Source: J. Chung, S. Ahn and Y. Bengio, Hierarchical multiscale recurrent neural networks, 2017.
    """

    def __init__(self, input_size: int, hidden_size: int, layers: int = 3, slope: float = 1.0) -> None:
        super().__init__()
        self.recurrent = HMLSTM(input_size, hidden_size, layers, slope=slope)
        self.gate = nn.Linear(layers * hidden_size, layers)
        self.out = nn.Linear(layers * hidden_size, hidden_size)

    @override
    def forward(self, x: Tensor, state: HMState | None = None) -> tuple[Tensor, HMState]:
        output = self.recurrent(x, state)
        gates = torch.sigmoid(self.gate(output.hidden.flatten(2))).unsqueeze(3)
        return torch.relu(self.out((gates * output.hidden).flatten(2))), cast(HMState, output.state)
