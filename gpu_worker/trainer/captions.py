"""What becomes of a caption at each of its uses: tags in another order, some or all of them left out."""

from __future__ import annotations

import random

from services.common.payloads.training import Training


def varied(caption: str, config: Training, epoch: int, chance: random.Random) -> str:
    """The caption for one use, in the epoch of that number from 1."""
    every = config.caption_dropout_every_n_epochs
    if every and epoch % every == 0:
        return ""
    if config.caption_dropout_rate and chance.random() < config.caption_dropout_rate:
        return ""
    if not config.shuffle_caption and not config.caption_tag_dropout_rate:
        return caption
    tags = [tag.strip() for tag in caption.split(config.caption_separator)]
    kept, others = tags[: config.keep_tokens], tags[config.keep_tokens :]
    if config.shuffle_caption:
        chance.shuffle(others)
    if config.caption_tag_dropout_rate:
        others = [tag for tag in others if chance.random() >= config.caption_tag_dropout_rate]
    return ", ".join(kept + others)  # whatever separated them, as kohya does
