"""Every instruction that is executed: its name, the modifiers that are understood, and the decoder.

What is not in this table is an error that names it, and so is a modifier that an entry does not list.
"""
import re

from ptxrun.errors import UnknownInstruction
from ptxrun.instructions import (
    arithmetic,
    barrier,
    bulk,
    convert,
    copy,
    logic,
    matrix,
    memory,
    warp,
    wgmma,
)
from ptxrun.instructions.operands import Operands

INTEGERS = "s16 u16 s32 u32 s64 u64"
BITS = "b16 b32 b64 pred"
FLOATS = "f16 f32 f64 bf16 f16x2 bf16x2 rn ftz"
PACKED_INTEGERS = "s16x2 u16x2"
APPROXIMATE = "f32 f64 approx rn ftz"
SCOPES = "volatile relaxed acquire release acq_rel sc cta gpu sys weak"
CACHING = ("ca cg cs lu cv wb wt nc L1::evict_last L1::evict_first L1::evict_normal L1::no_allocate "
           "L2::evict_last L2::evict_first L2::evict_normal L2::64B L2::128B L2::256B L2::cache_hint")
TYPES = "b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64"
SPACES = "global shared shared::cta"

TABLE = {
    # arithmetic
    "add": (arithmetic.arithmetic, f"{INTEGERS} {FLOATS} {PACKED_INTEGERS}"),
    "sub": (arithmetic.arithmetic, f"{INTEGERS} {FLOATS}"),
    "mul": (arithmetic.arithmetic, f"{INTEGERS} {FLOATS} lo hi wide"),
    "mad": (arithmetic.arithmetic, f"{INTEGERS} lo hi wide"),
    "fma": (arithmetic.arithmetic, FLOATS),
    "div": (arithmetic.arithmetic, f"{INTEGERS} f32 f64 rn full approx ftz"),
    "rem": (arithmetic.arithmetic, INTEGERS),
    "min": (arithmetic.arithmetic, f"{INTEGERS} {FLOATS} {PACKED_INTEGERS} NaN relu"),
    "max": (arithmetic.arithmetic, f"{INTEGERS} {FLOATS} {PACKED_INTEGERS} NaN relu"),
    "neg": (arithmetic.arithmetic, f"{INTEGERS} {FLOATS}"),
    "abs": (arithmetic.arithmetic, f"{INTEGERS} {FLOATS}"),
    **dict.fromkeys(("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"),
                    (arithmetic.approximate, APPROXIMATE)),
    # bits, predicates, moves, conversions
    **dict.fromkeys(("and", "or", "xor", "not"), (logic.bitwise, BITS)),
    "shl": (logic.shift, "b16 b32 b64"),
    "shr": (logic.shift, f"b16 b32 b64 {INTEGERS}"),
    "shf": (logic.funnel_shift, "l r wrap clamp b32"),
    "bfe": (logic.extract, "u32 s32 u64 s64"),
    "bfi": (logic.insert, "b32 b64"),
    "prmt": (logic.permute, "b32"),
    "lop3": (logic.lookup, "b32"),
    **dict.fromkeys(("popc", "clz", "brev"), (logic.count_bits, "b32 b64")),
    "setp": (logic.compare, f"{' '.join(logic.COMPARE)} nan num equ neu ltu leu gtu geu and or xor ftz f32 f64 f16 "
                            f"bf16 {INTEGERS} b16 b32 b64"),
    "selp": (logic.select, f"b16 b32 b64 f32 f64 {INTEGERS}"),
    "mov": (logic.move, f"{BITS} {INTEGERS} f32 f64"),
    "cvta": (logic.move, "to global shared param u32 u64"),
    "cvt": (convert.convert, f"rn rna rzi rni rmi rpi ftz sat relu tf32 s8 u8 {INTEGERS} f16 f32 f64 bf16 "
                             "f16x2 bf16x2"),
    # memory
    "ld": (memory.load, f"{SPACES} param v2 v4 v8 {TYPES} {SCOPES} {CACHING}"),
    "st": (memory.store, f"{SPACES} v2 v4 v8 {TYPES} {SCOPES} {CACHING}"),
    "atom": (memory.atomic, f"{SPACES} {SCOPES} add max min and or xor exch cas inc {TYPES} f16 bf16 f16x2 bf16x2 "
                            "noftz v2 v4 v8"),
    "red": (memory.atomic, f"{SPACES} {SCOPES} add max min and or xor inc {TYPES} f16 bf16 f16x2 bf16x2 noftz "
                           "v2 v4 v8"),
    "createpolicy": (memory.cache_hint, "fractional L2::evict_last L2::evict_first L2::evict_normal b64"),
    "prefetch": (barrier.nothing, f"global L1 L2 {CACHING} tensormap"),                  # a hint
    # warps
    "shfl": (warp.shuffle, "sync bfly idx up down b32"),
    "vote": (warp.vote, "sync any all uni ballot pred b32"),
    "redux": (warp.reduce, "sync max min add and or xor s32 u32 b32"),
    "elect": (warp.elect, "sync"),
    "activemask": (warp.active_mask, "b32"),
    # order and waiting
    "bar.warp": (barrier.warp_barrier, "sync"),
    "fence": (barrier.fence, f"{SCOPES} proxy async async::generic shared::cta shared::cluster global tensormap "
                             "tensormap::generic mbarrier_init cluster"),
    "membar": (barrier.nothing, "gl cta sys"),                                           # memory is never late
    "nanosleep": (barrier.nothing, "u32"),                                               # time does not pass
    "griddepcontrol": (barrier.nothing, "wait launch_dependents"),                       # launches follow each other
    "mbarrier": (barrier.mbarrier, "init inval arrive expect_tx shared shared::cta b64 release relaxed cta"),
    # asynchronous copies
    "cp.async": (copy.copy, "ca cg shared shared::cta global commit_group wait_group wait_all L2::64B L2::128B "
                            "L2::256B L2::cache_hint"),
    "cp.async.bulk": (bulk.bulk, "tensor 1d 2d 3d 4d 5d shared shared::cta shared::cluster global tile "
                                 "mbarrier::complete_tx::bytes bulk_group commit_group wait_group read L2::cache_hint"),
    "tensormap": (bulk.replace_field, "replace tile global_address rank box_dim global_dim global_stride "
                                      "element_stride elemtype interleave_layout swizzle_mode fill_mode global shared "
                                      "shared::cta b1024 b64 b32"),
    "tensormap.cp_fenceproxy": (bulk.copy_map, "global shared::cta tensormap::generic release gpu cta sync aligned"),
    # tensor cores
    "ldmatrix": (matrix.load_matrix, "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16"),
    "stmatrix": (matrix.store_matrix, "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16"),
    "mma": (matrix.multiply, "sync aligned m16n8k16 m16n8k8 row col f32 f16 bf16 tf32"),
    "wgmma": (wgmma.wgmma, "fence mma_async commit_group wait_group sync aligned f32 f16 bf16 tf32"),
}
# At these threads part or wait; the machine executes them itself.
CONTROL = {
    **dict.fromkeys(("bra", "ret"), "uni"),
    **dict.fromkeys(("exit", "trap"), ""),
    "brx": "idx uni",
    **dict.fromkeys(("bar", "barrier"), "sync arrive cta aligned"),
    "mbarrier": "try_wait test_wait parity acquire relaxed cta shared shared::cta b64",
    "setmaxnreg": "inc dec sync aligned u32",
}
# What all threads of a warp, or of a block, execute together. A predicate would have to part them; it is refused.
UNGUARDED = (
    "bar.", "barrier", "brx", "setmaxnreg", "mbarrier.try_wait", "mbarrier.test_wait", "fence.proxy.async",
    "shfl", "vote", "redux", "elect", "activemask", "ldmatrix", "stmatrix", "mma", "wgmma",
    *(f"cp.async.{action}" for action in ("commit_group", "wait_group", "wait_all")))
PRODUCT_SHAPE = re.compile(r"m64n\d+k\d+")


def parts_or_waits(instruction) -> bool:
    """Whether an instruction is one of CONTROL."""
    base, *rest = instruction.parts
    if base == "bar":
        return rest[0] != "warp"
    if base == "mbarrier":
        return rest[0] in ("try_wait", "test_wait")
    return base in CONTROL


def entry(instruction):
    """The longest name in TABLE that an opcode begins with; its decoder and the modifiers left over."""
    for length in (3, 2, 1):
        name = ".".join(instruction.parts[:length])
        if name in TABLE:
            decoder, understood = TABLE[name]
            rest = [part for part in instruction.parts[length:] if not PRODUCT_SHAPE.fullmatch(part)]
            return decoder, [part for part in rest if part not in understood.split()]
    return None, []


def decode(machine, instruction):
    """The function of a slice of threads that executes an instruction; None for one that the machine executes."""
    if parts_or_waits(instruction):
        understood = CONTROL[instruction.parts[0]].split()
        decoder, strange = no_function, [part for part in instruction.parts[1:] if part not in understood]
    else:
        decoder, strange = entry(instruction)
    if decoder is None or strange:
        raise UnknownInstruction(f"not emulated{f' (.{strange[0]})' if strange else ''}: {instruction}")
    operands = Operands(machine, instruction)
    if operands.guarded and instruction.opcode.startswith(UNGUARDED):
        raise operands.unknown("a predicate")
    try:
        return decoder(operands)
    except (KeyError, IndexError) as error:  # a type that is in no table, an operand that is not there
        raise operands.unknown(repr(error)) from error


def no_function(operands):
    """The decoder of what the machine executes."""
    return None
