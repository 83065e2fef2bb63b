"""Whose the idle joules are: what idle GPUs draw while requests are under way is divided equally among those."""

from collections.abc import Mapping

from tetrion.engine.energy.gpu_ledger import GpuLedger


class IdleShares:
    """How long each GPU was idle, divided by the number of requests under way; a request's share is a difference."""

    def __init__(self, gpu_of_device: Mapping[int, str]) -> None:
        self._gpu_of_device = gpu_of_device
        self._num_commands = dict.fromkeys(gpu_of_device.values(), 0)
        self._share_s = dict.fromkeys(gpu_of_device.values(), 0.0)
        self._num_requests = 0
        self._now_s = 0.0

    def begin(self, now_s: float) -> dict[str, float]:
        self._advance(now_s)
        self._num_requests += 1
        return dict(self._share_s)

    def end(self, start: dict[str, float], now_s: float, ledgers: Mapping[str, GpuLedger]) -> float | None:
        """Joules, or None while the idle power of a GPU that was idle is not known."""
        self._advance(now_s)
        self._num_requests -= 1
        joules = 0.0
        for uuid, share_s in self._share_s.items():
            idle_s, idle_w = share_s - start[uuid], ledgers[uuid].idle_w
            if idle_s > 0 and idle_w is None:
                return None
            joules += idle_s * (idle_w or 0.0)
        return joules

    def busy(self, members: tuple[int, ...], now_s: float) -> None:
        self._advance(now_s)
        for device_id in members:
            self._num_commands[self._gpu_of_device[device_id]] += 1

    def free(self, device_id: int, now_s: float) -> None:
        self._advance(now_s)
        self._num_commands[self._gpu_of_device[device_id]] -= 1

    def _advance(self, now_s: float) -> None:
        if self._num_requests and now_s > self._now_s:
            for uuid, num_commands in self._num_commands.items():
                if not num_commands:
                    self._share_s[uuid] += (now_s - self._now_s) / self._num_requests
        self._now_s = max(now_s, self._now_s)
