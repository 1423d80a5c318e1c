"""The names in a payload."""

import pytest

from gpu_worker import samplers
from gpu_worker.job import JobError

MODEL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def test_every_name_of_the_table_makes_a_scheduler() -> None:
    assert samplers.names() == ["Euler", "Euler Karras", "Euler a", "DPM++ 2M", "DPM++ 2M Karras"]
    for name in samplers.names():
        scheduler = samplers.create(name, "", MODEL)
        scheduler.set_timesteps(5)
        assert len(scheduler.timesteps) == 5
        assert scheduler.config.get("use_karras_sigmas", False) == name.endswith("Karras")


@pytest.mark.parametrize(
    ("name", "schedule", "karras"),
    [
        ("DPM++ 2M", "", False),
        ("DPM++ 2M", "Automatic", True),
        ("DPM++ 2M", "karras", True),
        ("DPM++ 2M Karras", "Automatic", True),
        ("dpm++ 2m karras", "", True),
        ("euler", "Automatic", False),
        ("Euler", "Karras", True),
    ],
)
def test_the_schedule_comes_from_the_name_or_the_field(name: str, schedule: str, karras: bool) -> None:
    assert samplers.create(name, schedule, MODEL).config.use_karras_sigmas is karras


def test_an_unknown_sampler_is_refused_with_what_is_possible() -> None:
    with pytest.raises(JobError, match=r"sampler 'Restart' is not known; possible: Euler, .*DPM\+\+ 2M Karras"):
        samplers.create("Restart", "", MODEL)
    with pytest.raises(JobError, match="'Euler a' has no scheduler 'Karras'"):
        samplers.create("Euler a", "Karras", MODEL)
    with pytest.raises(JobError, match="has no scheduler 'Beta'"):
        samplers.create("Euler", "Beta", MODEL)
