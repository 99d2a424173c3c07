"""What the emulator reports: each error says what would have gone wrong on a GPU, and where in PTX and source."""


class EmulationError(Exception):
    """A kernel did what it may not do; `at(instruction)` adds where."""

    def at(self, instruction) -> "EmulationError":
        """Name the instruction in the message, once."""
        if not getattr(self, "located", False):
            self.located = True
            self.args = (f"{self.args[0]}\n  at {instruction.where}", *self.args[1:])
        return self


class UnknownInstruction(EmulationError):
    """An instruction, a modifier or an operand that the emulator does not execute."""


class OutOfBounds(EmulationError):
    """An address outside of every tensor, or outside of the block's shared memory."""


class Misaligned(EmulationError):
    """An address that is no multiple of the access's size."""


class Race(EmulationError):
    """Two accesses of the same bytes, at least one a write, of which neither happens before the other."""


class Hazard(EmulationError):
    """A register that is read or written while an asynchronous product still uses it."""


class Misuse(EmulationError):
    """A rule of the instruction set that the kernel breaks: part of a warp at a collective, a barrier's count."""


class Deadlock(EmulationError):
    """Every thread waits."""
