"""A program: compile the kernels as an H100 would run FLUX.1 (no GPU needed) and print what the machine code holds.

One JSON object by kernel: registers and bytes of local memory (spills) a thread, bytes of shared memory a program, and
`ptx`: how often each instruction of INSTRUCTIONS occurs. test_compile_for_hopper.py starts it, the interpreter off.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tetrion.kernels import (
    attention,
    barrier,
    group_norm_silu,
    guided_step,
    output_push,
    qk_norm_rope_push,
    rescaled_guidance,
    residual_modulate,
    slot_version,
    state_place,
    state_pull,
    state_push,
    state_read,
    velocity_push,
)
from tetrion.kernels.attention_tiles import TILES

HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTIONS = {
    "load": r"ld\.global",
    "store": r"st\.global",
    "wide_store": r"st\.global\S*\.v4",
    "tensor_core": r"wgmma\.mma_async",
    "tensor_copy": r"cp\.async\.bulk\.tensor",
    "system_release": r"(?:atom|red)\.(?:\S*sys\S*release|\S*release\S*sys)",
    "system_fence": r"fence\.acq_rel\.sys",
    "multiply_add": r"fma\.rn\.f32",
}
FLUX = {"NUM_HEADS": 24, "HEAD_DIM": 128, "DEGREE": 4}
KREA = {"NUM_HEADS": 48, "HEADS_PER_KEY": 4}
POINTERS = {"table": "*i32", "bases": "*i64", "expected": "*i32", "status": "*i32", "step": "*i32"}
POINTERS |= {"abort": "*i32", "chunk": "*i32", "members": "*i32", "partners": "*i32"}
POINTERS |= {"partials": "*fp32", "statistics": "*fp32", "epsilon": "fp32", "weight": "*bf16", "bias": "*bf16"}
POINTERS |= dict.fromkeys(("cos", "sin", "log_sum_exp", "rows", "state", "coefficients", "guidance"), "*fp32")
PIECE = ("qkv", "q_norm", "k_norm")
BRANCH = ("x", "y", "shift", "scale", "gate")
TENSORS = ("x", "out", "output", "normed", "velocity", "negative")
TENSORS += tuple(f"{name}_{i}" for i in range(3) for name in PIECE)
TENSORS += tuple(f"{which}_{name}" for which in ("first", "last") for name in BRANCH)
POINTERS |= dict.fromkeys(TENSORS, "*bf16")


def compiled(module: Any, constants: dict[str, Any], types: dict[str, str] | None = None, **options: int) -> dict:
    """`module`: a kernel's file, or one of the kernels of a file that has several. Arguments that are neither constants
    nor given types are tensors by name, else multiples of 16 unless the kernel is not specialised on them."""
    kernel, known = getattr(module, "_kernel", module), POINTERS | (types or {})
    signature = {n: "constexpr" if n in constants else known.get(n, "i32") for n in kernel.arg_names}
    aligned = [
        i
        for i, (n, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True))
        if signature[n].startswith("*") or (signature[n] == "i32" and not parameter.do_not_specialize)
    ]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    result = triton.compile(source, target=HOPPER, options=options)
    ptx = result.asm["ptx"]
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()}
    return resources(result.asm["cubin"]) | {"shared": result.metadata.shared, "ptx": counts}


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "local": stack + local}


def main() -> None:
    push = {"HEADS_PER_KEY": 1, "ROWS": qk_norm_rope_push.TILE_ELEMENTS // 128, "rope_pair_stride": 1} | FLUX
    push |= {f"EPSILON_{i}": 1e-6 for i in range(3)}
    joint = push | {f"SEGMENT_{i}": i for i in range(3)} | {f"HAS_ROPE_{i}": True for i in range(3)}
    flux = joint | {f"{name}_2": None for name in PIECE}
    plain = joint | {f"{name}_{i}": None for i in range(3) for name in PIECE[1:]}
    plain |= {f"HAS_ROPE_{i}": False for i in range(3)} | {"cos": None, "sin": None, "HEAD_DIM": 64, "ROWS": 64}
    output = {"ROWS": output_push.TILE_ELEMENTS // 128} | {f"SEGMENT_{i}": i for i in range(3)} | FLUX
    meet = {"LANES": 4, "WORDS_APART": 16, "INTERVAL": 256, "ABORTED_STATUS": 1, "INTERPRETED": False}
    state = {"WIDTH": 64, "SIZE": state_place.BLOCK}
    step = {"NUM_ROWS": 1, "CHANNELS": 64, "SIZE": guided_step.BLOCK}
    fp32 = {"out": "*fp32"}
    versions = {"LONGS_APART": 8, "ABORTED_STATUS": 1}
    waits = versions | {"INTERVAL": 256, "INTERPRETED": False}
    confirm = {"LONGS_APART": 8, "WRONG": 2, "IN_GROUP": True}
    maps = {"WIDTH": 512, "GROUPS": 32, "BLOCK": group_norm_silu.TILE // 512}
    join = {"GROUPS": 32, "PROGRAMS": group_norm_silu.MAX_PROGRAMS}
    results = {
        "qk_norm_rope_push": compiled(qk_norm_rope_push, flux, num_warps=4),
        "qk_norm_rope_push of 3": compiled(qk_norm_rope_push, joint, num_warps=4),
        "qk_norm_rope_push of grouped heads": compiled(qk_norm_rope_push, flux | KREA, num_warps=4),
        "qk_norm_rope_push of copies": compiled(qk_norm_rope_push, plain, num_warps=4),
        "output_push": compiled(output_push, output, num_warps=4),
        "residual_modulate": compiled(
            residual_modulate, {"WIDTH": 3072, "BLOCK": 4096, "EPSILON": 1e-6, "IS_RMS": False}, num_warps=8
        ),
        "group_norm_partial": compiled(group_norm_silu._partial_statistics, maps, num_warps=group_norm_silu.NUM_WARPS),
        "group_norm_join": compiled(group_norm_silu._join_statistics, join, num_warps=group_norm_silu.JOIN_WARPS),
        "group_norm_silu": compiled(group_norm_silu._norm_silu, maps, num_warps=group_norm_silu.NUM_WARPS),
        "barrier": compiled(barrier, meet, num_warps=1),
        "state_pull": compiled(state_pull, {"SHORTS": 8, "BLOCK": 8 * state_pull.BLOCK_UNITS}, num_warps=4),
        "state_read": compiled(state_read, state, fp32, num_warps=4),
        "state_push": compiled(state_push, state, num_warps=4),
        "velocity_push": compiled(velocity_push, {"SIZE": velocity_push.BLOCK}, num_warps=4),
        "euler_step": compiled(guided_step, step | {"negative": None}, fp32, num_warps=4),
        "guided_step": compiled(guided_step, step | {"NUM_ROWS": 4, "CHANNELS": 16}, fp32, num_warps=4),
        "rescaled_guidance": compiled(
            rescaled_guidance, {"WIDTH": 64, "ROWS": 16, "COLUMNS": 64, "LEAST": 1e-30}, fp32, num_warps=4
        ),
        "wait_version": compiled(slot_version._wait, waits, num_warps=1),
        "wait_for_state": compiled(slot_version._wait_for_state, waits, num_warps=1),
        "confirm_version": compiled(slot_version._confirm, confirm, num_warps=1),
        "invalidate_version": compiled(slot_version._invalidate, versions, num_warps=1),
        "publish_version": compiled(slot_version._publish, versions, num_warps=1),
    }
    for row in (row for row in TILES if row.itemsize == 2):
        tile, dim = row.tile, row.head_dim
        queries, keys = (f"tensordesc<bf16[{block}, {dim}]>" for block in (tile.block_m, tile.block_n))
        types = {"q": queries, "k": keys, "v": keys, "out": queries, "scale": "fp32"}
        constants = {
            "log_sum_exp": None,
            "HEADS_PER_KEY": 1,
            "HEAD_DIM": dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        constants |= {"HEADS_PER_KEY": 1, "HAS_TAIL": True, "FULL_PRECISION": False}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        results[f"attention {dim} {tuple(tile)}"] = compiled(attention, constants, types, **options)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
