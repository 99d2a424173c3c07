"""The tensor cores' instructions of one warp: ldmatrix, stmatrix, mma.sync.

Which element of a matrix each thread holds is drawn in the PTX manual's figures for each shape. In words, for 16-bit
elements: thread t of a warp holds, of an 8x8 matrix, the elements 2 * (t % 4) and the next one of row t // 4.
Products are rounded as numpy rounds them, in float32; a tensor core's sums differ in their last bits.
"""
import numpy as np

from ptxrun.instructions.memory import one_value_each
from ptxrun.instructions.warp import LANE, whole_warps


def elements(words, kind: str):
    """uint32 words (..., n) as float32: (..., 2n) for two 16-bit elements a word, (..., n) for tf32."""
    words = np.ascontiguousarray(words)
    if kind == "bf16":
        pair = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], -1)
        return pair.view(np.float32).reshape(*words.shape[:-1], -1)
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


def left_fragment(registers, kind: str):
    """Four registers of each thread as matrices A (warps, 16, 16), or (warps, 16, 8) for tf32.

    Registers 0 and 1 are rows 0 to 7 and 8 to 15 of the left half of the columns, 2 and 3 of the right half.
    """
    parts = np.stack(registers, -1).reshape(-1, 8, 4, 2, 2)          # warp, row, column, half of columns, of rows
    return elements(parts.transpose(0, 4, 1, 3, 2).reshape(-1, 16, 8), kind)


def right_fragment(registers, kind: str):
    """Two registers of each thread as matrices B, transposed: (warps, 8 columns, 16 or 8 rows)."""
    parts = np.stack(registers, -1).reshape(-1, 8, 4, 2)             # warp, column, row, half of rows
    return elements(parts.transpose(0, 1, 3, 2).reshape(-1, 8, 8), kind)


def sums_to_matrix(registers, threads: int):
    """Four float32 registers of each thread as matrices (warps, 16, 8)."""
    parts = np.stack([np.broadcast_to(r, (threads,)) for r in registers], -1)
    return parts.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)


def matrix_to_sums(matrices):
    """The inverse of `sums_to_matrix`."""
    parts = matrices.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
    return [parts[:, i] for i in range(4)]


def multiply(o):
    """mma.sync m16n8k16 of f16 and bf16 and m16n8k8 of tf32, with float32 sums."""
    shape, sums, left_kind, right_kind, result = o.parts[3], o.parts[6], *o.parts[7:9], o.parts[-1]
    fits = {"f16": "m16n8k16", "bf16": "m16n8k16", "tf32": "m16n8k8"}
    if left_kind != right_kind or fits.get(left_kind) != shape or (sums, result) != ("f32", "f32"):
        raise o.unknown()
    if o.parts[4:6] != ["row", "col"]:
        raise o.unknown("layout")
    a, b, c = o.read_list(1, "b32"), o.read_list(2, "b32"), o.read_list(3, "f32")
    writes = o.write_list(0, "f32")

    def run(at):
        whole_warps(at)
        threads = at.stop - at.start
        A = left_fragment([read(at) for read in a], left_kind)
        B = right_fragment([read(at) for read in b], right_kind)
        C = sums_to_matrix([read(at) for read in c], threads)
        for write, value in zip(writes, matrix_to_sums(A @ B.swapaxes(1, 2) + C)):
            write(at, value)
    return run


def load_matrix(o):
    """ldmatrix of 8x8 matrices of 16-bit elements: lanes 8i to 8i + 7 name the rows of matrix i."""
    writes, address, machine = o.write_list(0, "b32"), o.address(1), o.machine
    count, transposed = len(writes), o.has("trans")

    def run(at):
        whole_warps(at)
        places = _rows(machine, at, address, count)
        rows = machine.shared.words[2][places[..., None] // 2 + np.arange(8)]  # warp, matrix, row, column
        words = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows).view(np.uint32)
        for i, write in enumerate(writes):
            write(at, words[:, i].reshape(-1))
    return run


def store_matrix(o):
    """stmatrix, the way back."""
    reads, address, machine = o.read_list(1, "b32"), o.address(0), o.machine
    count, transposed = len(reads), o.has("trans")

    def run(at):
        whole_warps(at)
        words = [np.ascontiguousarray(read(at)).reshape(-1, 8, 4).view(np.uint16) for read in reads]
        rows = np.stack(words, 1)
        rows = rows.swapaxes(2, 3) if transposed else rows
        places = _rows(machine, at, address, count, rows)
        memory, words = machine.shared.words[2], places[..., None] // 2 + np.arange(8)
        memory[words] = rows
        if machine.races:
            one_value_each([memory[words]], [rows], "shared")
    return run


def _rows(machine, at, address, count: int, stored=None):
    """Where each row of 16 bytes begins: (warps, matrices, 8). Lanes beyond the last matrix name nothing.

    stored: the rows that are written there (warps, matrices, 8, 8 words), None where they are read.
    """
    named, write = np.tile(8 * count > LANE, (at.stop - at.start) // 32), stored is not None
    threads = np.arange(at.start, at.stop)[named]
    places = machine.shared.places(address(at)[named], machine.shared.base[threads], 16,
                                   "stmatrix" if write else "ldmatrix")
    if machine.races:
        same = (machine.shared.words[2][places[:, None] // 2 + np.arange(8)] == stored.reshape(-1, 8)).all(1) \
            if write else None
        machine.races.access(threads, places, 16, write=write, whole=True, same=same)
    if machine.traffic:
        machine.traffic.of_matrix(places)
    return places.reshape(-1, count, 8)
