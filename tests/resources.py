"""Compile a Triton kernel for a GPU that need not be here, and read what its machine code takes from the GPU.

What has been compiled before, with the same sources, Triton, ptxas and options, is read from compiled.json and not
compiled again, but for one in sixteen, which is compared. After a whole `make test` on kernels that are to stay,
`python -m tests.resources` writes that file anew, of what the tests have asked for since it last did.

The types of a kernel's arguments follow from their names. Their divisibility is what the launcher finds for the usual
layouts: pointers and strides are multiples of 16, unless the kernel names them in do_not_specialize.
"""
import functools
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_key

import ptxrun
import tests.in_flight
import tests.schedule
from ptxrun import unknown_instructions
from ptxrun.instructions import TABLE
from tests.in_flight import overwritten
from tests.schedule import wait_distances
from tfkernels._launch import SHARED_LIMIT, Config

INT32 = (
    "lo_ptr", "hi_ptr", "low_ptr", "high_ptr", "since_ptr", "until_ptr", "bounds_ptr", "table_ptr", "offsets_ptr",
    "columns_ptr", "starts_ptr", "patch_image_ids_ptr")
INT64 = (
    "images_ptr", "documents_ptr", "hidden_ptr", "seed_ptr", "image_ids_ptr", "order_ptr", "targets_ptr",
    "places_ptr")
FLOAT32 = (
    "parts_ptr", "signal_ptr", "noise_ptr", "loss_ptr", "dloss_ptr", "sums_ptr", "mean_ptr", "means_ptr", "rstd_ptr",
    "statistics_ptr", "base_ptr", "base_parts_ptr", "ws_ptr", "ratio_ptr", "x0_factor_ptr", "eps_factor_ptr")
ELEMENT = {2: "bf16", 4: "fp32"}
EMULATED = (80, 90)  # architectures whose instructions ptxrun knows; every kernel that is compiled for them is decoded
TENSOR_CORE = re.compile(r"^\s*(?:@%\w+ )?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)
LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")
BUTTERFLY = re.compile(r"\bshfl\.sync\.bfly\.b32\s+(%\w+)")
FUSED = re.compile(r"\bfma\.rn(?:\.ftz)?\.f32\s+%\w+, [^,;]+, [^,;]+, (%\w+);")
COPY = re.compile(r"\bcp\.async\.(?:ca|cg|bulk)\b")
LEFT_IN_REGISTERS = re.compile(r"\bwgmma\.mma_async[^;]*?\}, \{")
KNOWN = Path(__file__).with_name("compiled.json")
ASKED = Path(__file__).parents[1] / "build" / "compiled"  # what tests have asked for, a file each
COMPARED = 16  # one in so many of what is known is compiled all the same


class Resources(NamedTuple):
    """What a compiled kernel takes, per thread and per block, and what its PTX holds."""

    registers: int  # per thread
    spills: int  # instructions that store to or load from a thread's stack
    shared_bytes: int  # per block
    tensor_core: dict[str, int]  # multiply instructions: how many of each
    loops: int  # innermost loops with a multiply instruction
    pipelined: int  # how many of them also start an asynchronous copy to shared memory
    waits: tuple[float, ...]  # of those: tiles of work between asking for a tile and waiting for it (tests/schedule.py)
    uneven_sums: int = 0  # fused steps of a butterfly, behind which lanes of one row may differ in the last bit
    overwritten: int = 0  # instructions that write what a product in flight may still read (tests/in_flight.py)

    def fit(self, architecture: int) -> bool:
        """Whether nothing spills, no product reads registers that are written, and a block's shared memory is within
        the limit of the architecture's cards."""
        return self.spills == self.overwritten == 0 and self.shared_bytes <= SHARED_LIMIT[architecture]


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
    return "fp32" if name in ("scale", "softcap", "smoothing", "z_loss", "eps") else "i32"


def output(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassembled(cubin: bytes) -> str:
    """Return machine code as text, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return output(knobs.nvidia.nvdisasm.path, file.name)


def innermost_loops(ptx: str) -> list[str]:
    """Return the text of each loop that holds no other: from a label to the last branch back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    ends = {}
    for branch in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx):
        if labels[branch[1]] < branch.start():
            ends[labels[branch[1]]] = branch.end()
    return [ptx[start:end] for start, end in ends.items() if not any(start < s and e < end for s, e in ends.items())]


def source_of(kernel, constants: dict, element: str, float32: tuple[str, ...]) -> ASTSource:
    """Return `kernel` with the types and the divisibility of the arguments that a launch with the usual layouts has."""
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return "*fp32" if name in float32 else argument_type(name, element)

    signature = {p.name: kind(p.name) for p in kernel.params}
    divisible = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params)
                 if (p.name.startswith("stride_") or p.name.endswith("_ptr")) and not p.do_not_specialize}
    return ASTSource(kernel, signature, constants, divisible)


def options_of(config: Config, fuses: bool) -> dict:
    """Return the options of a launch."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": fuses,
            "maxnreg": config.max_registers}


def compiled(kernel, constants: dict, config: Config, architecture: int, element: str, float32: tuple[str, ...],
             fuses: bool = True):
    """Compile `kernel` for sm_`architecture` as a launch with the usual layouts would."""
    return triton.compile(source_of(kernel, constants, element, float32), target=GPUTarget("cuda", architecture, 32),
                          options=options_of(config, fuses))


@functools.cache
def _readers(emulated: bool) -> str:
    """The text of what reads compiled code: an older one might have found something else."""
    reading = [inspect.getsource(one) for one in (Resources, innermost_loops, registers_and_spills, uneven_sums, read)]
    patterns = [one.pattern for one in (TENSOR_CORE, LOCAL_MEMORY, BUTTERFLY, FUSED, COPY, LEFT_IN_REGISTERS)]
    files = [Path(one.__file__) for one in (tests.schedule, tests.in_flight)]
    files += sorted(Path(ptxrun.__file__).parent.rglob("*.py")) if emulated else []
    return "".join([*reading, *patterns, *(file.read_text() for file in files)])


def key_of(kernel, constants: dict, config: Config, architecture: int, element: str, float32: tuple[str, ...],
           fuses: bool) -> str:
    """Hash all that `Resources` depend on: sources, Triton and ptxas, the options, and what reads the compiled code."""
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    compiling = get_cache_key(source_of(kernel, constants, element, float32), backend,
                              backend.parse_options(options_of(config, fuses)), get_cache_invalidating_env_vars())
    unknown = sorted(name for name, (rule, _) in TABLE.items() if rule is None)
    return hashlib.sha256(f"{compiling}{_readers(architecture in EMULATED)}{unknown}".encode()).hexdigest()[:20]


@functools.cache
def known() -> dict[str, list]:
    """What has been compiled before, by `key_of`."""
    return json.loads(KNOWN.read_text()) if KNOWN.is_file() else {}


def note(key: str, found: Resources) -> None:
    """Note what a test has asked for, which compiled.json shall hold."""
    ASKED.mkdir(parents=True, exist_ok=True)
    (ASKED / key).write_text(json.dumps(found))


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and how many instructions use its stack, by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        # A stack alone is no spill: ptxas keeps a frame of 8 bytes where it found room for what it first meant to
        # spill. So the instructions that use it are counted.
        stack = "STACK:0 " not in usage
    spills = len(LOCAL_MEMORY.findall(disassembled(cubin))) if stack else 0
    return int(re.search(r"REG:(\d+)", usage)[1]), spills


def uneven_sums(ptx: str) -> int:
    """Count the fused sums whose addend comes from another lane: the product beside it is not rounded, that lane's was.

    A register's name is defined once in what Triton emits, so that names are enough.
    """
    of_another_lane = set(BUTTERFLY.findall(ptx))
    return sum(addend in of_another_lane for addend in FUSED.findall(ptx))


def resources(kernel, constants: dict, config: Config, *, architecture: int, element_size: int,
              float32: tuple[str, ...] = (), fuses: bool = True) -> Resources:
    """Compile `kernel` with its constexprs `constants` and the warps and stages of `config` for sm_`architecture`.

    `float32` names arguments that hold float32 in this kernel and data in others. `fuses` is false where the launch
    says ROUNDED_PRODUCTS.
    """
    arguments = kernel, constants, config, architecture, ELEMENT[element_size], float32, fuses
    key = key_of(*arguments)
    before = known().get(key)
    if before is not None and int(key, 16) % COMPARED:
        found = Resources(*before)._replace(waits=tuple(before[Resources._fields.index("waits")]))
    else:
        found = read(compiled(*arguments), kernel.__name__, architecture)
        now = json.loads(json.dumps(found))
        assert before in (None, now), f"{kernel.__name__} for sm_{architecture} is {now}, compiled.json says {before}"
    note(key, found)
    return found


def read(built, name: str, architecture: int) -> Resources:
    """Return what a compiled kernel takes.

    Raises:
        AssertionError: an instruction that is not emulated, for an architecture of which all are.
    """
    if architecture in EMULATED and (unknown := unknown_instructions(built.asm["ptx"])):
        raise AssertionError(f"{name} for sm_{architecture}: {unknown}")
    registers, spills = registers_and_spills(built.asm["cubin"])
    ptx = built.asm["ptx"]
    found = [m.strip().split(" ")[-1] for m in TENSOR_CORE.findall(ptx)]
    loops = [loop for loop in innermost_loops(ptx) if TENSOR_CORE.search(loop)]
    return Resources(
        registers, spills, built.metadata.shared, {name: found.count(name) for name in sorted(set(found))},
        len(loops), sum(COPY.search(loop) is not None for loop in loops), tuple(wait_distances(built.asm["ttgir"])),
        uneven_sums(ptx), len(overwritten(disassembled(built.asm["cubin"]))) if LEFT_IN_REGISTERS.search(ptx) else 0)


if __name__ == "__main__":
    if not ASKED.is_dir():
        raise SystemExit(f"{ASKED} is not there: no test has asked since {KNOWN.name} was written; run make test")
    asked = {file.name: json.loads(file.read_text()) for file in sorted(ASKED.iterdir())}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(found)}" for key, found in asked.items())
    print(f"{KNOWN}: {len(asked)} kernels, {len(asked.keys() - known().keys())} of them new; "
          f"{len(known().keys() - asked.keys())} have gone")
    KNOWN.write_text(f"{{\n{lines}\n}}\n")
    shutil.rmtree(ASKED)
