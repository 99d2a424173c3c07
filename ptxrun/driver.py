"""A Triton driver without a GPU: kernels compile to PTX as ever, and a launch goes to the emulator.

Triton asks a driver for the target, for a loader of binaries and for a launcher; these are ours. The last stage of the
compilation, ptxas, is replaced by one that keeps the PTX, through the hook that Triton has for changing stages. What is
compiled here is remembered between runs in a folder of its own inside of Triton's cache, never to be taken for a cubin:
Triton 3.6 does not ask the hook for a key.
"""
import contextlib
import ctypes
import os
import struct
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ptxrun.launch import Emulation
from ptxrun.memory import GlobalMemory
from ptxrun.schedule import Schedule
from ptxrun.tensor_map import BYTES, TensorMap

SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes that a block may use
MULTIPROCESSORS = 4                                                  # what launches are told that the device has
STAGE_KEY = "ptxrun: PTX in place of a cubin"
SCALARS = {"i1": "<?", "u1": "<?", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I",
           "i64": "<q", "u64": "<Q", "fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}
APART, ALIGNED = 1 << 40, 64             # between tensors as kernels see them, and what stays of their alignment
SWIZZLE = {0: 16, 1: 32, 2: 64, 3: 128}  # of Triton's description of a tensor map, in bytes
running: list[Emulation] = []            # inside of `emulate`; the last one gets the launches


def architecture_number(name: str) -> int:
    """90 of "sm_90"."""
    number = name.removeprefix("sm_")
    if not number.isdigit() or int(number) not in SHARED_LIMIT:
        raise ValueError(f"emulate: architecture is {name!r}; "
                         f"{', '.join(f'sm_{n}' for n in SHARED_LIMIT)} fit; the instructions of others are unknown")
    return int(number)


@contextlib.contextmanager
def emulate(architecture: str, *, races: bool = False, schedule: str = "late", seed: int = 0, count: bool = False,
            copies_fenced: bool = False):
    """Run every Triton kernel that is launched inside on CPU tensors, as its compiled PTX.

    Args:
        architecture: "sm_80" or "sm_90", which kernels are compiled for.
        races: look for races in shared memory, and between blocks in global memory.
        schedule: "early", "late" or "random": when asynchronous copies and products are done. "random" also runs each
            warp by itself, in an order that `seed` decides.
        count: count instructions, bytes and bank conflicts by kernel.
        copies_fenced: see no race where only the `fence.proxy.async` between cp.async and wgmma or TMA is missing,
            which PTX asks for and some Tritons leave out, see `ptxrun.fences_copies`.

    Yields the `Emulation`, whose `kernels` hold the counts. Raises EmulationError, from the launch, where a kernel
    reads or writes outside of its tensors, races, waits for ever, or holds an instruction that is not emulated.
    """
    number = architecture_number(architecture)
    emulation = Emulation(number, Schedule(schedule, seed), races, count, copies_fenced=copies_fenced)
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, major=number // 10, minor=number % 10)
    before = getattr(triton.runtime.driver, "_active", None)
    hook = knobs.runtime.add_stages_inspection_hook
    capability, get_properties = torch.cuda.get_device_capability, torch.cuda.get_device_properties
    triton.runtime.driver.set_active(EmulatedDriver(emulation))
    knobs.runtime.add_stages_inspection_hook = keep_ptx
    torch.cuda.get_device_capability = lambda device=None: divmod(number, 10)
    torch.cuda.get_device_properties = lambda device=None: properties
    running.append(emulation)
    try:
        with knobs.cache.scope():
            knobs.cache.dir = os.path.join(knobs.cache.dir, "ptxrun")
            yield emulation
    finally:
        running.remove(emulation)
        torch.cuda.get_device_capability, torch.cuda.get_device_properties = capability, get_properties
        knobs.runtime.add_stages_inspection_hook = hook
        triton.runtime.driver.set_active(before)


def keep_ptx(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton's hook for stages: without arguments it asks for a key and a hash, with them to change the stages."""
    if stages is None:
        return STAGE_KEY, STAGE_KEY
    stages["cubin"] = lambda ptx, metadata: ptx.encode()


class EmulatedDriver(DriverBase):
    """What Triton asks about the device."""

    def __init__(self, emulation: Emulation):
        self.emulation = emulation
        self.utils = Loader(emulation.architecture)
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", self.emulation.architecture, 32)

    def get_current_device(self):
        return self.emulation.architecture  # a device of its own, so that Triton keeps its kernels apart

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        raise NotImplementedError("nothing can be timed in an emulator; launch with one configuration")


class Loader:
    """What Triton calls a driver's utils. A loaded function is the PTX itself."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def load_binary(self, name, binary, shared, device):
        return name, binary.decode(), 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_LIMIT[self.architecture], "multiprocessor_count": MULTIPROCESSORS,
                "warpSize": 32, "max_num_regs": 65536, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}


class Launcher:
    """Takes the arguments of a launch to the emulation that is active; Triton keeps a launcher with its kernel, and one
    emulation may follow another."""

    def __init__(self, source, metadata):
        self.metadata = metadata
        self.signature = list(source.signature.items())
        names = getattr(getattr(source, "fn", None), "arg_names", None)
        self.names = names or [str(name) for name, _ in self.signature]

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        tensors, parameters = [], []
        described = list(getattr(self.metadata, "tensordesc_meta", None) or ())
        for name, (_, kind), argument in zip(self.names, self.signature, arguments):
            self._take(name, kind, argument, tensors, parameters, described)
        scratch = torch.zeros(max(1, self.metadata.global_scratch_size * x * y * z), dtype=torch.uint8)
        tensors.append(("global scratch", scratch))
        parameters.append(pointer(scratch))
        memory, addresses = memory_of(tensors)
        parameters = [one(addresses) if callable(one) else one for one in parameters]
        triton.runtime.driver.active.emulation.launch(function, (x, y, z), parameters, memory, self.metadata.shared)

    def _take(self, name: str, kind, argument, tensors: list, parameters: list, described: list):
        """Append an argument's bytes, or the function of the tensors' addresses that gives them, and the tensors."""
        if isinstance(kind, tuple):
            for i, (inner, value) in enumerate(zip(kind, argument)):
                self._take(f"{name}[{i}]", inner, value, tensors, parameters, described)
        elif kind == "constexpr":
            return
        elif kind.startswith("tensordesc"):
            if not described:
                raise ValueError(f"{name} is a tensor descriptor that Triton takes apart for this architecture, which "
                                 "is not emulated; pass a pointer")
            parameters += descriptor(argument, described.pop(0))
            tensors.append((name, argument.base))
        elif kind.startswith("*"):
            parameters.append(pointer(argument) if argument is not None else bytes(8))
            if argument is not None:
                tensors.append((name, argument))
        else:
            parameters.append(struct.pack(SCALARS[kind], argument))


class Addresses:
    """Where a kernel sees each range of the host's memory: far from all others, so that no overrun meets a tensor, and
    at the same place in every process."""

    def __init__(self, spans):
        """`spans`: (start, end) of ranges in the host's memory."""
        self.spans = [(start, end, (i + 1) * APART + start % ALIGNED) for i, (start, end) in enumerate(spans)]

    def of(self, host: int) -> int:
        """The address of what lies at `host`; of an empty tensor, which is nowhere, one that may not be used."""
        return next((at + host - start for start, end, at in self.spans if start <= host < end), APART // 2)


def pointer(tensor):
    """The bytes of a pointer, as a function of addresses."""
    return lambda addresses: struct.pack("<Q", addresses.of(tensor.data_ptr()))


def descriptor(argument, meta) -> list:
    """A host's tensor descriptor: the tensor map, then sizes and strides, as Triton's launcher passes them."""
    element = argument.base.element_size()
    strides = [stride * element for stride in argument.strides[::-1]]

    def box(addresses):
        return TensorMap(addresses.of(argument.base.data_ptr()), tuple(argument.shape[::-1]), tuple(strides),
                         tuple(meta["block_size"][::-1]), element, SWIZZLE[meta["swizzle"]],
                         argument.padding == "nan").encode().ljust(BYTES, b"\0")
    return [box, *(struct.pack("<i", n) for n in argument.shape), *(struct.pack("<q", n) for n in argument.strides)]


def memory_of(tensors) -> tuple[GlobalMemory, Addresses]:
    """The memory of named tensors: from the first to the last element of each, those that overlap as one."""
    spans = []
    for place, (name, tensor) in enumerate(tensors):
        tensor = getattr(tensor, "base", tensor) if not isinstance(tensor, torch.Tensor) else tensor
        if tensor.device.type != "cpu":
            raise ValueError(f"emulate: {name} is on {tensor.device}; kernels run on CPU tensors here")
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), place, name))
    merged, spans = [], sorted(spans)
    while spans:
        start, end, place, name = spans.pop(0)
        while spans and spans[0][0] < end:
            _, other_end, other_place, other = spans.pop(0)
            end, place = max(end, other_end), min(place, other_place)
            name = name if other in name.split(" and ") else f"{name} and {other}"
        merged.append((place, start, end, name))
    merged.sort()  # by the place among the arguments, which is the same in every process
    memory, addresses = GlobalMemory(), Addresses([(start, end) for _, start, end, _ in merged])
    for _, start, end, name in merged:
        bytes_ = np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)
        memory.add(addresses.of(start), bytes_, name)
    return memory, addresses


def operators_on_cpu():
    """Let every operator of `torch.library.custom_op` that has a CUDA implementation run that on CPU tensors."""
    from torch._library.custom_ops import OPDEFS
    for operator in list(OPDEFS.values()):
        kernel = operator._backend_fns.get("cuda")
        if kernel is not None:
            operator.register_kernel("cpu")(kernel)
