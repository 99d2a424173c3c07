"""The import order of the project, checked: each file may import only what stands before it."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "tfkernels._library",
    "tfkernels._arguments",
    "tfkernels._launch",
    "tfkernels.mask",
    "tfkernels._attention_cpu",
    "tfkernels._attention_tiles",
    "tfkernels._attention_rows",
    "tfkernels._attention_forward",
    "tfkernels._attention_backward",
    "tfkernels._attention_decode",
    "tfkernels.attention",
    "tfkernels._norm_cpu",
    "tfkernels._norm_kernels",
    "tfkernels.norm",
    "tfkernels.rotary",
    "tfkernels._philox",
    "tfkernels._latents",
    "tfkernels.patchify",
    "tfkernels.embed",
    "tfkernels.diffusion_loss",
    "tfkernels._head_loss_kernels",
    "tfkernels.head_loss",
    "tfkernels.cross_entropy",
    "tfkernels",
    "tfkernels.integrations",
    "transfusion.values",
    "transfusion.settings",
    "transfusion.objective",
    "transfusion.guidance",
    "transfusion.sampler",
    "transfusion.config",
    "transfusion.sequence",
    "transfusion.embed",
    "transfusion.backbone",
    "transfusion.experts",
    "transfusion.heads",
    "transfusion.unet",
    "transfusion.checkpoint",
    "transfusion.tuning",
    "transfusion.vae",
    "transfusion.eval.metrics",
    "transfusion.eval.features",
    "transfusion.cache",
    "transfusion.sample",
    "transfusion.model",
    "transfusion",
    "transfusion.tokenizer",
    "transfusion.device",
    "transfusion.optim",
    "transfusion.run_state",
    "transfusion.emoji",
    "transfusion.data",
    "transfusion.picture_folder",
    "transfusion.latents",
    "transfusion.init",
    "transfusion.train",
    "transfusion.vae_losses",
    "transfusion.vae_train",
    "transfusion.presets",
    "transfusion.eval",
    "transfusion.vae_eval",
    "transfusion.demo",
    "transfusion.showcase",
    "transfusion.studies.vq",
    "transfusion.studies.data",
    "transfusion.studies.pictures",
    "transfusion.studies.arms",
    "transfusion.studies.measure",
    "transfusion.studies.run",
    "transfusion.studies",
    "transfusion.cli",
)
PACKAGES = [p for d in ("tfkernels", "transfusion") for p in sorted((ROOT / d).rglob("*.py"))]


def layer(module):
    """The place of a module in ORDER: its own name, or the longest package of it that is listed."""
    matches = [name for name in ORDER if module == name or (module.startswith(name + ".") and name not in ("tfkernels", "transfusion"))]
    return ORDER.index(max(matches, key=len)) if matches else None


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """(line, module) of every import; `from package import module` counts as the module where there is one."""
    for node in ast.walk(ast.parse(path.read_text())):
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
