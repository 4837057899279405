"""Text, character by character."""

from __future__ import annotations

import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from tying.data.resuming import ResumableLoader
from tying.errors import ConfigurationError

UNKNOWN = 0  # the slot of characters that the training text has too rarely, or not
HELD_OUT = 20  # one of so many files, or shares of a file, is for validation, and one for testing


class StreamLoader(ResumableLoader):
    """Iterate over a text in windows, in streams side by side: each batch goes on where the one before ended.

    Several processes share the streams. A training run goes on with the very batch at which it was interrupted.

    Args:
        ids: int64, (characters,).
        streams: how many, per process; samples of a batch.
        window: characters of a sample.
        rank: this process, of ``world``.
        world: number of processes.

    Example:
        >>> loader = StreamLoader(torch.arange(9), streams=2, window=2)
        >>> [(x.tolist(), y.tolist()) for x, y in loader]
        [([[0, 1], [4, 5]], [[1, 2], [5, 6]])]
    """

    def __init__(self, ids: Tensor, streams: int, window: int, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        joint = streams * world
        length = len(ids) // joint
        own = slice(rank * streams, (rank + 1) * streams)
        self.ids = ids[: length * joint].view(joint, length)[own]
        self.window = window

    @property
    def dataset(self) -> Tensor:
        """What has the length of the data."""
        return self.ids.flatten()

    def __len__(self) -> int:
        return max(0, self.ids.shape[1] - 1) // self.window

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in self._numbers(len(self)):
            start = number * self.window
            yield self.ids[:, start : start + self.window], self.ids[:, start + 1 : start + self.window + 1]


class Text(pl.LightningDataModule):
    """A text's characters, each to be told from those before it.

    Args:
        path: a text file, whose last twentieths are for validation and testing; by default the sources of Python's
            standard library, those modules that are one file: by the CRC-32 of its name, modulo 20, a file is for
            validation (0), testing (1) or training.
        window: characters of a sample.
        batch_size: samples of a batch, per process: streams of text, which go on from batch to batch.
        vocabulary: number of characters told apart: the most frequent ones of the training text, less one slot for all
            others.
        characters: use no more than so many of the training text; all by default.
        encoding: of the file.

    Attributes:
        key: stands for the content, once it is set up.
        letters: the characters told apart, from slot 1 on.

    Shape: batches of characters (batch, window) and of those that follow each, int64.

    Raises:
        ConfigurationError: an argument out of range; when it is set up, no such file, or a text shorter than one
            window for each sample.

    Example:
        >>> data = Text(window=50, batch_size=8, characters=20_000)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))[0].shape
        torch.Size([8, 50])
    """

    def __init__(
        self,
        path: str | None = None,
        window: int = 100,
        batch_size: int = 32,
        vocabulary: int = 128,
        characters: int | None = None,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__()
        for name, value, least in (("window", window, 1), ("batch_size", batch_size, 1), ("vocabulary", vocabulary, 2)):
            if value < least:
                raise ConfigurationError(f"{name} must be {least} or more, not {value}")
        if characters is not None and characters < 2:
            raise ConfigurationError(f"characters must be 2 or more, not {characters}")
        self.path, self.window, self.batch_size = path, window, batch_size
        self.vocabulary, self.characters, self.encoding = vocabulary, characters, encoding
        self.key, self.letters = "", ""
        self._ids: dict[str, Tensor] = {}
        self._training: StreamLoader | None = None
        self._place: dict[str, Any] = {}

    @override
    def setup(self, stage: str) -> None:
        if self._ids:
            return
        texts = _split(Path(self.path), self.encoding) if self.path is not None else _library()
        if self.characters is not None:
            texts["fit"] = texts["fit"][: self.characters]
        self.key = f"{zlib.crc32(''.join(texts.values()).encode('utf-8', 'surrogatepass')):08x}"
        counts = Counter(texts["fit"])
        chosen = sorted(counts, key=lambda letter: (-counts[letter], letter))[: self.vocabulary - 1]
        self.letters = "".join(sorted(chosen))
        slots = {letter: slot for slot, letter in enumerate(self.letters, start=1)}
        self._ids = {
            split: torch.tensor([slots.get(letter, UNKNOWN) for letter in text], dtype=torch.long)
            for split, text in texts.items()
        }
        told = []
        for split, ids in self._ids.items():
            if not len(StreamLoader(ids, 1, self.window)):
                raise ConfigurationError(
                    f"the text for {split} has {len(ids)} characters: a window of {self.window}, and what follows it, "
                    f"needs {self.window + 1}"
                )
            unknown = int((ids == UNKNOWN).sum())
            told.append(f"{len(ids):,} {split}" + (f", {unknown} of them unknown" if unknown else ""))
        rank_zero_info(f"Text: {self.description} of {len(self.letters)} characters ({'; '.join(told)})")

    @property
    def description(self) -> str:
        """Which text this is, in words."""
        return f"sources of Python {sys.version.split()[0]}" if self.path is None else Path(self.path).name

    def text(self, ids: Tensor) -> str:
        """Return the characters of slots; � for unknown ones, and for slots that no character has."""
        slots = dict(enumerate(self.letters, start=1))
        return "".join(slots.get(slot, "�") for slot in ids.flatten().tolist())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._training is None else self._training.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._place = dict(state_dict)

    @override
    def train_dataloader(self) -> StreamLoader:
        self._training = self._loader("fit")
        if self._place:
            self._training.load_state_dict(self._place)
            self._place = {}
        return self._training

    @override
    def val_dataloader(self) -> StreamLoader:
        return self._loader("val")

    @override
    def test_dataloader(self) -> StreamLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> StreamLoader:
        return self._loader("test")

    def _loader(self, split: str) -> StreamLoader:
        world = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        most = max(1, (len(self._ids[split]) - 1) // (self.window + 1) // world)  # streams of one window at least
        streams = self.batch_size if split == "fit" else min(self.batch_size, most)
        loader = StreamLoader(self._ids[split], streams, self.window, rank, world)
        if not len(loader):
            raise ConfigurationError(
                f"the text for {split} has {len(self._ids[split]):,} characters: a window of {self.window}, and what "
                f"follows it, for each of {streams * world} streams needs {streams * world * (self.window + 1):,}"
            )
        return loader


def _split(path: Path, encoding: str) -> dict[str, str]:
    try:
        text = path.read_text(encoding)
    except (OSError, UnicodeError, LookupError) as error:  # the last for an unknown encoding
        raise ConfigurationError(f"path: {path} cannot be read as {encoding}: {error}") from None
    last, before = (len(text) - share * len(text) // HELD_OUT for share in (1, 2))
    return {"fit": text[:before], "val": text[before:last], "test": text[last:]}


def _library() -> dict[str, str]:
    texts: dict[str, list[str]] = {"fit": [], "val": [], "test": []}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        split = {0: "val", 1: "test"}.get(zlib.crc32(path.name.encode()) % HELD_OUT, "fit")
        texts[split].append(path.read_text(encoding="utf-8", errors="replace"))
    return {split: "".join(parts) for split, parts in texts.items()}
