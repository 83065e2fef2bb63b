"""Messages survive the wire, and what is not a message is refused."""

import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine import messages
from tetrion.engine.params import Params
from tetrion.engine.shape import StepShape

IDS = st.integers(0, 2**63 - 1)
DEVICES = st.lists(st.integers(0, 63), min_size=1, unique=True).map(tuple)
PARAMS = st.builds(
    Params,
    model=st.text(),
    shape=st.builds(
        StepShape,
        width=st.integers(16, 4096),
        height=st.integers(16, 4096),
        image=st.integers(1, 65536),
        text=st.lists(st.integers(1, 512), min_size=1, max_size=2).map(tuple),
    ),
    num_steps=st.integers(1, 1000),
    guidance=st.floats(0, 100),
    true_cfg_scale=st.floats(1, 100),
    seed=IDS,
)
DENOISE = st.builds(
    messages.Denoise,
    command_id=IDS,
    round_id=IDS,
    request_id=st.text(),
    state_id=IDS,
    source_state_id=IDS,
    slot=st.integers(0, 4095),
    members=DEVICES,
    holders=DEVICES,
    source=st.integers(0, 63),
    step_index=st.integers(0, 1000),
    chunk_index=st.integers(0, 1000),
    chunk_steps=st.integers(1, 1000),
    params=PARAMS,
)
FAILED = st.builds(messages.Failed, command_id=IDS, device_id=st.integers(0, 63))


@given(DENOISE)
def test_a_command_survives_the_wire(command: messages.Denoise) -> None:
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=messages.Command)
    assert decoded == command


@pytest.mark.parametrize("kind", [messages.Command, messages.Event])
def test_handles_survive_the_wire(kind: object) -> None:
    slab = messages.PeerSlab(device_id=3, handle=bytes(range(64)), device_uuid="GPU-1")
    message = (
        messages.MapPeers(command_id=1, slabs=(slab, slab), host_memory=False)
        if kind is messages.Command
        else messages.Started(device_id=3, pid=7, slab=slab)
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind) == message


@given(FAILED)
def test_an_event_survives_the_wire(event: messages.Failed) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=messages.Event) == event


@pytest.mark.parametrize("union", [messages.Command, messages.Event])
def test_every_message_is_frozen_tagged_and_keyword_only(union: object) -> None:
    for kind in typing.get_args(union):
        config = kind.__struct_config__
        assert config.frozen and config.tag == kind.__name__
        with pytest.raises(TypeError):
            kind(1)


@pytest.mark.parametrize(
    "raw",
    [
        {"type": "Denoise", "command_id": 1},
        {"type": "Ping", "command_id": "one"},
        {"type": "NoSuchCommand", "command_id": 1},
        {"command_id": 1},
    ],
)
def test_a_malformed_command_is_refused(raw: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(raw), type=messages.Command)


@given(DENOISE, st.integers(0, 63))
def test_a_commands_answer_names_command_request_and_device(command: messages.Denoise, device_id: int) -> None:
    event = command.denoised(device_id, started_s=1.0, ended_s=2.0, waited_s=0.5)
    assert (event.command_id, event.request_id, event.device_id) == (command.command_id, command.request_id, device_id)
    assert event.step_index == command.step_index + command.chunk_steps


def test_a_failure_names_the_request_of_a_group_command_only() -> None:
    reset = messages.ResetBarriers(command_id=5)
    assert messages.failed(reset, 3, "error", "x").request_id == ""
    copy = messages.CopyLatents(
        command_id=6,
        request_id="r",
        state_id=1,
        slot=0,
        chunk_index=0,
        params=Params(
            model="",
            shape=StepShape(width=16, height=16, image=1, text=(1,)),
            num_steps=1,
            guidance=0.0,
            seed=0,
        ),
        image_slot=0,
    )
    failure = messages.failed(copy, 3, "out_of_memory", "x")
    assert (failure.command_id, failure.device_id, failure.request_id) == (6, 3, "r")
