"""img2img: a picture from a picture and a text; with a mask, only that part of it is painted anew."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from services.common.payloads import pictures, plots
from services.common.payloads.generation import MAX_STRENGTH, Generation, stretched
from services.common.payloads.showing import says

JUST_RESIZE, CROP_AND_RESIZE, RESIZE_AND_FILL, LATENT_UPSCALE = range(4)
FILL, ORIGINAL, LATENT_NOISE, LATENT_NOTHING = range(4)


class Img2Img(Generation):
    """An img2img payload. Several `init_images` are a batch of one picture each."""

    without_effect: ClassVar[frozenset[str]] = Generation.without_effect | {"image_cfg_scale"}

    has_picture: ClassVar[bool] = True

    init_images: list[str] = Field(min_length=1, max_length=8)
    denoising_strength: float = Field(0.75, ge=0, le=1)
    # All steps are made, on a schedule that is as much longer: `override_settings.img2img_fix_steps`.
    fix_steps: bool = False
    resize_mode: int = Field(JUST_RESIZE, ge=0, le=3)
    initial_noise_multiplier: float = Field(1.0, ge=0, le=2)
    # White is painted anew.
    mask: str | None = None
    # The deviation of the blur of the mask's edge, in pixels.
    mask_blur_x: int = Field(4, ge=0, le=64)
    mask_blur_y: int = Field(4, ge=0, le=64)
    # What the masked part begins as.
    inpainting_fill: int = Field(FILL, ge=0, le=3)
    # Only the masked part and some pixels around it are scaled to the job's size, painted, and put back.
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = Field(0, ge=0, le=1024)
    inpainting_mask_invert: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_picture_for_each_row(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = dict(fields)
        if says(given.get("latent_mask")):
            raise ValueError("latent_mask is not supported; use mask")
        if (blur := given.pop("mask_blur", None)) is not None:
            given |= {"mask_blur_x": blur, "mask_blur_y": blur}
        images = given.get("init_images")
        if isinstance(images, list) and len(images) > 1:
            given["batch_size"] = len(images)
        return given

    @field_validator("init_images")
    @classmethod
    def _readable(cls, images: list[str]) -> list[str]:
        for index, image in enumerate(images):
            pictures.check(image, f"init_images[{index}]")
        return images

    @field_validator("mask")
    @classmethod
    def _readable_mask(cls, mask: str | None) -> str | None:
        if mask:
            pictures.check(mask, "mask")
        return mask or None

    @model_validator(mode="after")
    def _possible(self) -> Img2Img:
        _ = self.schedule_steps
        if self.plot is not None and len(self.init_images) > 1:
            raise ValueError(f"{plots.SCRIPT}: it paints on one picture, and init_images has {len(self.init_images)}")
        return self

    @property
    def num_steps(self) -> int:
        """Steps that the denoising strength leaves; A1111 makes one more than diffusers.

        That holds of its k-diffusion samplers. DDIM and PLMS (modules/sd_samplers_timesteps.py) cut their list in
        another place and make two less, 14 of 20 steps at 0.75, the first of them one step below the noise that was
        added; and in txt2img 19 of 20. Here all make as many, as diffusers' pipelines do.
        """
        return self.steps if self.fix_steps else int(min(self.denoising_strength, MAX_STRENGTH) * self.steps) + 1

    @property
    def schedule_steps(self) -> int:
        """More than `steps` where all of those are made."""
        return stretched(self.steps, self.denoising_strength) if self.fix_steps else self.steps

    def echo(self) -> dict[str, Any]:
        """Without the pictures."""
        return super().echo() | {"init_images": None, "mask": None}
