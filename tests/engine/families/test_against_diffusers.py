"""Every family computes what diffusers computes, to the rounding of fp32."""

import numpy as np
import torch
from torch import Tensor

from tests.engine.families.conftest import Loaded

NUM_STEPS = 6
TOLERANCE = 1e-5


def test_one_step_is_the_transformers(loaded: Loaded) -> None:
    case, ours, step = loaded.case, loaded.ours, 1
    prompt = loaded.prompts[-1]
    params = loaded.params(NUM_STEPS, [prompt])
    (text,), latents = loaded.begin(params, [prompt])
    time = float(ours.model.schedule(NUM_STEPS, params.shape).after(params.skipped_steps).times[step])
    expected = case.velocity(loaded.theirs, latents, time, prompt)
    assert_close(ours.velocity(text, latents, params, step)[: len(expected)], expected)


def test_a_run_is_the_pipelines_from_prompt_to_pixels(loaded: Loaded) -> None:
    """Prompts through all encoders, pictures through theirs, noise from the seed, guidance, the decoder."""
    ours, params = loaded.ours, loaded.params(NUM_STEPS)
    expected = loaded.case.draw(loaded.theirs, NUM_STEPS, params.seed)
    latents = ours.denoise(*loaded.begin(params), params, [((0,), params.num_steps)])
    assert_close(latents[: len(expected.latents)], expected.latents)
    picture = ours.model.codec.decode(latents, params.shape).pixels.numpy()
    assert np.abs(picture.astype(int) - expected.picture).max() <= 1


def test_noise_levels_are_the_pipelines_to_the_bit(loaded: Loaded) -> None:
    ours, params = loaded.ours, loaded.params(NUM_STEPS)
    loaded.case.draw(loaded.theirs, NUM_STEPS, params.seed)
    schedule = ours.model.schedule(NUM_STEPS, params.shape)
    assert torch.equal(schedule.times, loaded.theirs.scheduler.timesteps)
    assert torch.equal(schedule.levels, loaded.theirs.scheduler.sigmas[:-1])
    assert torch.equal(schedule.coefficients[:, 0, 1], loaded.theirs.scheduler.sigmas.diff())


def test_text_does_not_depend_on_the_number_of_threads(loaded: Loaded) -> None:
    (expected,) = loaded.ours.encode([loaded.prompts[0]])
    torch.set_num_threads(2)
    (fields,) = loaded.ours.encode([loaded.prompts[0]])
    assert all(torch.equal(fields[name], expected[name]) for name in expected)


def test_pictures_mean_the_same_for_any_number_of_threads(loaded: Loaded) -> None:
    params = loaded.params(NUM_STEPS)
    texts, state = loaded.begin(params)
    torch.set_num_threads(2)
    others, other = loaded.begin(params)
    assert torch.equal(state, other)
    assert all(torch.equal(texts[0][name], others[0][name]) for name in texts[0])


def assert_close(tensor: Tensor, expected: Tensor) -> None:
    """To `TOLERANCE`, relative to the largest value."""
    error = float((tensor - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"{error:.1e} of the largest value"
