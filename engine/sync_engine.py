"""`Engine`: the synchronous twin of `AsyncEngine`, in the manner of vLLM's `LLMEngine`.

with Engine() as engine:
    results = engine.generate(["a red circle", "a green star"])
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Self

from tetrion.engine.api import AsyncEngine, RequestHandle
from tetrion.engine.config import EngineConfig
from tetrion.engine.hardware.event_loop import new_event_loop
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.request import Failure, ImageRequest, ImageResult


class Engine:
    """The engine for synchronous code. Owns an event loop, which runs only inside its methods."""

    def __init__(self, config: EngineConfig | None = None, g_per_kwh: Callable[[], float | None] | None = None) -> None:
        """Starts the engine at once; raises as `AsyncEngine.start`. Call `close`, or use it in a `with`.

        `g_per_kwh`: as for `AsyncEngine`."""
        self._runner = asyncio.Runner(loop_factory=new_event_loop)
        self._unfinished: dict[str, RequestHandle] = {}
        self._unasked: list[ImageResult | Failure] = []
        self._engine = AsyncEngine(config, g_per_kwh=g_per_kwh)
        try:
            self._runner.run(self._engine.start())
        except BaseException:
            self._runner.close()
            raise
        self.models = self._engine.models
        self.devices = self._engine.devices

    @property
    def spec(self) -> ModelSpec:
        """Of the model that requests get which name none."""
        return self.models.default

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            self._runner.run(self._engine.close())
        finally:
            self._runner.close()

    def add_request(self, request: ImageRequest | str) -> str:
        """Queue a request and return its id. Raises as `AsyncEngine.submit`."""
        handle = self._runner.run(self._submit(request))
        self._unfinished[handle.request_id] = handle
        return handle.request_id

    def abort_request(self, request_id: str) -> None:
        """Give a request up; it comes back from `step` as a Failure with RequestCancelled."""
        if request_id in self._unfinished:
            self._unfinished[request_id].cancel()

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to return, now or later."""
        return bool(self._unfinished or self._unasked)

    def step(self) -> list[ImageResult | Failure]:
        """Run until at least one request has ended; return all that have. Nothing unfinished: an empty list."""
        if self._unasked:
            ended, self._unasked = self._unasked, []
            return ended
        return self._run_step()

    def generate(self, requests: Iterable[ImageRequest | str]) -> list[ImageResult]:
        """Draw all pictures and return them in order. Raises the first failure (the others are drawn all the same); of
        a request that is refused the others are given up. What others add to the engine is left for `step`."""
        ids = self._add_all(requests)
        ended: dict[str, ImageResult | Failure] = {}
        left = set(ids)
        while left:
            for output in self._run_step():
                if output.request_id in left:
                    left.remove(output.request_id)
                    ended[output.request_id] = output
                else:
                    self._unasked.append(output)
        results = []
        for request_id in ids:
            output = ended[request_id]
            if isinstance(output, Failure):
                raise output.error
            results.append(output)
        return results

    def _add_all(self, requests: Iterable[ImageRequest | str]) -> list[str]:
        """All of them or none."""
        ids: list[str] = []
        try:
            for request in requests:
                ids.append(self.add_request(request))
        except BaseException:
            for request_id in ids:
                self._unfinished.pop(request_id).cancel()
            raise
        return ids

    def _run_step(self) -> list[ImageResult | Failure]:
        return self._runner.run(self._step()) if self._unfinished else []

    async def _submit(self, request: ImageRequest | str) -> RequestHandle:
        return self._engine.submit(request)

    async def _step(self) -> list[ImageResult | Failure]:
        tasks = {asyncio.create_task(_outcome(handle)): handle for handle in self._unfinished.values()}
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            del self._unfinished[tasks[task].request_id]
        return [task.result() for task in done]


async def _outcome(handle: RequestHandle) -> ImageResult | Failure:
    try:
        return await handle.result()
    except asyncio.CancelledError:
        raise
    except Exception as error:
        return Failure(request_id=handle.request_id, error=error)
