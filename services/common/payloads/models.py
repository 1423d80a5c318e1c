"""Which of a job's model files its request uses: the service checks that they are there, the worker loads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import PurePosixPath

from services.common.errors import InvalidArgument
from services.common.payloads.base import Payload
from services.common.payloads.extras import RemoveBackground
from services.common.payloads.generation import Generation
from services.common.payloads.prompts import HYPERNETWORK_TAG, LORA_TAG
from services.common.payloads.upscalers import LATENT_UPSCALERS, PIXEL_UPSCALERS

BASE, VAE, LORA, EMBEDDING, CONTROLNET = "Stable-diffusion", "VAE", "Lora", "embeddings", "ControlNet"
HYPERNETWORK = "hypernetworks"
NETWORK_TYPES = {LORA_TAG: LORA, HYPERNETWORK_TAG: HYPERNETWORK}  # by the kind of their tags
# Not the original's: types of models that change pictures without a checkpoint, named as A1111's folders for them.
UPSCALER, REMBG = "ESRGAN", "rembg"
PSEUDO_VAES = ("Automatic", "None")
# A1111's names of upscalers that it fetches by itself, and the stems of their files.
_ALIASES = {
    "R-ESRGAN 4x+": "RealESRGAN_x4plus",
    "R-ESRGAN 4x+ Anime6B": "RealESRGAN_x4plus_anime_6B",
    "R-ESRGAN 2x+": "RealESRGAN_x2plus",
}
_HASH = re.compile(r"\[[0-9a-fA-F]+\]$")


def used(request: Payload, models: Sequence[tuple[str, str]]) -> list[int]:
    """Positions in `models`, which are pairs of type and file name: the base model first, then other checkpoints,
    the VAE if there is one, LoRAs and hypernetworks in the prompt's order, ControlNets, the embeddings that a prompt
    mentions, and what upscales or cuts out.

    Raises:
        InvalidArgument: the request names a model that is not among them.
    """
    found = _used(request, models) if isinstance(request, Generation) else []
    found += [find(models, UPSCALER, name, field) for field, name in request.upscalers]
    if isinstance(request, RemoveBackground):
        there = [index for index, (kind, _) in enumerate(models) if kind == REMBG][:1]
        found += [find(models, REMBG, request.model, "model")] if there and request.model else there
    return list(dict.fromkeys(found))


def _used(request: Generation, models: Sequence[tuple[str, str]]) -> list[int]:
    if request.plot is not None:
        return list(dict.fromkeys(index for cell in request.cells() for index in used(cell, models)))
    bases = [index for index, (kind, _) in enumerate(models) if kind == BASE]
    if not bases:
        raise InvalidArgument(f"models names no checkpoint of type {BASE}")
    named = "override_settings.sd_model_checkpoint"
    found = [find(models, BASE, request.model_name, named) if request.model_name else bases[0]]
    found += [find(models, BASE, name, field) for field, name in request.other_checkpoints]
    found += _vae(request, models)
    found += [find(models, NETWORK_TYPES[tag.kind], tag.name, str(tag)) for tag in request.all_networks]
    for index, unit in enumerate(request.controlnet):
        found.append(find(models, CONTROLNET, unit.model, f"controlnet unit {index}"))
    text = request.all_text.lower().replace("\\", "")  # before brackets that are text
    found += [i for i, (kind, name) in enumerate(models) if kind == EMBEDDING and _is_said(stem(name).lower(), text)]
    return found


def _is_said(word: str, text: str) -> bool:
    """Whether a text has a word that is no part of a longer one, as tokens have it."""
    if word not in text:
        return False
    before = r"(?<![^\W\d_])" if word[0].isalpha() else ""
    after = r"(?![^\W\d_])" if word[-1].isalpha() else ""
    return re.search(before + re.escape(word) + after, text) is not None


@lru_cache(maxsize=4096)  # each name is asked for by each of a plot's cells
def stem(name: str) -> str:
    """A file's name as prompts have it: without folder, extension, and the hash that A1111 shows behind it."""
    return PurePosixPath(_without_hash(name)).stem


def _without_hash(name: str) -> str:
    shown_hash = _HASH.search(name)
    return name[: shown_hash.start()].rstrip() if shown_hash else name


def _vae(request: Generation, models: Sequence[tuple[str, str]]) -> list[int]:
    if request.vae_name == "None":
        return []
    if request.vae_name not in {"", "Automatic"}:
        return [find(models, VAE, request.vae_name, "override_settings.sd_vae")]
    return [index for index, (kind, name) in enumerate(models) if kind == VAE and name not in PSEUDO_VAES][:1]


def find(models: Sequence[tuple[str, str]], kind: str, name: str, field: str) -> int:
    """The position of a model by its file's name or stem, of a ControlNet also by its beginning. `field` is what names
    it. What follows a dot may be a version as well as an extension.

    Raises:
        InvalidArgument: it is not among them.
    """
    asked, name = name, _ALIASES.get(name, name)
    same_kind = {index: model for index, (own_kind, model) in enumerate(models) if own_kind == kind}
    bare = PurePosixPath(_without_hash(name)).name
    for wanted, known in ((name, str), (name, stem), (bare, str), (bare, stem), (stem(name), stem)):
        for index, model in same_kind.items():
            if known(model) == wanted:
                return index
    for beginning in (bare, stem(name)) if kind == CONTROLNET else ():
        for index, model in same_kind.items():
            if model.startswith(beginning):
                return index
    there = ", ".join(same_kind.values()) or "none"
    if kind == UPSCALER:
        built_in = (*LATENT_UPSCALERS, *PIXEL_UPSCALERS) if field == "hr_upscaler" else PIXEL_UPSCALERS
        there += f"; built in: {', '.join(built_in)}"
    asked += "" if asked == name else f" ({name})"
    raise InvalidArgument(f"{field} names {asked}, which is not among the job's models of type {kind}; there: {there}")
