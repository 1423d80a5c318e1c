"""A1111's prompt syntax: from a text with weights to what the UNet reads. Written from its behaviour, not its code.

`(x)` weighs 1.1, `[x]` 1/1.1, `(x:1.3)` 1.3; they nest and multiply; a backslash before a bracket makes it text; BREAK
begins a new chunk. A text of any length is encoded in chunks of 75 tokens that the UNet reads one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_worker.devices import on_device
from gpu_worker.job import JobError
from gpu_worker.models.adapters import Adapters
from gpu_worker.models.embeddings import injected
from gpu_worker.models.lora import applied
from gpu_worker.models.weights import Models, TextEncoder

CHUNK_TOKENS = 75  # between CLIP's marks of start and end
MAX_CHUNKS = 64
_NONE = Adapters()
_BACKTRACK_TOKENS = 20  # how far back a chunk may end at a comma
_NO_MEAN = 1e-4  # of the mean size
_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_CLOSED_BY = {")": ("(", _FACTORS["("]), "]": ("[", _FACTORS["["])}
_SYNTAX = re.compile(
    r"""
    \\ (?P<escaped> [\\()\[\]] )
    | (?P<backslash> \\ )
    | (?P<open> [(\[] )
    | : \s* (?P<weight> [+-]? (?: \d+ (?: \. \d* )? | \. \d+ ) ) \s* \)
    | (?P<close> [)\]] )
    | \s* \b (?P<break> BREAK ) \b \s*
    | (?P<text> [^\\()\[\]:B\s]+ | \s+ | . )
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass
class Piece:
    """Text of one weight. BREAK is a piece with no text."""

    text: str
    weight: float = 1.0


@dataclass
class _Chunk:
    """Up to 75 tokens and the weight of each; vectors of embeddings take the place of those at an offset."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    vectors: dict[int, torch.Tensor] = field(default_factory=dict)


def parse(text: str) -> list[Piece]:
    """The pieces of a prompt. A bracket that is never closed weighs all that follows it. As in A1111, round and square
    ones need not lie within each other, and a backslash before anything else is no text."""
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {bracket: [] for bracket in _FACTORS}

    def close(bracket: str, factor: float) -> bool:
        """Weighs what lies in the last bracket of this kind, if one is open."""
        if not opened[bracket]:
            return False
        for piece in pieces[opened[bracket].pop() :]:
            piece.weight *= factor
        return True

    for match in _SYNTAX.finditer(text):
        found, kind = match.group(), match.lastgroup
        if kind == "open":
            opened[found].append(len(pieces))
        elif kind == "break":
            pieces.append(Piece(""))
        elif kind != "backslash":
            is_closed = (kind == "weight" and close("(", float(match["weight"]))) or (
                kind == "close" and close(*_CLOSED_BY[found])
            )
            if not is_closed:
                pieces.append(Piece(match["escaped"] or found))
    for bracket, factor in _FACTORS.items():
        while close(bracket, factor):
            pass
    return _merged(pieces)


def encode(
    models: Models, text: str, clip_skip: int, adapters: Adapters = _NONE
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The text as the UNet reads it, of shape (1, 77 x chunks, width), and for SDXL its pooled form, (1, n).

    `clip_skip` is the layer of SD1.5's encoder that is read, counted from its end; SDXL has always read the second.

    Raises:
        JobError: the text is too long.
    """
    pieces = parse(text)
    hidden, pooled = [], None
    for index, encoder in enumerate(models.text_encoders):
        words = {word: embedding.vectors[index] for word, embedding in adapters.embeddings.items()}
        chunks = _chunks(pieces, encoder.tokenizer, words)
        marked = torch.tensor([_marked(chunk.tokens, encoder.tokenizer) for chunk in chunks])
        tokens = on_device(marked, models.device)
        places = [(i, 1 + start, found) for i, chunk in enumerate(chunks) for start, found in chunk.vectors.items()]
        changes = [(slice(None), use.text_scale, network.texts[index]) for network, use in adapters.networks]
        with applied(encoder.model, changes), injected(encoder.model, places):
            layers, pooled = read_chunks(models, encoder, tokens, clip_skip)
        weighed = [_weighed(layer, chunk.weights) for layer, chunk in zip(layers, chunks, strict=True)]
        hidden.append(torch.cat(weighed)[None])
    return torch.cat(hidden, dim=-1), None if pooled is None else pooled[:1]  # of the second encoder and first chunk


def plain_chunks(text: str, tokenizer: Any) -> list[list[int]]:
    """The tokens of a text without syntax, in chunks of 77 as encode() forms them.

    Raises:
        JobError: the text is too long.
    """
    return [_marked(chunk.tokens, tokenizer) for chunk in _chunks([Piece(text)], tokenizer, {})]


def read_chunks(
    models: Models, encoder: TextEncoder, tokens: torch.Tensor, clip_skip: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What an encoder makes of tokens of shape (chunks, 77): (chunks, 77, width), and of SDXL's second one what each
    chunk is as a whole, (chunks, n)."""
    output = encoder.model(tokens, output_hidden_states=models.is_sdxl or clip_skip > 1)
    if models.is_sdxl:
        return _sdxl_layer(output), output[0] if output[0].ndim == 2 else None
    return _layer(encoder, output, clip_skip), None


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one weight as one piece: tokens may span what the syntax took apart."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and piece.text and merged[-1].text and merged[-1].weight == piece.weight:
            merged[-1].text += piece.text
        else:
            merged.append(piece)
    return merged


def _chunks(pieces: list[Piece], tokenizer: Any, words: dict[str, torch.Tensor]) -> list[_Chunk]:
    """The pieces in chunks of tokens. `words` are what embeddings stand for; the longest that fits a place wins."""
    known = [(tokenizer(word, add_special_tokens=False).input_ids, vectors) for word, vectors in words.items()]
    known.sort(key=lambda entry: -len(entry[0]))
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    chunks = [_Chunk()]
    for piece in pieces:
        if not piece.text:
            chunks.append(_Chunk())
            continue
        for token, vectors in _read(tokenizer(piece.text, add_special_tokens=False).input_ids, known):
            if len(chunks[-1].tokens) == CHUNK_TOKENS:
                chunks.append(_carried_over(chunks[-1], comma, token))
            if vectors is not None:
                _put(chunks, vectors, piece.weight, token)
            else:
                chunks[-1].tokens.append(token)
                chunks[-1].weights.append(piece.weight)
    if len(chunks) > 1 and not chunks[-1].tokens:
        chunks.pop()  # a BREAK at the end
    if len(chunks) > MAX_CHUNKS:
        raise JobError(f"a prompt has {len(chunks)} chunks of {CHUNK_TOKENS} tokens; at most {MAX_CHUNKS} are possible")
    return chunks


def _read(tokens: list[int], known: list[tuple[list[int], torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor | None]]:
    """The tokens one by one, and the vectors where some of them are an embedding's word."""
    start = 0
    while start < len(tokens):
        match = next(((word, found) for word, found in known if tokens[start : start + len(word)] == word), None)
        word, found = match if match is not None else (tokens[start : start + 1], None)
        yield word[0], found
        start += len(word)


def _put(chunks: list[_Chunk], vectors: torch.Tensor, weight: float, token: int) -> None:
    """Puts an embedding into the last chunk, or whole into a new one; any token keeps its place."""
    if len(vectors) > CHUNK_TOKENS:
        raise JobError(f"an embedding has {len(vectors)} vectors; at most {CHUNK_TOKENS} are possible")
    if len(chunks[-1].tokens) + len(vectors) > CHUNK_TOKENS:
        chunks.append(_Chunk())
    chunks[-1].vectors[len(chunks[-1].tokens)] = vectors
    chunks[-1].tokens += [token] * len(vectors)
    chunks[-1].weights += [weight] * len(vectors)


def _carried_over(full: _Chunk, comma: int, token: int) -> _Chunk:
    """The next chunk: it begins with what follows a comma near the full one's end, so that no phrase is cut."""
    tail = full.tokens[-_BACKTRACK_TOKENS:]
    if token == comma or comma not in tail:
        return _Chunk()
    start = CHUNK_TOKENS - tail[::-1].index(comma)
    vectors = {offset: full.vectors.pop(offset) for offset in list(full.vectors) if offset >= start}
    carried = _Chunk(
        full.tokens[start:], full.weights[start:], {offset - start: found for offset, found in vectors.items()}
    )
    del full.tokens[start:], full.weights[start:]
    return carried


def _marked(tokens: list[int], tokenizer: Any) -> list[int]:
    padding = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(tokens))
    return [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *padding]


def _layer(encoder: TextEncoder, output: Any, clip_skip: int) -> torch.Tensor:
    """SD1.5: the last layer, or an earlier one, as the encoder's last norm leaves it."""
    layer: torch.Tensor = output.last_hidden_state
    if clip_skip > 1:
        depth = min(clip_skip, len(output.hidden_states))
        layer = encoder.model.final_layer_norm(output.hidden_states[-depth])
    return layer


def _sdxl_layer(output: Any) -> torch.Tensor:
    layer: torch.Tensor = output.hidden_states[-2]
    return layer


def _weighed(layer: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """A chunk of shape (77, width) with its tokens weighed, and the mean of the whole as it was before."""
    if all(weight == 1 for weight in weights):
        return layer
    factors = torch.ones(len(layer), dtype=layer.dtype)
    factors[1 : len(weights) + 1] = torch.tensor(weights, dtype=layer.dtype)
    weighed = layer * on_device(factors, layer.device)[:, None]
    # A layer whose mean is 0 but for rounding has none to restore: the quotient would be noise, or NaN.
    means = torch.stack([layer.mean(), weighed.mean()]).float()
    has_none = (means.abs() < _NO_MEAN * layer.abs().mean()).any()
    return weighed * (means[0] / means[1]).masked_fill(has_none, 1.0)  # which way is the device's to say
