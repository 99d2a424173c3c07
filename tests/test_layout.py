"""The import order of the project, checked: a folder may import only itself and what stands before it."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (  # a folder is a layer: files inside it are free among themselves
    "tfkernels._library",
    "tfkernels._arguments",
    "tfkernels._launch",
    "tfkernels.mask",
    "tfkernels.attention",
    "tfkernels.norm",
    "tfkernels.rotary",
    "tfkernels.patches",
    "tfkernels.losses",
    "tfkernels",
    "tfkernels.integrations",
    "transfusion.settings",
    "transfusion.files",
    "transfusion.command",
    "transfusion.device",
    "transfusion.sequence",
    "transfusion.diffusion",
    "transfusion.generate",
    "transfusion.model",
    "transfusion",
    "transfusion.data",
    "transfusion.eval",
    "transfusion.train",
    "transfusion.recipes",
    "transfusion.entry",
)
ENTRIES = ("cli", "sample", "demo", "showcase", "studies", "train.__main__")  # what people start: these may import everything
PACKAGES = [p for d in ("tfkernels", "transfusion") for p in sorted((ROOT / d).rglob("*.py"))]


def layer(module):
    """The place of a module in ORDER: that of the longest name in it that the module begins with; a face has its own."""
    if module.removeprefix("transfusion.") in ENTRIES:
        return ORDER.index("transfusion.entry")
    matches = [name for name in ORDER if module == name or (module.startswith(name + ".") and "." in name)]
    return ORDER.index(max(matches, key=len)) if matches else None


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_run_as_a_program(node):
    """Whether a statement is `if __name__ == "__main__":`, beneath which a file is an entry, as those of ENTRIES are."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(path):
    """(line, module) of every import; `from package import module` counts as the module where there is one."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not is_run_as_a_program(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if (ROOT / Path(*inner.split("."))).with_suffix(".py").is_file() else node.module


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = layer(name_of(path))
    assert here is not None, f"{path.relative_to(ROOT)} has no place in ORDER"
    for line, module in imported(path):
        there = layer(module)
        assert there is None or there <= here, f"{path.name}:{line} imports {module}, which stands above it"
        assert module.split(".")[0] not in ("tests", "benchmarks"), f"{path.name}:{line} imports {module}"


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_class_and_public_function_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has no docstring"
