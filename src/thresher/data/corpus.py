"""What all language modelling data share: works cut into contiguous windows, and what is to be predicted in them.

Objectives:

    causal     every token from those before it
    masked     15 % of the tokens from the others: 80 % of these are replaced by the mask, 10 % by any token, 10 % stay
    denoising  all tokens from a copy in which 30 % are gone, spans of about 3 tokens behind one mask each (as in BART)

Batches are (inputs, targets). Inputs are token ids [b, n], for `denoising` a pair of the corrupted copy [b, m] and the
target shifted right [b, n]; targets are ids [b, n], -100 where nothing is predicted. In evaluation every window is
corrupted in one way, whatever the run.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from thresher.attention.options import check_choice, check_integer
from thresher.data.loading import Seeded, check_loading, evaluation_loader, training_loader
from thresher.data.tokens import Tokenizer, load_tokenizer

Objective = Literal["causal", "masked", "denoising"]
IGNORED = -100
MASKED, AS_MASK, AS_ANY = 0.15, 0.8, 0.1
CORRUPTED, SPAN = 0.3, 3.0


class Windows(Dataset[tuple[tuple[Tensor, ...], Tensor]]):
    """Consecutive windows of `context` tokens, each with what is to be predicted in it; none crosses works.

    Args:
        works: Token ids of each work.
        context: Tokens of a window.
        objective: What is predicted.
        tokenizer: Knows the special ids.
        fixed: Corrupt each window in one way for ever, and keep short last windows.
    """

    def __init__(
        self, works: Sequence[np.ndarray], context: int, objective: Objective, tokenizer: Tokenizer, *, fixed: bool
    ) -> None:
        self.works, self.context, self.objective = works, context, objective
        self.tokenizer, self.fixed = tokenizer, fixed
        ahead = 1 if objective == "causal" else 0  # the last token has a successor to predict, too
        self.starts = [
            (i, start)
            for i, work in enumerate(works)
            for start in range(0, len(work) - ahead, context)
            if start + context + ahead <= len(work) or (fixed and start + ahead + 1 < len(work))
        ]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        work, start = self.starts[index]
        stop = start + self.context + (self.objective == "causal")
        tokens = torch.from_numpy(self.works[work][start:stop].astype(np.int64))
        if self.objective == "causal":
            return (tokens[:-1],), tokens[1:]
        generator = torch.Generator()
        generator.manual_seed(index if self.fixed else int(torch.randint(2**62, ())))
        if self.objective == "masked":
            return masked(tokens, self.tokenizer, generator)
        return denoising(tokens, self.tokenizer, generator)


def masked(tokens: Tensor, tokenizer: Tokenizer, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hide some tokens; return the inputs, and targets where something is hidden."""
    assert tokenizer.mask is not None
    chosen = torch.rand(len(tokens), generator=generator) < MASKED
    chosen[int(torch.randint(len(tokens), (), generator=generator))] = True
    kind = torch.rand(len(tokens), generator=generator)
    others = torch.randint(1, tokenizer.vocabulary, tokens.shape, generator=generator)
    inputs = torch.where(chosen & (kind < AS_MASK), tokenizer.mask, tokens)
    inputs = torch.where(chosen & (kind >= 1 - AS_ANY), others, inputs)
    return (inputs,), tokens.masked_fill(~chosen, IGNORED)


def denoising(tokens: Tensor, tokenizer: Tokenizer, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    """Take spans out; return the copy that is left with the tokens before each target, and the targets."""
    assert tokenizer.mask is not None
    n = len(tokens)
    gone = torch.zeros(n, dtype=torch.bool)
    spans = max(round(CORRUPTED * n / SPAN), 1)
    lengths = torch.poisson(torch.full((spans,), SPAN), generator=generator).long().clamp_min(1)
    firsts = torch.randint(n, (spans,), generator=generator)
    for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
        gone[first : first + length] = True
    begins = gone & ~torch.cat([gone.new_zeros(1), gone[:-1]])
    corrupted = tokens.masked_fill(begins, tokenizer.mask)[~gone | begins]
    targets = torch.cat([tokens, tokens.new_tensor([tokenizer.last])])
    return (corrupted, torch.cat([tokens.new_tensor([tokenizer.first]), tokens])), targets


class CorpusData(pl.LightningDataModule):
    """Windows of the works of a corpus; a corpus derives from this class and reads its files in `read_works`.

    Args:
        batch_size: Windows in a batch of one process.
        workers: Processes that load data; 0 loads them in the training process.
        seed: Of the training order unless `order_seed` is set.
        context: Tokens of a window.
        objective: "causal", "masked" or "denoising".
        limit_train: Train on the first so many windows; None for all.
        tokenizer: `bytes`, the folder of a tokenizer of Hugging Face's, or its name on the hub.

    Raises:
        ValueError: A hyper-parameter outside its range, or a tokenizer without a mask where one is needed.
    """

    def __init__(
        self,
        *,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        context: int = 512,
        objective: Objective = "causal",
        limit_train: int | None = None,
        tokenizer: str = "bytes",
    ) -> None:
        super().__init__()
        check_loading(batch_size, workers, seed, limit_train)
        check_integer("data.context", context, 2)
        check_choice("data.objective", objective, get_args(Objective))
        self.batch_size, self.workers, self.order_seed = batch_size, workers, seed
        self.context, self.objective, self.limit_train = context, objective, limit_train
        self.tokenizer = load_tokenizer(tokenizer)
        if objective != "causal" and self.tokenizer.mask is None:
            raise ValueError(f"data.objective={objective} needs a mask token, and the tokenizer {tokenizer!r} has none")
        self._parts: dict[str, Windows] = {}
        self._bytes_per_token: dict[str, float] = {}

    @abstractmethod
    def read_works(self) -> dict[str, list[str]]:
        """Return the works of the parts `train`, `val` and `test`.

        Raises:
            FileNotFoundError: The files are not there; the message says how to get them.
        """

    @property
    def class_names(self) -> list[str]:
        """None: there are no classes."""
        return []

    def symbols(self, ids: Sequence[int]) -> list[str]:
        """Return what each token id stands for."""
        return self.tokenizer.pieces(ids)

    @property
    def model_arguments(self) -> Mapping[str, Any]:
        """What a model must know of the data."""
        return {
            "vocabulary": self.tokenizer.vocabulary,
            "length": self.context + (self.objective == "denoising"),
            "padding": self.tokenizer.padding,
            "objective": self.objective,
        }

    @property
    def task_arguments(self) -> Mapping[str, Any]:
        """What a task must know of the data: bytes a token in `val` and `test`, where all tokens are predicted."""
        return {
            "vocabulary": self.tokenizer.vocabulary,
            "bytes_per_token": dict(self._bytes_per_token) if self.objective == "causal" else {},
        }

    def setup(self, stage: str) -> None:
        """Read the works and cut them into windows."""
        if self._parts:
            return
        for part, texts in self.read_works().items():
            ids = [np.asarray(each, dtype=np.int32) for each in self.tokenizer.encode(texts, whole=False)]
            windows = Windows(ids, self.context, self.objective, self.tokenizer, fixed=part != "train")
            if not len(windows):
                raise ValueError(
                    f"the {part} texts of {type(self).__name__} are shorter than data.context={self.context}"
                )
            self._parts[part] = windows
            if part != "train":
                self._bytes_per_token[part] = sum(len(t.encode()) for t in texts) / sum(map(len, ids))
        if self.limit_train is not None:
            train = self._parts["train"]
            if self.limit_train > len(train):
                raise ValueError(f"data.limit_train={self.limit_train} but there are {len(train)} training windows")
            train.starts = train.starts[: self.limit_train]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of one size; a last smaller one is dropped unless it is the only one."""
        train = Seeded(self._part("train"), self.order_seed)
        return training_loader(train, self.trainer, seed=self.order_seed, **self._options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return all validation windows, in order."""
        return evaluation_loader(self._part("val"), self.trainer, **self._options)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return all test windows, in order."""
        return evaluation_loader(self._part("test"), self.trainer, **self._options)

    def _part(self, name: str) -> Windows:
        if not self._parts:
            raise ValueError(f"{type(self).__name__} has read nothing yet; call prepare_data() and setup('fit')")
        return self._parts[name]

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": self.collate,
        }

    def collate(self, examples: list[tuple[tuple[Tensor, ...], Tensor]]) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Put windows into one batch, filled up at the end."""
        inputs, targets = zip(*examples, strict=True)
        padding = self.tokenizer.padding
        filled = tuple(
            pad_sequence(list(each), batch_first=True, padding_value=padding) for each in zip(*inputs, strict=True)
        )
        wanted = pad_sequence(list(targets), batch_first=True, padding_value=IGNORED)
        return filled if len(filled) > 1 else filled[0], wanted
