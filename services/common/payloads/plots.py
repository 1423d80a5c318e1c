"""A1111's script "x/y/z plot": one request as many that differ in up to three fields, and grids of their pictures.

Its arguments are positions; their order and the numbers of the axes are those of A1111 1.6 to 1.8. Written from its
behaviour, not its code.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from services.common.payloads.showing import OFF, says, shown

SCRIPT = "x/y/z plot"
NOTHING = "Nothing"
_PROMPT, _SEED = "Prompt S/R", "Seed"
_MAX_VALUES = 64
_MAX_LETTERS = 1000  # of a value, which may stand for each letter of a prompt


@dataclass(frozen=True)
class _Axis:
    """A field that an axis changes, and what its values are. Of some only the value is written beside the pictures."""

    field: str = ""
    type: Callable[[Any], Any] = str
    is_labelled: bool = True


_AXES = {
    NOTHING: _Axis(),
    _SEED: _Axis("seed", int),
    "Var. seed": _Axis("subseed", int),
    "Var. strength": _Axis("subseed_strength", float),
    "Steps": _Axis("steps", int),
    "Hires steps": _Axis("hr_second_pass_steps", int),
    "CFG Scale": _Axis("cfg_scale", float),
    _PROMPT: _Axis("prompt", is_labelled=False),
    "Sampler": _Axis("sampler_name", is_labelled=False),
    "Hires sampler": _Axis("hr_sampler_name"),
    "Checkpoint name": _Axis("model_name", is_labelled=False),
    "Clip skip": _Axis("clip_skip", int),
    "Denoising": _Axis("denoising_strength", float),
    "Eta": _Axis("eta", float),
    "Hires upscaler": _Axis("hr_upscaler"),
    "Refiner switch at": _Axis("refiner_switch_at", float),
    "VAE": _Axis("vae_name"),
    "Refiner checkpoint": _Axis("refiner_checkpoint", is_labelled=False),
}
# By A1111's numbers.
_TXT2IMG = {
    **dict(enumerate(list(_AXES)[:8])),
    9: "Sampler", 10: "Hires sampler", 11: "Checkpoint name", 21: "Eta", 22: "Clip skip", 23: "Denoising",
    26: "Hires upscaler", 27: "VAE", 35: "Refiner checkpoint", 36: "Refiner switch at",
}  # fmt: skip
_IMG2IMG = {
    **dict(enumerate(list(_AXES)[:5])),
    5: "CFG Scale", 7: _PROMPT, 9: "Sampler", 10: "Checkpoint name", 20: "Eta", 21: "Clip skip", 22: "Denoising",
    26: "VAE", 34: "Refiner checkpoint", 35: "Refiner switch at",
}  # fmt: skip
_NUMBER = r"[+-]?\d+(?:\.\d*)?"
_RANGE = re.compile(
    rf"(?P<first>{_NUMBER})\s*-\s*(?P<last>{_NUMBER})\s*"
    rf"(?:\(\s*(?P<step>[+-]\d+(?:\.\d*)?)\s*\)|\[\s*(?P<count>\d+)\s*\])?"
)


class Axis(BaseModel):
    """What changes along one direction of the grid."""

    name: str = NOTHING
    values: list[int | float | str] = Field(default=[""], min_length=1, max_length=_MAX_VALUES)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in _AXES:
            raise ValueError(f"name {shown(name)} cannot be varied here; possible: {', '.join(_AXES)}")
        return name

    @field_validator("values")
    @classmethod
    def _of_its_type(cls, values: list[int | float | str], info: Any) -> list[Any]:
        """JSON's numbers know no types."""
        if long := next((value for value in values if isinstance(value, str) and len(value) > _MAX_LETTERS), None):
            raise ValueError(f"a value has {len(long)} letters; at most {_MAX_LETTERS} are possible")
        axis = _AXES.get(info.data.get("name"))  # none where the name is wrong
        try:
            return [axis.type(value) for value in values] if axis else values
        except (ValueError, OverflowError):
            raise ValueError(f"values {shown(values)} cannot be read as those of {info.data['name']}") from None

    @property
    def labels(self) -> list[str]:
        """What is written beside the pictures."""
        if self.name == NOTHING:
            return [""]
        prefix = f"{self.name}: " if _AXES[self.name].is_labelled else ""
        return [f"{prefix}{round(value, 8) if isinstance(value, float) else value}" for value in self.values]

    def changes(self, index: int, before: dict[str, Any]) -> dict[str, Any]:
        """The fields with the value of that index, of a request with these before."""
        if self.name == NOTHING:
            return {}
        field, value = _AXES[self.name].field, self.values[index]
        if field in {"seed", "subseed"} and value == -1:
            return {field: before[field] + 1 + index}
        if self.name != _PROMPT:
            return {field: value}
        search, replacement = str(self.values[0]), str(self.values[index])
        return {name: before[name].replace(search, replacement) for name in ("prompt", "negative_prompt")}


class Plot(BaseModel):
    """A grid of pictures: x to the right, y downwards, and a grid for each z."""

    x: Axis = Axis()
    y: Axis = Axis()
    z: Axis = Axis()
    draw_legend: bool = True
    # Beside the whole grid: each of its pictures, and the grid of each z.
    include_lone_images: bool = False
    include_sub_grids: bool = False
    # Which directions have seeds of their own for each place.
    vary_seeds: list[Literal["x", "y", "z"]] = Field(default=[])
    margin_size: int = Field(0, ge=0, le=500)

    @property
    def num_cells(self) -> int:
        """Pictures that are painted."""
        return len(self.x.values) * len(self.y.values) * len(self.z.values)

    @property
    def num_grids(self) -> int:
        """Grids of the result."""
        return 1 + (len(self.z.values) if self.include_sub_grids else 0)

    @property
    def num_images(self) -> int:
        """Pictures of the result."""
        return self.num_grids + (self.num_cells if self.include_lone_images else 0)

    def cells(self, fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What tells each cell from others, and its fields: x by x, then y by y, then z by z. `fields` are those of the
        request."""
        width, height = len(self.x.values), len(self.y.values)
        for index in range(self.num_cells):
            places = index % width, index // width % height, index // width // height
            cell = fields | {"plot": None, "batch_size": 1, "n_iter": 1}
            for axis, place in zip((self.x, self.y, self.z), places, strict=True):
                cell |= axis.changes(place, cell)
            cell["seed"] += self._seed_offset(*places)
            names = [axis.labels[place] for axis, place in zip((self.x, self.y, self.z), places, strict=True)]
            yield ", ".join(name for name in names if name), cell

    def _seed_offset(self, x: int, y: int, z: int) -> int:
        width = len(self.x.values) if "x" in self.vary_seeds else 1
        height = len(self.y.values) if "y" in self.vary_seeds else 1
        offsets = {"x": x, "y": y * width, "z": z * width * height}
        return sum(offset for name, offset in offsets.items() if name in self.vary_seeds)


def plot_of(arguments: Any, fields: dict[str, Any], is_img2img: bool) -> dict[str, Any]:
    """The fields of the plot that the script's arguments ask for, of a payload with these fields.

    Raises:
        ValueError: an axis cannot be had, or its values cannot be read.
    """
    given = list(arguments) if isinstance(arguments, list) else []
    given += [None] * (18 - len(given))
    # 1.8 put three switches before the margin.
    has_varied = isinstance(given[13], bool)
    margin, is_csv = (given[16], given[17]) if has_varied else (given[13], given[14])
    plot: dict[str, Any] = {
        name: _axis(name.upper(), given[at : at + 3], bool(is_csv), fields, is_img2img)
        for name, at in (("x", 0), ("y", 3), ("z", 6))
    }
    vary = [name for name, flag in zip("xyz", given[13:16], strict=True) if has_varied and flag]
    if says(given[12]) and fields.get("seed", -1) == -1:  # no fixed seed: each cell its own
        vary = ["x", "y", "z"]
    switches = {"draw_legend": given[9] not in OFF, "include_lone_images": says(given[10])}
    return plot | switches | {"include_sub_grids": says(given[11]), "vary_seeds": vary, "margin_size": margin or 0}


def _axis(letter: str, given: list[Any], is_csv: bool, fields: dict[str, Any], is_img2img: bool) -> dict[str, Any]:
    name = _name(letter, given[0], is_img2img)
    if name == NOTHING:
        return {}
    kind = _AXES[name].type
    try:
        has_choices = kind is str and name != _PROMPT
        texts = _texts(given[1], given[2] if has_choices and not is_csv else None)
        values = [kind(value) for value in (texts if kind is str else _expanded(texts, kind))]
    except (ValueError, OverflowError, csv.Error):
        raise ValueError(f"{SCRIPT}: {letter} values {shown(given[1])} cannot be read as those of {name}") from None
    if not values or len(values) > _MAX_VALUES:
        raise ValueError(f"{SCRIPT}: {letter} has {len(values)} values of {name}; 1 to {_MAX_VALUES} are possible")
    if name == _PROMPT and not any(str(values[0]) in str(fields.get(p) or "") for p in ("prompt", "negative_prompt")):
        raise ValueError(f"{SCRIPT}: {_PROMPT} did not find {shown(values[0])} in prompt or negative_prompt")
    return {"name": name, "values": values}


def _name(letter: str, given: Any, is_img2img: bool) -> str:
    """An axis by A1111's number or by its name."""
    numbered = _IMG2IMG if is_img2img else _TXT2IMG
    name = given
    if isinstance(given, int) and not isinstance(given, bool):
        name = numbered.get(given, "")
    known = {axis.lower(): axis for axis in _AXES}
    found = known.get(name.lower()) if isinstance(name, str) else NOTHING if name is None else None
    if found is None:
        raise ValueError(f"{SCRIPT}: {letter} type {shown(given)} cannot be varied here; possible: {', '.join(_AXES)}")
    return found


def _texts(values: Any, chosen: Any) -> list[str]:
    """The values as texts: those chosen from a list, or comma-separated, also over several lines."""
    if isinstance(chosen, list) and chosen:
        return [str(value) for value in chosen]
    if isinstance(values, list):
        return [str(value) for value in values]
    rows = csv.reader(io.StringIO(str(values if values is not None else "")), skipinitialspace=True)
    return [text.strip() for row in rows for text in row]


def _expanded(texts: list[str], kind: Callable[[str], Any]) -> Iterator[Any]:
    """Ranges such as `1-5`, `1-10 (+3)` or `1-10 [4]` as their values; others as they are, without empty ones."""
    for text in filter(None, texts):
        match = _RANGE.fullmatch(text)
        if match is None:
            yield text
            continue
        first, last = float(match["first"]), float(match["last"])
        if match["count"]:
            count = int(match["count"])
            values = [first + (last - first) * i / max(1, count - 1) for i in range(min(count, _MAX_VALUES + 1))]
        else:
            step = float(match["step"] or 1)
            count = int((last - first) / step + 1e-9) + 1 if step else 0
            values = [first + step * i for i in range(max(0, min(count, _MAX_VALUES + 1)))]
        yield from (int(value) if kind is int else value for value in values)
