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
    "tfkernels.attention.cpu",
    "tfkernels.attention.triton.tiles",
    "tfkernels.attention.triton.rows",
    "tfkernels.attention.triton.forward",
    "tfkernels.attention.triton.backward",
    "tfkernels.attention.triton.decode",
    "tfkernels.attention.op",
    "tfkernels.norm.cpu",
    "tfkernels.norm.kernels",
    "tfkernels.norm.op",
    "tfkernels.rotary.op",
    "tfkernels.patches.philox",
    "tfkernels.patches.latents",
    "tfkernels.patches.patchify",
    "tfkernels.patches.embed",
    "tfkernels.losses.diffusion",
    "tfkernels.losses.head_kernels",
    "tfkernels.losses.head",
    "tfkernels.losses.cross_entropy",
    "tfkernels",
    "tfkernels.integrations",
    "transfusion.values",
    "transfusion.settings",
    "transfusion.diffusion.objective",
    "transfusion.diffusion.guidance",
    "transfusion.diffusion.solvers",
    "transfusion.model.config",
    "transfusion.sequence.packing",
    "transfusion.model.image_layers.embedding",
    "transfusion.model.backbone",
    "transfusion.model.mixture_of_transformers",
    "transfusion.model.image_layers.heads",
    "transfusion.model.image_layers.unet",
    "transfusion.files",
    "transfusion.model.lora",
    "transfusion.model.vae",
    "transfusion.eval.metrics",
    "transfusion.eval.features",
    "transfusion.generate.kv_cache",
    "transfusion.generate.generation",
    "transfusion.model.transfusion",
    "transfusion",
    "transfusion.sequence.tokenizer",
    "transfusion.device",
    "transfusion.train.optimizer",
    "transfusion.train.run_state",
    "transfusion.recipes.emoji",
    "transfusion.data.batches",
    "transfusion.data.pictures",
    "transfusion.data.latents",
    "transfusion.model.from_language_model",
    "transfusion.train.transfusion",
    "transfusion.train.autoencoder_losses",
    "transfusion.train.autoencoder",
    "transfusion.recipes.paper",
    "transfusion.eval",
    "transfusion.eval.autoencoder",
    "transfusion.recipes.demo",
    "transfusion.recipes.showcase",
    "transfusion.recipes.studies.vq",
    "transfusion.recipes.studies.data",
    "transfusion.recipes.studies.pictures",
    "transfusion.recipes.studies.arms",
    "transfusion.recipes.studies.measure",
    "transfusion.recipes.studies.run",
    "transfusion.recipes.studies",
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
