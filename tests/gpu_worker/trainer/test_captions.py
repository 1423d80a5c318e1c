"""What becomes of captions."""

import random
from typing import Any

from gpu_worker.trainer.captions import varied
from services.common.payloads.training import check_training

CAPTION = "zog, red, round, on grass"


def many(caption: str = CAPTION, epoch: int = 1, **fields: Any) -> set[str]:
    chance, config = random.Random(0), check_training(fields)
    return {varied(caption, config, epoch, chance) for _ in range(200)}


def test_a_caption_stays_as_it_is_by_default() -> None:
    assert many("one,  two") == {"one,  two"}


def test_shuffled_tags_are_all_there_and_those_to_be_kept_go_first() -> None:
    found = many(shuffle_caption=True, keep_tokens=1)
    assert len(found) == 6
    assert all(caption.startswith("zog, ") and sorted(caption) == sorted(CAPTION) for caption in found)


def test_some_captions_are_dropped_whole() -> None:
    assert many(caption_dropout_rate=0.5) == {CAPTION, ""}
    assert many(caption_dropout_rate=1) == {""}


def test_every_nth_epoch_has_no_captions() -> None:
    assert many(epoch=4, caption_dropout_every_n_epochs=2) == {""}
    assert many(epoch=3, caption_dropout_every_n_epochs=2) == {CAPTION}


def test_some_tags_are_dropped_but_not_those_to_be_kept() -> None:
    found = many(caption_tag_dropout_rate=0.5, keep_tokens=2)
    assert found == {"zog, red", "zog, red, round", "zog, red, on grass", CAPTION}


def test_tags_may_have_another_separator_and_are_joined_by_commas_as_kohya_does() -> None:
    assert many("a; b", shuffle_caption=True, caption_separator=";") == {"a, b", "b, a"}
