"""The engine's energy account: takes readings of the meter and what devices did, gives totals and receipts.

Owns a ledger for every GPU. The loop tells of commands, answers and ends; that is noted only, and worked off by whoever
comes next: the sampler with a reading, or who wants a receipt or the totals, in threads of their own. A lock keeps
those apart. Readings are settled up to when the oldest unanswered command was sent, since what devices did before is
known. Times are CLOCK_MONOTONIC seconds.
"""

import functools
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tetrion.engine.energy.figures import EnergyFigures, Totals, errors_of
from tetrion.engine.energy.gpu_ledger import WINDOW_S, GpuLedger, Settled, Window
from tetrion.engine.energy.idle_shares import IdleShares
from tetrion.engine.energy.meters.base import MODEL, EnergyMeter, NoMeter, Reading
from tetrion.engine.energy.modelled import fastest_degree, steps_j
from tetrion.engine.energy.quantum import Quantum, Share
from tetrion.engine.messages import Denoise, StageCommand
from tetrion.engine.planning.cost.predict import measured_j
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.request import JOULES_PER_WH, PhaseJoules, Receipt, unmetered, with_saving
from tetrion.engine.stages import STAGES, Stage

logger = logging.getLogger(__name__)
UNRECONCILED = 0.1
"""How far power samples may be from the counter while no window has closed, as a share."""
NO_POWER = "no reading has come from its GPUs"
NO_IDLE_POWER = "its GPUs were not yet seen idle"
NO_METERED_POWER = "no power is metered"
NOT_BOOKED = "its account could not be kept; the engine's log says why"


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a receipt needs to know of a request."""

    request_id: str
    model: str
    cost_key: str
    degrees: tuple[int, ...]


class EnergyAccount:
    """`gpu_of_device`: device id → UUID (several devices may be on one GPU)."""

    def __init__(
        self,
        meter: EnergyMeter,
        gpu_of_device: Mapping[int, str],
        *,
        cpu_meter: EnergyMeter | None = None,
        g_per_kwh: Callable[[], float | None] | None = None,
        window_s: float = WINDOW_S,
    ) -> None:
        self._meter, self._cpu_meter = meter, cpu_meter
        self._gpu_of_device = dict(gpu_of_device)
        self._g_per_kwh = g_per_kwh
        self._lock = threading.Lock()
        self._noted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._ledgers = {uuid: GpuLedger(window_s) for uuid in sorted(set(self._gpu_of_device.values()))}
        self._sent: dict[int, _Sent] = {}
        self._spent: dict[str, _Spent] = {}
        self._totals = Totals()
        self._idle = IdleShares(self._gpu_of_device)
        self._cpu_start: dict[str, float] | None = None
        self._cpu_j: float | None = None

    # Told by the sampler -----------------------------------------------------------------------------------------

    def receive(self, reading: Reading) -> None:
        """A reading of the meter, in order."""
        cpu = self._cpu_meter.read() if self._cpu_meter is not None else None
        with self._lock:
            self._work_off()
            for uuid, ledger in self._ledgers.items():
                ledger.read(reading.time_s, reading.joules.get(uuid), reading.watts.get(uuid))
            self._settle(reading.time_s)
            if cpu is not None and cpu.joules:
                self._cpu_start = self._cpu_start or cpu.joules
                start = self._cpu_start
                self._cpu_j = sum(joules - start.get(name, joules) for name, joules in cpu.joules.items())

    # Told by the loop --------------------------------------------------------------------------------------------

    def sent(self, command: StageCommand, members: tuple[int, ...], costs: CostTables, now_s: float) -> None:
        """A command is about to be given to its members. Told afterwards, a reading may have settled its beginning."""
        if not self._meter.reason:
            self._noted.append((self._on_sent, (command, members, costs, now_s)))

    def answered(self, command_id: int, device_id: int, started_s: float, ended_s: float, now_s: float) -> None:
        """A member has executed its command."""
        if not self._meter.reason:
            self._noted.append((self._on_answered, (command_id, device_id, started_s, ended_s, now_s)))

    def failed(self, command_id: int, device_id: int, now_s: float) -> None:
        """A member brings no result: it is taken to have been busy since the command was sent."""
        if not self._meter.reason:
            self._noted.append((self._on_failed, (command_id, device_id, now_s)))

    def ended(self, request: RequestFacts, costs: CostTables, now_s: float) -> Callable[[], Receipt]:
        """The request is over; what is booked for it from now on counts in totals only. The answer gives its receipt
        and may be called in any thread."""
        if self._meter.reason:
            return functools.partial(self._unmetered, self._meter.reason, request.degrees, "none")
        end = _End(request, costs, now_s)
        self._noted.append((self._on_ended, (end,)))
        return functools.partial(self._receipt_at, end)

    # Asked -------------------------------------------------------------------------------------------------------

    def figures(self) -> EnergyFigures:
        with self._lock:
            self._work_off()
            known = not self._meter.reason
            is_metered = known and self._meter.source != MODEL
            totals = self._totals
            latest = [ledger.windows[-1] for ledger in self._ledgers.values() if ledger.windows]
            watts = {uuid: w for uuid, ledger in self._ledgers.items() if (w := ledger.power_w()) is not None}
            idle_w = {uuid: w for uuid, ledger in self._ledgers.items() if (w := ledger.idle_w) is not None}
            return EnergyFigures(
                source=self._meter.source,
                reason=self._meter.reason,
                active_j=dict(totals.active_j) if known else None,
                idle_j=totals.idle_j if is_metered else None,
                unattributed_j=totals.unattributed_j if is_metered else None,
                counter_j=totals.counter_j if is_metered else None,
                watts=watts,
                num_windows=totals.num_windows,
                worst_identity_error=totals.worst_identity_error if totals.num_windows else None,
                latest=errors_of(latest),
                overall=totals.errors,
                idle_w=idle_w,
                cpu_j=self._cpu_j,
                cpu_reason="" if self._cpu_meter is None else self._cpu_meter.reason,
            )

    @property
    def knows_idle(self) -> bool:
        """Whether the idle power of every GPU was seen."""
        with self._lock:
            return all(ledger.idle_w is not None for ledger in self._ledgers.values())

    def windows(self) -> dict[str, tuple[Window, ...]]:
        """The latest closed windows of each GPU."""
        with self._lock:
            self._work_off()
            return {uuid: tuple(ledger.windows) for uuid, ledger in self._ledgers.items()}

    def _receipt_at(self, end: "_End") -> Receipt:
        with self._lock:
            self._work_off()
        return end.receipt or self._unmetered(NOT_BOOKED, end.request.degrees, self._meter.source)

    # Bookkeeping, by whoever holds the lock ----------------------------------------------------------------------

    def _work_off(self) -> None:
        """Do what the loop's words ask for, in their order; it may go on speaking meanwhile. What fails is left out:
        whoever comes next, with a reading or for a receipt, need not be whom it concerns."""
        while self._noted:
            act, arguments = self._noted.popleft()
            try:
                act(*arguments)
            except Exception as error:
                self._not_booked(arguments[0], error)

    def _not_booked(self, about: "StageCommand | int | _End", error: Exception) -> None:
        """`about`: the command, its id, or the end that was not worked off."""
        match about:
            case _End():
                request_id = about.request.request_id
            case int():
                request_id = self._sent[about].command.request_id if about in self._sent else f"of command {about}"
            case _:
                request_id = about.request_id
        logger.error("energy: the account of request %s could not be kept", request_id, exc_info=error)
        spent = self._spent.get(request_id)
        if spent is not None:
            spent.unknown = spent.unknown or NOT_BOOKED

    def _on_sent(self, command: StageCommand, members: tuple[int, ...], costs: CostTables, now_s: float) -> None:
        self._sent[command.command_id] = _Sent(command, members, now_s, measured_j(command, costs))
        if command.request_id not in self._spent:
            self._spent[command.request_id] = _Spent(self._idle.begin(now_s))
        self._idle.busy(members, now_s)

    def _on_answered(self, command_id: int, device_id: int, started_s: float, ended_s: float, now_s: float) -> None:
        sent = self._sent.get(command_id)
        if sent is None or device_id not in sent.pending:
            return
        sent.pending.discard(device_id)
        if not sent.pending:
            del self._sent[command_id]
        self._idle.free(device_id, now_s)
        try:
            self._book(sent, device_id, started_s, ended_s)
        except Exception as error:
            self._not_booked(sent.command, error)

    def _on_failed(self, command_id: int, device_id: int, now_s: float) -> None:
        sent = self._sent.get(command_id)
        if sent is not None:
            self._on_answered(command_id, device_id, sent.sent_s, now_s, now_s)

    def _on_ended(self, end: "_End") -> None:
        spent = self._spent.pop(end.request.request_id, None)
        if spent is None:
            end.receipt = self._unmetered("nothing was done for it", end.request.degrees, self._meter.source)
        else:
            idle_j = self._idle.end(spent.idle_start, end.now_s, self._ledgers)
            end.receipt = self._receipt(end.request, spent, idle_j, end.costs)

    def _book(self, sent: "_Sent", device_id: int, started_s: float, ended_s: float) -> None:
        command, params, shape = sent.command, sent.command.params, sent.command.params.shape
        phase = command.stage
        passes = command.chunk_steps * shape.num_branches if isinstance(command, Denoise) else 1
        quantum = Quantum(
            start_s=started_s,
            end_s=ended_s,
            share=Share(command.request_id, phase, params.model, shape.cost_key),
            weight=shape.image * passes / len(sent.members),
            model_j=None if sent.model_j is None else sent.model_j / len(sent.members),
        )
        spent = self._spent.get(command.request_id)
        if spent is not None:
            spent.gpus.add(self._gpu_of_device[device_id])
            spent.phases.add(phase)
        if self._meter.source == MODEL:
            self._book_model(spent, quantum)
        else:
            reason = self._ledgers[self._gpu_of_device[device_id]].add(quantum)
            if spent is not None:
                spent.unknown = spent.unknown or reason

    def _book_model(self, spent: "_Spent | None", quantum: Quantum) -> None:
        """Nothing is measured: what the profile says is all there is."""
        joules = quantum.model_j
        if joules is not None:
            share = quantum.share
            self._totals.active_j[share.model, share.cost_key, share.phase] += joules
        if spent is not None:
            spent.settled_j[quantum.share.phase] += joules or 0.0
            if joules is None:
                spent.unknown = f"the profile has no joules for {quantum.share.phase} at this size"

    def _settle(self, now_s: float) -> None:
        until_s = min([now_s, *(sent.sent_s for sent in self._sent.values())])
        for ledger in self._ledgers.values():
            for settled in ledger.settle(until_s):
                self._take(settled)

    def _take(self, settled: Settled) -> None:
        for share, joules in settled.joules.items():
            spent = self._spent.get(share.request_id)
            if spent is not None:
                spent.settled_j[share.phase] += joules
                spent.unknown = spent.unknown or settled.reason
        self._totals.add(settled)

    def _receipt(self, request: RequestFacts, spent: "_Spent", idle_j: float | None, costs: CostTables) -> Receipt:
        pending: dict[Stage, float] = defaultdict(float)
        drift = 0.0
        for uuid in spent.gpus:
            ledger = self._ledgers[uuid]
            for share, joules in ledger.pending_j(request.request_id).items():
                pending[share.phase] += joules
            drift = max(drift, UNRECONCILED if ledger.drift is None else ledger.drift)
        ledgers = [self._ledgers[uuid] for uuid in spent.gpus]
        is_blind = self._meter.source != MODEL and (not ledgers or None in [ledger.power_w() for ledger in ledgers])
        saving_j = _saving(request, costs, len(self._gpu_of_device))
        if spent.unknown or is_blind:
            blank = self._unmetered(spent.unknown or NO_POWER, request.degrees, self._meter.source)
            return blank if isinstance(saving_j, str) else with_saving(blank, saving_j)
        by_phase = {phase: spent.settled_j[phase] + pending[phase] for phase in STAGES if phase in spent.phases}
        active_j = sum(by_phase.values())
        # Where it began and ended is known to a reading's distance only.
        edge_j = sum(ledger.edge_j(self._meter.resolution_s) for ledger in ledgers)
        return self._priced(
            Receipt(
                method=self._meter.source,
                active_j=active_j,
                phases=PhaseJoules(**by_phase),
                uncertainty_j=UNRECONCILED * active_j
                if self._meter.source == MODEL
                else min(active_j, drift * sum(pending.values()) + edge_j),
                degrees=request.degrees,
            ),
            idle_j,
            saving_j,
        )

    def _unmetered(self, reason: str, degrees: tuple[int, ...], method: str) -> Receipt:
        return unmetered(reason, degrees, method, has_intensity=self._g_per_kwh is not None)

    def _priced(self, receipt: Receipt, idle_j: float | None, saving_j: float | str) -> Receipt:
        """With idle share, watt-hours, the fastest plan and CO₂e, as far as they are known."""
        assert receipt.active_j is not None
        reasons: dict[str, str] = {}
        no_idle = NO_METERED_POWER if receipt.method == MODEL else NO_IDLE_POWER
        if idle_j is None:
            reasons["idle_share_j"] = reasons["wh"] = no_idle
        saved_j = None if isinstance(saving_j, str) else saving_j
        if isinstance(saving_j, str):
            reasons["fastest_plan_j"] = reasons["saved_j"] = saving_j
        wh = None if idle_j is None else (receipt.active_j + idle_j) / JOULES_PER_WH
        co2e_g = None
        if self._g_per_kwh is not None:
            intensity = self._g_per_kwh()
            co2e_g = None if intensity is None or wh is None else intensity * wh / 1e3
            if co2e_g is None:
                reasons["co2e_g"] = "the intensity is not known now" if intensity is None else no_idle
        return msgspec.structs.replace(
            receipt,
            idle_share_j=idle_j,
            wh=wh,
            fastest_plan_j=None if saved_j is None else receipt.active_j + saved_j,
            saved_j=saved_j,
            co2e_g=co2e_g,
            reasons=reasons,
        )


def unmetered_account(device_ids: tuple[int, ...]) -> EnergyAccount:
    """The account of an engine that nobody meters."""
    reason = "this engine runs without a meter"
    return EnergyAccount(NoMeter(reason), {device_id: f"device-{device_id}" for device_id in device_ids})


class _Sent:
    """A command that members have yet to answer. `model_j`: over all members."""

    __slots__ = ("command", "members", "model_j", "pending", "sent_s")

    def __init__(self, command: StageCommand, members: tuple[int, ...], sent_s: float, model_j: float | None) -> None:
        self.command, self.members, self.sent_s, self.model_j = command, members, sent_s, model_j
        self.pending = set(members)


class _End:
    """The end of a request; `receipt` is None until it is worked off."""

    __slots__ = ("costs", "now_s", "receipt", "request")

    def __init__(self, request: RequestFacts, costs: CostTables, now_s: float) -> None:
        self.request, self.costs, self.now_s = request, costs, now_s
        self.receipt: Receipt | None = None


class _Spent:
    """A request under way: what closed windows gave it, and where and in which phases it ran."""

    __slots__ = ("gpus", "idle_start", "phases", "settled_j", "unknown")

    def __init__(self, idle_start: dict[str, float]) -> None:
        self.settled_j: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self.gpus: set[str] = set()
        self.phases: set[Stage] = set()
        self.unknown = ""
        self.idle_start = idle_start


def _saving(request: RequestFacts, costs: CostTables, num_devices: int) -> float | str:
    """Joules that the fastest plan would have taken more, or why that is not known."""
    model, key = request.model, request.cost_key
    fastest = fastest_degree(costs, model, key, num_devices)
    used_j = steps_j(costs, model, key, request.degrees)
    fastest_j = steps_j(costs, model, key, [fastest] * len(request.degrees))
    if used_j is None or fastest_j is None:
        return "the profile has no joules for these degrees at this size"
    return fastest_j - used_j
