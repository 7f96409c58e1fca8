"""Paragraphs of Jane Austen's six novels, classified by novel; ships with the package."""

import re

from thresher.data.text import TextClassificationData, Texts
from thresher.data.works import read_works

SHORTEST = 100  # characters of a paragraph
TEST_SHARE = 0.15  # of each novel, at its end


class Austen(TextClassificationData):
    """Paragraphs of at least 100 characters; the last 15 % of each novel are the test set.

    All hyper-parameters are those of `TextClassificationData`.
    """

    def read_texts(self) -> tuple[list[str], dict[str, Texts]]:
        """Cut the novels into paragraphs."""
        works = read_works("austen")
        shipped = f"paragraphs of {SHORTEST} characters and more, from the texts that ship with the package"
        self.sources["train"] = f"the first {1 - TEST_SHARE:.0%} of each novel: {shipped}"
        self.sources["test"] = f"the last {TEST_SHARE:.0%} of each novel: {shipped}"
        parts = {"train": Texts([], []), "test": Texts([], [])}
        for label, text in enumerate(works.values()):
            paragraphs = [re.sub(r"\s+", " ", p).strip() for p in text.split("\n\n")]
            paragraphs = [p for p in paragraphs if len(p) >= SHORTEST]
            cut = round((1 - TEST_SHARE) * len(paragraphs))
            for part, some in (("train", paragraphs[:cut]), ("test", paragraphs[cut:])):
                parts[part].texts.extend(some)
                parts[part].labels.extend([label] * len(some))
        return list(works), parts
