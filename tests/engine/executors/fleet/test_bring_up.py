"""Bringing workers up, first and again: loading in the right order, and GPU workers that reach each other's slabs."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrion.engine.executors.fleet.bring_up import BringUp
from tetrion.engine.messages import (
    Command,
    Event,
    Failed,
    Loaded,
    LoadWeights,
    MapPeers,
    PeerSlab,
    PeersMapped,
    Started,
    UnmapPeers,
)


class FakeWorker:
    """What a worker does with the commands of its start. `mapped`: by device, whose slab (its `life`) it has mapped."""

    def __init__(self, device_id: int, life: int, gpu: bool, unreachable: frozenset[int]) -> None:
        self.device_id, self.life, self.gpu = device_id, life, gpu
        self.unreachable = unreachable
        self.mapped = {device_id: life}
        self.in_host_memory = False
        self.commands: deque[Command] = deque()
        self.answers: deque[Event] = deque()
        slab = PeerSlab(device_id=device_id, handle=str(life).encode(), device_uuid="uuid") if gpu else None
        self.answers.append(Started(device_id=device_id, pid=life, slab=slab))

    def execute(self) -> None:
        command = self.commands.popleft()
        match command:
            case LoadWeights():
                answer: Event = Loaded(command_id=command.command_id, device_id=self.device_id, weights_bytes=7)
            case MapPeers():
                answer = self.map_peers(command)
            case UnmapPeers():
                for device_id in command.device_ids:
                    self.mapped.pop(device_id, None)
                answer = self.peers_mapped(command, "")
            case _:
                raise AssertionError(f"not of the start: {command}")
        self.answers.append(answer)

    def map_peers(self, command: MapPeers) -> PeersMapped:
        assert self.gpu, "a CPU worker has everything mapped"
        self.in_host_memory |= command.host_memory
        failed = []
        for slab in command.slabs:
            if slab.device_id == self.device_id:
                continue
            if slab.device_id in self.unreachable:
                failed.append(f"{self.device_id} cannot reach {slab.device_id}")
            else:
                self.mapped[slab.device_id] = int(slab.handle)
        return self.peers_mapped(command, "; ".join(failed))

    def peers_mapped(self, command: MapPeers | UnmapPeers, reason: str) -> PeersMapped:
        mapped = tuple(range(9)) if self.in_host_memory else tuple(sorted(self.mapped))
        return PeersMapped(command_id=command.command_id, device_id=self.device_id, mapped=mapped, reason=reason)


class Room:
    """All workers of an engine, their ends and their successors, in an order that `draw` decides."""

    def __init__(
        self,
        num_devices: int,
        *,
        gpu: bool,
        draw: random.Random,
        unreachable: frozenset[int] = frozenset(),
        host_memory: bool = False,
    ) -> None:
        self.gpu, self.draw, self.unreachable = gpu, draw, unreachable
        self.workers: dict[int, FakeWorker] = {}
        self.ready: set[int] = set()
        self.dead: set[int] = set()
        self.num_lives = self.num_reserved = 0
        self.published: bool | None = None if not gpu else True
        self.publishers: set[int] = set()
        self.bring_up = BringUp(
            tuple(range(num_devices)), self.send, self.reserve, shared_weights=not gpu, host_memory=host_memory
        )
        for device_id in range(num_devices):
            self.launch(device_id)

    def reserve(self) -> None:
        self.num_reserved += 1

    def launch(self, device_id: int) -> None:
        assert not any(device_id in worker.mapped and not worker.in_host_memory for worker in self.workers.values()), (
            "a dead worker's slab is still mapped"
        )
        self.num_lives += 1
        self.workers[device_id] = FakeWorker(device_id, self.num_lives, self.gpu, self.unreachable)

    def send(self, command: Command, device_id: int) -> None:
        if isinstance(command, LoadWeights):
            assert command.publish == (self.published is None) or (not command.publish and self.published)
            self.publishers |= {device_id} if command.publish else set()
            self.published = False if command.publish else self.published
        if device_id in self.workers:
            self.workers[device_id].commands.append(command)

    def kill(self, device_id: int) -> None:
        if device_id in self.workers:
            del self.workers[device_id]
            self.ready.discard(device_id)
            if device_id in self.publishers and self.published is False:
                self.published = None
            self.bring_up.lost(device_id)
            self.dead.add(device_id)

    def step(self) -> bool:
        """One worker executes or is heard. False if nothing is left to do."""
        if busy := self.busy():
            worker = self.draw.choice(busy)
            if worker.answers and (not worker.commands or self.draw.random() < 0.5):
                self.hear(worker.answers.popleft())
            else:
                worker.execute()
        for device_id in self.bring_up.take_unmapped():
            self.launch(device_id)
        for device_id in self.bring_up.take_failed():
            self.kill(device_id)
        for device_id in self.bring_up.take_ready():
            self.check_reach(device_id)
            self.ready.add(device_id)
        return bool(self.busy())

    def busy(self) -> list[FakeWorker]:
        return [worker for worker in self.workers.values() if worker.commands or worker.answers]

    def hear(self, event: Event) -> None:
        if isinstance(event, Loaded) and event.device_id in self.publishers:
            self.published = True
        assert self.bring_up.handle(event)

    def check_reach(self, device_id: int) -> None:
        """The newcomer and those that serve have each other's present slabs."""
        worker = self.workers[device_id]
        for peer_id in self.ready if self.gpu else ():
            peer = self.workers[peer_id]
            assert worker.in_host_memory == peer.in_host_memory
            assert worker.in_host_memory or (
                worker.mapped.get(peer_id) == peer.life and peer.mapped.get(device_id) == worker.life
            )

    def revive(self) -> None:
        dead, self.dead = self.dead, set()
        for device_id in dead:
            self.bring_up.unmap(device_id)

    def settle(self) -> None:
        for _ in range(2_000):
            self.revive()
            if not self.step() and not self.dead:
                return
        raise AssertionError("it never ends")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whoever_dies_and_when_all_come_up_again_and_reach_each_other(data: st.DataObject) -> None:
    num_devices, gpu = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    draw, host_memory = random.Random(data.draw(st.integers(0, 10**6))), data.draw(st.booleans())
    room = Room(num_devices, gpu=gpu, draw=draw, host_memory=host_memory)
    for device_id in data.draw(st.lists(st.one_of(st.none(), st.integers(0, num_devices - 1)), max_size=60)):
        if device_id is None:
            room.step()
        else:
            room.kill(device_id)
        if data.draw(st.booleans()):
            room.revive()
    room.settle()
    assert room.ready == set(range(num_devices))
    assert room.bring_up.weights_bytes == 7
    assert room.num_reserved == 0


@pytest.mark.parametrize("gpu", [False, True])
def test_one_worker_publishes_and_gpus_all_read_for_themselves(gpu: bool) -> None:
    room = Room(3, gpu=gpu, draw=random.Random(1))
    room.settle()
    assert room.publishers == (set() if gpu else {min(room.publishers)}) and room.ready == {0, 1, 2}


def test_all_move_to_host_memory_if_one_gpu_cannot_be_reached() -> None:
    room = Room(3, gpu=True, draw=random.Random(1), unreachable=frozenset({2}))
    room.settle()
    assert all(worker.in_host_memory for worker in room.workers.values()) and room.num_reserved == 1
    room.kill(0)
    room.settle()
    assert room.workers[0].in_host_memory and room.num_reserved == 1


def test_no_room_in_host_memory_either_fails_them_all() -> None:
    def no_room() -> None:
        raise OSError("no room for slabs")

    sent: list[tuple[Command, int]] = []
    bring_up = BringUp((0,), lambda c, d: sent.append((c, d)), no_room, shared_weights=False, host_memory=False)
    bring_up.handle(Started(device_id=0, pid=1, slab=PeerSlab(device_id=0, handle=b"h", device_uuid="u")))
    ((command, _),) = sent
    bring_up.handle(Failed(command_id=command.command_id, device_id=0, request_id="", kind="error", message="no IPC"))
    assert bring_up.take_failed() == {0: "no IPC; host memory in place of it: no room for slabs"}


def test_a_model_that_cannot_be_loaded_is_told_with_its_reason() -> None:
    sent: list[tuple[Command, int]] = []
    bring_up = BringUp((0,), lambda c, d: sent.append((c, d)), lambda: None, shared_weights=True, host_memory=True)
    bring_up.handle(Started(device_id=0, pid=1))
    ((command, _),) = sent
    answer = Failed(command_id=command.command_id, device_id=0, request_id="", kind="error", message="no such file")
    assert bring_up.handle(answer) and bring_up.take_ready() == []
    assert bring_up.take_failed() == {0: "it could not load the model: no such file"}
    assert not bring_up.refusal, "nothing is said of a checkpoint"
    of_a_request = Failed(command_id=1_000_000, device_id=0, request_id="r", kind="error", message="no")
    assert not bring_up.handle(of_a_request)


def test_a_fault_of_a_checkpoint_is_every_workers() -> None:
    sent: list[tuple[Command, int]] = []
    bring_up = BringUp((0, 1), lambda c, d: sent.append((c, d)), lambda: None, shared_weights=True, host_memory=True)
    for device_id in (0, 1):
        bring_up.handle(Started(device_id=device_id, pid=1))
    ((command, _),) = sent
    said = "model: 'it' has no tensor x"
    answer = Failed(command_id=command.command_id, device_id=0, request_id="", kind="checkpoint", message=said)
    assert bring_up.handle(answer) and bring_up.refusal == said
    assert bring_up.take_failed() == {0: f"it could not load the model: {said}"}
