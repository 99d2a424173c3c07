"""The layers of the project, checked: a folder may import only itself and what stands before it in ORDER.

A new file in a folder needs no entry here. A new folder gets a line in ORDER, behind everything that it imports.
"""
import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "tfkernels._library",
    "tfkernels._arguments",
    "tfkernels._launch",
    "tfkernels.mask",
    "tfkernels.attention",
    "tfkernels.parallel",
    "tfkernels.norm",
    "tfkernels.rotary",
    "tfkernels.patches",
    "tfkernels.losses",
    "tfkernels",
    "tfkernels.integrations",
    "transfusion.settings",
    "transfusion.locks",
    "transfusion.journal",
    "transfusion.files",
    "transfusion.command",
    "transfusion.device",
    "transfusion.sequence",
    "transfusion.diffusion",
    "transfusion.generate",
    "transfusion.model",
    "transfusion",
    "transfusion.data",
    "transfusion.serve",
    "transfusion.integrations",
    "transfusion.eval",
    "transfusion.train",
    "transfusion.recipes",
    "ptxrun.errors",
    "ptxrun.numbers",
    "ptxrun.ptx",
    "ptxrun.registers",
    "ptxrun.memory",
    "ptxrun.flow",
    "ptxrun.threads",
    "ptxrun.barriers",
    "ptxrun.races",
    "ptxrun.block_races",
    "ptxrun.thread_races",
    "ptxrun.tensor_map",
    "ptxrun.traffic",
    "ptxrun.schedule",
    "ptxrun.instructions",
    "ptxrun.machine",
    "ptxrun.launch",
    "ptxrun.driver",
    "ptxrun",
    "ptxrun.plugin",
)
ROOMS = ("tfkernels", "transfusion", "ptxrun")
KNOW_NOTHING_OF = {"tfkernels": ("ptxrun",), "transfusion": ("ptxrun",), "ptxrun": ("tfkernels", "transfusion")}
ENTRIES = (  # what people start; these may import everything, and nothing imports them
    "transfusion.cli",
    "transfusion.sample",
    "transfusion.demo",
    "transfusion.showcase",
    "transfusion.studies",
    "transfusion.train.__main__",
)
APART = ("tests", "benchmarks", "examples")  # the packages import none of these
FILE_LINES, FUNCTION_LINES = 420, 70  # what needs more is asking to become two; kernels may be longer


def name_of(path):
    """The module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(module):
    """The place in ORDER of a module of the packages, None where it has none; the last place is that of ENTRIES.

    A module belongs to the longest name in ORDER that it is or lies in. The packages' own names,
    "tfkernels", "transfusion" and "ptxrun", stand for their `__init__.py` alone.
    """
    if module in ENTRIES:
        return len(ORDER)
    found = [name for name in ORDER if module == name or "." in name and module.startswith(f"{name}.")]
    return ORDER.index(max(found, key=len)) if found else None


def is_run_as_a_program(statement):
    """Whether a statement is `if __name__ == "__main__":`, beneath which a file is an entry like those of ENTRIES."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def imported(path):
    """(line, module) of every import; `from package import module` counts as the module where there is one."""
    tree = ast.parse(path.read_text())
    tree.body = [statement for statement in tree.body if not is_run_as_a_program(statement)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = ROOT / Path(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def is_kernel(function):
    """Whether a function is a Triton kernel, `@triton.jit` or `@triton.jit(...)`."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def files(*folders):
    """A parametrization over the Python files of folders."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return pytest.mark.parametrize("path", found, ids=lambda path: str(path.relative_to(ROOT)))


@files(*ROOMS)
def test_imports_point_down(path):
    where, here = path.relative_to(ROOT), place(name_of(path))
    assert here is not None, (
        f"{where} has no place: name its folder in ORDER of tests/test_layout.py, behind all that it imports, "
        "or the file in ENTRIES if people start it")
    for line, module in imported(path):
        assert module.split(".")[0] not in APART, f"{where}:{line} imports {module}; packages import none of {APART}"
        if module.split(".")[0] in ROOMS:
            assert module.split(".")[0] not in KNOW_NOTHING_OF[where.parts[0]], (
                f"{where}:{line} imports {module}; the emulator and the packages that it tests know nothing of each "
                "other")
            there = place(module)
            assert there is not None, f"{where}:{line} imports {module}, which has no place in ORDER"
            assert there <= here, (
                f"{where}:{line} imports {module}, which stands above it in ORDER; move what both need below them, "
                "or the importing code above")


BROUGHT = {"PIL": "pillow", "sklearn": "scikit-learn", "jinja2": "torch", "huggingface_hub": "transformers",
           "anyio": "fastapi", "starlette": "fastapi", "pydantic": "fastapi", "gradio_client": "gradio"}
"""modules by the package that is installed for them"""
EXTRAS = {"transfusion.serve": ("serve", "app"), "transfusion.recipes.digits_judge": ("demo",),
          "transfusion.recipes.studies": ("demo",), "transfusion.eval.lmms_model": ("lmms_eval",)}
"""what the modules of some places need beside what is always installed: extras, or a package itself"""


@files("tfkernels", "transfusion")
def test_what_a_module_imports_at_once_is_installed(path, monkeypatch):
    package = {}
    monkeypatch.setattr("setuptools.setup", package.update)
    runpy.run_path(str(ROOT / "setup.py"))
    late = next((extras for name, extras in EXTRAS.items() if name_of(path).startswith(name)), ())
    lists = [package["install_requires"], *(package["extras_require"].get(extra, [extra]) for extra in late)]
    installed = {re.split("[<>= ;]", one)[0] for names in lists for one in names}
    for statement in ast.parse(path.read_text()).body:
        names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else [
            statement.module] if isinstance(statement, ast.ImportFrom) else []
        for root in {name.split(".")[0] for name in names} - sys.stdlib_module_names - set(ROOMS):
            assert BROUGHT.get(root, root) in installed, (
                f"{path.relative_to(ROOT)}:{statement.lineno} imports {root}, which setup.py does not install; name it "
                "there, or import it where it is used, with an error that names the extra")


def test_every_layer_and_entry_is_there():
    for module in ORDER + ENTRIES:
        path = ROOT / Path(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), f"there is no {module}"


@files(*ROOMS)
def test_every_module_class_and_public_function_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has no docstring"


@files(*ROOMS, "benchmarks", "examples")
def test_files_and_functions_are_short_enough_to_read_at_once(path):
    text, where = path.read_text(), path.relative_to(ROOT)
    lines = len(text.splitlines())
    assert lines <= FILE_LINES, f"{where} has {lines} lines, at most {FILE_LINES} fit; split it by what its parts do"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_kernel(node):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES, (
                f"{where}:{node.lineno} {node.name} has {length} lines, at most {FUNCTION_LINES} fit; split it")


@files(*ROOMS, *APART)
def test_lines_have_at_most_120_characters(path):
    """Ruff lets a line pass that a `noqa` behind it makes too long."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 120, f"{path.relative_to(ROOT)}:{number} has {len(line)} characters"
