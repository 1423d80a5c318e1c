"""txt2img: a picture from a text."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from payloads.generation import Generation


class Txt2Img(Generation):
    """A txt2img payload."""

    without_effect: ClassVar[frozenset[str]] = Generation.without_effect | {"denoising_strength"}

    @model_validator(mode="before")
    @classmethod
    def _without_second_pass(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get("enable_hr"):
            raise ValueError("enable_hr true: it is not supported yet; set it to false")
        return fields
