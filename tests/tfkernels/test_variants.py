"""How often Triton compiles each kernel: once for the constants of a launch, whatever the sizes of a batch are.

Triton compiles anew for an integer that is 1 or a multiple of 16, and for a pointer that is one or is not. Here nothing
is compiled: launches are seen on CPU tensors, while operators compute as ever, and what each would be compiled for is
counted. Head dims are multiples of 16; others make strides that are so for some lengths of a row and not for others.
"""
import functools
from collections import defaultdict

import pytest
import torch
import triton
from triton import language as tl

import tfkernels
from tests.conftest import KERNEL_RUNS
from tests.launches import OPTIONS, kernel_names, seen, specialization
from tests.transfusion.conftest import tiny_model
from tfkernels import TransfusionMask
from tfkernels.attention.triton import backward, forward
from transfusion import Image, Text
from transfusion.sequence import encode, pack

LENGTHS = (61, 62, 64, 80, 96)          # of a row: each remainder by 4, and multiples of 16
MODELS = (("decoder", "dit", "1d"), ("adaln", "dit", "2d"), ("mixture_of_transformers", "linear", "2d"),
          ("adaln", "unet", "1d"))

pytestmark = pytest.mark.skipif(KERNEL_RUNS, reason="what a launch is compiled for is seen without running it, once")


class Variants:
    """What each kernel was compiled for, by what its launches say by intent."""

    def __init__(self):
        self.found = defaultdict(lambda: defaultdict(set))

    def __call__(self, kernel, grid, arguments, named):
        bound = kernel.signature.bind(*arguments, **{n: x for n, x in named.items() if n not in OPTIONS}).arguments
        meant = tuple((n, x) for n, x in bound.items() if n.isupper() or x is None)
        meant += tuple((n, named.get(n)) for n in OPTIONS)
        self.found[kernel.__name__][meant].add(specialization(kernel, arguments, named))

    def repeated(self) -> dict[str, list]:
        """The kernels that are compiled more than once for the same constants, and the arguments that differ."""
        differ = {name: {argument for variants in groups.values()
                         for argument, _ in set.union(*map(set, variants)) - set.intersection(*map(set, variants))}
                  for name, groups in self.found.items()}
        return {name: sorted(arguments) for name, arguments in differ.items() if arguments}


def pictures(size: int) -> list[Image]:
    return [Image(torch.rand(1, size, size) * 2 - 1) for _ in range(3)]


def train(model, images: list[Image]):
    """Steps on batches of one to five rows of each length."""
    for rows, length in zip((1, 2, 3, 5, 4), LENGTHS):
        documents = [[Text("a seven"), images[i % len(images)], Text("b"), images[-1]][:1 + (i + rows) % 4]
                     for i in range(rows)]
        sequence = pack([encode(parts, model.tokenizer, model.config) for parts in documents], length, 4)
        model(sequence, torch.rand(sequence.image_count), 7).loss.backward()


def sample(model, image: Image):
    """Text behind an image, and images behind text of many lengths, for one to three prompts."""
    for rows in (1, 2, 3):
        model.generate_batch([[Text("a b c" * (i + 1)), image] for i in range(rows)], max_new_tokens=6, max_images=0)
        model.draw(["a" * (i + rows) for i in range(rows)], steps=2, guidance=2.0, seed=3)


def caches():
    """New tokens against a long cache that grows, whole and in pages, by a mask with and without holes."""
    for rows, length in ((1, 300), (1, 513), (2, 1027), (3, 2064), (1, 8192)):
        k = torch.randn(rows, 2, length, 32)
        pages, table = torch.randn(600, 16, 2, 32), torch.arange(rows * (length // 16)).int().view(rows, -1)
        for new in (1, 3, 20):
            q, cached = torch.randn(rows, 4, new, 32), torch.full((rows,), length - max(new, 5))
            mask = TransfusionMask.from_cache(cached, new, length)
            tfkernels.attention(q, k, k, mask)
            tfkernels.attention(q, k, k, TransfusionMask.from_spans([[(4, 20)]] * rows, length).queries(7, 7 + new))
            tfkernels.paged_attention(q, pages, pages, table,
                                      TransfusionMask.from_cache(cached - 20, new, 16 * table.shape[1]))


def operators():
    """What the models above do not reach: masks with holes, token types, wide norms, chunks of a large vocabulary."""
    for rows, length in zip((1, 2, 3, 5, 4), LENGTHS):
        q, k, v = (torch.randn(rows, heads, length, 32, requires_grad=True) for heads in (4, 2, 2))
        types = torch.zeros(rows, length, dtype=torch.int64)
        types[:, 5:9] = 1
        hidden = TransfusionMask.from_spans([[(4, 20)]] * rows, length, hidden=[[(4, 20)]] * rows)
        for mask in (hidden, TransfusionMask.from_token_types(types)):
            tfkernels.attention(q, k, v, mask).sum().backward()
        x, scale, shift = (torch.randn(*shape, 4112, requires_grad=True) for shape in ((rows, 8), (rows,), (rows,)))
        tfkernels.modulated_layer_norm(x, None, None, scale, shift, None).sum().backward()


def model_of(backbone: str, layers: str, positions: str) -> tuple:
    """A random model, and images of two sizes but where its layers take one alone."""
    model = tiny_model(backbone=backbone, image_layers=layers, positions=positions, hidden_size=64)
    return model, pictures(8) + (pictures(4) if layers != "unet" else [])


@functools.cache
def variants_of(run: str) -> Variants:
    variants, (kind, *model) = Variants(), run.split()
    with seen(variants, computes=True):
        if kind == "training":
            train(*model_of(*model))
        elif kind == "sampling":
            model, images = model_of(*model)
            sample(model, images[0])
        else:
            {"caches": caches, "operators": operators}[kind]()
    return variants


RUNS = [f"{kind} {' '.join(model)}" for kind in ("training", "sampling") for model in MODELS] + ["caches", "operators"]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_compiles_each_kernel_once(run):
    variants = variants_of(run)
    assert variants.found and variants.repeated() == {}


def test_rows_by_tma_compile_each_kernel_once_too(monkeypatch):
    """Whether keys and values are loaded by TMA follows from their layout, whatever the lengths of rows are."""
    for table in (forward.CONFIGS, backward.DQ_CONFIGS):
        for key in [key for key in table if key[0] == 90]:
            monkeypatch.setitem(table, key, table[key]._replace(by_tma=True))
    variants = Variants()
    with seen(variants, computes=True):
        for rows, length in zip((1, 2, 3, 5, 4), LENGTHS):
            tokens = (torch.randn(rows, length, heads, 32, requires_grad=True) for heads in (4, 2, 2))
            q, k, v = (x.transpose(1, 2) for x in tokens)
            tfkernels.attention(q, k, v, TransfusionMask.from_spans([[(4, 20)]] * rows, length)).sum().backward()
    assert variants.repeated() == {}
    by_tma = {name: [dict(meant)["TMA"] for meant in variants.found[name]]
              for name in ("_attention_fwd", "_attention_bwd_dq")}
    assert by_tma == {"_attention_fwd": [True], "_attention_bwd_dq": [True]}


def test_every_kernel_of_the_library_is_counted():
    assert set.union(*(set(variants_of(run).found) for run in RUNS)) == kernel_names()


def test_a_kernel_that_looks_at_its_sizes_is_found_out():
    @triton.jit
    def kernel(x_ptr, n, BLOCK: tl.constexpr):
        tl.store(x_ptr + n, 1)

    variants, x = Variants(), torch.zeros(64)
    for tensor, n in ((x, 3), (x, 5)):
        variants(kernel, (1,), (tensor, n), {"BLOCK": 4})
    assert variants.repeated() == {}
    variants(kernel, (1,), (x[1:], 32), {"BLOCK": 4})
    assert variants.repeated() == {"kernel": ["n", "x_ptr"]}
