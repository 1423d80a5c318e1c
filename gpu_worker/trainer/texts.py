"""Captions → what the UNet reads, for a whole batch and with gradients for the encoders that are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gpu_worker.devices import on_device
from gpu_worker.models import prompt
from gpu_worker.models.weights import Models


def encode(
    models: Models, captions: Sequence[str], clip_skip: int, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The captions of shape (n, 77 x chunks, width), and for SDXL their pooled form, (n, m).

    A caption has as many chunks of 75 tokens as it needs, as a prompt has; what lies behind `max_tokens` is not read.
    Captions of different lengths are repeated to a common one, which changes nothing for the UNet (denoise.py).
    """
    hidden, pooled = [], None
    for encoder in models.text_encoders:
        chunked = [
            prompt.plain_chunks(caption, encoder.tokenizer)[: max_tokens // prompt.CHUNK_TOKENS] for caption in captions
        ]
        counts = [len(chunks) for chunks in chunked]
        tokens = on_device(torch.tensor([chunk for chunks in chunked for chunk in chunks]), models.device)
        layers, whole = prompt.read_chunks(models, encoder, tokens, clip_skip)
        num_chunks = math.lcm(*counts)
        hidden.append(
            torch.stack([part.flatten(0, 1).repeat(num_chunks // len(part), 1) for part in torch.split(layers, counts)])
        )
        pooled = None if whole is None else torch.stack([part[0] for part in torch.split(whole, counts)])
    return torch.cat(hidden, dim=-1), pooled
