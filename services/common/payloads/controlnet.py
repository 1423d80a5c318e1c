"""ControlNet units as the extension's API sends them: a model, what it looks at, and how much it may say when.

What prepares the picture (`module`) must need no weights; those that do, or that look into the guidance itself
(tile_colorfix+sharp), are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, field_validator

from services.common.payloads import pictures
from services.common.payloads.showing import OFF, says, shown

ResizeMode = Literal["Just Resize", "Crop and Resize", "Resize and Fill"]
ControlMode = Literal["Balanced", "My prompt is more important", "ControlNet is more important"]
Passes = Literal["Both", "Low res only", "High res only"]
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
STRETCHED, CROPPED, FILLED = RESIZE_MODES
CONTROL_MODES: tuple[ControlMode, ...] = get_args(ControlMode)
BALANCED, PROMPT, CONTROL = CONTROL_MODES
PASSES: tuple[Passes, ...] = get_args(Passes)
BOTH, LOW_RES, HIGH_RES = PASSES
INPAINT_ONLY = "inpaint_only"
INPAINT = ("inpaint", INPAINT_ONLY)
MAX_UNITS = 10
_NOTHING = (None, "", "None", "none")
# Other spellings of the extension's API.
_FIELDS = {"input_image": "image", "mask_image": "mask", "guidance": "guidance_end"}
# Fields of the extension that say how it works, saves memory or shows itself.
_WITHOUT_EFFECT = frozenset({
    "batch_images", "enabled", "inpaint_crop_input_image", "input_mode", "is_ui", "loopback", "low_vram", "lowvram",
    "output_dir", "pixel_perfect",
})  # fmt: skip
_DEFAULTS = {"pulid_mode": "Fidelity", "union_control_type": "Unknown"}
_VALUES = {
    "Scale to Fit (Inner Fit)": CROPPED,
    "Inner Fit (Scale to Fit)": CROPPED,
    "Outer Fit (Shrink to Fit)": FILLED,
    "Envelope (Outer Fit)": FILLED,
}
_MODULES = {"inpaint_global_harmonious": "inpaint", "t2ia_color_grid": "color"}


@dataclass(frozen=True)
class Preprocessor:
    """Default, least and largest value of each threshold that it has. Beyond its bounds the default counts, as in the
    extension."""

    thresholds: tuple[tuple[float, float, float], ...] = ()

    def value(self, index: int, given: float | None) -> float:
        """The threshold of that index; 0 where it has none."""
        if index >= len(self.thresholds):
            return 0.0
        default, least, largest = self.thresholds[index]
        return default if given is None or not least <= given <= largest else given


PREPROCESSORS = {
    "none": Preprocessor(),
    "canny": Preprocessor(((100, 1, 255), (200, 1, 255))),
    "invert": Preprocessor(),
    "threshold": Preprocessor(((127, 0, 255),)),
    "lineart_standard": Preprocessor(),
    "scribble_xdog": Preprocessor(((32, 1, 64),)),
    "blur_gaussian": Preprocessor(((9, 0.01, 64),)),
    "tile_resample": Preprocessor(((1, 1, 8),)),
    "tile_colorfix": Preprocessor(((8, 3, 32),)),
    "shuffle": Preprocessor(),
    "color": Preprocessor(),
    "recolor_luminance": Preprocessor(((1, 0.1, 2),)),
    "recolor_intensity": Preprocessor(((1, 0.1, 2),)),
    "inpaint": Preprocessor(),
    "inpaint_only": Preprocessor(),
}


class Unit(BaseModel):
    """A unit that is on. Pictures are base64; where there is none, img2img's own is looked at."""

    model: str
    # What prepares the picture, and its thresholds.
    module: str = "none"
    threshold_a: float = Field(-1, validate_default=True)
    threshold_b: float = Field(-1, validate_default=True)
    # Pixels of the shorter side at which the module looks at the picture; 0: as many as the job has.
    processor_res: int = Field(512, ge=0, le=2048)
    image: str | None = None
    mask: str | None = None
    weight: float = Field(1.0, ge=0, le=2)
    # The part of the steps in which it has a say.
    guidance_start: float = Field(0.0, ge=0, le=1)
    guidance_end: float = Field(1.0, ge=0, le=1)
    resize_mode: ResizeMode = CROPPED
    control_mode: ControlMode = BALANCED
    # In which of two passes.
    hr_option: Passes = BOTH
    # What it looks at is a picture of the result.
    save_detected_map: bool = True

    @field_validator("module")
    @classmethod
    def _known(cls, module: str) -> str:
        if module not in PREPROCESSORS:
            possible = ", ".join(PREPROCESSORS)
            raise ValueError(f"the module {shown(module)} cannot be run here; possible: {possible}")
        return module

    @field_validator("image", "mask")
    @classmethod
    def _readable(cls, picture: str | None, info: Any) -> str | None:
        if picture is not None:
            pictures.check(picture, info.field_name)
        return picture

    @field_validator("guidance_end")
    @classmethod
    def _not_before_its_start(cls, end: float, info: Any) -> float:
        start = info.data.get("guidance_start", 0.0)  # that of none where it is wrong
        if end < start:
            raise ValueError(f"guidance_end {end} lies before guidance_start {start}: {start} to 1 is possible")
        return end

    @field_validator("threshold_a", "threshold_b", mode="before")
    @classmethod
    def _within_bounds(cls, given: Any, info: Any) -> float:
        module = PREPROCESSORS.get(info.data.get("module"), Preprocessor())  # that of none where it is wrong
        index = int(info.field_name == "threshold_b")
        try:
            return module.value(index, float(given))
        except (TypeError, ValueError, OverflowError):  # no number
            return module.value(index, None)

    def acts_in(self, step: int, num_steps: int) -> bool:
        """Whether it has a say in that step, counted from 0."""
        return self.weight > 0 and self.guidance_start <= step / num_steps <= self.guidance_end


def units(arguments: list[Any]) -> list[dict[str, Any]]:
    """The fields of those units that are on: one is, unless it says otherwise, when it has a model.

    Raises:
        ValueError: a unit that is on cannot be had; the message names it by its place in the list.
    """
    found = []
    for index, given in enumerate(arguments):
        if _is_on(given):
            said = {_FIELDS.get(name) or name: value for name, value in given.items() if value not in (None, "")}
            unit = _unit(f"controlnet unit {index}", said)
            found += [unit] if unit else []
    return found


def unused(arguments: list[Any]) -> list[str]:
    """The names of what does nothing: units that are on and have a module, but no model, and fields that say something
    and are not known."""
    found = []
    for index, given in enumerate(arguments):
        if not _is_on(given):
            continue
        name = f"controlnet unit {index}"
        if given.get("model") not in _NOTHING:
            known = Unit.model_fields.keys() | _FIELDS.keys() | _WITHOUT_EFFECT
            said = [field for field, value in given.items() if says(value) and value != _DEFAULTS.get(field)]
            found += [f"{name}: {field}" for field in said if field not in known]
        elif given.get("module") not in _NOTHING:
            found.append(f"{name}, which has no model")
    return found


def _is_on(given: Any) -> bool:
    return isinstance(given, dict) and given.get("enabled") not in OFF


def _unit(name: str, given: dict[str, Any]) -> dict[str, Any] | None:
    fields = {field: value for field, value in given.items() if field in Unit.model_fields and value is not None}
    module = str(fields.get("module", "none"))
    if module.endswith(")"):
        module = module.partition("(")[0]
    module = module.strip().lower()
    module = _MODULES.get(module, module)
    model = str(fields.get("model", "None"))
    if module.startswith(("reference", "revision", "ip-adapter")) or "ip-adapter" in model.lower():
        raise ValueError(f"{name}: {shown(module)} is no ControlNet, and cannot be run here; disable the unit")
    if model in _NOTHING:
        return None
    for field, choices in (("resize_mode", RESIZE_MODES), ("control_mode", CONTROL_MODES), ("hr_option", PASSES)):
        if field in fields:
            fields[field] = _choice(f"{name}: {field}", fields[field], choices)
    is_perfect = says(given.get("pixel_perfect"))
    if is_perfect or fields.get("processor_res", 0) == -1:
        fields["processor_res"] = 0 if is_perfect else 512
    return fields | {"module": module, "model": model} | _pictures(name, given)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of the choices, by its words or its place."""
    if isinstance(value, list) and len(value) == 1:  # as webuiapi.py writes "Balanced", for a comma too many
        value = value[0]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return choices[value]
    known = {choice.lower(): choice for choice in choices}
    found = known.get(str(_VALUES.get(value, value) if isinstance(value, str) else value).lower())
    if found is None:
        raise ValueError(f"{name} {shown(value)} is not known; possible: {', '.join(choices)}")
    return found


def _pictures(name: str, given: dict[str, Any]) -> dict[str, str | None]:
    """The picture and the mask, which a client may send as one object.

    Raises:
        ValueError: one is no text.
    """
    image: Any = given.get("image")
    mask: Any = given.get("mask")
    if isinstance(image, list | tuple):
        image, mask = (*image, None, None)[:2]
    if isinstance(image, dict):
        image, mask = image.get("image"), image.get("mask", mask)
    found = {"image": image or None, "mask": mask or None}
    for field, text in found.items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name}: {field} is no picture in base64")
    return found
