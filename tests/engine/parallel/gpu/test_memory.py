"""Where slabs lie and who reaches them: with a runtime that only keeps books, then on a GPU between real processes."""

import ctypes
import mmap
import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.engine.parallel.conftest import anonymous_file, tiny_spec
from tests.engine.parallel.device_fleet import ON_GPU, DeviceFleet
from tetrion.engine.messages import PeerSlab
from tetrion.engine.parallel.gpu import memory as device_memory
from tetrion.engine.parallel.gpu.cuda_runtime import CudaError, CudaRuntime
from tetrion.engine.parallel.gpu.memory import GpuMemory
from tetrion.engine.parallel.layout import ControlLayout, SlabLayout, slab_layout
from tetrion.engine.parallel.words import AbortWords

CPU = torch.device("cpu")
PEERS = {"gpu-0": 0, "gpu-1": 1, "gpu-2": 2}


class Books(CudaRuntime):
    """Allocations and mappings are ordinary memory here; `far`: a GPU without peer access; `broken`: bad handles."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.open: dict[bytes, int] = {}
        self.registered: set[int] = set()
        self.far, self.broken = -1, b""

    def malloc(self, num_bytes: int) -> int:
        block = ctypes.create_string_buffer(num_bytes)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.memory[address]

    def read(self, address: int, num_bytes: int) -> bytes:
        return ctypes.string_at(address, num_bytes)

    def ipc_open(self, handle: bytes) -> int:
        if handle == self.broken:
            raise CudaError("cudaIpcOpenMemHandle", 201, "invalid device context")
        assert handle not in self.open, "a slab is mapped twice"
        self.open[handle] = self.malloc(1 << 16)
        return self.open[handle]

    def ipc_close(self, address: int) -> None:
        (handle,) = (handle for handle, opened in self.open.items() if opened == address)
        self.free(self.open.pop(handle))

    def can_access_peer(self, device_index: int, peer_index: int) -> bool:
        return peer_index != self.far

    def host_register(self, address: int, num_bytes: int) -> int:
        assert address not in self.registered
        self.registered.add(address)
        return address

    def host_unregister(self, address: int) -> None:
        self.registered.remove(address)


@pytest.fixture
def layout() -> SlabLayout:
    return slab_layout([tiny_spec()], 3, 2, itemsize=2)


@pytest.fixture
def control_fd() -> Iterator[int]:
    fd = anonymous_file(ControlLayout(num_devices=3).num_bytes)
    yield fd
    os.close(fd)


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Books:
    monkeypatch.setattr(device_memory, "device_index_of", PEERS.get)
    return Books()


def make_memory(layout: SlabLayout, fd: int, books: Books | None, sizes: int = 0) -> tuple[GpuMemory, list[int]]:
    fds = [anonymous_file(sizes) for _ in range(3)]
    return GpuMemory(layout, 1, CPU, [os.dup(own) for own in fds], os.dup(fd), books), fds


def slab(device: int, handle: bytes | None = None) -> PeerSlab:
    return PeerSlab(device_id=device, handle=handle or secrets.token_bytes(64), device_uuid=f"gpu-{device}")


def test_peers_are_mapped_and_unmapped(layout: SlabLayout, control_fd: int, books: Books) -> None:
    memory, _ = make_memory(layout, control_fd, books)
    bases = memory.slabs.bases
    assert memory.slabs.mapped == (1,) and bases.tolist()[1] in books.memory
    assert memory.map_peers([slab(0), slab(1), slab(2)], host_memory=False) == ((0, 1, 2), "")
    assert bases.tolist() == [*books.open.values()][:1] + bases.tolist()[1:2] + [*books.open.values()][1:]
    memory.unmap_peers([2])
    assert memory.slabs.mapped == (0, 1) and bases.tolist()[2] == 0 and len(books.open) == 1
    again = slab(0)
    assert memory.map_peers([again], host_memory=False) == ((0, 1), "")
    assert [*books.open] == [again.handle], "the old mapping must go before the new one comes"
    memory.close()
    assert not books.memory and not books.open and not books.registered and memory.slabs.mapped == ()


def test_what_cannot_be_mapped_is_said(layout: SlabLayout, control_fd: int, books: Books) -> None:
    memory, _ = make_memory(layout, control_fd, books)
    books.far, books.broken = 2, secrets.token_bytes(64)
    stranger = PeerSlab(device_id=2, handle=bytes(64), device_uuid="gpu-9")
    mapped, reason = memory.map_peers([slab(0, books.broken), slab(2)], host_memory=False)
    assert mapped == (1,) and "device 1 has no peer access to device 2" in reason
    assert "cudaIpcOpenMemHandle failed with error 201: invalid device context" in reason
    mapped, reason = memory.map_peers([stranger], host_memory=False)
    assert mapped == (1,) and "gpu-9) is not visible" in reason


def test_all_change_over_to_host_memory(layout: SlabLayout, control_fd: int, books: Books) -> None:
    memory, fds = make_memory(layout, control_fd, books)
    memory.map_peers([slab(0)], host_memory=False)
    before = memory.slabs.bases.tolist()
    for fd in fds:
        os.ftruncate(fd, layout.num_bytes)
    assert memory.map_peers([], host_memory=True) == ((0, 1, 2), "")
    after = memory.slabs.bases.tolist()
    assert not books.open and set(after) <= books.registered and not {*before} & {*after}
    memory.slabs.state(1, "tiny", 0, 0)[0, 0] = 2.5
    stored = mmap.mmap(fds[1], 0)[layout.slot_offset(0) + layout.slots["tiny"].place("latents").offset :][:4]
    assert stored == torch.tensor([2.5]).numpy().tobytes()
    assert memory.map_peers([], host_memory=True) == ((0, 1, 2), ""), "said twice, done once"


@pytest.mark.parametrize("with_gpu", [True, False])
def test_sized_files_mean_host_memory(layout: SlabLayout, control_fd: int, books: Books, with_gpu: bool) -> None:
    memory, fds = make_memory(layout, control_fd, books if with_gpu else None, layout.num_bytes)
    assert memory.slabs.mapped == (0, 1, 2) and not books.memory
    assert len(books.registered) == (4 if with_gpu else 0)
    assert len(fds) == 3


def test_a_successor_starts_with_clean_counters_and_versions(layout: SlabLayout, control_fd: int) -> None:
    _, fds = make_memory(layout, control_fd, None, layout.num_bytes)
    files = [mmap.mmap(fd, 0) for fd in fds]
    for file in files:
        file[:] = b"\x07" * layout.num_bytes
    GpuMemory(layout, 1, CPU, [os.dup(fd) for fd in fds], os.dup(control_fd))
    assert not any(files[1][: layout.q_offset]) and files[1][layout.q_offset :] == files[0][layout.q_offset :]
    assert files[0][:] == files[2][:] == b"\x07" * layout.num_bytes


def test_the_abort_word_is_the_engines(layout: SlabLayout, control_fd: int) -> None:
    memory, _ = make_memory(layout, control_fd, None, layout.num_bytes)
    aborts = AbortWords(memoryview(mmap.mmap(control_fd, 0)), 3)
    aborts.set(0)
    assert memory.abort.tolist() == [0]
    aborts.set(1)
    assert memory.abort.tolist() == [1]
    memory.clear_abort()
    assert not aborts.is_set(1) and aborts.is_set(0)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_fleet_changes_over_to_host_memory() -> None:
    """What the engine does when some peer cannot be mapped: same workers, same requests, other memory."""
    fleet = DeviceFleet(2, host_memory=False)
    try:
        fleet.reserve()
        fleet.host_memory = True
        fleet.map({0: [], 1: []})
        shape, life = {"text": [5], "image": 22}, {"slot": 1, "state_id": 9}
        pull = {"op": "pull", "source": 0, "step_index": 0, "chunk_index": 0, **life, **shape}
        check = {"op": "check"}
        fleet.run({0: [{"op": "encode", **life, **shape}, check], 1: [pull, check]})
        states = fleet.run({device: [{"op": "state", "slot": 1, "chunk_index": 0, **shape}] for device in (0, 1)})
        assert states[0] == states[1]
    finally:
        fleet.stop()
