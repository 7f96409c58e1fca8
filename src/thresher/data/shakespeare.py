"""Shakespeare's plays and poems, with whole plays held out; ships with the package."""

from thresher.data.corpus import CorpusData
from thresher.data.works import read_works

VAL = ("macbeth", "twelfth_night")
TEST = ("tempest", "henry_v", "much_ado_about_nothing")


class Shakespeare(CorpusData):
    """42 works, 5.06 million characters: two plays for validation, a comedy, a history and a romance for the test.

    All hyper-parameters are those of `CorpusData`.
    """

    def read_works(self) -> dict[str, list[str]]:
        """Split by work."""
        works = read_works("shakespeare")
        held_out = {"val": VAL, "test": TEST}
        parts = {part: [works[title] for title in titles] for part, titles in held_out.items()}
        parts["train"] = [text for title, text in works.items() if title not in (*VAL, *TEST)]
        return parts
