"""A corpus of the user's text files, each a work."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from thresher.attention.options import check_number
from thresher.data.corpus import CorpusData, Objective, Short
from thresher.data.encoding import read_text
from thresher.data.part_names import sort_by_part

ENDINGS = (".txt", ".md")
NAMED = 5  # largest number of file names of a part in the summary


class TextCorpus(CorpusData):
    """The text files of a folder, each a document.

    Files and folders named train, valid (val, validation, dev) or test are these parts. A part without such a name is
    held out of the training files: whole files, or the ends of files if there are fewer than three.

    Args:
        root: A text file, or a folder; its .txt and .md files, also in subfolders and behind links, are read once each.
        held_out: Share of the files, at least one, for validation and again for the test; with fewer than three files,
            share of the characters of each, at its end. It has no effect on parts with files of their own.
        batch_size: See `CorpusData`, as for the others.
        workers: Processes that load data.
        seed: Of the choice of files and the order.
        context: Tokens of a window.
        objective: "causal", "masked" or "denoising".
        short: "pack", "pad" or "drop", see `CorpusData`.
        limit_train: Number of training windows to use, from the first.
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
        short: Short = "pack",
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
        check_number("data.held_out", held_out, above=0.0, below=0.5)
        self.root, self.held_out, self.seed = Path(root).expanduser(), held_out, seed

    def read_works(self) -> dict[str, list[str]]:
        """Read and split the files."""
        if not self.root.exists():
            raise FileNotFoundError(f"there is no {self.root}; data.root names a text file, or a folder of .txt files")
        paths = self._list_files() if self.root.is_dir() else [self.root]
        try:
            named = sort_by_part([path.relative_to(self.root) for path in paths]) if self.root.is_dir() else {}
        except ValueError as error:
            raise ValueError(f"{self.root}: {error}") from error
        if not named:
            return self._split(paths, ("val", "test"))
        files = {part: [self.root / path for path in some] for part, some in named.items()}
        missing = tuple(part for part in ("val", "test") if part not in files)
        works = self._split(files["train"], missing)
        if not missing:
            self.sources["train"] = self._describe_files(files["train"])
        for part in files.keys() - {"train"}:
            works[part] = [_read(path) for path in files[part]]
            self.sources[part] = self._describe_files(files[part])
        if unnamed := len(paths) - sum(map(len, files.values())):
            self._leave_out("files that are not named after a part", unnamed)
        return works

    def _list_files(self) -> list[Path]:
        """List the text files of the folder, each once; count other entries."""
        found = sorted(self._walk())
        hidden = {path for path in found if self._is_hidden(path)}
        seen = [path for path in found if path not in hidden]
        texts = [path for path in seen if path.suffix.lower() in ENDINGS]
        once = list({path.resolve(): path for path in reversed(texts)}.values())[::-1]
        self._leave_out("hidden files", len(hidden))
        self._leave_out(f"files that do not end in {' or '.join(ENDINGS)}", len(seen) - len(texts))
        self._leave_out("links to a file that is read anyway", len(texts) - len(once))
        if not once:
            raise FileNotFoundError(f"{self.root} holds no {' or '.join(ENDINGS)} file")
        return once

    def _walk(self) -> Iterator[Path]:
        """Yield all files, also behind links to folders unless these are hidden, read anyway or lead back."""
        real = self.root.resolve()
        entered, waiting = set(real.parents), deque([self.root])
        links: deque[Path] = deque()  # entered after all real folders
        while waiting or links:
            folder = waiting.popleft() if waiting else links.popleft()
            if folder.resolve() in entered:
                self._leave_out("links to a folder that is read anyway", 1)
                continue
            entered.add(folder.resolve())
            try:
                entries = sorted(folder.iterdir())
            except OSError as error:
                where = f"{folder} cannot be listed ({error.strerror})"
                raise ValueError(f"{where}; make it readable or remove it") from error
            for path in entries:
                if path.is_file():
                    yield path
                elif path.is_dir() and not (path.is_symlink() and self._is_hidden(path)):
                    (links if path.is_symlink() else waiting).append(path)
                elif path.is_symlink():
                    self._leave_out("links that lead nowhere or are hidden", 1)

    def _is_hidden(self, path: Path) -> bool:
        return any(name.startswith(".") for name in path.relative_to(self.root).parts)

    def _leave_out(self, reason: str, count: int) -> None:
        if count:
            self.left_out.setdefault("train", Counter())[reason] += count

    def _split(self, paths: list[Path], parts: tuple[str, ...]) -> dict[str, list[str]]:
        """Read files and hold some out for the parts, or the ends of all files if there are fewer than three."""
        texts = [_read(path) for path in paths]
        if not parts:
            return {"train": texts}
        if len(texts) < 3:
            each = "each of " * (len(paths) > 1)
            of = str(self.root) if paths == [self.root] else f"{each}{self._format_names(paths)} in {self.root}"
            share = f"{self.held_out:g} of {of}, data.held_out"
            self.sources = {"train": f"the beginning of {of}", parts[-1]: f"the last {share}"}
            self.sources |= dict.fromkeys(parts[:-1], f"before the last {share}")
            cuts = [(text, round(self.held_out * len(text))) for text in texts]
            works = {"train": [text[: len(text) - len(parts) * cut] for text, cut in cuts]}
            for i, part in enumerate(parts):
                behind = len(parts) - 1 - i
                works[part] = [text[len(text) - (behind + 1) * cut : len(text) - behind * cut] for text, cut in cuts]
            return works
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(self.seed)).tolist()
        cut = max(round(self.held_out * len(order)), 1)
        chosen = {part: order[i * cut : (i + 1) * cut] for i, part in enumerate(parts)}
        chosen["train"] = sorted(order[len(parts) * cut :])
        for part, some in chosen.items():
            drawn = f"{len(some)} of {len(paths)} files of {self.root}, drawn by data.seed={self.seed}"
            self.sources[part] = f"{drawn}: {self._format_names(paths[i] for i in some)}"
        return {part: [texts[i] for i in some] for part, some in chosen.items()}

    def _describe_files(self, paths: list[Path]) -> str:
        return f"{len(paths)} of the files of {self.root}, by name: {self._format_names(paths)}"

    def _format_names(self, paths: Iterable[Path]) -> str:
        names = [str(path.relative_to(self.root)) for path in paths]
        return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _read(path: Path) -> str:
    return read_text(path).replace("\r\n", "\n").replace("\r", "\n")
