"""The tables in the kernels' module docstrings, which say how many bytes each operator moves.

A table has a row for each operator ("op  forward  backward"), or is one operator's and has a row called "ours".
"""
import ast
import re
from pathlib import Path

import tfkernels


def table_lines(folder: str) -> list[list[str]]:
    """The cells of every line of all module docstrings in a folder of tfkernels; two spaces or more part two cells."""
    files = sorted((Path(tfkernels.__file__).parent / folder).glob("*.py"))
    docstrings = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in files]
    return [re.split(r" {2,}", line.strip()) for text in docstrings for line in text.splitlines()]


def bytes_moved(folder: str, op: str, **sizes: int) -> list[int]:
    """What `op` moves forward and backward by its table, whose formulas like "2 T C e" are computed for `sizes`."""
    header = None
    for cells in table_lines(folder):
        if cells[1:] and "forward" in cells:
            header = cells
        elif header and cells[0] == op or header and header[0] == op and cells[0] == "ours":
            formulas = cells[header.index("forward")], cells[header.index("backward")]
            return [eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), dict(sizes)) for formula in formulas]
    raise AssertionError(f"no table in tfkernels/{folder} says what {op} moves")
