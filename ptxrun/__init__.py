"""Runs compiled Triton kernels without a GPU: their PTX, instruction by instruction, on CPU tensors.

    import ptxrun
    with ptxrun.emulate("sm_90", races=True):
        kernel[grid](x, y, out, n, BLOCK=128)        # tensors of the CPU, bfloat16 included

This is the code that a GPU would run, with its tiles, its layouts in registers and shared memory, its barriers and
asynchronous copies, of which Triton's interpreter knows nothing. docs/testing.md says what it proves and what not.
`pytest -p ptxrun.plugin --emulate sm_90` runs a project's own tests this way.
"""
import sys

from ptxrun.errors import (
    Deadlock,
    EmulationError,
    Hazard,
    Misaligned,
    Misuse,
    OutOfBounds,
    Race,
    UnknownInstruction,
)

__all__ = ["Deadlock", "EmulationError", "Hazard", "Misaligned", "Misuse", "OutOfBounds", "Race", "UnknownInstruction",
           "active", "emulate", "fences_copies", "operators_on_cpu", "unknown_instructions"]


def emulate(architecture: str, **options):
    """See `ptxrun.driver.emulate`, which this imports with Triton when it is called."""
    from ptxrun import driver
    return driver.emulate(architecture, **options)


def active() -> bool:
    """Whether launches are emulated now, for tests that choose by that what they ask of a kernel."""
    driver = sys.modules.get("ptxrun.driver")
    return driver is not None and bool(driver.running)


def fences_copies(version: str) -> bool:
    """Whether this version of Triton puts a `fence.proxy.async` between cp.async and wgmma: from 3.7 on
    (triton-lang/triton pull request 9610)."""
    return tuple(map(int, version.split(".")[:2])) >= (3, 7)


def unknown_instructions(ptx: str) -> list[str]:
    """See `ptxrun.launch.unknown_instructions`."""
    from ptxrun import launch
    return launch.unknown_instructions(ptx)


def operators_on_cpu():
    """See `ptxrun.driver.operators_on_cpu`."""
    from ptxrun import driver
    driver.operators_on_cpu()
