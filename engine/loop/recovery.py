"""What happens after a worker was lost or a group member failed, and how a new worker joins those that serve.

    HEALTHY ──(worker lost, member failed)──▶ DRAINING ──(nothing in flight)──▶ RESETTING ──(all reset)──▶ HEALTHY

DRAINING: every member of a hit request's commands has its abort word set, so nobody waits for one that will not come.
An abort may also stop a command of another request queued on the same device; that request is then hit as well.
RESETTING: all workers are idle; each zeroes its barrier counters and abort word. Only then are new commands given out,
so no late store or count of an aborted chunk can meet a new one. For requests that are not hit this is a pause of at
most one chunk.

A hit request goes on from its last finished chunk, which is as it was wherever it was: a chunk writes into another
buffer than it reads, and there is room for the two that may be in flight (parallel/layout.py). If no living device has
it, its prompt is encoded again and its latents are those that the chunk's first member has saved in host memory. What
it dispatches from now on has another state id, since some members may have finished what others did not. A request that
rested on the dead device, among others, is not hit at all. Only the request whose command the device was at when it
died may be to blame; after `MAX_ATTEMPTS` such deaths it fails.

A device whose answer is overdue gets nothing new (stalls.py). If all that it holds is its own, its requests go on
without it, in other slots and from what is saved, and the others notice nothing; it is killed after the stall timeout,
or if it comes back all is drained and reset, since it was aborted. If it holds a group's command, that is aborted like
a dead one's, and who does not react to that is killed. Whoever answers was slow, not silent: nobody is blamed for that,
and the next time the request is waited for twice as long.

A stage that lasts longer than the stall timeout has a device that does not answer: whoever owes an answer is killed,
and hit requests fail, with the reason; all that comes later is served once the loss is reported. (A reset that is not
answered is left as long again, since no request has waited for the drain: killing its device alone may do.) If no
worker serves a stage, requests wait for one to come back; an engine that has had none for `no_worker_timeout_s`, or
whose recovery has stood still for so long after its devices were killed, gives itself up: whoever runs it can start
another.

A worker that is started in a lost one's place joins without any pause. While it starts, it is in no group; when it is
ready and all is HEALTHY, it alone is given `ResetBarriers`, and when it has answered, commands. That suffices, for
what two devices know of each other is one count at each end and one counter in each slab (parallel/cpu/barrier.py), and
for the newcomer n and any survivor s all four are zero by then:

* s's count of n and n's counter in s's slab: *every* loss leads through RESETTING, also that of an idle worker whose
  death hit no request. n's dead predecessor wrote nothing after that: it was gone for good before it was reported lost.
* n's count of s and s's counter in n's slab: n itself zeroes them at its reset, after which s does not write there
  before it meets n in a group. It could not have written late either: n is reset only while HEALTHY, hence after s had
  drained and reset since the loss.

Resets may overlap: another worker may be lost while a reset is under way, and all is drained and reset again. So an
answer counts only if it is to the latest `ResetBarriers` the device was given: an earlier one says nothing of whether
the later has been carried out, and a counter zeroed after a peer has arrived is an arrival lost.
"""

import enum
import logging
import math
from collections.abc import Collection, Iterator

import msgspec

from tetrion.engine.errors import EngineEnded, GenerationError
from tetrion.engine.executors.base import Executor, WorkerLost
from tetrion.engine.loop.in_flight import InFlight, InFlightTable
from tetrion.engine.loop.progress import Answer, Bookkeeper
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.loop.requests import Request
from tetrion.engine.loop.stalls import Stalls, patience
from tetrion.engine.messages import BarriersReset, Decode, Denoise, Failed, ResetBarriers, StageCommand
from tetrion.engine.request import MAX_ATTEMPTS
from tetrion.engine.roles import Stages, unserved

logger = logging.getLogger(__name__)
STALL_CHECK_S = 0.2
"""So often it is looked at whether an answer is overdue: stalls are a matter of seconds."""
STOOD_STILL_S = 0.5
"""A loop that ticks so much later than it meant to stood still itself."""
ABORT_S = 2.0
"""An abort is seen at the next barrier, which comes many times in a step."""
RESET_S = 5.0
"""A reset is a matter of milliseconds."""


class RecoveryState(enum.Enum):
    HEALTHY = "healthy"
    DRAINING = "draining"
    RESETTING = "resetting"


class RecoveryFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Since the start: workers lost, workers started in their place, times that an answer was overdue, requests that
    went on or started again after either, steps that these have run again. `serving`: devices that are given commands;
    a worker that is alive joins them once its barriers are reset. `overdue`: devices that are set aside."""

    serving: tuple[int, ...] = ()
    num_deaths: int = 0
    num_stalls: int = 0
    overdue: tuple[int, ...] = ()
    num_respawns: int = 0
    num_retries: int = 0
    num_repeated_steps: int = 0


class Hit(msgspec.Struct):
    """Why a request's commands came to nothing, from when on. `may_be_cause`: a device was at its command when it died
    or fell silent. `lost_steps`: of the command that a device was at."""

    reason: str
    since_s: float
    may_be_cause: bool = False
    lost_steps: int = 0

    def repeat(self, command: StageCommand) -> None:
        """A device was at this command, which is to be done again."""
        if isinstance(command, Denoise):
            self.lost_steps = max(self.lost_steps, command.chunk_steps)

    def blame(self, command: StageCommand) -> None:
        """It was at this command when it died or fell silent."""
        self.may_be_cause = True
        self.repeat(command)


class Recovery:
    """`in_flight` says which devices may be given commands; those join and leave here. `command_ids`: the loop's own.
    A worker whose answer has been overdue for `stall_timeout_s` is killed."""

    def __init__(
        self,
        *,
        executor: Executor,
        table: RequestTable,
        in_flight: InFlightTable,
        books: Bookkeeper,
        command_ids: Iterator[int],
        stall_timeout_s: float,
        no_worker_timeout_s: float,
    ) -> None:
        self._executor = executor
        self._table = table
        self._in_flight = in_flight
        self._books = books
        self._command_ids = command_ids
        self._stall_timeout_s = stall_timeout_s
        self._no_worker_timeout_s = no_worker_timeout_s
        self._stalls = Stalls(executor, in_flight, table, books)
        self._hit: dict[str, Hit] = {}
        self._failed_while_hit: set[str] = set()
        """Hit requests that did not wait for the end of the recovery: by now their ids may be others'."""
        self._resets: dict[int, tuple[int, float]] = {}
        self._state = RecoveryState.HEALTHY
        self._since_s = 0.0
        """When it came into this state."""
        self._check_s = 0.0
        self._no_worker_since_s: float | None = None
        self._last_loss = ""
        self.num_respawns = 0
        self._num_deaths = self._num_stalls = self._num_retries = self._num_repeated_steps = 0

    @property
    def figures(self) -> RecoveryFigures:
        return RecoveryFigures(
            serving=tuple(sorted(self._in_flight.devices)),
            num_deaths=self._num_deaths,
            num_stalls=self._num_stalls,
            overdue=tuple(sorted(self._stalls.devices)),
            num_respawns=self.num_respawns,
            num_retries=self._num_retries,
            num_repeated_steps=self._num_repeated_steps,
        )

    @property
    def is_healthy(self) -> bool:
        """Whether commands may be given out."""
        return self._state is RecoveryState.HEALTHY

    @property
    def is_waiting(self) -> bool:
        """Whether something is due that may never come: an answer, or a worker."""
        return bool(self._resets or self._stalls.devices) or not self.is_healthy or bool(self._unserved())

    def _unserved(self) -> Stages:
        """Stages that no living worker serves."""
        return unserved(self._executor.stages, self._executor.alive)

    def is_hit(self, request_id: str) -> bool:
        """Whether something that is in flight for the request has come to nothing."""
        return request_id in self._hit

    def counts(self, command: StageCommand) -> bool:
        """Whether a command that all of its members have executed takes its request further: not if it builds on one of
        which that cannot be said, or if the request has another slot by now."""
        request = self._table.get(command.request_id)
        if request is None or (command.slot, command.chunk_index) != (request.slot, request.chunk_index):
            return False
        if isinstance(command, Decode):
            self._hit.pop(command.request_id, None)  # it is about to end, and its id may soon be another's
        return True

    # Told by the loop ---------------------------------------------------------------------------------------------

    def sent(self, entry: InFlight) -> None:
        self._stalls.sent(entry)

    def executed(self, entry: InFlight, device_id: int) -> None:
        self._stalls.executed(entry, device_id)

    def answered_late(self, event: Answer | Failed) -> None:
        """Nothing was due. A device that was set aside is one of the others again once all are reset: its abort word
        is set."""
        if self._stalls.answered(event):
            logger.info("worker %d answers again", event.device_id)
            self._enter(RecoveryState.DRAINING)

    def stood_still(self, seconds: float) -> None:
        """The engine did nothing for so long that it had meant to; perhaps others could not either."""
        if STOOD_STILL_S < seconds < math.inf:
            logger.warning("the engine stood still for %.1f s", seconds)
            self._in_flight.allow(seconds)
            self._stalls.allow(seconds)
            self._since_s += seconds
            self._resets = {device_id: (id, sent_s + seconds) for device_id, (id, sent_s) in self._resets.items()}
            if self._no_worker_since_s is not None:  # none could be started meanwhile
                self._no_worker_since_s += seconds

    def request_failed(self, event: Failed, command: StageCommand) -> None:
        """A failure of its own ends the request, once nothing is in flight for it; others start again."""
        request = self._table.get(event.request_id)
        if event.request_id in self._failed_while_hit:
            return  # nobody waits for it, and its commands are aborted already
        if event.kind == "aborted" and self.is_hit(event.request_id):
            return  # as was asked for
        if event.kind == "aborted" or request is None:  # because of those that are hit already; or it has ended
            first = next(iter(self._hit.values()), None)
            self._hit_request(event.request_id, event.message if first is None else first.reason).repeat(command)
            return
        logger.error("request %s failed on worker %d: %s", event.request_id, event.device_id, event.message)
        request.attempts = MAX_ATTEMPTS
        if self._in_flight.of_request(event.request_id):
            self._hit_request(event.request_id, event.message)
        else:
            self._books.end(request, GenerationError(event.message))

    def worker_lost(self, event: WorkerLost) -> None:
        """What ran there is hit, and so is every request whose state only that worker had. All drain, also if that is
        none."""
        logger.error("worker %d was lost: %s", event.device_id, event.reason)
        self._num_deaths += 1
        self._stalls.lost(event.device_id)
        now_s = self._executor.now_s()
        lost = self._in_flight.drop_device(event.device_id, now_s)
        for number, entry in enumerate(lost):
            hit = self._hit_request(entry.command.request_id, event.reason)
            if number == 0:
                hit.blame(entry.command)
            self._books.member_failed(entry.command, event.device_id, now_s)
            self._books.discard(entry.command)
        for request in self._table.admitted():
            if event.device_id in request.holders:
                request.holders = tuple(holder for holder in request.holders if holder != event.device_id)
            if event.device_id in request.planned_holders and not self.is_hit(request.request_id):
                self._lost_holder(request, event.reason)
        self._resets.pop(event.device_id, None)
        self._last_loss = f"worker {event.device_id}: {event.reason}"
        self._enter(RecoveryState.DRAINING)

    def barriers_reset(self, event: BarriersReset) -> None:
        """The device may be given commands again, if this answers its latest `ResetBarriers`."""
        if self._resets.get(event.device_id, (None,))[0] == event.command_id:
            del self._resets[event.device_id]
            if self._in_flight.add_device(event.device_id):
                logger.info("worker %d has joined the others", event.device_id)

    # At every tick ------------------------------------------------------------------------------------------------

    def check_stalls(self) -> None:
        """Devices whose answer is overdue are set aside or killed, and handled like lost ones. So is what keeps a
        recovery from ending. Raises EngineEnded if there has been no worker for too long."""
        now_s = self._executor.now_s()
        if now_s < self._check_s:
            return
        self._check_s = now_s + STALL_CHECK_S
        if not self._unserved():
            self._no_worker_since_s = None
        elif self._no_worker_since_s is None:
            self._no_worker_since_s = now_s
        for device_id, entry in self._stalls.silent(now_s):
            self._on_silence(device_id, entry, now_s)
        for device_id in self._stalls.for_too_long(now_s, self._stall_timeout_s):
            self._executor.kill(device_id, f"no answer for {self._stall_timeout_s:g} s more than it could take")
        for device_id in [d for d, (_, sent_s) in self._resets.items() if now_s > sent_s + RESET_S]:
            self._executor.kill(device_id, f"no answer to ResetBarriers for {RESET_S:g} s")
        if not self.is_healthy:
            self._check_progress(now_s - self._since_s)
        self._check_workers(now_s)

    def _on_silence(self, device_id: int, entry: InFlight, now_s: float) -> None:
        """A device's answer to the command that it is at is overdue."""
        held = self._in_flight.of_device(device_id)
        reason = f"no answer for {now_s - entry.start_s:.1f} s, {entry.duration_s:.2g} s were predicted"
        untold = [other for other in held if not self.is_hit(other.command.request_id)]
        if all(len(other.members) == 1 for other in held) and self._table.slots.num_free >= len(held):
            self._set_aside(device_id, reason, now_s)
        elif untold:
            logger.warning("worker %d is overdue in a group: %s", device_id, reason)
            self._num_stalls += 1
            for other in untold:
                hit = self._hit_request(other.command.request_id, f"worker {device_id}: {reason}")
                if other is entry:
                    hit.repeat(other.command)
            self._stalled(entry)
        elif now_s > max(self._hit[other.command.request_id].since_s for other in held) + self._abort_s(entry):
            self._executor.kill(device_id, f"{reason}, and others wait for what it may write to")

    def _stalled(self, entry: InFlight) -> None:
        request = self._table.get(entry.command.request_id)
        if request is not None:
            request.num_stalls += 1

    def _abort_s(self, entry: InFlight) -> float:
        """How long a device may take to react to an abort, the request having been overdue once more."""
        request = self._table.get(entry.command.request_id)
        return ABORT_S * (1 if request is None else max(1, patience(request) // 2))

    def _set_aside(self, device_id: int, reason: str, now_s: float) -> None:
        """What the device holds is its own: its requests go on without it, at once if nothing else waits for it."""
        logger.warning("worker %d is overdue and gets nothing new: %s", device_id, reason)
        self._num_stalls += 1
        entries = self._in_flight.drop_device(device_id, now_s)
        self._stalls.set_aside(device_id, entries, now_s)
        self._executor.abort((device_id,))
        requests: dict[str, Request] = {}
        for number, entry in enumerate(entries):
            self._books.member_failed(entry.command, device_id, now_s)
            request = self._table.get(entry.command.request_id)
            if request is not None:
                requests[request.request_id] = request
                hit = self._hit.setdefault(request.request_id, Hit(f"worker {device_id}: {reason}", now_s))
                if number == 0:
                    hit.blame(entry.command)
        self._stalled(entries[0])
        for request in requests.values():
            self._change_slot(request)
            if self.is_healthy and not self._in_flight.of_request(request.request_id):
                self._go_on(request, self._hit.pop(request.request_id))
        if self._hit:
            self._enter(RecoveryState.DRAINING)

    def _check_progress(self, lasted_s: float) -> None:
        """Of a recovery: whoever keeps it from ending is killed, and nobody has to wait for it."""
        timeout_s = self._stall_timeout_s
        if lasted_s <= timeout_s * (1 if self._state is RecoveryState.DRAINING else 2):
            return
        owing = frozenset({member for entry in self._in_flight for member in entry.pending} | self._resets.keys())
        to_blame = frozenset({member for entry in self._in_flight for member in self._to_blame(entry)})
        for device_id in sorted(to_blame | self._resets.keys()):
            self._executor.kill(device_id, f"it has kept the others from going on for {lasted_s:.0f} s")
        silent = ", ".join(map(str, sorted(owing)))
        for request_id, hit in self._hit.items():
            request = self._table.get(request_id)
            if request is not None and request_id not in self._failed_while_hit:
                self._failed_while_hit.add(request_id)
                message = f"{hit.reason}; then worker {silent} did not answer for {lasted_s:.0f} s"
                self._books.end(request, GenerationError(message))
        if lasted_s > 2 * timeout_s + self._no_worker_timeout_s:
            raise EngineEnded(f"worker {silent} neither answers nor ends, and the others wait for it")

    def _to_blame(self, entry: InFlight) -> Collection[int]:
        """Who can be what a command waits for. Nobody if another command comes first, of which the same is asked; nor
        if a member is dead, whose loss is about to be reported: the others wait for that one."""
        if entry.num_behind or not entry.pending <= self._executor.alive:
            return ()
        return sorted(entry.pending)

    def _check_workers(self, now_s: float) -> None:
        timeout_s = self._no_worker_timeout_s
        if self._no_worker_since_s is not None and now_s >= self._no_worker_since_s + timeout_s:
            what = f" that serves {' or '.join(self._unserved())}" if self._executor.alive else ""
            raise EngineEnded(
                f"no worker{what} has been alive for {timeout_s:g} s; the last one lost, {self._last_loss}"
            )

    def proceed(self) -> None:
        """Go one stage further, if it is time to; let workers join that were started anew."""
        if self._state is RecoveryState.DRAINING:
            self._drain()
        if self._state is RecoveryState.RESETTING and not self._resets:
            self._finish()
        able = self._executor.alive - self._stalls.devices
        if self.is_healthy and not able <= self._in_flight.devices:
            self._reset(able - self._in_flight.devices - self._resets.keys())

    def _hit_request(self, request_id: str, reason: str) -> Hit:
        """What is in flight for it will come to nothing."""
        self._enter(RecoveryState.DRAINING)
        return self._hit.setdefault(request_id, Hit(reason, self._executor.now_s()))

    def _lost_holder(self, request: Request, reason: str) -> None:
        """All that was dispatched for it runs elsewhere, or it rests: it goes on from any holder that is left."""
        left = tuple(holder for holder in request.planned_holders if holder in self._in_flight.devices)
        if left:
            request.planned_holders = left
            self._table.mark_changed(request)
        else:
            self._hit_request(request.request_id, reason)

    def _enter(self, state: RecoveryState) -> None:
        if state is not self._state:
            self._state, self._since_s = state, self._executor.now_s()

    def _drain(self) -> None:
        """Abort what may wait inside a hit request's command. Once all workers are idle: reset them."""
        hit = [entry for entry in self._in_flight if entry.command.request_id in self._hit]
        self._executor.abort({member for entry in hit for member in entry.pending} & self._executor.alive)
        if len(self._in_flight) == 0:
            self._enter(RecoveryState.RESETTING)
            self._executor.revive()
            self._resets.clear()
            self._reset(self._executor.alive - self._stalls.devices)

    def _reset(self, device_ids: frozenset[int]) -> None:
        for device_id in sorted(device_ids):
            command = ResetBarriers(command_id=next(self._command_ids))
            self._resets[device_id] = (command.command_id, self._executor.now_s())
            if not self._executor.submit(command, (device_id,)):
                self._executor.kill(device_id, "it does not take its commands")

    def _finish(self) -> None:
        """All have reset: back to HEALTHY."""
        self._enter(RecoveryState.HEALTHY)
        hit, self._hit = self._hit, {}
        failed, self._failed_while_hit = self._failed_while_hit, set()
        for request_id, why in hit.items():
            request = self._table.get(request_id)
            if request is not None and request_id not in failed:
                self._go_on(request, why)

    def _go_on(self, request: Request, hit: Hit) -> None:
        request.attempts += hit.may_be_cause
        if request.attempts >= MAX_ATTEMPTS:
            self._books.end(request, GenerationError(hit.reason))
            return
        self._num_retries += 1
        self._num_repeated_steps += hit.lost_steps
        state = request.forget_dispatched()
        self._table.mark_changed(request)
        if request.state is not state:
            self._table.move(request, state)

    def _change_slot(self, request: Request) -> None:
        """Somebody may still write to the one that it has: all that is known of its state is what is saved."""
        old, index = request.slot, request.chunk_index
        self._table.change_slot(request)
        if request.step_index:
            saved = self._executor.read_saved(request.params, old, index)
            self._executor.write_saved(request.params, request.slot, index, saved)
        request.holders = ()
