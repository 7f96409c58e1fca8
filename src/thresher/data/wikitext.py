"""WikiText through the package `datasets`: from the hub, or from a local copy."""

from thresher.data.corpus import CorpusData, Objective, Short
from thresher.data.hub import load_splits

PARTS = {"train": "train", "val": "validation", "test": "test"}


class WikiText(CorpusData):
    """Good and featured articles of Wikipedia, one work for each part.

    Args:
        name: Configuration on the hub: wikitext-2-raw-v1 or wikitext-103-raw-v1.
        root: Folder that `datasets.DatasetDict.save_to_disk` wrote; None loads from the hub.
        batch_size: See `CorpusData`, as for the others.
        workers: Processes that load data.
        seed: Of the order.
        context: Tokens of a window.
        objective: "causal", "masked" or "denoising".
        short: "pack", "pad" or "drop", see `CorpusData`.
        limit_train: Number of training windows to use, from the first.
        tokenizer: `bytes`, or a tokenizer of Hugging Face's.
    """

    def __init__(
        self,
        *,
        name: str = "wikitext-2-raw-v1",
        root: str | None = None,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        context: int = 512,
        objective: Objective = "causal",
        short: Short = "drop",
        limit_train: int | None = None,
        tokenizer: str = "bytes",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            context=context,
            objective=objective,
            short=short,
            limit_train=limit_train,
            tokenizer=tokenizer,
        )
        self.configuration, self.root = name, root

    def read_works(self) -> dict[str, list[str]]:
        """Join the lines of each part."""
        splits = load_splits("Salesforce/wikitext", self.configuration, self.root)
        name = self.root or f"Salesforce/wikitext, {self.configuration}"
        self.sources = {part: f"the {split} split of {name}" for part, split in PARTS.items()}
        return {part: ["".join(splits[split]["text"])] for part, split in PARTS.items()}
