"""Corpora: windows, and what is to be predicted in them under each objective."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from thresher.data.austen_lm import AustenLM
from thresher.data.corpus import IGNORED, corrupt_spans
from thresher.data.shakespeare import TEST, VAL, Shakespeare
from thresher.data.text_corpus import TextCorpus
from thresher.data.tokens import ByteTokenizer
from thresher.data.wikitext import WikiText
from thresher.data.works import read_works

BYTES = ByteTokenizer()


def ready(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data


def test_whole_plays_are_held_out_and_every_byte_is_predicted_once() -> None:
    data, works = ready(Shakespeare(context=512)), read_works("shakespeare")
    for part, titles in (("val", VAL), ("test", TEST)):
        predicted = [data.get_part(part)[i][1] for i in range(len(data.get_part(part)))]
        texts = [works[title] for title in titles]
        assert BYTES.decode(torch.cat(predicted).tolist()) == "".join(text[1:] for text in texts)
    held_out = sum(len(works[title]) for title in (*VAL, *TEST))
    trained = 512 * len(data.get_part("train"))
    assert 0.99 < trained / (sum(map(len, works.values())) - held_out) < 1
    assert data.task_arguments["bytes_per_token"] == {"val": 1.0, "test": 1.0}


def test_causal_targets_are_the_tokens_that_follow() -> None:
    inputs, targets = next(iter(ready(Shakespeare(context=64, batch_size=4)).train_dataloader()))
    assert inputs.shape == targets.shape == (4, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (targets != IGNORED).all()


def test_the_last_short_window_is_filled_up_and_nothing_is_predicted_there() -> None:
    data = ready(Shakespeare(context=1000, batch_size=300))
    inputs, targets = next(iter(data.val_dataloader()))
    short = (inputs == 0).any(1)
    assert short.sum() == len(VAL)
    assert torch.equal(inputs == 0, targets == IGNORED)


def test_masking_hides_15_percent_in_three_ways_and_predicts_those_only() -> None:
    data = ready(AustenLM(context=512, objective="masked", batch_size=64))
    inputs, targets = next(iter(data.train_dataloader()))
    hidden = targets != IGNORED
    assert 0.14 < hidden.float().mean() < 0.16
    mask, same = inputs[hidden] == BYTES.mask, inputs[hidden] == targets[hidden]
    assert 0.78 < mask.float().mean() < 0.82
    assert 0.08 < same.float().mean() < 0.12
    assert (inputs[~hidden] != BYTES.mask).float().mean() > 0.999
    one, two = (next(iter(data.val_dataloader()))[0] for _ in range(2))
    assert torch.equal(one, two), "evaluation is corrupted in one way"
    again = data.get_part("train")
    assert not torch.equal(again[0][0][0], again[0][0][0]), "training is corrupted anew each time"


def test_denoising_keeps_what_is_not_gone_in_order_and_predicts_everything() -> None:
    tokens = torch.arange(1, 201)
    (corrupted, before), targets = corrupt_spans(tokens, BYTES, torch.Generator().manual_seed(0))
    kept = corrupted[corrupted != BYTES.mask]
    assert torch.equal(kept, kept.sort().values)
    assert 0.6 < len(kept) / 200 < 0.85
    for left, right in zip(corrupted[:-1].tolist(), corrupted[1:].tolist(), strict=True):
        assert right == BYTES.mask or left == BYTES.mask or right == left + 1, "what is gone leaves a mask"
    assert before.tolist() == [BYTES.first, *tokens.tolist()]
    assert targets.tolist() == [*tokens.tolist(), BYTES.last]
    data = ready(AustenLM(context=64, objective="denoising", batch_size=4))
    (source, target), wanted = next(iter(data.train_dataloader()))
    assert target.shape == wanted.shape == (4, 65)
    assert source.shape[1] < 64
    assert data.model_arguments["length"] == 65


def test_a_folder_of_ones_own_is_split_by_file(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 400)
    (tmp_path / "other.bin").write_bytes(b"\xff")
    data = ready(TextCorpus(root=str(tmp_path), context=100))
    seen = {
        part: set(BYTES.decode(torch.cat([targets for _, targets in data.get_part(part)]).tolist()))
        for part in ("train", "val", "test")
    }
    assert [len(seen[part]) for part in ("train", "val", "test")] == [8, 1, 1]
    assert len(set.union(*seen.values())) == 10


def test_a_single_file_is_split_at_its_end(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + i // 1000) for i in range(10_000))
    (tmp_path / "book.txt").write_text(text)
    data = ready(TextCorpus(root=str(tmp_path / "book.txt"), context=50))
    assert {BYTES.decode([int(data.get_part("test")[i][1][0])]) for i in range(19)} == {"j"}
    assert {BYTES.decode([int(data.get_part("val")[i][1][0])]) for i in range(19)} == {"i"}


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.root names a text file, or a folder"):
        ready(TextCorpus(root=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt"):
        ready(TextCorpus(root=str(tmp_path)))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        ready(TextCorpus(root=str(tmp_path)))
    (tmp_path / "latin.txt").write_text("short")
    with pytest.raises(ValueError, match=r"shorter than data.context=512"):
        ready(TextCorpus(root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data.objective must be one of causal, masked, denoising"):
        Shakespeare(objective="prefix")  # type: ignore[arg-type]


def test_wikitext_from_a_local_copy(tmp_path: Path) -> None:
    lines = {"text": [" = Title = \n", "", " Some words . \n"] * 40}
    parts = {name: datasets.Dataset.from_dict(lines) for name in ("train", "validation", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "copy"))
    data = ready(WikiText(root=str(tmp_path / "copy"), context=32))
    assert BYTES.decode(data.get_part("val")[0][0][0].tolist()) == "".join(lines["text"])[:32]
