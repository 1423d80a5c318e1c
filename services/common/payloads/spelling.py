"""From a client's spelling of a request, A1111's, to that of the checked form: what settings and scripts say become
fields, and a sampler has one name.

Fields that change nothing here are ignored; `ignored` names those that a client might miss. What would change the
picture in a way that cannot be had is refused, unless it is switched off.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Final

from services.common.payloads import plots, prompts, samplers
from services.common.payloads.scripts import as_fields, check_scripts
from services.common.payloads.showing import OFF, is_text, says, shown

# What would change the picture and cannot be had, and what is possible instead.
_REFUSED = {
    "restore_faces": "face restoration needs weights that this service does not have; set it to false",
    "s_churn": "it is not supported yet; set it to 0",
    "firstpass_image": "it is deprecated in A1111 too; use img2img",
}
# Fields of A1111 that say how its own interface shows, stores or repeats a picture.
WITHOUT_EFFECT = frozenset({
    "alwayson_scripts", "comments", "do_not_save_grid",
    "do_not_save_samples", "force_task_id", "include_init_images", "override_settings",
    "override_settings_restore_afterwards", "s_tmax", "s_tmin", "sampler_index",
    "save_images", "scheduler", "script_args", "script_name", "send_images",
})  # fmt: skip
_SCHEDULES = (("sampler_name", "scheduler"), ("hr_sampler_name", "hr_scheduler"))
# Of newer versions and of Forge, whose clients send them.
_DEFAULTS = {"distilled_cfg_scale": 3.5, "hr_distilled_cfg": 3.5, "mask_round": True, "seed_enable_extras": True}
_NEGATIVE = ("negative_prompt", "hr_negative_prompt")
_PROMPTS = ("prompt", "hr_prompt", *_NEGATIVE)
_COMMENTS = "enable_prompt_comments"
_SETTINGS = {
    "CLIP_stop_at_last_layers": "clip_skip",
    "eta_ancestral": "eta_ancestral",
    "eta_ddim": "eta_ddim",
    "eta_noise_seed_delta": "noise_seed_delta",
    "hires_fix_refiner_pass": "refiner_pass",
    "img2img_fix_steps": "fix_steps",
    "initial_noise_multiplier": "initial_noise_multiplier",
    "randn_source": "noise_source",
    "s_min_uncond": "s_min_uncond",
    "s_noise": "s_noise",
    "sd_model_checkpoint": "model_name",
    "sd_vae": "vae_name",
    "tiling": "tiling",
}
# Fields that no client's payload has: what they hold comes from settings and scripts.
_OWN = frozenset({
    "clip_skip", "controlnet", "eta_ancestral", "eta_ddim", "fix_steps", "form", "ignored", "model_name",
    "noise_seed_delta", "noise_source", "plot", "refiner_pass", "vae_name",
})  # fmt: skip
CHECKED: Final = "checked"


def checked_form(
    fields: dict[str, Any], known: Set[str], without_effect: Set[str], has_picture: bool
) -> dict[str, Any]:
    """The fields of a request, of which these names are known, not yet checked one by one. Those of the checked form
    stay as they are.

    Raises:
        ValueError: something cannot be had; the message names it.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    own = frozenset[str]() if given.get("form") == CHECKED else _OWN
    unused = _unused(given, (known | without_effect) - own)
    given = {name: value for name, value in given.items() if name not in own}
    for name, instead in _REFUSED.items():
        if says(given.get(name)):
            raise ValueError(f"{name} {shown(given[name])}: {instead}")
    for name in ("alwayson_scripts", "override_settings"):
        if given.get(name) and not isinstance(given[name], dict):
            raise ValueError(f"{name} {shown(given[name])}: an object is wanted")
    if given.get("form") != CHECKED:
        given |= _without_comments(given)
    ignored = unused + check_scripts(given.get("alwayson_scripts")) + _unused_tags(given)
    script = str(given.get("script_name") or "None")
    if script.lower() == plots.SCRIPT:
        given["plot"] = plots.plot_of(given.get("script_args"), given, has_picture)
    elif script not in OFF:
        ignored.append(f"script {script}")
    given["sampler_name"] = given.get("sampler_name") or given.get("sampler_index") or "Euler"
    passes = [(name, field) for name, field in _SCHEDULES if name in known and given.get(name)]
    ignored += [field for name, field in passes if samplers.ignores(given[name], given.get(field))]
    given["sampler_name"] = samplers.find(given["sampler_name"], given.get("scheduler"))
    given.setdefault("ignored", [name if is_text(name) else shown(name) for name in ignored])
    given |= as_fields(given.get("alwayson_scripts"))
    if given.get("refiner_checkpoint") in OFF:
        given.pop("refiner_checkpoint", None)
    settings = given.get("override_settings")
    for setting, value in (settings if isinstance(settings, dict) else {}).items():
        if setting in _SETTINGS and value is not None:  # what the payload says itself wins
            given.setdefault(_SETTINGS[setting], value)
    return given


def _without_comments(given: dict[str, Any]) -> dict[str, str]:
    """The prompts without comments, unless the settings say that there are none."""
    if (given.get("override_settings") or {}).get(_COMMENTS) is False:
        return {}
    return {name: prompts.without_comments(given[name]) for name in _PROMPTS if isinstance(given.get(name), str)}


def _unused_tags(given: dict[str, Any]) -> list[str]:
    """Tags of networks that cannot be had, or that stand where they do nothing."""
    found: list[str] = []
    for name in _PROMPTS:
        read = prompts.read(str(given.get(name, "")))
        found += read.ignored
        if name in _NEGATIVE or given.get("disable_extra_networks") is True:
            found += [str(network) for network in read.networks]
    return list(dict.fromkeys(found))


def _unused(given: dict[str, Any], known: Set[str]) -> list[str]:
    """Names of fields and settings that say something and are not known."""
    said = [name for name, value in given.items() if (value != _DEFAULTS[name] if name in _DEFAULTS else says(value))]
    fields = [name for name in said if name not in known]
    settings = given.get("override_settings")
    if isinstance(settings, dict):
        known = {name for name, value in settings.items() if name in {*_SETTINGS, _COMMENTS} or value is None}
        fields += [f"override_settings.{name}" for name in settings if name not in known]
    return fields
