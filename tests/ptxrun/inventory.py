"""The instructions that the library's kernels compile to, and those of them that ptxrun does not know.

    python -m tests.ptxrun.inventory [FOLDERS OF TESTS]

Compiles what the tests compile offline: every row of the launch tables with its variants, in each dtype, and every
kernel around attention, for sm_80 and sm_90; without FOLDERS also the rare rows that the tests leave out. ptxas is left
out, nothing is run. With another Triton before it on PYTHONPATH the same is said of that one.
"""
import collections
import os
import sys

import pytest
import triton
from triton import knobs

from ptxrun.driver import keep_ptx
from ptxrun.ptx import parse
from tests import resources
from tests.tfkernels.test_resources import RARE, compiled

COMPILING = ("-k", "spill", "-q", "-p", "no:cacheprovider", "--tb=line")


class Inventory:
    """Counts the instructions of all kernels that tests compile."""

    def __init__(self):
        self.opcodes, self.unknown, self.kernels = collections.Counter(), collections.Counter(), 0
        self.compiled = resources.compiled

    def compile(self, kernel, constants, config, architecture, *rest):
        """Compile, decode and count."""
        if architecture not in resources.EMULATED:
            pytest.skip(f"sm_{architecture} is not emulated")
        built = self.compiled(kernel, constants, config, architecture, *rest)
        self.kernels += 1
        self.opcodes.update({instruction.opcode for instruction in parse(built.asm["ptx"]).instructions})
        self.unknown.update(resources.unknown_instructions(built.asm["ptx"]))
        return built


def main(arguments: list[str]) -> int:
    """Print every opcode with the number of kernels that hold it, then what is not emulated."""
    inventory = Inventory()
    os.environ["PYTEST_XDIST_WORKER"] = "inventory"  # so that no test compiles in a process of its own
    knobs.runtime.add_stages_inspection_hook = keep_ptx
    resources.compiled, resources.registers_and_spills = inventory.compile, lambda cubin: (0, 0)
    resources.known, resources.note = dict, lambda key, found: None
    pytest.main([*COMPILING, *(arguments or ["tests/tfkernels"])])
    for row in () if arguments else RARE:
        if row.architecture in resources.EMULATED:
            compiled(row)
    for opcode, kernels in sorted(inventory.opcodes.items()):
        print(f"{kernels:5} {opcode}")
    print(f"{len(inventory.opcodes)} opcodes in {inventory.kernels} kernels on Triton {triton.__version__}; "
          f"not emulated: {dict(inventory.unknown) or 'none'}")
    return bool(inventory.unknown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
