"""What a worker is told when it is started, as JSON, and what is said of its start and end. All `_fd`s are inherited
descriptors."""

from collections.abc import Mapping
from typing import Any

import msgspec

from tetrion.engine.config import Attention, DeviceSpec, LoadFormat
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.layout import SlabLayout
from tetrion.engine.transport.channel import ChannelSpec


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`slab_fds[d]` is device d's slab. `engine_life_fd` reads end-of-file when the engine is gone; `worker_life_fd`
    is held open as long as the worker lives. `weights_fd` is a file that the first worker sizes and fills."""

    device: DeviceSpec
    num_threads: int
    models: tuple[ModelSpec, ...]
    load_format: LoadFormat
    attention: Attention
    layout: SlabLayout
    channel: ChannelSpec
    slab_fds: tuple[int, ...]
    control_fd: int
    saved_states_fd: int
    image_slab_fd: int
    num_image_slots: int
    image_slot_bytes: int
    input_slab_fd: int
    num_input_slots: int
    input_slot_bytes: int
    weights_fd: int
    engine_life_fd: int
    worker_life_fd: int

    def renumbered(self, numbers: Mapping[int, int]) -> "WorkerSpec":
        """For a process that has these descriptors under other numbers."""
        return msgspec.convert(_renumbered(msgspec.to_builtins(self), numbers), WorkerSpec)


class ForkRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Asks the fork server for a worker, or a spare to become it. The descriptors of all `fds` come with it, behind
    that of the worker's status socket if it is to be forked. `fds`: what each of them is to be called in the worker."""

    spec: WorkerSpec
    fds: tuple[int, ...]


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message on the status socket."""

    pid: int


class Exited(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last one, sent before the worker is reaped. `code`: the exit status, or minus the signal that ended it."""

    code: int


def _renumbered(value: Any, numbers: Mapping[int, int], name: str = "") -> Any:
    match value:
        case dict():
            return {key: _renumbered(item, numbers, key) for key, item in value.items()}
        case list() | tuple():
            return [_renumbered(item, numbers, name) for item in value]
        case int() if name.endswith(("_fd", "_fds")):
            return numbers.get(value, value)
    return value
