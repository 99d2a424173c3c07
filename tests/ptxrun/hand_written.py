"""Small PTX programs by hand: a body between loads of each thread's inputs and the store of its result."""
import struct

import numpy as np

from ptxrun.launch import Emulation
from ptxrun.memory import GlobalMemory
from ptxrun.schedule import Schedule

REGISTERS = """
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<160>;
    .reg .b64 %d<16>;
    .reg .b32 %me, %lane;
    .reg .b64 %offset, %at;
"""
WIDTH = {2: ("b16", "h"), 4: ("b32", "r"), 8: ("b64", "d")}


def aligned(words: int) -> np.ndarray:
    """uint32 numbers that begin at a multiple of 128 bytes."""
    buffer = np.zeros(words + 32, np.uint32)
    return buffer[-buffer.ctypes.data % 128 // 4:][:words]


def run_kernel(body, arrays, *, threads=32, blocks=1, shared=0, schedule="late", seed=0, races=False, count=False,
               header="", parameters=(), **options):
    """Run a body with a 64-bit pointer parameter p0, p1, ... for each array (written in place). More `parameters`
    follow as (declaration, bytes)."""
    memory = GlobalMemory()
    for i, array in enumerate(arrays):
        memory.add(array.ctypes.data, array, f"p{i}")
    declared = [f".param .u64 p{i}" for i in range(len(arrays))] + [text for text, _ in parameters]
    emulation = Emulation(90, Schedule(schedule, seed), races, count, **options)
    values = [struct.pack("<Q", array.ctypes.data) for array in arrays] + [data for _, data in parameters]
    emulation.launch(kernel_text(body, declared, threads, header), (blocks, 1, 1), values, memory, shared)
    return emulation


def kernel_text(body, declared=(), threads=32, header=""):
    """The PTX of a kernel with a body."""
    return f"""
.visible .entry kernel({', '.join(declared)}) .reqntid {threads} {header}
{{
{REGISTERS}
    mov.u32 %me, %tid.x;
    mov.u32 %lane, %laneid;
{body}
    ret;
}}
"""


def per_thread(body, *inputs, result=np.uint32, threads=32, **options):
    """Run a body for each thread's own inputs and return each thread's result.

    Inputs are in %r0, %r1, ... (or %h, %d by their size, each kind counted by itself); the body leaves its result in
    register 15 of the kind that `result` has.
    """
    inputs = [np.array(np.broadcast_to(x, (threads,))) for x in inputs]
    out = np.zeros(threads, result)
    lines, count = [], {"h": 0, "r": 0, "d": 0}
    for i, array in enumerate(inputs):
        kind, letter = WIDTH[array.itemsize]
        lines += [f"ld.param.u64 %at, [p{i}];", f"mul.wide.u32 %offset, %me, {array.itemsize};",
                  "add.s64 %at, %at, %offset;", f"ld.global.{kind} %{letter}{count[letter]}, [%at];"]
        count[letter] += 1
    kind, letter = WIDTH[out.itemsize]
    lines += [body, f"ld.param.u64 %at, [p{len(inputs)}];", f"mul.wide.u32 %offset, %me, {out.itemsize};",
              "add.s64 %at, %at, %offset;", f"st.global.{kind} [%at], %{letter}15;"]
    run_kernel("\n".join(lines), [*inputs, out], threads=threads, **options)
    return out
