"""Shakespeare's plays and poems, with whole plays held out; ships with the package."""

from thresher.data.corpus import CorpusData
from thresher.data.works import describe_sources, split_works

VAL = ("macbeth", "twelfth_night")
TEST = ("tempest", "henry_v", "much_ado_about_nothing")


class Shakespeare(CorpusData):
    """42 works, 5.06 million characters: two plays for validation, a comedy, a history and a romance for the test.

    All hyper-parameters are those of `CorpusData`.
    """

    def read_works(self) -> dict[str, list[str]]:
        """Split by work."""
        parts = split_works("shakespeare", VAL, TEST)
        self.sources = describe_sources(parts, VAL, TEST)
        return parts
