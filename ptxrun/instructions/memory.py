"""Loads, stores and atomics of global and shared memory, and loads of parameters.

Loads and stores are done at once and in order: what caches may delay or reorder is not modelled, and so fences of
ordinary memory have nothing to do.
"""
import re

import numpy as np

from ptxrun.errors import Race
from ptxrun.instructions.operands import ADDRESS
from ptxrun.numbers import DTYPES, bf16_to_f32, f32_to_bf16, halves, pack, size
from ptxrun.ptx import members

UPDATE = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or,
          "xor": np.bitwise_xor}


def space(o) -> str:
    """The memory that an instruction names."""
    for part in o.parts:
        name = part.split("::")[0]
        if name in ("global", "shared", "param") and "cluster" not in part:
            return name
    raise o.unknown("which memory")


def load(o):
    """ld of one value or of a vector."""
    where, kind = space(o), o.type
    if where == "param":
        return _load_parameter(o)
    texts, width = members(o.texts[0]), size(kind)
    address, machine = o.address(1), o.machine
    writes = [o.write_wide(text, kind) for text in texts]
    fetch = _fetch_shared if where == "shared" else _fetch_global

    def run(at):
        if not o.guarded:
            for write, value in zip(writes, fetch(machine, o, at, address(at), width, len(texts), None)):
                write(at, value.view(DTYPES[kind]))
            return
        active = o.active(at)
        if active.any():
            for write, value in zip(writes, fetch(machine, o, at, address(at)[active], width, len(texts), active)):
                everywhere = np.zeros(len(active), value.dtype)
                everywhere[active] = value
                write(at, everywhere.view(DTYPES[kind]))
    return run


def _fetch_global(machine, o, at, addresses, width, count, active):
    return read_global(machine, lanes(at, active), addresses, width, count, "a load")


def read_global(machine, threads, addresses, width: int, count: int, what: str):
    """`count` numbers of `width` bytes for each thread, counted and looked at for races."""
    if machine.traffic:
        machine.traffic.of_global("load", threads, addresses, width * count)
    if machine.block_races:
        machine.block_races.read(machine.block_number[threads], addresses, width * count)
    if machine.thread_races:
        machine.thread_races.read(threads, addresses, width * count)
    return machine.global_memory.load(addresses, width, count, what)


def write_global(machine, threads, addresses, width: int, values, what: str):
    """Store `values`, an array for each of the numbers that a thread writes; the counterpart of `read_global`."""
    if machine.traffic:
        machine.traffic.of_global("store", threads, addresses, width * len(values))
    if machine.block_races:
        machine.block_races.write(machine.block_number[threads], addresses, width, values)
    if machine.thread_races:
        machine.thread_races.write(threads, addresses, width, values)
    machine.global_memory.store(addresses, width, values, what)
    if machine.races:
        one_value_each(machine.global_memory.load(addresses, width, len(values)), values, "global")


def _fetch_shared(machine, o, at, addresses, width, count, active):
    bases = machine.shared.base[at]
    places = machine.shared.places(addresses, bases if active is None else bases[active], width * count, "a load")
    if machine.races:
        machine.races.access(lanes(at, active), places, width * count, write=False)
    if machine.traffic:
        machine.traffic.of_shared(lanes(at, active), addresses, width * count)
    return machine.shared.load(places, width, count)


def lanes(at, active):
    """The numbers of threads of which some may be inactive."""
    threads = np.arange(at.start, at.stop)
    return threads if active is None else threads[active]


def _load_parameter(o):
    found = ADDRESS.match(o.texts[1])
    if found is None:
        raise o.unknown(f"address {o.texts[1]}")
    name, offset, width = found[1], int(found[2] or "0", 0), size(o.type)
    write, machine = o.write_wide(o.texts[0], o.type), o.machine

    def run(at):
        write(at, np.frombuffer(machine.parameters[name], DTYPES[o.type], 1, offset)[0])
    if width + offset > o.machine.parameter_sizes.get(name, 0):
        raise o.unknown(f"parameter {name}")
    return run


def store(o):
    """st of one value or of a vector."""
    where, width = space(o), size(o.type)
    texts = members(o.texts[1])
    reads = [o.read_bits(text, width) for text in texts]
    address, machine = o.address(0), o.machine
    put = {"shared": _put_shared, "global": _put_global}[where]

    def run(at):
        active = o.active(at) if o.guarded else None
        if active is None or active.any():
            addresses, *values = o.selected(at, address, *reads)
            put(machine, at, addresses, width, values, active)
    return run


def _put_global(machine, at, addresses, width, values, active):
    write_global(machine, lanes(at, active), addresses, width, values, "a store")


def _put_shared(machine, at, addresses, width, values, active):
    memory, total = machine.shared, width * len(values)
    places = memory.places(addresses, memory.base[lanes(at, active)], total, "a store")
    if machine.traffic:
        machine.traffic.of_shared(lanes(at, active), addresses, total)
    if machine.races:
        there = memory.load(places, width, len(values))
        same = np.logical_and.reduce([old == value for old, value in zip(there, values)])
        machine.races.access(lanes(at, active), places, total, write=True, same=same)
    memory.store(places, width, values)
    if machine.races:
        one_value_each(memory.load(places, width, len(values)), values, "shared")


def one_value_each(now, values, where: str):
    """Check that each thread's values stand where it stored them, so that no other thread of the instruction did."""
    if any((there != value).any() for there, value in zip(now, values)):
        raise Race(f"threads store different values in one place of {where} memory, and which one stays is open")


def atomic(o):
    """atom and red: thread by thread, in their order."""
    kind, where = o.type, space(o)
    returns = o.parts[0] == "atom"
    operation = next((part for part in o.parts[1:] if part in (*UPDATE, "exch", "cas", "inc")), "")
    first = 1 if returns else 0
    many = o.texts[-1].startswith("{")
    reads = [o.read_text(t, _bits(kind)) for text in o.texts[first + 1:] for t in members(text)]
    writes = [o.write_text(text, _bits(kind)) for text in members(o.texts[0])] if returns else []
    address, machine, update = o.address(first), o.machine, _update(o, operation, kind)
    step = size(kind)

    def run(at):
        active = o.active(at) if o.guarded else None
        threads = lanes(at, active)
        addresses, *values = o.selected(at, address, *reads)
        if machine.block_races and where == "global":
            machine.block_races.reduce(machine.block_number[threads], addresses, step * (len(values) if many else 1))
        results = [np.zeros(at.stop - at.start, DTYPES[_bits(kind)]) for _ in writes]
        for i, thread in enumerate(threads):
            operands = [[value[i]] for value in values] if many else [[value[i] for value in values]]
            for j, operand in enumerate(operands):
                cell = _cell(machine, where, int(addresses[i]) + j * step, int(thread), DTYPES[_bits(kind)])
                if results:
                    results[j][thread - at.start] = cell[0]
                cell[0] = update(cell[0], *operand)
        if machine.traffic and len(threads):
            total = step * (len(values) if many else 1)
            if where == "shared":
                machine.traffic.of_shared(threads, addresses, total)
            else:
                machine.traffic.of_global("atomic", threads, addresses, total)
        for write, result in zip(writes, results):
            write(at, result)
    return run


def _bits(kind: str) -> str:
    """How a type travels between registers and memory."""
    return {"bf16": "b16", "bf16x2": "b32", "f16x2": "b32"}.get(kind, kind)


def _update(o, operation: str, kind: str):
    if operation == "exch":
        return lambda old, new: new
    if operation == "cas":
        return lambda old, expected, new: new if old == expected else old
    if operation == "inc":
        return lambda old, most: old.dtype.type(0) if old >= most else old + old.dtype.type(1)
    if operation not in UPDATE:
        raise o.unknown()
    function = UPDATE[operation]
    if kind == "bf16":
        return lambda old, new: f32_to_bf16(function(bf16_to_f32(old), bf16_to_f32(new)))
    if kind in ("f16x2", "bf16x2"):
        return lambda old, new: pack(*(function(np.float64(a), np.float64(b)) for a, b in zip(
            halves(old, kind), halves(new, kind))), kind)
    return function


def _cell(machine, where: str, address: int, thread: int, dtype):
    """One number in memory, as an array of one that can be written."""
    width = np.dtype(dtype).itemsize
    if where == "shared":
        base = machine.shared.base[thread]
        places = machine.shared.places(np.array([address]), base, width, "an atomic")
        if machine.races:
            machine.races.access(np.array([thread]), places, width, write=False)
            machine.races.access(np.array([thread]), places, width, write=True)
        return machine.shared.bytes[int(places[0]):int(places[0]) + width].view(dtype)
    _, offsets, data = next(machine.global_memory.parts(np.array([address]), width, "an atomic"))
    return data[int(offsets[0]):int(offsets[0]) + width].view(dtype)


def cache_hint(o):
    """createpolicy: a hint has no result that anybody computes with."""
    return _nothing if re.fullmatch(r"%\w+", o.texts[0]) is None else _zero(o)


def _nothing(at):
    return None


def _zero(o):
    write = o.write(0, "b64")
    return lambda at: write(at, np.uint64(0))
