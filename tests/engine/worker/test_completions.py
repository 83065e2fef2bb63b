"""Answers leave in the order of their commands, whatever is done first, and failures among them."""

import threading

import pytest
import torch

from tetrion.engine.messages import Event, Failed, Ping, Pong
from tetrion.engine.parallel.cpu.barrier import Aborted
from tetrion.engine.worker.completions import Completions
from tetrion.engine.worker.work_queue import DeviceBroken


def pong(number: int) -> Pong:
    return Pong(command_id=number, device_id=3)


def test_answers_keep_their_order() -> None:
    sent: list[Event] = []
    completions, done = Completions(3, sent.append, on_broken=lambda: None), threading.Event()

    def finish_late() -> Event:
        assert done.wait(10)
        return pong(1)

    completions.add(Ping(command_id=1), finish_late)
    completions.send(pong(2))
    completions.add(Ping(command_id=3), lambda: pong(3))
    assert sent == []
    done.set()
    completions.close()
    assert sent == [pong(1), pong(2), pong(3)]


def test_its_thread_is_prepared_before_it_answers() -> None:
    threads: list[int] = []
    sent: list[int] = []
    completions = Completions(
        3,
        lambda event: sent.append(threading.get_ident()),
        on_broken=lambda: None,
        on_start=lambda: threads.append(threading.get_ident()),
    )
    completions.send(pong(1))
    completions.close()
    assert threads == sent and threads[0] != threading.get_ident()


@pytest.mark.parametrize(
    ("error", "kind", "broken"),
    [
        (Aborted("x"), "aborted", 0),
        (torch.OutOfMemoryError("no room"), "out_of_memory", 0),
        (RuntimeError("odd"), "error", 0),
        (DeviceBroken("illegal address"), "error", 1),
    ],
)
def test_a_failure_is_an_answer(error: Exception, kind: str, broken: int) -> None:
    sent: list[Event] = []
    calls: list[int] = []
    completions = Completions(3, sent.append, on_broken=lambda: calls.append(len(sent)))

    def fail() -> Event:
        raise error

    completions.add(Ping(command_id=1), fail)
    completions.send(pong(2))
    completions.close()
    first, second = sent
    assert isinstance(first, Failed) and (first.command_id, first.device_id, first.kind) == (1, 3, kind)
    assert second == pong(2)
    assert calls == [1] * broken, "told of a broken device after, and only after, its command was answered"
