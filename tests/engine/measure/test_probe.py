"""What a chunk's members report, put together. Measuring runs in the tests of profile and bench step."""

import numpy as np

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.measure.probe import ChunkTimes, Probe, chunk_times
from tetrion.engine.messages import Denoised, Encoded, Event


def denoised(command_id: int, device_id: int, started_s: float, waited_s: float, ended_s: float) -> Denoised:
    return Denoised(
        command_id=command_id,
        device_id=device_id,
        request_id="r",
        step_index=1,
        started_s=started_s,
        ended_s=ended_s,
        waited_s=waited_s,
    )


def test_chunks_in_the_order_of_their_commands_whatever_order_members_answer_in() -> None:
    encoded = Encoded(command_id=6, device_id=0, request_id="r", started_s=0, ended_s=1, num_text_tokens=3)
    events: list[Event] = [
        denoised(9, 1, 4.0, 0.0, 5.0),
        denoised(7, 1, 1.0, 1.0, 3.5),
        encoded,
        denoised(7, 0, 1.5, 0.25, 3.75),
    ]
    first, second = chunk_times(events, [4, 1])
    assert first == ChunkTimes(num_steps=4, started_s=1.0, entered_s=2.0, ended_s=3.75, net_s=2.0)
    assert (first.step_s, second.step_s) == (0.5, 1.0)


async def test_groups_rehearse_side_by_side_and_those_that_share_a_member_in_turn() -> None:
    config = EngineConfig(devices="cpu:3", num_threads=1)
    spec = read_model_spec(resolve_model(config.models[0]), config.load_format)
    executor = ProcessExecutor(parse_devices(config.devices), [spec], config)
    await executor.start()
    try:
        probe = Probe(executor, spec)
        for groups in ([(0,), (1,), (2,)], [(0, 1), (2, 0)], [(1, 2, 0)]):
            await probe.rehearse((128, 128), groups, decoding=True)
        request = probe.request((128, 128), 2, device_id=2)
        await probe.encode(request)
        assert len(await probe.denoise(request, [((1, 2), 1), ((0,), 1)])) == 2
        assert np.isfinite(await probe.latents(request)).all()
    finally:
        await executor.close()
