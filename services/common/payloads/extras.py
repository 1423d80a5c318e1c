"""Pictures that are changed without a model: made larger (extra-single-image, extra-batch-images), or cut out of their
background (rembg)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from services.common.payloads import pictures
from services.common.payloads.base import Payload
from services.common.payloads.generation import MAX_IMAGES, MAX_SIDE
from services.common.payloads.showing import says, shown
from services.common.payloads.upscalers import PIXEL_UPSCALERS

BY_FACTOR, TO_SIZE = range(2)
_SECONDS_PER_PICTURE = 1.0
_MODEL_FACTOR = 4
_FACES = ("gfpgan_visibility", "codeformer_visibility")


class Edit(Payload):
    """A change of pictures that needs no GPU."""

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """The pictures in base64, each behind the name of its field."""
        raise NotImplementedError

    @property
    def num_images(self) -> int:
        """One for each that was sent."""
        return len(self.pictures)

    @property
    def cost_seconds(self) -> float:
        """Little, unless a model is at work."""
        return _SECONDS_PER_PICTURE * self.num_images * (1 + _MODEL_FACTOR * len(self.upscalers))


class Upscale(Edit):
    """What both tasks have: a factor or a size, and up to two upscalers whose results are blended."""

    resize_mode: int = Field(BY_FACTOR, ge=0, le=1)
    upscaling_resize: float = Field(2.0, ge=1, le=8)
    upscaling_resize_w: int = Field(512, ge=1, le=MAX_SIDE)
    upscaling_resize_h: int = Field(512, ge=1, le=MAX_SIDE)
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _without_faces(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in fields.items() if value is not None}
        for name in _FACES:
            if given.get(name):
                raise ValueError(
                    f"{name} {shown(given[name])}: faces are not restored here, for want of weights; set it to 0"
                )
        return given

    @model_validator(mode="after")
    def _bounded(self) -> Upscale:
        for name, text in self.pictures:
            width, height = self.size_of(*pictures.check(text, name))
            if self.upscaler_1 != "None" and width * height > pictures.MAX_PIXELS:
                raise ValueError(
                    f"{name} would have {width}x{height} pixels; at most {pictures.MAX_PIXELS} pixels are possible"
                )
        return self

    @property
    def upscalers(self) -> list[tuple[str, str]]:
        """Of those that are used."""
        named = [("upscaler_1", self.upscaler_1)]
        if self.upscaler_1 != "None" and self.extras_upscaler_2_visibility:
            named.append(("upscaler_2", self.upscaler_2))
        return [(field, name) for field, name in named if name not in PIXEL_UPSCALERS]

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """The size that a picture is scaled to: whole multiples of 8, and at least a size that was asked for."""
        factor, least = self.upscaling_resize, (8, 8)
        if self.resize_mode == TO_SIZE:
            least = self.upscaling_resize_w, self.upscaling_resize_h
            factor = max(least[0] / width, least[1] / height)
        # A1111 rounds down here too, and leaves a black edge where a side is not a multiple of 8.
        wide, high = (
            max(int(side * factor) // 8, -(-wanted // 8)) * 8
            for side, wanted in zip((width, height), least, strict=True)
        )
        return wide, high


class UpscaleOne(Upscale):
    """An extra-single-image payload."""

    image: str

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """The one."""
        return [("image", self.image)]

    def echo(self) -> dict[str, Any]:
        """Without the picture."""
        return super().echo() | {"image": None}


class NamedPicture(BaseModel):
    """A picture of a batch; its name is the client's."""

    data: str
    name: str = ""


class UpscaleMany(Upscale):
    """An extra-batch-images payload."""

    imageList: list[NamedPicture] = Field(min_length=1, max_length=MAX_IMAGES)  # noqa: N815 - A1111's spelling

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """All of the batch."""
        return [(f"imageList[{index}].data", picture.data) for index, picture in enumerate(self.imageList)]

    def echo(self) -> dict[str, Any]:
        """Without the pictures."""
        return super().echo() | {"imageList": [{"name": picture.name} for picture in self.imageList]}


class RemoveBackground(Edit):
    """A rembg payload. `model` is one of the job's models of type rembg; without one, GrabCut takes its place."""

    input_image: str
    model: str = ""
    return_mask: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_matting(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if says(fields.get("alpha_matting")):
            raise ValueError("alpha_matting true: edges are not matted here; set it to false")
        return {name: value for name, value in fields.items() if value is not None}

    @model_validator(mode="after")
    def _readable(self) -> RemoveBackground:
        for name, text in self.pictures:
            pictures.check(text, name)
        return self

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """The one."""
        return [("input_image", self.input_image)]

    def echo(self) -> dict[str, Any]:
        """Without the picture."""
        return super().echo() | {"input_image": None}
