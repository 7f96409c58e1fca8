"""Tasks of GLUE, of one sentence and of two, through the package `datasets`: from the hub, or from a local copy."""

from thresher.data.hub import load_splits
from thresher.data.text import TextClassificationData, Texts

COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
HELD_OUT = {"mnli": "validation_matched"}  # else `validation`: the labels of GLUE's test sets are not public


class Glue(TextClassificationData):
    """A task of GLUE. Its validation set serves as the test set; validation texts are held out from training.

    The tokenizer joins pairs of sentences; bytes are joined by a line break.

    Args:
        task: cola, sst2, mrpc, qqp, mnli, qnli, rte or wnli.
        root: Folder that `datasets.DatasetDict.save_to_disk` wrote; None loads from the hub.
        batch_size: See `TextClassificationData`, as for the others.
        workers: Processes that load data.
        seed: Of the split and the order.
        val_fraction: Share of the training texts held out for validation.
        limit_train: Number of training texts to use, from the first.
        length: Largest number of tokens of a text.
        tokenizer: `bytes`, or a tokenizer of Hugging Face's.

    Raises:
        ValueError: There is no such task.
    """

    def __init__(
        self,
        *,
        task: str = "sst2",
        root: str | None = None,
        batch_size: int = 32,
        workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        length: int = 128,
        tokenizer: str = "bytes",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            val_fraction=val_fraction,
            limit_train=limit_train,
            length=length,
            tokenizer=tokenizer,
        )
        if task not in COLUMNS:
            raise ValueError(f"data.task must be one of {', '.join(COLUMNS)}; got {task!r}")
        self.task, self.root = task, root

    def read_texts(self) -> tuple[list[str], dict[str, Texts]]:
        """Read both parts."""
        splits = load_splits("nyu-mll/glue", self.task, self.root)
        names = list(splits["train"].features["label"].names)
        held_out = HELD_OUT.get(self.task, "validation")
        parts = {}
        for part, split in (("train", "train"), ("test", held_out)):
            self.sources[part] = f"the {split} split of {self.root or 'nyu-mll/glue'}, task {self.task}"
            columns = [list(splits[split][name]) for name in COLUMNS[self.task]]
            labels = list(splits[split]["label"])
            for row, (label, *texts) in enumerate(zip(labels, *columns, strict=True)):
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"row {row} of {self.sources[part]} lacks a text")
                if label not in range(len(names)):
                    raise ValueError(
                        f"row {row} of {self.sources[part]} has label {label}; {', '.join(names)} are 0 to "
                        f"{len(names) - 1}, and -1 stands where labels are not public"
                    )
            parts[part] = Texts(columns[0], labels, columns[1] if len(columns) > 1 else None)
        return names, parts
