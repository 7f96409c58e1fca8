"""Language modelling data: works cut into contiguous windows, with the tokens to predict in each.

The rest of a work after its last full window, or a whole work shorter than a window, is in training

    packed     joined with the next work: all works of the part are one, with the end token between them. Works in a
               window see each other, as is usual in the training of GPTs, and the end token is predicted.
    padded     a window of its own, filled with padding, where nothing is predicted
    dropped    not used

In evaluation it is always padded: works never see each other, and no token between them counts in perplexity.

Objectives:

    causal     every token from those before it
    masked     15 % of the tokens from the others: 80 % of these are replaced by the mask, 10 % by any token, 10 % stay
    denoising  all tokens from a copy in which masks replace spans of about 3 tokens, 30 % in all (as in BART)

Batches are (inputs, targets). Inputs are token ids [b, n], for `denoising` a pair of the corrupted copy [b, m] and the
target shifted right [b, n]; targets are ids [b, n], -100 where nothing is predicted. In evaluation the corruption
of a window is the same in every run.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from thresher.attention.options import check_choice, check_integer
from thresher.data.loading import Seeded, TrainingOrder, build_evaluation_loader, build_training_loader, check_loading
from thresher.data.summary import PARTS, PartSummary
from thresher.data.tokens import Tokenizer, load_tokenizer

Objective = Literal["causal", "masked", "denoising"]
Short = Literal["pack", "pad", "drop"]
IGNORED = -100
MASKED, AS_MASK, AS_ANY = 0.15, 0.8, 0.1
CORRUPTED, SPAN = 0.3, 3.0


class Windows(Dataset[tuple[tuple[Tensor, ...], Tensor]]):
    """Consecutive windows of `context` tokens, each with its targets; none crosses works.

    Args:
        works: Token ids of each work.
        context: Tokens of a window.
        objective: The tokens to predict.
        tokenizer: Has the special ids.
        fixed: Corrupt each window always in the same way.
        short: Keep short last windows.
    """

    def __init__(
        self,
        works: Sequence[np.ndarray],
        context: int,
        objective: Objective,
        tokenizer: Tokenizer,
        *,
        fixed: bool,
        short: bool,
    ) -> None:
        self.works, self.context, self.objective = works, context, objective
        self.tokenizer, self.fixed, self.short = tokenizer, fixed, short
        ahead = 1 if objective == "causal" else 0  # the last token also has a successor to predict
        least = 2  # tokens: one to predict from the other
        self.starts = [
            (i, start)
            for i, work in enumerate(works)
            for start in range(0, len(work) - ahead, context)
            if start + (least if short else context + ahead) <= len(work)
        ]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def tokens_read(self) -> int:
        """Tokens of all works."""
        return sum(map(len, self.works))

    @property
    def tokens_used(self) -> int:
        """Tokens in windows; one that ends a window and begins the next counts once."""
        ahead = 1 if self.objective == "causal" else 0
        ends: dict[int, int] = {}
        used = 0
        for i, start in self.starts:
            stop = min(start + self.context + ahead, len(self.works[i]))
            used += stop - max(start, ends.get(i, 0))
            ends[i] = stop
        return used

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        work, start = self.starts[index]
        stop = start + self.context + (self.objective == "causal")
        tokens = torch.from_numpy(self.works[work][start:stop].astype(np.int64))
        if self.objective == "causal":
            return (tokens[:-1],), tokens[1:]
        generator = torch.Generator()
        generator.manual_seed(index if self.fixed else int(torch.randint(2**62, ())))
        if self.objective == "masked":
            return mask_tokens(tokens, self.tokenizer, generator)
        return corrupt_spans(tokens, self.tokenizer, generator)


def mask_tokens(tokens: Tensor, tokenizer: Tokenizer, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    """Mask some tokens; return the inputs, and targets at the masked places."""
    assert tokenizer.mask is not None
    chosen = torch.rand(len(tokens), generator=generator) < MASKED
    chosen[int(torch.randint(len(tokens), (), generator=generator))] = True
    kind = torch.rand(len(tokens), generator=generator)
    padding = tokenizer.padding
    others = torch.randint(tokenizer.vocabulary - (padding >= 0), tokens.shape, generator=generator)
    if padding >= 0:
        others = others + (others >= padding)  # any token but padding
    inputs = torch.where(chosen & (kind < AS_MASK), tokenizer.mask, tokens)
    inputs = torch.where(chosen & (kind >= 1 - AS_ANY), others, inputs)
    return (inputs,), tokens.masked_fill(~chosen, IGNORED)


def corrupt_spans(
    tokens: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Remove spans; return the corrupted copy with the tokens before each target, and the targets."""
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


class CorpusData(TrainingOrder, pl.LightningDataModule):
    """Windows of the works of a corpus; a subclass reads its files in `read_works`.

    Args:
        batch_size: Windows in a batch of one process.
        workers: Processes that load data; 0 loads them in the training process.
        seed: Of the training order unless `set_order_seed` is called.
        context: Tokens of a window.
        objective: "causal", "masked" or "denoising".
        short: Treatment in training of works, and ends of works, shorter than a window: "pack", "pad" or "drop".
        limit_train: Number of training windows to use, from the first; None for all.
        tokenizer: `bytes`, the folder of a tokenizer of Hugging Face's, or its name on the hub.

    Attributes:
        sources: The origin of each part, in words; set by `read_works`.
        left_out: Numbers of unused items by reason, for each part; set by `read_works`.

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
        short: Short = "drop",
        limit_train: int | None = None,
        tokenizer: str = "bytes",
    ) -> None:
        super().__init__()
        check_loading(batch_size, workers, seed, limit_train)
        check_integer("data.context", context, 2)
        check_choice("data.objective", objective, get_args(Objective))
        check_choice("data.short", short, get_args(Short))
        self.batch_size, self.workers, self._order_seed = batch_size, workers, seed
        self.context, self.objective, self.limit_train, self.short = context, objective, limit_train, short
        self.tokenizer = load_tokenizer(tokenizer)
        if objective != "causal" and self.tokenizer.mask is None:
            raise ValueError(f"data.objective={objective} needs a mask token, and the tokenizer {tokenizer!r} has none")
        self.sources: dict[str, str] = {}
        self.left_out: dict[str, Counter[str]] = {}
        self._parts: dict[str, Windows] = {}
        self._bytes_per_token: dict[str, float] = {}

    @abstractmethod
    def read_works(self) -> dict[str, list[str]]:
        """Read the works of the parts `train`, `val` and `test`.

        Raises:
            FileNotFoundError: The files are missing; the message says how to get them.
        """

    @property
    def class_names(self) -> list[str]:
        """Empty: there are no classes."""
        return []

    def symbols(self, ids: Sequence[int]) -> list[str]:
        """Name the token of each id."""
        return self.tokenizer.pieces(ids)

    @property
    def model_arguments(self) -> Mapping[str, Any]:
        """Arguments of a model that depend on the data."""
        return {
            "vocabulary": self.tokenizer.vocabulary,
            "length": self.context + (self.objective == "denoising"),
            "padding": self.tokenizer.padding,
            "objective": self.objective,
        }

    @property
    def task_arguments(self) -> Mapping[str, Any]:
        """Arguments of a task that depend on the data: bytes per token in evaluation, if all tokens are predicted."""
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
            windows = self._cut_windows(part, ids)
            if not len(windows):
                texts_of = f"the {part} texts of {type(self).__name__}"
                if windows.short:
                    raise ValueError(f"{texts_of} have fewer than 2 tokens each, so that there is nothing to predict")
                raise ValueError(
                    f"{texts_of} are shorter than data.context={self.context}"
                    + ("; data.short=pack joins them" if self.short == "drop" else "")
                )
            self._parts[part] = windows
            if part != "train":
                self._bytes_per_token[part] = sum(len(t.encode()) for t in texts) / sum(map(len, ids))
        if self.limit_train is not None:
            train = self._parts["train"]
            if self.limit_train > len(train):
                raise ValueError(f"data.limit_train={self.limit_train} but there are {len(train)} training windows")
            self.left_out.setdefault("train", Counter())[f"by data.limit_train={self.limit_train}"] = (
                len(train) - self.limit_train
            )
            train.starts = train.starts[: self.limit_train]

    def _cut_windows(self, part: str, works: list[np.ndarray]) -> Windows:
        train = part == "train"
        short = not train or self.short == "pad"
        if empty := sum(not len(work) for work in works):
            self.left_out.setdefault(part, Counter())["empty works"] = empty
            works = [work for work in works if len(work)]
        if works and train and self.short == "pack":
            end = np.asarray([self.tokenizer.last], dtype=np.int32)
            works = [np.concatenate([each for work in works for each in (work, end)][:-1])]
        windows = Windows(works, self.context, self.objective, self.tokenizer, fixed=not train, short=short)
        if unused := len(works) - len({work for work, _ in windows.starts}):
            least = "2 tokens" if short else f"data.context={self.context}"
            self.left_out.setdefault(part, Counter())[f"works shorter than {least}"] = unused
        return windows

    def summary(self) -> list[PartSummary]:
        """Summarise each part."""
        return [self._summarise_part(name) for name in PARTS]

    def _summarise_part(self, name: str) -> PartSummary:
        part, kind = self._parts.get(name), f"windows of {self.context:,} tokens"
        left_out: Mapping[str, int] = self.left_out.get(name, {})
        if part is None:
            return PartSummary(name, kind, None, "not read", left_out=left_out)
        return PartSummary(
            name,
            kind,
            len(part),
            self.sources.get(name, type(self).__name__),
            left_out=left_out,
            tokens_read=part.tokens_read,
            tokens_used=part.tokens_used,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Load shuffled batches of one size; drop a smaller last batch unless it is the only one."""
        train = Seeded(self.get_part("train"), self.order_seed)
        return build_training_loader(train, self.trainer, seed=self.order_seed, **self._options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Load all validation windows, in order."""
        return build_evaluation_loader(self.get_part("val"), self.trainer, **self._options)

    def test_dataloader(self) -> DataLoader[Any]:
        """Load all test windows, in order."""
        return build_evaluation_loader(self.get_part("test"), self.trainer, **self._options)

    def get_part(self, name: str) -> Windows:
        """Return the examples of a part: "train", "val" or "test".

        Raises:
            ValueError: Nothing is read yet.
        """
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
        """Join windows to a batch, padded at the end."""
        inputs, targets = zip(*examples, strict=True)
        padding = self.tokenizer.padding
        filled = tuple(
            pad_sequence(list(each), batch_first=True, padding_value=padding) for each in zip(*inputs, strict=True)
        )
        wanted = pad_sequence(list(targets), batch_first=True, padding_value=IGNORED)
        return filled if len(filled) > 1 else filled[0], wanted
