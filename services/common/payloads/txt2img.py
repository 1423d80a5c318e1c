"""txt2img: a picture from a text, and with `enable_hr` a second pass over it at a larger size."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from services.common.payloads import prompts, samplers
from services.common.payloads.generation import MAX_SIDE, REFINE_FIRST, REFINE_SECOND, Generation, stretched
from services.common.payloads.showing import says
from services.common.payloads.spelling import CHECKED
from services.common.payloads.upscalers import LATENT_UPSCALERS, PIXEL_UPSCALERS

_SAME = (None, "", "Use same checkpoint", "Use same sampler", "Use same scheduler", "None")


class SecondPass(Generation):
    """The second pass of a txt2img job: the last `num_left` of `steps`, from the first pass's picture."""

    num_left: int
    steps_before: int

    @property
    def refiner(self) -> str:
        """None where only the first pass has one."""
        return "" if self.refiner_pass == REFINE_FIRST else self.refiner_checkpoint

    @property
    def num_steps(self) -> int:
        """Steps that are made."""
        return self.num_left

    @property
    def prompt_steps(self) -> int:
        """Steps that a changing prompt counts."""
        return self.num_left


class Txt2Img(Generation):
    """A txt2img payload. The names of the second pass begin with `hr_`; what is empty there is as in the first."""

    without_effect: ClassVar[frozenset[str]] = Generation.without_effect | {"hr_scheduler"}

    enable_hr: bool = False
    denoising_strength: float = Field(0.75, ge=0, le=1)
    hr_scale: float = Field(2.0, ge=1, le=8)
    # Pixels; 0 follows from the other one, and both are 0 where hr_scale counts.
    hr_resize_x: int = Field(0, ge=0, le=MAX_SIDE)
    hr_resize_y: int = Field(0, ge=0, le=MAX_SIDE)
    hr_upscaler: str = "Latent"
    hr_second_pass_steps: int = Field(0, ge=0, le=150)
    hr_sampler_name: str = ""
    hr_checkpoint_name: str = ""
    hr_prompt: str = ""
    hr_negative_prompt: str = ""

    @model_validator(mode="before")
    @classmethod
    def _second_pass_as_one(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = dict(fields)
        if not says(given.get("enable_hr")):
            return {name: value for name, value in given.items() if not name.startswith("hr_")}
        for field in ("hr_checkpoint_name", "hr_scheduler"):
            if given.get(field) in _SAME:
                given.pop(field, None)
        upscaler = given.get("hr_upscaler") or "Latent"
        return given | {"hr_sampler_name": _hr_sampler(given), "hr_upscaler": upscaler}

    @model_validator(mode="after")
    def _second_pass_possible(self) -> Txt2Img:
        if not self.enable_hr:
            return self
        (width, height), (full_width, full_height) = self.hr_size, self.hr_full_size
        if max(full_width, full_height) > MAX_SIDE or min(width, height) < 8:
            raise ValueError(
                f"the second pass has {full_width}x{full_height} pixels; each way at most {MAX_SIDE} are possible"
            )
        stretched(self._hr_steps, self.denoising_strength)
        return self

    @property
    def hr_full_size(self) -> tuple[int, int]:
        """Width and height that the first pass's picture is scaled to: its own proportions, and no less than wanted."""
        x, y = self.hr_resize_x, self.hr_resize_y
        if not x and not y:
            return _whole(int(self.width * self.hr_scale), int(self.height * self.hr_scale))
        by_width = x, x * self.height // self.width
        by_height = y * self.width // self.height, y
        if not x or not y:
            return _whole(*(by_width if x else by_height))
        return _whole(*(by_width if by_width[1] >= y else by_height))

    @property
    def hr_size(self) -> tuple[int, int]:
        """Width and height of the second pass: the middle of the scaled picture."""
        full = self.hr_full_size
        return _whole(self.hr_resize_x or full[0], self.hr_resize_y or full[1])

    @property
    def upscalers(self) -> list[tuple[str, str]]:
        """The upscaler of the second pass, where it is a model."""
        if not self.enable_hr or self.hr_upscaler in (*LATENT_UPSCALERS, *PIXEL_UPSCALERS):
            return []
        return [("hr_upscaler", self.hr_upscaler)]

    @property
    def final_size(self) -> tuple[int, int]:
        """That of the last pass."""
        return self.hr_size if self.enable_hr else super().final_size

    @property
    def second_pass(self) -> SecondPass | None:
        """The second pass as a request of its own."""
        if not self.enable_hr:
            return None
        width, height = self.hr_size
        changes = {
            "prompt": self.hr_prompt or self.prompt,
            "negative_prompt": self.hr_negative_prompt or self.negative_prompt,
            "sampler_name": self.hr_sampler_name or self.sampler_name,
            "model_name": self.hr_checkpoint_name or self.model_name,
            "width": width,
            "height": height,
            # A1111 makes all steps of the second pass, on a schedule that is as much longer as strength is less than 1.
            "steps": stretched(self._hr_steps, self.denoising_strength),
            "num_left": self._hr_steps,
            "steps_before": self.steps,
        }
        return SecondPass.model_construct(**{name: getattr(self, name) for name in Generation.model_fields} | changes)

    @property
    def sampler_names(self) -> list[str]:
        """Those of both passes."""
        return [self.sampler_name, self.hr_sampler_name] if self.hr_sampler_name else [self.sampler_name]

    @property
    def refiner(self) -> str:
        """None where only the second pass has one, as A1111 has it if nothing else is said."""
        return "" if self.enable_hr and self.refiner_pass == REFINE_SECOND else self.refiner_checkpoint

    @property
    def other_checkpoints(self) -> list[tuple[str, str]]:
        """Those of both passes."""
        second = self.second_pass
        own = [("hr_checkpoint_name", self.hr_checkpoint_name)] if second and self.hr_checkpoint_name else []
        return super().other_checkpoints + own + (second.other_checkpoints if second else [])

    @property
    def total_steps(self) -> int:
        """Steps of both passes, of each image."""
        return self.steps + (self._hr_steps if self.enable_hr else 0)

    @property
    def all_networks(self) -> tuple[prompts.NetworkTag, ...]:
        """The LoRAs and hypernetworks of both passes."""
        second = self.second_pass
        return self.networks + (second.networks if second else ())

    @property
    def all_text(self) -> str:
        """The prompts of both passes, without tags."""
        second = self.second_pass
        return f"{super().all_text} {second.all_text}" if second else super().all_text

    @property
    def num_pixels(self) -> int:
        """Pixels of a step of the larger pass, over all its rows."""
        second = self.second_pass
        return max(super().num_pixels, second.num_pixels if second else 0)

    @property
    def cost_seconds(self) -> float:
        """The estimated GPU time of both passes, up to a constant factor."""
        second = self.second_pass
        return super().cost_seconds + (second.cost_seconds if second else 0)

    @property
    def _hr_steps(self) -> int:
        """As in A1111, a denoising strength of 0 leaves the scaled picture as it is."""
        return (self.hr_second_pass_steps or self.steps) if self.denoising_strength else 0


def _hr_sampler(given: dict[str, Any]) -> str:
    """The second pass's sampler with its schedule, each of which is the first one's where it is not said; nothing where
    neither is."""
    name, schedule = given.get("hr_sampler_name"), given.get("hr_scheduler")
    first = given.get("sampler_name") or given.get("sampler_index") or "Euler"
    if name in _SAME:
        return samplers.find(samplers.without_schedule(first), schedule) if schedule else ""
    if not schedule and given.get("form") != CHECKED:  # there the name says it
        schedule = samplers.schedule_of(first, given.get("scheduler"))
    return samplers.find(name, schedule, "hr_sampler_name")


def _whole(width: int, height: int) -> tuple[int, int]:
    """Down to whole latents."""
    return width // 8 * 8, height // 8 * 8
