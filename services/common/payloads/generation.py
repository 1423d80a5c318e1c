"""What txt2img and img2img have in common: the fields of contract 10.4 with A1111's defaults, and their bounds.

How a client spells them is read in `spelling`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from services.common.payloads import plots, prompts
from services.common.payloads.base import Payload
from services.common.payloads.controlnet import MAX_UNITS, Unit
from services.common.payloads.samplers import sampler_of
from services.common.payloads.spelling import CHECKED, WITHOUT_EFFECT, checked_form

MAX_IMAGES = 64
MAX_SIDE = 4096
MAX_STRENGTH = 0.999  # A1111's, so that 1 means all steps and not one more
_MAX_SCHEDULE = 1000  # steps that a noise schedule can have
_MAX_PLOT_PIXELS = 2**26
_LARGEST_EXACT_INTEGER = 2**53 - 1  # payloads travel as JSON numbers
# GPU-seconds of one step at 512x512. Only ratios between jobs matter to the queue, so any constant will do.
_STEP_SECONDS = 0.05
_CONTROLNET_PART = 0.4  # of a UNet: its way down and its middle
REFINE_FIRST: Final = "first pass"
REFINE_SECOND: Final = "second pass"
# Pixels, down to whole latents. A1111 does that with the latents only: it scales an init image, and a second pass, from
# the size that was sent.
Side = Annotated[int, Field(ge=64, le=MAX_SIDE), AfterValidator(lambda side: side // 8 * 8)]


class Generation(Payload):
    """One job's request. Sizes are in pixels; those of `seed_resize_from` are used where both are > 0."""

    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT
    # Whether the job paints on a picture.
    has_picture: ClassVar[bool] = False

    # Marks the form that was checked. Without it a payload is a client's, which has none of `spelling`'s own.
    form: Literal["checked"] = CHECKED
    # Names of what the payload has and nothing here uses; goes into the result's `info`.
    ignored: list[str] = Field(default=[])
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, le=_LARGEST_EXACT_INTEGER)
    subseed: int = Field(-1, ge=-1, le=_LARGEST_EXACT_INTEGER)
    subseed_strength: float = Field(0.0, ge=0, le=1)
    seed_resize_from_w: int = Field(0, ge=-1, le=MAX_SIDE)
    seed_resize_from_h: int = Field(0, ge=-1, le=MAX_SIDE)
    # The sampler with its schedule, such as `DPM++ 2M Karras`.
    sampler_name: str = "Euler"
    steps: int = Field(50, ge=1, le=150)
    cfg_scale: float = Field(7.0, ge=0, le=30)
    width: Side = 512
    height: Side = 512
    batch_size: int = Field(1, ge=1, le=8)
    n_iter: int = Field(1, ge=1, le=MAX_IMAGES)
    # The picture can be laid beside itself.
    tiling: bool = False
    # The share of new noise in a step, of samplers that have a choice; without one, that of the settings.
    eta: float | None = Field(None, ge=0, le=1)
    # `override_settings.eta_ancestral` and `.eta_ddim`.
    eta_ancestral: float = Field(1.0, ge=0, le=1)
    eta_ddim: float = Field(0.0, ge=0, le=1)
    # How much of their noise the steps of k-diffusion's samplers bring.
    s_noise: float = Field(1.0, ge=0, le=10)
    # Below this noise level every other evaluation goes without the negative prompt.
    s_min_uncond: float = Field(0.0, ge=0, le=1000)
    # Whose noise it is, by A1111's names: its CPU's, or its GPU's, also where that is drawn without one (NV). From
    # `override_settings.randn_source`.
    noise_source: Literal["CPU", "GPU", "NV"] = "CPU"
    # What is added to the seed for the noise of the sampler's steps: `override_settings.eta_noise_seed_delta`.
    noise_seed_delta: int = Field(0, ge=0, lt=2**32)
    # The layer of SD1.5's text encoder that is read, from its end: `override_settings.CLIP_stop_at_last_layers`.
    clip_skip: int = Field(1, ge=1, le=12)
    # Which of the job's models are used, where not the first: `override_settings.sd_model_checkpoint` and `.sd_vae`.
    model_name: str = ""
    vae_name: str = ""
    # Another checkpoint that goes on with the latents once so much of the steps is done; in which pass, where there are
    # two: `override_settings.hires_fix_refiner_pass`.
    refiner_checkpoint: str = ""
    refiner_switch_at: float = Field(0.8, ge=0, le=1)
    refiner_pass: Literal["first pass", "second pass", "both passes"] = REFINE_SECOND
    controlnet: list[Unit] = Field(default=[])
    # The request as many, whose pictures are a grid.
    plot: plots.Plot | None = None
    # The prompt's tags are taken out, and do nothing.
    disable_extra_networks: bool = False
    # Not A1111's: the job shares no step with others, and its picture repeats bit for bit.
    exclusive: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return checked_form(fields, cls.model_fields.keys(), cls.without_effect, cls.has_picture)

    @field_validator("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt", check_fields=False)
    @classmethod
    def _bounded_text(cls, text: str, info: Any) -> str:
        if len(text) > prompts.MAX_CHARACTERS:
            most = f"at most {prompts.MAX_CHARACTERS} are possible"
            raise ValueError(f"{info.field_name} has {len(text)} characters; {most}")
        return text

    @field_validator("prompt", "hr_prompt", check_fields=False)
    @classmethod
    def _few_parts(cls, text: str, info: Any) -> str:
        read = prompts.read(text)
        if (num_texts := len(prompts.joined_by_and(read.text))) > prompts.MAX_TEXTS:
            most = f"at most {prompts.MAX_TEXTS} are possible"
            raise ValueError(f"{info.field_name} joins {num_texts} texts with AND; {most}")
        if (num_networks := len(read.networks)) > prompts.MAX_NETWORKS:
            most = f"at most {prompts.MAX_NETWORKS} are possible"
            raise ValueError(f"{info.field_name} names {num_networks} LoRAs and hypernetworks; {most}")
        return text

    @model_validator(mode="after")
    def _bounded(self) -> Generation:
        if self.batch_size * self.n_iter > MAX_IMAGES:
            raise ValueError(
                f"batch_size {self.batch_size} times n_iter {self.n_iter} is {self.batch_size * self.n_iter} images; "
                f"at most {MAX_IMAGES} are possible"
            )
        for name in self.sampler_names:
            if self.noise_source != "CPU" and sampler_of(name).is_brownian:
                raise ValueError(
                    f"override_settings.randn_source {self.noise_source} does not go with {name}, for which it would "
                    "be drawn too slowly; CPU is possible"
                )
        if self.plot is not None:
            self._check_plot(self.plot)
        if len(self.controlnet) > MAX_UNITS:
            raise ValueError(f"{len(self.controlnet)} controlnet units are enabled; at most {MAX_UNITS} are possible")
        for index, unit in enumerate(self.controlnet):
            if unit.image is None and not self.has_picture:
                raise ValueError(f"controlnet unit {index} is enabled, but has no image")
        return self

    def _check_plot(self, plot: plots.Plot) -> None:
        num_pixels = plot.num_cells * self.final_size[0] * self.final_size[1]
        if plot.num_cells > MAX_IMAGES or plot.num_images > MAX_IMAGES:
            raise ValueError(
                f"{plots.SCRIPT}: {plot.num_cells} pictures and their grids; at most {MAX_IMAGES} are possible"
            )
        if num_pixels > _MAX_PLOT_PIXELS:
            raise ValueError(
                f"{plots.SCRIPT}: the grid has {num_pixels} pixels; at most {_MAX_PLOT_PIXELS} are possible"
            )

    def cells(self) -> list[Generation]:
        """The requests that the plot is made of, x by x, then y by y, then z by z; without a plot this one.

        Raises:
            ValidationError: one of them cannot be run.
        """
        if self.plot is None:
            return [self]
        return [type(self).model_validate(fields) for _, fields in self.cell_fields()]

    def cell_fields(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What tells each cell of the plot from the others, and its fields, not yet checked."""
        if self.plot is not None:  # the units are checked already, and their pictures large
            yield from self.plot.cells(self.model_dump() | {"controlnet": self.controlnet})

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        return self.width, self.height

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt counts. Nothing is left of it at a guidance scale of 1, by the weight of the text
        too; and 0, as few-step checkpoints are often asked for, means the same. Several texts need it."""
        (_, weight), *others = self.texts
        return bool(others) or (self.cfg_scale != 0 and self.cfg_scale * weight != 1)

    @property
    def sampler_names(self) -> list[str]:
        """Those of all passes."""
        return [self.sampler_name]

    @property
    def sampler_eta(self) -> float:
        """The sampler's eta, of one that has a choice."""
        if self.eta is not None:
            return self.eta
        return self.eta_ddim if self.sampler_name == "DDIM" else self.eta_ancestral

    @property
    def texts(self) -> list[tuple[str, float]]:
        """The texts that are joined by AND, without tags, each with its weight."""
        return prompts.joined_by_and(prompts.read(self.prompt).text)

    @property
    def negative_text(self) -> str:
        """The negative prompt without tags."""
        return prompts.read(self.negative_prompt).text

    @property
    def networks(self) -> tuple[prompts.NetworkTag, ...]:
        """The LoRAs and hypernetworks of the prompt."""
        return () if self.disable_extra_networks else prompts.read(self.prompt).networks

    @property
    def refiner(self) -> str:
        """The name of the refiner of this pass, or nothing."""
        return self.refiner_checkpoint

    @property
    def first_refined_step(self) -> int:
        """The number of the first step, from 0, that is the refiner's."""
        return next(
            (step for step in range(self.num_steps) if step / self.num_steps >= self.refiner_switch_at), self.num_steps
        )

    @property
    def other_checkpoints(self) -> list[tuple[str, str]]:
        """The names of the checkpoints beside the first, over all passes, each behind its field."""
        return [("refiner_checkpoint", self.refiner)] if self.refiner else []

    @property
    def num_painted(self) -> int:
        """How many pictures are painted."""
        return self.plot.num_cells if self.plot else self.batch_size * self.n_iter

    @property
    def num_images(self) -> int:
        """How many pictures the job makes: those, or the grids of a plot, and what ControlNet looked at."""
        painted = self.plot.num_images if self.plot else self.num_painted
        return painted + sum(unit.save_detected_map for unit in self.controlnet)

    @property
    def num_steps(self) -> int:
        """Denoising steps of each image."""
        return self.steps

    @property
    def total_steps(self) -> int:
        """Denoising steps of each image, over all passes."""
        return self.num_steps

    @property
    def prompt_steps(self) -> int:
        """Steps that a changing prompt counts: all of the schedule, as in A1111."""
        return self.steps

    @property
    def schedule_steps(self) -> int:
        """Steps of the sampler's schedule, of which the last `num_steps` are made."""
        return self.steps

    @property
    def first_step(self) -> int:
        """The sampler's step that each image begins with."""
        return self.schedule_steps - self.num_steps

    @property
    def num_pixels(self) -> int:
        """Pixels of a denoising step, over all its rows."""
        return self.width * self.height * self.batch_size * (len(self.texts) + self.is_guided)

    @property
    def cost_seconds(self) -> float:
        """The job's estimated GPU time, up to a constant factor."""
        step_seconds = _STEP_SECONDS * (1 + _CONTROLNET_PART * len(self.controlnet))
        return step_seconds * self.num_steps * self.num_painted * self.width * self.height / (512 * 512)

    @property
    def all_networks(self) -> tuple[prompts.NetworkTag, ...]:
        """The LoRAs and hypernetworks of all passes."""
        return self.networks

    @property
    def all_text(self) -> str:
        """The prompts of all passes, without tags."""
        return f"{prompts.read(self.prompt).text} {self.negative_text}"

    def echo(self) -> dict[str, Any]:
        """Without the pictures: they are large, and their owner has them."""
        units = [unit.model_dump() | {"image": None, "mask": None} for unit in self.controlnet]
        return super().echo() | {"controlnet": units}

    def seed_of(self, image: int) -> int:
        """The seed of an image: those of a variation share one, and differ in their subseeds."""
        return self.seed if self.subseed_strength else self.seed + image

    def subseed_of(self, image: int) -> int:
        """The subseed of an image."""
        return self.subseed + image


def stretched(num_steps: int, strength: float) -> int:
    """Steps of a schedule whose part from this denoising strength on has so many.

    Raises:
        ValueError: a schedule cannot have so many.
    """
    if strength * _MAX_SCHEDULE < num_steps:
        raise ValueError(
            f"denoising_strength {strength} is too little for {num_steps} steps: "
            f"from {num_steps / _MAX_SCHEDULE:g} on is possible"
        )
    return int(num_steps / min(strength, MAX_STRENGTH)) if num_steps else 0
