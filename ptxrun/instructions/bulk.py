"""TMA: copies of boxes of a tensor by the copy engine, and the changing of tensor maps on the device."""
import re

import numpy as np

from ptxrun.errors import OutOfBounds
from ptxrun.instructions.barrier import barrier_key, change_mbarrier
from ptxrun.instructions.memory import read_global, write_global
from ptxrun.numbers import UNSIGNED
from ptxrun.tensor_map import BYTES, TensorMap

TENSOR = re.compile(r"\[\s*([%\w]+)\s*,\s*\{(.*?)\}\s*\]")


def bulk(o):
    """cp.async.bulk.tensor of a tile, in both directions, and its commit and wait."""
    action = o.parts[3]
    if action == "commit_group":
        return lambda at: _close(o.machine, o.lanes(at))
    if action == "wait_group":
        return lambda at: _wait(o.machine, o.lanes(at), o.constant(0))
    if action != "tensor" or any(part in ("im2col", "reduce") or "multicast" in part for part in o.parts):
        raise o.unknown()
    return _store(o) if o.parts[5] == "global" else _load(o)


def _box(o, place: int):
    """Functions that read the address of the tensor map and the corner of the box."""
    found = TENSOR.match(o.texts[place])
    if found is None:
        raise o.unknown(f"tensor {o.texts[place]}")
    return o.read_text(found[1], "u64"), [o.read_text(text.strip(), "s32") for text in found[2].split(",")]


def tensor_map(machine, address: int) -> TensorMap:
    """The map at an address: a parameter's, or one that the device has made in global memory."""
    return TensorMap.decode(map_bytes(machine, address))


def map_bytes(machine, address: int) -> np.ndarray:
    """The bytes of a map."""
    for name, start in machine.parameter_addresses.items():
        if address == start:
            return np.frombuffer(machine.parameters[name], np.uint8)
    start, data = machine.global_memory.find(address, address + BYTES, "a tensor map")
    return data[address - start:address - start + BYTES]


def _each(o, at, *reads):
    """For each active thread: its number, and what `reads` give."""
    for thread, *values in zip(o.lanes(at), *o.selected(at, *reads)):
        yield int(thread), *map(int, values)


def _load(o):
    """Global to shared memory; an mbarrier counts the bytes when they are there."""
    target, (described, corner), barrier, machine = o.address(0), _box(o, 1), o.address(2), o.machine

    def run(at):
        for thread, to, where, key_address, *start in _each(o, at, target, described, barrier, *corner):
            box, key = tensor_map(machine, where), barrier_key(machine, thread, key_address)
            places = _shared_places(machine, box, to, thread)
            if machine.races:
                touched = (places[:, None] + np.arange(box.element)).reshape(-1)
                machine.races.bulk_write(thread // 32, touched, key, machine.mbarriers.find(key).phase + 1)

            def deliver(box=box, key=key, places=places, start=start, thread=thread):
                machine.shared.store(places, box.element, [_read_box(machine, box, start, thread)])
                change_mbarrier(machine, key, 0, -box.bytes)
            if machine.schedule.early:
                deliver()
            else:
                machine.deliveries.append(deliver)
    return run


def _shared_places(machine, box: TensorMap, start: int, thread: int):
    places = box.places(start)
    if start < 0 or int(places.max()) + box.element > machine.shared.size:
        raise OutOfBounds(f"TMA reaches {int(places.max())} of shared memory, which has {machine.shared.size}")
    return places + machine.shared.base[thread]


def _read_box(machine, box: TensorMap, corner, thread: int):
    offsets, inside = box.offsets(corner)
    values = np.zeros(len(offsets), UNSIGNED[box.element])
    if box.fill_nan:
        values[:] = {2: 0x7FFF, 4: 0x7FFFFFFF}.get(box.element, 0)
    addresses = box.address + offsets[inside]
    if len(addresses):
        values[inside] = read_global(machine, np.full(len(addresses), thread), addresses, box.element, 1, "TMA")[0]
    return values


def _store(o):
    """Shared to global memory; read when it is waited for, at the latest."""
    (described, corner), source, machine = _box(o, 0), o.address(1), o.machine

    def run(at):
        for thread, where, address, *start in _each(o, at, described, source, *corner):
            box = tensor_map(machine, where)
            places = _shared_places(machine, box, address, thread)
            if machine.races:
                touched = (places[:, None] + np.arange(box.element)).reshape(-1)
                machine.races.bulk_read(thread // 32, touched)

            def deliver(box=box, places=places, start=start, thread=thread):
                offsets, inside = box.offsets(start)
                value, addresses = machine.shared.load(places, box.element, 1)[0], box.address + offsets[inside]
                if len(addresses):
                    threads = np.full(len(addresses), thread)
                    write_global(machine, threads, addresses, box.element, [value[inside]], "TMA")
            machine.bulk_stores.setdefault(thread, [[]])[-1].append(deliver)
    return run


def _close(machine, threads):
    for thread in map(int, threads):
        if thread in machine.bulk_stores:
            machine.bulk_stores[thread].append([])
            if machine.races:
                machine.races.close_copies([thread // 32])


def _wait(machine, threads, still_pending: int):
    for thread in map(int, threads):
        groups = machine.bulk_stores.get(thread, [[]])
        while len(groups) - 1 > still_pending:
            for deliver in groups.pop(0):
                deliver()
        if machine.races and thread in machine.bulk_stores:
            machine.races.wait_copies([thread // 32], still_pending)


def replace_field(o):
    """tensormap.replace.tile.<field>."""
    machine, name = o.machine, o.parts[3]
    address, kind = o.address(0), "u64" if o.has("b64") else "u32"
    place = o.constant(1) if len(o.texts) > 2 else None
    value = o.read(len(o.texts) - 1, kind)

    def run(at):
        for thread, where, new in _each(o, at, address, value):
            data = _writable_map(machine, o, thread, where)
            fresh = not data.any() or not 1 <= int(data[88]) <= 5
            box = TensorMap(0, (0,) * 5, (2, 0, 0, 0, 0), (0,) * 5, 2, 16) if fresh else TensorMap.decode(data)
            data[:] = 0
            encoded = box.with_field(name, new, place).encode()
            data[:len(encoded)] = np.frombuffer(encoded, np.uint8)
    return run


def _writable_map(machine, o, thread: int, address: int):
    """The bytes of the map that a thread changes, in the memory that the instruction names."""
    if any(part.startswith("shared") for part in o.parts):
        place = int(machine.shared.places(np.array([address]), machine.shared.base[thread], BYTES, "a tensor map")[0])
        return machine.shared.bytes[place:place + BYTES]
    start, data = machine.global_memory.find(address, address + BYTES, "a tensor map")
    return data[address - start:address - start + BYTES]


def copy_map(o):
    """tensormap.cp_fenceproxy: a finished map from shared to global memory."""
    machine, target, source = o.machine, o.address(0), o.address(1)

    def run(at):
        for thread, to, start in _each(o, at, target, source):
            place = int(machine.shared.base[thread]) + start
            first, data = machine.global_memory.find(to, to + BYTES, "a tensor map")
            data[to - first:to - first + BYTES] = machine.shared.bytes[place:place + BYTES]
    return run
