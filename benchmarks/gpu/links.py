"""What a layer's exchange costs between this host's GPUs: both pushes and the barrier, all members at once.

    python -m benchmarks.gpu.links OUTPUT.json                      on two or more GPUs, half a minute
    TRITON_INTERPRET=1 python -m benchmarks.gpu.links OUTPUT.json   a rehearsal on the CPU: tiny shapes, no barrier

One process with all GPUs, peer access between them, and the workers' own kernels: a CUDA graph of many repeats on every
GPU, replayed at the same time; a row has the slowest member's time. `gb_per_s`: what a member stores in peers' memory.
`push and barrier` is what the step pays: it ends when the peers' stores have arrived.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import triton

from benchmarks.gpu.kernels import FLUX, TINY, Row, Shapes, group_tensors
from tetrion.engine.parallel.group import GroupPlan, plan_group
from tetrion.entrypoints.record import make_record, write_record
from tetrion.kernels.barrier import ABORTED, CACHE_LINE, barrier
from tetrion.kernels.chunk_words import lists_of
from tetrion.kernels.output_push import output_push
from tetrion.kernels.qk_norm_rope_push import Piece, qk_norm_rope_push

REPEATS, ROUNDS = 50, 7
ALIGNMENT = 4096
Calls = list[Callable[[], None]]
"""What every member enqueues on its own GPU."""


class Member:
    """A GPU with its slab [counters | q | k | v | output] and its share of a sequence."""

    def __init__(self, plan: GroupPlan, rank: int, device: torch.device, head_dim: int) -> None:
        self.plan, self.rank, self.device = plan, rank, device
        self.shape = plan.shape_of(plan.members[rank])
        num_rows = max(self.shape.num_tokens, self.shape.num_local)
        self.region = -(-num_rows * plan.num_heads * head_dim * 2 // ALIGNMENT) * ALIGNMENT
        shard, width = plan.shards[rank], plan.num_heads * head_dim
        with torch.device(device):
            self.slab = torch.zeros(ALIGNMENT + 4 * self.region, dtype=torch.uint8)
            norms = torch.rand(4, head_dim).bfloat16()
            self.pieces = [
                Piece(torch.randn(len(rows), 3 * width).bfloat16(), segment, norms[2 * segment], norms[2 * segment + 1])
                for segment, rows in enumerate(shard.rows)
            ]
            angles = torch.randn(self.shape.num_tokens, head_dim // 2)
            self.rope = angles.cos(), angles.sin()
            self.output = torch.randn(self.shape.num_tokens, len(shard.heads), head_dim).bfloat16()
            self.table, self.words, self.status = group_tensors(plan, rank)
            self.expected = torch.zeros(plan.degree, dtype=torch.int32)
        self.abort = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.bases = torch.zeros(0)

    def meet(self, members: Sequence["Member"]) -> None:
        self.bases = torch.tensor([member.slab.data_ptr() for member in members], device=self.device)

    def offset(self, region: int) -> int:
        return ALIGNMENT + region * self.region

    def push_qkv(self) -> None:
        qk_norm_rope_push(
            self.pieces,
            self.rope,
            self.table,
            self.words,
            self.status,
            self.bases,
            (self.offset(0), self.offset(1), self.offset(2)),
            degree=self.plan.degree,
            num_heads=self.plan.num_heads,
            head_dim=self.output.shape[2],
        )

    def push_output(self) -> None:
        output_push(
            self.output,
            range(len(self.plan.counts)),
            self.shape.padded,
            self.table,
            self.words,
            self.status,
            self.bases,
            self.offset(3),
            degree=self.plan.degree,
            num_heads=self.plan.num_heads,
        )

    def wait_for_all(self) -> None:
        part, _, _ = lists_of(self.words)
        barrier(part, self.bases, self.expected, self.abort, self.status, device_id=self.plan.members[self.rank])

    def holds_values_of(self, other: "Member") -> bool:
        """Whether the other's v, which is stored as it is, has arrived here."""
        head_dim = self.output.shape[2]
        heads = self.plan.shards[self.rank].heads
        shape = self.shape.num_tokens, len(heads), head_dim
        start = self.offset(2)
        v = self.slab[start : start + 2 * torch.Size(shape).numel()].view(torch.bfloat16).view(shape)
        for (qkv, *_), rows in zip(other.pieces, self.plan.canonical_rows(other.plan.shards[other.rank]), strict=True):
            theirs = qkv.view(len(qkv), 3, -1, head_dim)[:, 2, heads.start : heads.stop]
            if not torch.equal(v[rows.start : rows.stop], theirs.to(self.device)):
                return False
        return True


def on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def measure(members: Sequence[Member], num_image: int) -> Iterator[Row]:
    """Every kind of exchange between these members."""
    on_gpu, plan = members[0].device.type == "cuda", members[0].plan
    qkv_bytes = 2 * max(sum(piece.qkv.numel() for piece in member.pieces) for member in members)
    far = 1 - 1 / plan.degree

    def with_barrier(member: Member, push: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            push()
            member.wait_for_all()

        return both

    cases: dict[str, tuple[Calls, float]] = {
        "qkv push": ([member.push_qkv for member in members], far * qkv_bytes),
        "output push": ([member.push_output for member in members], far * qkv_bytes / 3),
    }
    if on_gpu:
        for name, (calls, num_bytes) in dict(cases).items():
            together = [with_barrier(member, call) for member, call in zip(members, calls, strict=True)]
            cases[f"{name} and barrier"] = together, num_bytes
        cases["barrier"] = [member.wait_for_all for member in members], 0.0
    shape = {"num_image": num_image, "degree": plan.degree}
    for name, (calls, num_bytes) in cases.items():
        us = _slowest_us(members, calls)
        speed = num_bytes / us / 1e3 if num_bytes else None
        yield {"exchange": name, **shape, "us": us, "peer_bytes": int(num_bytes), "gb_per_s": speed}
    arrived = all(ours.holds_values_of(theirs) for ours in members for theirs in members)
    yield {"exchange": "values arrived", **shape, "arrived": arrived, "aborted": sum(int(m.status[0]) for m in members)}


def _slowest_us(members: Sequence[Member], calls: Calls) -> float:
    """Microseconds of one call, all members at work at the same time; median of some rounds."""
    if members[0].device.type == "cpu":
        started_s = time.perf_counter()
        for call in calls:
            call()
        return 1e6 * (time.perf_counter() - started_s)
    graphs = []
    for member, call in zip(members, calls, strict=True):
        with on(member.device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(REPEATS):
                    call()
            graphs.append((graph, stream))
    for member, graph in zip(members, graphs, strict=True):
        _rehearse(member, *graph)
    return statistics.median(_replay_us(members, graphs) for _ in range(1 + ROUNDS))


def _rehearse(member: Member, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """A graph's first launch, for which CUDA may allocate memory: not while another GPU waits. After an abort kernels
    wait for nobody and tell nobody anything."""
    with on(member.device), torch.cuda.stream(stream):
        member.status.fill_(ABORTED)
        graph.replay()
        member.status.zero_()
    torch.cuda.synchronize(member.device)


def _replay_us(members: Sequence[Member], graphs: Sequence[tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]]) -> float:
    marks = []
    for member, (graph, stream) in zip(members, graphs, strict=True):
        with on(member.device), torch.cuda.stream(stream):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            marks.append((begin, end))
    _synchronize(members)
    return max(begin.elapsed_time(end) for begin, end in marks) * 1e3 / REPEATS


def _synchronize(members: Sequence[Member]) -> None:
    for member in members:
        torch.cuda.synchronize(member.device)


def _load_kernels(members: Sequence[Member]) -> None:
    """Before anything is recorded; each GPU's barrier alone, its peers' arrivals given."""
    for member in members:
        counters = member.slab[: CACHE_LINE * len(members)].view(torch.int32)
        with on(member.device):
            member.push_qkv()
            member.push_output()
            if member.device.type == "cuda":
                counters.fill_(1)
                member.wait_for_all()
                torch.cuda.synchronize(member.device)
    for member in members:
        member.slab[: CACHE_LINE * len(members)].zero_()
        member.expected.zero_()
    if members[0].device.type == "cuda":
        _synchronize(members)


def _allow_peers(devices: Sequence[torch.device]) -> None:
    """Copying is how torch is asked for peer access."""
    for here in devices:
        for there in devices:
            if here != there and here.type == "cuda":
                torch.ones(1, device=here).to(there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    on_gpu = not triton.knobs.runtime.interpret
    shapes: Shapes = FLUX if on_gpu else TINY
    count = torch.cuda.device_count() if on_gpu else max(TINY.degrees)
    devices = [torch.device("cuda", i) if on_gpu else torch.device("cpu") for i in range(count)]
    if count < 2:
        parser.error(f"{count} GPU: there is no link to measure")
    record = make_record(f"python -m benchmarks.gpu.links {shlex.join(sys.argv[1:])}", [])
    _allow_peers(devices)
    for degree in (n for n in shapes.degrees if 2 <= n <= count):
        for num_image in shapes.num_image:
            plan = plan_group(tuple(range(degree)), (shapes.num_text, num_image), shapes.num_heads)
            members = [Member(plan, rank, devices[rank], shapes.head_dim) for rank in range(degree)]
            for member in members:
                member.meet(members)
            _load_kernels(members)
            for row in measure(members, num_image):
                record["rows"].append(row)
                print(row, flush=True)
            write_record(record, arguments.output)


if __name__ == "__main__":
    main()
