"""What the threads of a warp do together: shuffles, votes, reductions, elect, match.

All 32 threads must be there; that is what Triton's kernels ask for with the mask 0xFFFFFFFF.
"""
import numpy as np

from ptxrun.errors import Misuse
from ptxrun.numbers import DTYPES

LANE = np.arange(32)
REDUCE = {"max": np.max, "min": np.min, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce,
          "xor": np.bitwise_xor.reduce}


def warps(at, values) -> np.ndarray:
    """Values of threads as rows of 32."""
    return np.broadcast_to(values, (at.stop - at.start,)).reshape(-1, 32)


def whole_warps(at):
    """Collectives want every thread of a warp."""
    if at.start % 32 or at.stop % 32:
        raise Misuse(f"threads {at.start} to {at.stop - 1}, part of a warp, come to an instruction for whole warps")


def all_members(o, place: int):
    """Check that the mask of members, operand number `place`, names all threads."""
    mask = o.read(place, "u32")

    def check(at):
        whole_warps(at)
        if np.any(mask(at) != np.uint32(0xFFFF_FFFF)):
            raise o.unknown("a mask of members other than 0xFFFFFFFF")
    return check


def shuffle(o):
    """shfl.sync: a value from another lane; behind `|` whether that lane was within the segment."""
    first, _, second = o.texts[0].partition("|")
    write, write_inside = o.write_text(first, "b32"), o.write_text(second, "pred") if second else None
    value, other, clamp, check = o.read(1, "b32"), o.read(2, "u32"), o.read(3, "u32"), all_members(o, 4)
    mode = o.parts[2]

    def run(at):
        check(at)
        b, c = (warps(at, read(at)).astype(np.int64) for read in (other, clamp))
        lane, inside = _source_lane(mode, b & 31, c & 31, c >> 8 & 31)
        write(at, np.take_along_axis(warps(at, value(at)), lane, 1).reshape(-1))
        if write_inside is not None:
            write_inside(at, inside.reshape(-1))
    return run


def _source_lane(mode: str, b, clamp, segment):
    """Which lane each lane reads, and whether it is within bounds; where not, a lane reads itself."""
    least = LANE & segment
    most = least | clamp & ~segment
    source = {"bfly": lambda: LANE ^ b, "idx": lambda: least | b & ~segment, "down": lambda: LANE + b,
              "up": lambda: LANE - b}[mode]()
    inside = source >= most if mode == "up" else source <= most
    return np.where(inside, source, LANE), inside


def vote(o):
    """vote.sync: any, all, uni, or the ballot of a warp's predicates."""
    holds, check, mode, write = o.read(1, "pred"), all_members(o, 2), o.parts[2], o.write()

    def run(at):
        check(at)
        votes = warps(at, holds(at))
        if mode == "ballot":
            result = (votes.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)
        else:
            result = {"any": votes.any(1), "all": votes.all(1), "uni": votes.all(1) | ~votes.any(1)}[mode]
        write(at, np.repeat(result, 32))
    return run


def reduce(o):
    """redux.sync: one value of all lanes."""
    value, check, reduction, write = o.read(1), all_members(o, 2), REDUCE[o.parts[2]], o.write()

    def run(at):
        check(at)
        write(at, np.repeat(reduction(warps(at, value(at)), axis=1).astype(DTYPES[o.type]), 32))
    return run


def elect(o):
    """elect.sync: one lane of each warp, here the first."""
    first, _, second = o.texts[0].partition("|")
    write, write_chosen, check = o.write_text(first, "b32"), o.write_text(second, "pred"), all_members(o, 1)

    def run(at):
        check(at)
        write(at, np.zeros(at.stop - at.start, np.uint32))
        write_chosen(at, np.tile(LANE == 0, (at.stop - at.start) // 32))
    return run


def active_mask(o):
    """activemask: all lanes, since whole warps stand at it."""
    write = o.write(0, "b32")

    def run(at):
        whole_warps(at)
        write(at, np.uint32(0xFFFF_FFFF))
    return run
