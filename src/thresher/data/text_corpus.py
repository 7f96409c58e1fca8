"""A corpus of one's own: text files, each a work."""

from pathlib import Path

import torch

from thresher.attention.options import check_number
from thresher.data.corpus import CorpusData, Objective


class TextCorpus(CorpusData):
    """The text files of a folder. Whole files are held out, or the ends of files where there are fewer than three.

    Args:
        root: A text file, or a folder whose .txt and .md files are read, those of its subfolders too.
        held_out: Share of the files, at least one, for validation and again for the test; with fewer than three files,
            share of the characters of each, at its end.
        batch_size: See `CorpusData`, as for the others.
        workers: Processes that load data.
        seed: Of the choice of files and the order.
        context: Tokens of a window.
        objective: "causal", "masked" or "denoising".
        limit_train: Train on the first so many windows.
        tokenizer: `bytes`, or a tokenizer of Hugging Face's.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    def __init__(
        self,
        *,
        root: str,
        held_out: float = 0.1,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        context: int = 512,
        objective: Objective = "causal",
        limit_train: int | None = None,
        tokenizer: str = "bytes",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            context=context,
            objective=objective,
            limit_train=limit_train,
            tokenizer=tokenizer,
        )
        check_number("data.held_out", held_out, above=0.0, below=0.5)
        self.root, self.held_out, self.seed = Path(root).expanduser(), held_out, seed

    def read_works(self) -> dict[str, list[str]]:
        """Read and split the files."""
        if not self.root.exists():
            raise FileNotFoundError(f"there is no {self.root}; data.root names a text file, or a folder of .txt files")
        paths = [self.root]
        if self.root.is_dir():
            paths = sorted(path for path in self.root.rglob("*") if path.suffix in (".txt", ".md"))
        if not paths:
            raise FileNotFoundError(f"{self.root} holds no .txt or .md file")
        texts = [_read(path) for path in paths]
        if len(texts) < 3:
            cuts = [(text, round(self.held_out * len(text))) for text in texts]
            return {
                "train": [text[: len(text) - 2 * cut] for text, cut in cuts],
                "val": [text[len(text) - 2 * cut : len(text) - cut] for text, cut in cuts],
                "test": [text[len(text) - cut :] for text, cut in cuts],
            }
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(self.seed)).tolist()
        cut = max(round(self.held_out * len(order)), 1)
        chosen = {"val": order[:cut], "test": order[cut : 2 * cut], "train": sorted(order[2 * cut :])}
        return {part: [texts[i] for i in some] for part, some in chosen.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it, for example with iconv") from error
