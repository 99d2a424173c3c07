"""Compile a Triton kernel for a GPU that need not be here and read what the machine code takes from it.

The arguments' types follow from their names, and their divisibility from what the launcher finds for the usual layouts: data
pointers and strides are multiples of 16 unless the kernel says do_not_specialize.
"""
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tfkernels._launch import Config

INT32 = ("lo_ptr", "hi_ptr", "low_ptr", "high_ptr", "since_ptr", "until_ptr", "bounds_ptr", "table_ptr", "offsets_ptr", "columns_ptr", "starts_ptr",
         "patch_image_ids_ptr")
INT64 = ("images_ptr", "documents_ptr", "hidden_ptr", "seed_ptr", "image_ids_ptr", "order_ptr", "targets_ptr", "places_ptr")
FLOAT32 = ("parts_ptr", "signal_ptr", "noise_ptr", "loss_ptr", "dloss_ptr", "sums_ptr", "mean_ptr", "means_ptr", "rstd_ptr", "statistics_ptr", "base_ptr",
           "base_parts_ptr", "ws_ptr", "ratio_ptr", "x0_factor_ptr", "eps_factor_ptr")
ELEMENT = {2: "bf16", 4: "fp32"}
TENSOR_CORE = re.compile(r"^\s*(?:@%\w+ )?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)
LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")
COPY = re.compile(r"\bcp\.async\.(?:ca|cg|bulk)\b")


class Resources(NamedTuple):
    """Per thread: registers and bytes of stack, which holds spills. Per block: bytes of shared memory. Of the PTX: see below."""

    registers: int
    spills: int  # instructions that store to or load from a thread's stack
    shared_bytes: int
    tensor_core: dict[str, int]  # multiply instructions: how many of each
    loops: int  # innermost loops with a multiply instruction
    pipelined: int  # how many of them also start an asynchronous copy to shared memory


def argument_type(name: str, element: str) -> str:
    """Return the type of the kernel argument `name`, where data is `element`."""
    if name in INT32:
        return "*i32"
    if name in INT64:
        return "*i64"
    if name.endswith(("lse_ptr", "delta_ptr")) or name in FLOAT32:
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{element}"
    return "fp32" if name in ("scale", "softcap", "eps") else "i32"


def output(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def innermost_loops(ptx: str) -> list[str]:
    """Return the text of each loop that holds no other: from a label to the last branch back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    ends = {}
    for branch in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx):
        if labels[branch[1]] < branch.start():
            ends[labels[branch[1]]] = branch.end()
    return [ptx[start:end] for start, end in ends.items() if not any(start < s and e < end for s, e in ends.items())]


def resources(kernel, constants: dict, config: Config, *, architecture: int, element_size: int, float32: tuple[str, ...] = ()) -> Resources:
    """Compile `kernel` with its constexprs `constants` and the warps and stages of `config` for sm_`architecture`.

    `float32` names arguments that hold float32 in this kernel and data in others.
    """
    signature = {p.name: "constexpr" if p.name in constants else "*fp32" if p.name in float32 else argument_type(p.name, ELEMENT[element_size])
                 for p in kernel.params}
    divisible = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params)
                 if p.name.startswith("stride_") and not p.do_not_specialize or p.name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, divisible)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True, "maxnreg": config.max_registers}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        # ptxas leaves a frame of 8 bytes behind where it found room for what it first meant to spill: what counts is its use
        spills = 0 if "STACK:0 " in usage else len(LOCAL_MEMORY.findall(output(knobs.nvidia.nvdisasm.path, file.name)))
    found = [m.strip().split(" ")[-1] for m in TENSOR_CORE.findall(built.asm["ptx"])]
    loops = [loop for loop in innermost_loops(built.asm["ptx"]) if TENSOR_CORE.search(loop)]
    return Resources(int(re.search(r"REG:(\d+)", usage)[1]), spills, built.metadata.shared,
                     {name: found.count(name) for name in sorted(set(found))}, len(loops), sum(COPY.search(loop) is not None for loop in loops))
