"""Samplers by the names in a payload."""

import inspect
from itertools import pairwise

import pytest
import torch

from gpu_worker import samplers
from services.common.payloads import samplers as names
from tests.gpu_worker import reference
from tests.gpu_worker.driving import assert_close
from tests.gpu_worker.tables import SAMPLER_NAMES

ANCESTRAL = [
    *("Euler a", "Euler a Karras", "DPM2 a", "DPM2 a Exponential"),
    *("DPM++ 2S a", "DPM++ 2S a Karras", "DPM++ 2S a SGM Uniform"),
]
SHAPE = (1, 4, 8, 8)
MODEL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def test_every_sampler_that_a_payload_may_name_is_there() -> None:
    assert samplers.SAMPLERS.keys() == names.SAMPLERS.keys()
    assert samplers.SCHEDULES.keys() == {schedule for known in names.SAMPLERS.values() for schedule in known.schedules}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 60])
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


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_steps_are_those_of_the_scheduler_itself(name: str) -> None:
    """Two rows, through more steps than any sampler looks back."""
    seeds, num_steps = [5, 6], 8
    scheduler = reference.scheduler_of(name, seeds)
    given = {"original_inference_steps": 50} if name == "LCM" else {}
    scheduler.set_timesteps(num_steps, **given)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    taken = inspect.signature(scheduler.step).parameters
    noise = {"generator": generators} if "generator" in taken else {}
    sampling = samplers.create(name, MODEL, num_steps, [torch.Generator().manual_seed(seed) for seed in seeds])
    assert sampling.timesteps == pytest.approx([float(time) for time in scheduler.timesteps])
    first = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    expected, found = first * scheduler.init_noise_sigma, sampling.latents(first)
    for index, time in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(expected, time)
        assert_close(sampling.scaled(found, index), x)
        expected = scheduler.step(torch.tanh(x) + first.flip(0), time, expected, **noise, return_dict=False)[0]
        found = sampling.step(torch.tanh(sampling.scaled(found, index)) + first.flip(0), index, found)
        assert_close(found, expected)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ANCESTRAL)
def test_ancestral_steps_are_k_diffusions_for_any_eta(name: str, eta: float) -> None:
    """get_ancestral_step and sample_euler_ancestral, sample_dpm_2_ancestral, sample_dpmpp_2s_ancestral of
    k_diffusion/sampling.py, as formulas."""
    solver = next(known for known in ("Euler", "DPM2", "DPM++ 2S") if name.startswith(known))
    levels = reference.scheduler_of(name.replace(f"{solver} a", "Euler"), 0)
    levels.set_timesteps(6)
    first, generator = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(5)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + first.flip(2)

    def derivative(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model(x / (sigma**2 + 1).sqrt())

    x = first * levels.sigmas[0]
    for before, after in pairwise(levels.sigmas):
        up = min(after, eta * (after**2 * (before**2 - after**2) / before**2).sqrt())
        down = (after**2 - up**2).sqrt()
        slope = derivative(x, before)
        middle = (before * down).sqrt()
        if solver == "DPM++ 2S" and down > 0:
            t, h = -before.log(), before.log() - down.log()
            s = t + h / 2
            x_2 = (-s).exp() / (-t).exp() * x - (-h / 2).expm1() * (x - before * slope)
            x = down / before * x - (-h).expm1() * (x_2 - middle * derivative(x_2, middle))
        else:
            if solver == "DPM2" and down > 0:
                slope = derivative(x + slope * (middle - before), middle)
            x = x + slope * (down - before)
        x = x + torch.randn(SHAPE, generator=generator) * up
    sampling = samplers.create(name, MODEL, 6, [torch.Generator().manual_seed(5)], eta)
    found = sampling.latents(first)
    for index in range(len(sampling.timesteps)):
        found = sampling.step(model(sampling.scaled(found, index)), index, found)
    assert_close(found, x)
