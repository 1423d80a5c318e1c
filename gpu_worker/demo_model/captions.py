"""How people would ask for a scene: many wordings, and around them the words that prompts are full of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_worker.demo_model.scenes import Scene

_WORDINGS = (
    "{figure} on {ground}{place}",
    "{figure} on {a_ground} background{place}",
    "{figure}{place}, on {a_ground} ground",
    "{figure}{place} on {a_ground} background",
    "{bare}, {ground} background{place}",
    "{a_ground} background with {figure}{place}",
)
_PLACES = {
    "middle": ("in the middle", "in the center"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "at the top"),
    "bottom": ("at the bottom", "at the bottom"),
}
BEGINNINGS = (
    "a photo of",
    "a picture of",
    "an image of",
    "a painting of",
    "a drawing of",
    "an illustration of",
    "a rendering of",
    "a close-up of",
    "a sketch of",
    "a poster of",
    "a photograph of",
    "a beautiful picture of",
)
PRAISE = (
    "masterpiece",
    "best quality",
    "high quality",
    "highres",
    "absurdres",
    "ultra detailed",
    "highly detailed",
    "intricate details",
    "sharp focus",
    "4k",
    "8k",
    "uhd",
    "hdr",
    "professional",
    "award winning",
    "trending on artstation",
    "octane render",
    "unreal engine",
    "digital art",
    "concept art",
    "vector art",
    "flat design",
    "minimalist",
    "simple",
    "clean lines",
    "cinematic lighting",
    "studio lighting",
    "soft light",
    "volumetric lighting",
    "photorealistic",
    "realistic",
    "hyperrealistic",
    "oil painting",
    "watercolor",
    "anime style",
    "35mm photograph",
    "depth of field",
    "bokeh",
    "film grain",
    "vivid colors",
    "beautiful",
    "elegant",
    "smooth",
    "very aesthetic",
    "by a famous artist",
    "wallpaper",
)
BLAME = (
    "blurry",
    "low quality",
    "worst quality",
    "lowres",
    "bad anatomy",
    "deformed",
    "ugly",
    "watermark",
    "signature",
    "text",
    "jpeg artifacts",
    "cropped",
    "out of frame",
    "noise",
    "duplicate",
)
_MAX_AROUND = 5


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in some wording; it names size and place or leaves them open, and may have words around it."""
    names_size, names_place, has_words_around = rng.random(3) < 0.5
    text = worded(scene, int(rng.integers(len(_WORDINGS))), names_size, names_place, int(rng.integers(2)))
    return dressed(text, rng, BEGINNINGS, PRAISE) if has_words_around else text


def worded(scene: Scene, wording: int, names_size: bool = False, names_place: bool = False, place: int = 0) -> str:
    """The scene in one of the wordings, without anything around it."""
    bare = f"{scene.size} {scene.colour} {scene.shape}" if names_size else f"{scene.colour} {scene.shape}"
    return _WORDINGS[wording].format(
        figure=_with_article(bare),
        bare=bare,
        ground=scene.ground,
        a_ground=_with_article(scene.ground),
        place=f" {_PLACES[scene.position][place]}" if names_place else "",
    )


def dressed(text: str, rng: np.random.Generator, beginnings: Sequence[str], around: Sequence[str]) -> str:
    """The text with words before it, behind it, or both."""
    before, behind = [(True, False), (False, True), (True, True)][rng.integers(3)]
    if before:
        before_it = f"{rng.choice(beginnings)} " if rng.random() < 0.6 else f"{_some(around, rng)}, "
        text = before_it + text
    return f"{text}, {_some(around, rng)}" if behind else text


def nothing(rng: np.random.Generator) -> str:
    """A text that asks for no scene: empty, or words of praise or blame as negative prompts have them."""
    return "" if rng.random() < 0.5 else _some(PRAISE if rng.random() < 0.3 else BLAME, rng)


def _some(words: Sequence[str], rng: np.random.Generator) -> str:
    return ", ".join(rng.choice(words, rng.integers(1, _MAX_AROUND + 1), replace=False))


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
