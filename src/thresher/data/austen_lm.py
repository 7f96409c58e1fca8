"""Jane Austen's novels for language modelling, with whole novels held out; ships with the package."""

from thresher.data.corpus import CorpusData
from thresher.data.works import describe_sources, split_works

VAL = ("northangerabbey",)
TEST = ("persuasion",)


class AustenLM(CorpusData):
    """Six novels, 4.03 million characters: one for validation, one for the test.

    All hyper-parameters are those of `CorpusData`.
    """

    def read_works(self) -> dict[str, list[str]]:
        """Split by novel."""
        parts = split_works("austen", VAL, TEST)
        self.sources = describe_sources(parts, VAL, TEST)
        return parts
