"""Noise levels and solvers as tables against diffusers and against loops written out."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tetrion.engine.model_spec import SchedulerSpec
from tetrion.engine.sampling.flow_match import euler_schedule, pack_latents, sigmas, timesteps, unpack_latents
from tetrion.kernels.reference import guided_step

SCHEDULERS = [
    SchedulerSpec(use_dynamic_shifting=True, shift=3.0),
    SchedulerSpec(use_dynamic_shifting=True, time_shift_type="linear"),
    SchedulerSpec(use_dynamic_shifting=True, base_shift=0.3, max_shift=2.0, base_image_seq_len=64),
    SchedulerSpec(shift=1.0),
    SchedulerSpec(shift=3.0),
    SchedulerSpec(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
    SchedulerSpec(shift=3.0, shift_terminal=0.3),
]


@settings(max_examples=60, deadline=None)
@given(
    scheduler=st.sampled_from(SCHEDULERS),
    num_steps=st.integers(1, 60),
    num_image_tokens=st.integers(1, 16384),
    seed=st.integers(0, 1000),
)
def test_equals_diffusers_scheduler(scheduler, num_steps, num_image_tokens, seed) -> None:
    assume(num_steps > 1 or not scheduler.shift_terminal)  # theirs are NaN then
    theirs = _diffusers_scheduler(scheduler, num_steps, num_image_tokens)
    levels = sigmas(scheduler, num_steps, num_image_tokens)
    assert levels.dtype == np.float32 and levels.shape == (num_steps + 1,) and levels[-1] == 0
    assert np.array_equal(levels, theirs.sigmas.numpy())
    assert np.array_equal(timesteps(scheduler, levels), theirs.timesteps.numpy())
    times, coefficients, _ = euler_schedule(scheduler, num_steps, num_image_tokens)
    assert times.dtype == coefficients.dtype == torch.float32 and coefficients.shape == (num_steps, 1, 2)
    assert torch.equal(times, theirs.timesteps)
    latents = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    velocity = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed + 1))
    for i, timestep in enumerate(theirs.timesteps[:3]):
        expected = theirs.step(velocity, timestep, latents, return_dict=False)[0]
        assert torch.equal(guided_step(latents, [velocity], coefficients[i], 1.0), expected)
        latents = expected


@given(num_steps=st.integers(1, 60), num_image_tokens=st.integers(1, 16384), seed=st.integers(0, 1000))
def test_a_row_of_the_euler_schedule_adds_the_levels_change_times_the_velocity(
    num_steps: int, num_image_tokens: int, seed: int
) -> None:
    """To the bit: latents + (next level − level) · velocity, all in fp32."""
    levels = sigmas(SCHEDULERS[0], num_steps, num_image_tokens)
    coefficients = euler_schedule(SCHEDULERS[0], num_steps, num_image_tokens).coefficients
    generator = torch.Generator().manual_seed(seed)
    latents, velocity = torch.randn(2, 7, 12, generator=generator)
    for i in range(num_steps):
        expected = latents + float(levels[i + 1] - levels[i]) * velocity
        latents = guided_step(latents, [velocity], coefficients[i], 1.0)
        assert torch.equal(latents, expected)


@given(num_steps=st.integers(1, 60), num_image_tokens=st.integers(1, 16384), last=st.floats(0.001, 0.99))
def test_stretched_levels_fall_from_1_to_the_last(num_steps: int, num_image_tokens: int, last: float) -> None:
    """A single step has nothing to stretch."""
    spec = SchedulerSpec(use_dynamic_shifting=True, shift_terminal=last)
    levels = sigmas(spec, num_steps, num_image_tokens)
    assert levels[0] == 1 and (np.diff(levels) < 0).all()
    assert num_steps == 1 or levels[-2] == pytest.approx(last, rel=1e-3)


def test_unpack_inverts_pack() -> None:
    latents = torch.randn(3, 10, 6)
    packed = pack_latents(latents)
    assert packed.shape == (15, 12)
    assert torch.equal(unpack_latents(packed, 5, 3), latents)


def test_bad_schedules_are_errors_with_what_was_given() -> None:
    with pytest.raises(ValueError, match="num_steps: must be at least 1, got 0"):
        sigmas(SCHEDULERS[0], 0, 64)
    with pytest.raises(ValueError, match="time_shift_type: expected exponential or linear, got 'cubic'"):
        sigmas(SchedulerSpec(use_dynamic_shifting=True, time_shift_type="cubic"), 4, 64)


def _diffusers_scheduler(spec: SchedulerSpec, num_steps: int, num_image_tokens: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=spec.num_train_timesteps,
        shift=spec.shift,
        use_dynamic_shifting=spec.use_dynamic_shifting,
        time_shift_type=spec.time_shift_type,
        shift_terminal=spec.shift_terminal or None,
    )
    mu = calculate_shift(
        num_image_tokens, spec.base_image_seq_len, spec.max_image_seq_len, spec.base_shift, spec.max_shift
    )
    scheduler.set_timesteps(num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    scheduler.set_begin_index(0)
    return scheduler
