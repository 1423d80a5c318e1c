"""Samplers by the names in a payload."""

import inspect
from itertools import pairwise

import pytest
import torch

from gpu_worker.engine.denoise import Evaluation, Guidance, Step
from gpu_worker.sampling import samplers
from gpu_worker.sampling.schedules import SCHEDULES
from services.common.payloads import samplers as names
from tests.gpu_worker import reference
from tests.gpu_worker.driving import assert_close
from tests.gpu_worker.k_diffusion import KINDS
from tests.gpu_worker.tables import SAMPLER_NAMES, slow

SHAPE = (1, 4, 8, 8)
NO_STEP = Step(None, Guidance((), None, 1.0))
MODEL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def test_every_sampler_that_a_payload_may_name_is_there() -> None:
    assert samplers.SAMPLERS.keys() == names.SAMPLERS.keys()
    of_a_process = {name for name in names.SAMPLERS if samplers.create(name, MODEL, 4, [])._plan.span}
    assert of_a_process == {name for name, known in names.SAMPLERS.items() if known.is_brownian}
    assert SCHEDULES.keys() == {schedule for known in names.SAMPLERS.values() for schedule in known.schedules}


@pytest.mark.parametrize("num_steps", [1, 2, 3, *slow([60])])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_sampler_stays_finite_in_any_number_of_steps(name: str, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = samplers.create(name, MODEL, num_steps, [generator])
    latents = sampling.latents(torch.randn((1, 4, 8, 8), generator=generator))
    for index in range(len(sampling.timesteps)):
        x = sampling.scaled(latents, index)
        assert torch.isfinite(x).all()
        latents = sampling.step(torch.zeros_like(x), index, latents)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("name", sorted(names.SAMPLERS.keys() - {"DDIM", "PLMS", "UniPC", "LCM"}))
def test_a_single_step_begins_with_all_the_noise(name: str) -> None:
    sampling = samplers.create(name, MODEL, 1, [torch.Generator()])
    assert sampling.timesteps[0] == pytest.approx(999)
    zeros, ones = torch.zeros(1), torch.ones(1)
    assert float(sampling.noised(zeros, ones, 0) / sampling.noised(ones, zeros, 0)) == pytest.approx(14.6146, rel=1e-3)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_steps_are_those_of_the_reference(name: str) -> None:
    go_through_both(name, None)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_steps_from_the_middle_of_a_schedule_are_those_of_the_reference(name: str) -> None:
    go_through_both(name, None, first_step=3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", names.SAMPLERS)
def test_a_perfect_prediction_means_the_clean_latents(name: str, prediction_type: str) -> None:
    sampling = samplers.create(name, MODEL | {"prediction_type": prediction_type}, 8, [torch.Generator()], first_step=2)
    clean, noise = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    for index, timestep in enumerate(sampling.timesteps):
        level = sampling.noise_level(index)
        signal, share = 1 / (1 + level**2) ** 0.5, level / (1 + level**2) ** 0.5
        prediction = noise if prediction_type == "epsilon" else signal * noise - share * clean
        x = sampling.scaled(sampling.noised(clean, noise, index), index)
        evaluation = Evaluation(x, timestep, NO_STEP, sampling.shares(index))
        assert_close(evaluation.clean(prediction), clean)
        assert_close(evaluation.meaning(clean), prediction)


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("name", sorted(name for name in KINDS if names.SAMPLERS[name].eta))
def test_steps_are_those_of_the_reference_for_any_eta(name: str, eta: float) -> None:
    go_through_both(name, eta)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_steps_noise_can_be_more_or_less_of_those_to_which_a1111_says_so(name: str) -> None:
    go_through_both(name, None, num_steps=20 if name == "Restart" else 8, s_noise=1.3)


@pytest.mark.parametrize("name", ["DPM2", "DPM++ 2M", "Euler", "Heun", "LMS"])
def test_an_eta_does_nothing_to_samplers_that_have_none(name: str) -> None:
    go_through_both(name, 0.5)


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize("num_steps", [19, 20, 23, 35, 36, 47])
def test_restart_goes_back_to_more_noise_as_often_as_the_reference(num_steps: int, first_step: int) -> None:
    go_through_both("Restart", None, num_steps, first_step)


def test_restart_makes_as_many_steps_as_are_asked_for_and_returns_from_20_and_twice_from_36_on() -> None:
    def num_returns(num_steps: int, first_step: int = 0) -> int:
        sampling = samplers.create("Restart", MODEL, num_steps, [torch.Generator()], first_step=first_step)
        assert len(sampling.timesteps) == 2 * (num_steps - first_step) - 1
        steps = sampling.timesteps[::2]
        return sum(after > before for before, after in pairwise(steps))

    assert [num_returns(num_steps) for num_steps in (19, 20, 35, 36, 60)] == [0, 1, 1, 2, 2]
    assert [num_returns(40, first_step) for first_step in (4, 5, 20, 21)] == [2, 1, 1, 0]


def go_through_both(
    name: str, eta: float | None, num_steps: int = 8, first_step: int = 0, s_noise: float = 1.0
) -> None:
    """Two rows, through more steps than any sampler looks back."""
    seeds = [5, 6]
    scheduler = reference.scheduler_of(name, seeds, eta)
    scheduler.s_noise = 1.0 if name in {"Euler a", "Restart"} else s_noise
    given = {"original_inference_steps": 50} if name == "LCM" else {}
    scheduler.set_timesteps(num_steps, **given)
    if first_step:
        scheduler.set_begin_index(first_step * scheduler.order)
    times = scheduler.timesteps[first_step * scheduler.order :]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    taken = inspect.signature(scheduler.step).parameters
    noise = {"generator": generators} if "generator" in taken else {}
    own = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampling = samplers.create(name, MODEL, num_steps, own, eta, first_step, s_noise)
    assert sampling.timesteps == pytest.approx([float(time) for time in times], rel=1e-5, abs=1e-3)
    first = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    expected, found = first * scheduler.init_noise_sigma, sampling.latents(first)
    for index, time in enumerate(times):
        x = scheduler.scale_model_input(expected, time)
        assert_close(sampling.scaled(found, index), x)
        expected = scheduler.step(torch.tanh(x) + first.flip(0), time, expected, **noise, return_dict=False)[0]
        found = sampling.step(torch.tanh(sampling.scaled(found, index)) + first.flip(0), index, found)
        assert_close(found, expected)
