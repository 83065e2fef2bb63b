import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrion.engine.transport.doorbell import DoorbellKind
from tetrion.engine.transport.image_slab import ImageSlab
from tetrion.engine.transport.segment import Backing


@pytest.fixture
def slab(kinds: tuple[Backing, DoorbellKind]) -> Iterator[ImageSlab]:
    slab = ImageSlab.create(3, 16 * 32 * 3, backing=kinds[0])
    yield slab
    slab.close()


def attach(slab: ImageSlab) -> ImageSlab:
    return ImageSlab.attach(os.dup(slab.fd), num_slots=slab.num_slots, slot_bytes=slab.slot_bytes)


def test_a_worker_writes_and_the_engine_reads_a_copy(slab: ImageSlab) -> None:
    worker = attach(slab)
    pictures = [np.random.default_rng(i).integers(0, 256, (16, 32, 3), np.uint8) for i in range(3)]
    latents = np.random.default_rng(9).normal(size=(20, 16)).astype(np.float32)
    for slot, picture in enumerate(pictures):
        worker.view(slot, (16, 32, 3))[...] = picture
    copies = [slab.read(slot, (16, 32, 3)) for slot in range(3)]
    worker.write(1, latents)
    assert all((copy == picture).all() for copy, picture in zip(copies, pictures, strict=True))
    assert (slab.read(1, (20, 16), np.float32) == latents).all()
    assert (slab.read(0, (16, 32, 3)) == pictures[0]).all() and (slab.read(2, (16, 32, 3)) == pictures[2]).all()
    worker.close()


@given(actions=st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=60))
@settings(max_examples=50, deadline=None)
def test_a_slot_has_one_holder(actions: list[int | None]) -> None:
    """None acquires, a number releases one of the held slots."""
    slab, held = ImageSlab.create(5, 1), list[int]()
    for action in actions:
        if action is None:
            slot = slab.acquire()
            assert (slot is None) == (len(held) == 5) and slot not in held
            held += [] if slot is None else [slot]
        elif held:
            slab.release(held.pop(action % len(held)))
        assert slab.num_free == 5 - len(held)
    slab.close()


def test_errors_name_the_numbers(slab: ImageSlab) -> None:
    assert slab.slot_bytes == 4096
    with pytest.raises(ValueError, match="slot 3 is out of bounds: this slab has slots 0 to 2"):
        slab.view(3, (1,))
    with pytest.raises(ValueError, match="slot -1 is out of bounds"):
        slab.release(-1)
    with pytest.raises(ValueError, match="slot 1 is released twice"):
        slab.release(1)
    with pytest.raises(ValueError, match=r"uint8 array of shape \(4097,\): 4,097 bytes, a slot has 4,096"):
        slab.view(0, (4097,))
    with pytest.raises(ValueError, match=r"float32 array of shape \(1025,\): 4,100 bytes"):
        slab.read(0, (1025,), np.float32)
    with pytest.raises(ValueError, match=r"shape \(-1, 3\)"):
        slab.view(0, (-1, 3))
    with pytest.raises(ValueError, match="expected a uint8 or float32 array, got float64"):
        slab.write(0, np.zeros(3))
    with pytest.raises(ValueError, match="must be positive, got 0, 5"):
        ImageSlab.create(0, 5)


def test_only_the_engine_hands_out_slots(slab: ImageSlab) -> None:
    worker = attach(slab)
    for call in (worker.acquire, lambda: worker.release(0)):
        with pytest.raises(RuntimeError, match="handed out by the engine"):
            call()
    worker.close()


def test_several_arrays_lie_one_behind_the_other() -> None:
    slab = ImageSlab.create(2, 4096)
    arrays = [np.full((h, w, c), value, np.uint8) for value, (h, w, c) in enumerate([(4, 5, 3), (1, 1, 3), (7, 3, 1)])]
    slab.write_all(1, arrays)
    views = slab.view_all(1, [array.shape for array in arrays])
    assert all(np.array_equal(view, array) for view, array in zip(views, arrays, strict=True))
    assert slab.view_all(1, []) == [] and not slab.read(0, (4096,)).any()
    with pytest.raises(ValueError, match="a slot has 4,096"):
        slab.write_all(0, [np.zeros((4097,), np.uint8)])
