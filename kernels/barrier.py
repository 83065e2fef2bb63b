"""The pairwise-counter barrier on GPUs: what engine/parallel/cpu/barrier.py does between processes, inside a CUDA
graph.

Owns waiting for peers, bounded and abortable; knows no tensors of the model and no token ranges.

For every ordered pair (sender, receiver) the receiver's slab has one 32-bit counter, on a cache line of its own, that
only the sender changes. `expected[p]` on each device is how many barriers it has begun with device p since the last
reset. One program, one lane a member:

    1. expected[p] += 1 for each other member p
    2. release-add 1 at system scope to slab[p].counter[me]: what earlier kernels of this stream stored in p's slab is
       visible to whoever reads the new count with an acquire
    3. read slab[me].counter[p] until it has reached expected[p] (modulo 2^32: a peer may be one barrier ahead), looking
       at the abort word, which lies in host memory and is slow to read, every ABORT_INTERVAL looks
    4. a fence at system scope, which makes the reads of 3 acquires: the kernels behind this one see what peers stored

A counter has one writer, so slabs may also lie in host memory, where a GPU's read-modify-write is not always atomic for
others.

An abort sets `status`; from then on every barrier of this device returns at once and tells nobody anything, so a graph
in flight drains. Pushes still to come look at it too and store nothing (`is_live` in chunk_words.py): a peer may be at
work for another request by then. Whatever is computed must not be used. Before the next group the survivors zero their
counters, `expected` and `status` while all are idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrion.kernels.group_table import slab_pointer

CACHE_LINE = 64
ABORT_INTERVAL = 256
ABORTED = 1


def barrier(
    members: Tensor,
    bases: Tensor,
    expected: Tensor,
    abort: Tensor,
    status: Tensor,
    *,
    device_id: int,
    counters_offset: int = 0,
) -> None:
    """Enqueue a barrier of a group. Any two devices must run the groups that contain both in the same order.

    members: who is waited for, by device id, each once; filled up with this device itself, whose number is `device_id`,
        to a power of two. int32, one of chunk_words.py's lists.
    bases: address of each device's slab by device id; int64.
    expected: barriers begun with each device; int32 by device id, on this device.
    abort: int32 [1] in pinned host memory; non-zero ends every wait.
    status: int32 on this device; its first word becomes ABORTED.
    counters_offset: of the counters in every slab, in bytes; sender s has the word at `counters_offset + 64 s`.
    """
    assert members.dtype == expected.dtype == abort.dtype == status.dtype == torch.int32, "words are int32"
    assert len(members) == triton.next_power_of_2(len(members)), f"{len(members)} lanes are no power of two"
    assert bases.dtype == torch.int64 and len(bases) == len(expected), f"{len(bases)} slabs, {len(expected)} counts"
    assert counters_offset % CACHE_LINE == 0, f"counters at {counters_offset} are not aligned"
    _kernel[(1,)](
        members,
        bases,
        expected,
        abort,
        status,
        device_id,
        counters_offset // 4,
        LANES=len(members),
        WORDS_APART=CACHE_LINE // 4,
        INTERVAL=ABORT_INTERVAL,
        ABORTED_STATUS=ABORTED,
        INTERPRETED=triton.knobs.runtime.interpret,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["me", "counters"])
def _kernel(
    members,
    bases,
    expected,
    abort,
    status,
    me,
    counters,
    LANES: tl.constexpr,
    WORDS_APART: tl.constexpr,
    INTERVAL: tl.constexpr,
    ABORTED_STATUS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    if tl.load(status) == 0:
        device_P = tl.load(members + tl.arange(0, LANES))
        other_P = device_P != me
        want_P = tl.load(expected + device_P, mask=other_P, other=0) + 1
        tl.store(expected + device_P, want_P, mask=other_P)
        theirs_P = tl.load(bases + device_P, mask=other_P, other=0).to(tl.pointer_type(tl.int32))
        tl.atomic_add(theirs_P + counters + me * WORDS_APART, 1, mask=other_P, sem="release", scope="sys")

        ours_P = slab_pointer(bases, me, tl.int32) + counters + device_P * WORDS_APART
        missing = tl.sum(other_P.to(tl.int32))
        looks = 0
        while missing > 0:
            have_P = tl.load(ours_P, mask=other_P, other=0, volatile=True)
            missing = tl.sum((other_P & (have_P - want_P < 0)).to(tl.int32))
            looks += 1
            if looks % INTERVAL == 0:  # noqa: SIM102 - here `and` would read the host's word at every look
                if tl.load(abort, volatile=True) != 0:
                    tl.store(status, ABORTED_STATUS)
                    missing = 0
        if not INTERPRETED:
            system_fence(looks)


@triton.jit
def system_fence(after):
    """No later access of any device's memory overtakes an earlier one. `after`: a number known by then."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; mov.u32 $0, $1;", "=r,r", [after], dtype=tl.int32, is_pure=False, pack=1
    )
