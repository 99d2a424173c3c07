"""The operands of one instruction, as functions of the threads that execute it.

A decoder takes `Operands` and returns the function that executes the instruction. That function is given `at`, a slice
of thread numbers, and works on all of them at once.
"""
import re

import numpy as np

from ptxrun.errors import UnknownInstruction
from ptxrun.numbers import DTYPES, SIGNED, UNSIGNED, literal, size
from ptxrun.ptx import Instruction, members

ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


class Operands:
    """Reads and writes what an instruction names."""

    def __init__(self, machine, instruction: Instruction):
        self.machine, self.instruction = machine, instruction
        self.parts, self.texts = instruction.parts, instruction.operands
        self.registers = machine.registers

    @property
    def type(self) -> str:
        """The last part of the opcode, as a rule the type that it computes in."""
        return self.parts[-1]

    def unknown(self, what: str = "") -> UnknownInstruction:
        """The error of an instruction that is not emulated."""
        return UnknownInstruction(f"not emulated{f' ({what})' if what else ''}: {self.instruction}")

    def has(self, modifier: str) -> bool:
        """Whether the opcode has a part."""
        return modifier in self.parts

    # reading

    def read(self, place: int, kind: str | None = None):
        """A function that reads operand number `place` as `kind`."""
        return self.read_text(self.texts[place], kind or self.type)

    def read_text(self, text: str, kind: str):
        """A function that reads a register, a special register or a number as `kind`."""
        if text in self.registers:
            return self.registers.view(text, DTYPES[kind]).__getitem__
        if kind == "pred" and text.startswith("!") and text[1:] in self.registers:
            row = self.registers.view(text[1:], bool)
            return lambda at: ~row[at]
        if text in self.machine.special:
            return self.machine.special[text].view(DTYPES[kind]).__getitem__
        if text.startswith("%clock") or text == "%globaltimer":
            return self._constant(DTYPES[kind](0))
        if text == "global_smem":
            return self._constant(DTYPES[kind](0))
        try:
            return self._constant(literal(text, kind))
        except ValueError:
            raise self.unknown(f"operand {text}") from None

    @staticmethod
    def _constant(value):
        return lambda at: value

    def read_list(self, place: int, kind: str):
        """A list of functions that read the members of `{a, b}`."""
        return [self.read_text(text, kind) for text in members(self.texts[place])]

    def read_bits(self, text: str, width: int):
        """A function that reads `width` bytes: the lower part of a register that has more."""
        if text in self.registers and self.registers.width(text) > width:
            row = self.registers.rows[text]
            return lambda at: row[at].astype(UNSIGNED[width])
        return self.read_text(text, f"b{8 * width}")

    def constant(self, place: int) -> int:
        """An operand that must be a number."""
        try:
            return int(self.texts[place], 0)
        except ValueError:
            raise self.unknown(f"{self.texts[place]} is no number") from None

    # writing

    def write(self, place: int = 0, kind: str | None = None):
        """A function (at, value) that writes operand number `place`, in active threads alone."""
        return self.write_text(self.texts[place], kind or self.type)

    def write_text(self, text: str, kind: str):
        """A function (at, value) that writes a register as `kind`; `_` throws the value away."""
        if text == "_":
            return lambda at, value: None
        if text not in self.registers:
            raise self.unknown(f"destination {text}")
        row = self.registers.view(text, DTYPES[kind])
        if self.instruction.predicate is None:
            return row.__setitem__
        active = self.active

        def guarded(at, value):
            row[at] = np.where(active(at), value, row[at])
        return guarded

    def write_wide(self, text: str, kind: str):
        """Like `write_text`, where the register may be wider than `kind`: sign or zero fills it."""
        if text == "_" or text not in self.registers or self.registers.width(text) == size(kind):
            return self.write_text(text, kind)
        width = self.registers.width(text)
        if width < size(kind):
            raise self.unknown(f"{kind} into {text}")
        signed = kind[0] == "s"
        wide = (SIGNED if signed else UNSIGNED)[width]
        write = self.write_text(text, f"{'s' if signed else 'u'}{8 * width}")
        return lambda at, value: write(at, np.asarray(value).astype(wide))

    def write_list(self, place: int, kind: str):
        """A list of functions that write the members of `{a, b}`."""
        return [self.write_text(text, kind) for text in members(self.texts[place])]

    # predicates and addresses

    @property
    def guarded(self) -> bool:
        """Whether the instruction has a predicate."""
        return self.instruction.predicate is not None

    def active(self, at):
        """The threads of `at` whose predicate holds."""
        if self.instruction.predicate is None:
            return np.ones(at.stop - at.start, bool)
        row = self.registers.rows[self.instruction.predicate][at]
        return ~row if self.instruction.negated else row

    def address(self, place: int):
        """A function that gives the address of `[register + offset]` for each thread, as int64."""
        found = ADDRESS.match(self.texts[place])
        if found is None:
            raise self.unknown(f"address {self.texts[place]}")
        base, offset = found[1], int(found[2] or "0", 0)
        if base in self.registers:
            row = self.registers.rows[base]
            return lambda at: row[at].astype(np.int64) + offset
        if base == "global_smem":
            base = "0"
        if not base.isdigit():
            raise self.unknown(f"address {self.texts[place]}")
        return lambda at: np.full(at.stop - at.start, int(base) + offset, np.int64)

    def lanes(self, at):
        """The numbers of the active threads."""
        threads = np.arange(at.start, at.stop)
        return threads[self.active(at)] if self.guarded else threads

    def selected(self, at, *reads):
        """What `reads` give in the active threads; a number becomes one for each."""
        count = at.stop - at.start
        values = [np.broadcast_to(read(at), (count,)) for read in reads]
        if not self.guarded:
            return values
        active = self.active(at)
        return [value[active] for value in values]
