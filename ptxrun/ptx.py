"""PTX text into a kernel: its instructions in order, with labels, registers and parameters.

Triton writes one `.entry` to a module. A name that is declared inside `{ ... }` is visible there alone; such names
get a number behind them, so that what follows sees one flat list of names. `.loc` lines tell which line of Python an
instruction came from; errors quote it.
"""
import bisect
import re
from dataclasses import dataclass, field

from ptxrun.errors import UnknownInstruction

ENTRY = re.compile(r"\.entry\s+([$\w]+)\s*\((.*?)\)\s*(.*?)\{", re.DOTALL)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
LOCATION = re.compile(r"^[ \t]*\.(?:loc|file|section)\b[^\n]*", re.MULTILINE)
SOURCE = re.compile(r"^[ \t]*\.loc\b[^\n]*?//\s*(\S+)", re.MULTILINE)
STATEMENT = re.compile(r"""
    \s* (?: (?P<label> [$%\w]+ ) : (?!:)
          | (?P<open> \{ )
          | (?P<close> \} )
          | (?P<text> [^;{}]* (?: \{ [^{}]* \} [^;{}]* )* ) ;
        )""", re.VERBOSE)
INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
NAME = re.compile(r"[%$]?[A-Za-z_$%]\w*")


@dataclass(slots=True)
class Instruction:
    """One instruction, `@predicate opcode operands`."""

    opcode: str
    operands: list[str]
    predicate: str | None = None
    negated: bool = False
    line: int = 0
    source: str = ""  # "file.py:line:column" of the Python that it came from
    parts: list[str] = field(init=False)

    def __post_init__(self):
        self.parts = self.opcode.split(".")

    def __str__(self):
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"

    @property
    def where(self) -> str:
        """The instruction, the line of PTX, and the line of Python."""
        return f"line {self.line} of the PTX{f', from {self.source}' if self.source else ''}: {self}"


@dataclass
class Kernel:
    """A parsed `.entry`."""

    name: str
    threads: int                                                      # of a block, .reqntid
    registers_per_thread: int | None                                  # .maxnreg
    parameters: list[tuple[str, str, int]]                            # name, type, number of elements (0: a scalar)
    registers: dict[str, str] = field(default_factory=dict)           # name to type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)              # name to index of an instruction
    branch_targets: dict[str, list[str]] = field(default_factory=dict)


def split(text: str, separator: str = ",") -> list[str]:
    """Split operands at commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == separator and depth == 0:
            found.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*found, text[start:]] if part.strip()]


def members(operand: str) -> list[str]:
    """The registers of `{a, b, c}`, or the one that `a` is."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def parse(text: str) -> Kernel:
    """Parse a PTX module with one entry."""
    head = ENTRY.search(text)
    if head is None:
        raise UnknownInstruction("the PTX has no .entry")
    kernel = Kernel(head[1], block_size(head[3]), directive(head[3], "maxnreg"), parameters(head[2]))
    _Body(kernel, text, head.end()).read()
    return kernel


def blank(found: re.Match) -> str:
    """As many spaces and lines as were found, so that what stands behind keeps its place."""
    return re.sub(r"[^\n]", " ", found[0])


def directive(text: str, name: str) -> int | None:
    """The number behind a directive of the entry, None where it is absent."""
    found = re.search(rf"\.{name}\s+(\d+)", text)
    return int(found[1]) if found else None


def block_size(text: str) -> int:
    """Threads of a block. Clusters of several blocks are not emulated."""
    cluster = re.search(r"\.reqnctapercluster\s+([\d, ]+)", text)
    if cluster and any(int(n) > 1 for n in cluster[1].split(",")):
        raise UnknownInstruction(f"clusters of blocks: .reqnctapercluster {cluster[1]}")
    threads = directive(text, "reqntid")
    if threads is None:
        raise UnknownInstruction("an entry without .reqntid")
    return threads


def parameters(text: str) -> list[tuple[str, str, int]]:
    """Name, type and number of elements of each parameter."""
    found = []
    for one in split(COMMENT.sub("", text)):
        name, _, count = one.split()[-1].partition("[")
        found.append((name, re.search(r"\.([usfb]\d+)\b", one)[1], int(count.rstrip("]") or 0)))
    return found


class _Body:
    """Reads the statements of an entry's body into its kernel."""

    def __init__(self, kernel: Kernel, text: str, start: int):
        self.kernel, self.start = kernel, start
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        sources = [(m.start(), m[1]) for m in SOURCE.finditer(text, start)]
        self.source_starts, self.sources = [s for s, _ in sources], [name for _, name in sources]
        self.text = LOCATION.sub(blank, COMMENT.sub(blank, text[:self.end(text)]))
        self.scopes, self.scope_count = [], 0

    def end(self, text: str) -> int:
        """Where the debugging sections begin, or the text ends."""
        found = re.search(r"^\s*\.section\b", text[self.start:], re.MULTILINE)
        return self.start + found.start() if found else len(text)

    def read(self):
        """Read statement by statement until the entry's brace closes."""
        at, table = self.start, None
        while True:
            found = STATEMENT.match(self.text, at)
            if found is None:
                raise UnknownInstruction(f"line {self.line(at)} of the PTX: {self.text[at:at + 60].strip()!r}")
            at = found.end()
            if found["label"]:
                table = self.declare(found["label"])
                self.kernel.labels[table] = len(self.kernel.instructions)
            elif found["open"]:
                self.scope_count += 1
                self.scopes.append({})
            elif found["close"]:
                if not self.scopes:
                    return
                self.scopes.pop()
            else:
                self.statement(found["text"].strip(), found.start("text"), table)

    def statement(self, text: str, at: int, label: str | None):
        """A declaration of registers, a table of branch targets, or an instruction."""
        if text.startswith(".reg"):
            self.declare_registers(text)
        elif text.startswith(".branchtargets"):
            self.kernel.branch_targets[label] = split(text.removeprefix(".branchtargets"))
        elif text.startswith(".") or not text:
            return  # .pragma; memory of a thread's own, whose name is unknown to whatever would use it
        elif found := INSTRUCTION.match(text):
            negated, predicate, opcode, operands = found.groups()
            operands = [self.renamed(" ".join(part.split())) for part in split(operands)]
            self.kernel.instructions.append(Instruction(
                opcode, operands, predicate and self.renamed(predicate), bool(negated), self.line(at),
                self.source(at)))
        else:
            raise UnknownInstruction(f"line {self.line(at)} of the PTX: {text}")

    def declare_registers(self, text: str):
        """`.reg .b32 %r<78>;` or `.reg .pred p, q;`."""
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            many = re.match(r"\s*([%$\w]+)<(\d+)>", name)
            declared = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [self.declare(name.strip())]
            self.kernel.registers |= dict.fromkeys(declared, kind.lstrip("."))

    def declare(self, name: str) -> str:
        """A name, made unique where it is declared in an inner scope."""
        return self.scopes[-1].setdefault(name, f"{name}__{self.scope_count}") if self.scopes else name

    def renamed(self, operand: str) -> str:
        """An operand with the unique names of the scopes around it."""
        if not self.scopes:
            return operand
        names = {name: unique for scope in self.scopes for name, unique in scope.items()}
        return NAME.sub(lambda m: names.get(m[0], m[0]), operand)

    def line(self, at: int) -> int:
        return bisect.bisect_left(self.newlines, at) + 1

    def source(self, at: int) -> str:
        place = bisect.bisect_right(self.source_starts, at) - 1
        return self.sources[place] if place >= 0 else ""
