"""Attention under PyTorch's machinery: autocast, export, compile, checkpointing, FSDP2, CUDA graphs, storages past 2^31
elements."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.conftest import DEVICE, DTYPES, cpu_only, traced
from tests.gloo_processes import needs_gloo, run_together
from tests.tfkernels.attention.test_attention import random_inputs
from tfkernels import TransfusionMask, attention, attention_with_lse
from tfkernels._library import INTERPRET

HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 2, 16
needs_cuda = pytest.mark.skipif(
    DEVICE != "cuda", reason="torch.cuda.is_available() is False: CUDA graphs and synchronisations exist on CUDA only"
)


class Block(nn.Module):
    """x + attention between projections: the least that a model does with the operator."""

    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM), nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)

    def forward(self, x, mask):
        q, k, v = (project(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return x + self.out(attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return x


class CheckpointedStack(Stack):
    """`Stack` whose blocks keep their input only (and, with a context_fn, what its policy saves)."""

    context_fn = None

    def forward(self, x, mask):
        options = {} if self.context_fn is None else {"context_fn": self.context_fn}
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False, **options)
        return x


def packed_mask():
    """40 tokens: images, two documents and padding."""
    documents = torch.tensor([[0] * 25 + [1] * 12 + [-1] * 3])
    return TransfusionMask.from_spans([[(3, 9), (9, 20), (26, 33)]], 40, documents=documents, device=DEVICE)


def made(module, seed=0):
    torch.manual_seed(seed)
    return module().to(DEVICE)


def tokens(batch, seq_len, seed=1):
    return torch.randn(batch, seq_len, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def leaves(inputs, *dtypes):
    return [x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip(inputs, dtypes)]


def loss_and_gradients(module, *inputs):
    loss = module(*inputs).square().mean()
    # strict export orders them anew
    return [loss.detach(), *torch.autograd.grad(loss, [p for _, p in sorted(module.named_parameters())])]


def assert_equal(actual, expected):
    assert (len(actual) == len(expected)
            and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(actual, expected)))


def assert_close(actual, expected):
    """Equal but for the order in which float32 sums are taken."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "float32 v beside half q and k"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_computes_in_its_dtype_and_gradients_come_back_in_the_inputs_dtypes(dtype, mixed, softcap):
    mask, inputs = packed_mask(), random_inputs(1, 4, 2, 40, 40, 32)
    given = (dtype, dtype, torch.float32) if mixed else (torch.float32,) * 3
    dout, dlse = inputs[3].to(DEVICE, dtype), inputs[4].to(DEVICE, torch.float32)
    q, k, v = leaves(inputs, *given)
    plain = attention_with_lse(q.to(dtype), k.to(dtype), v.to(dtype), mask, softcap=softcap)
    expected = [*plain, *torch.autograd.grad(plain, (q, k, v), (dout, dlse))]
    with torch.autocast(DEVICE, dtype):
        cast = attention_with_lse(q, k, v, mask, softcap=softcap)
        within = torch.autograd.grad(cast, (q, k, v), (dout, dlse), retain_graph=True)
        assert cast.out.dtype == F.scaled_dot_product_attention(q, k, v, mask.dense(), enable_gqa=True).dtype == dtype
    after = torch.autograd.grad(cast, (q, k, v), (dout, dlse))
    assert_equal([*cast, *after], expected)
    assert_equal([*cast, *within], expected)


def test_autocast_of_a_model_equals_its_casts_written_out():
    dtype, mask, x = torch.float16, packed_mask(), tokens(1, 40)
    module = made(Block)

    def written_out(x, mask):
        q, k, v = (
            F.linear(x.to(dtype), p.weight.to(dtype), p.bias.to(dtype)).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for p in (module.q, module.k, module.v)
        )
        out = attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return x + F.linear(out, module.out.weight.to(dtype), module.out.bias.to(dtype))

    with torch.autocast(DEVICE, dtype):
        actual = module(x, mask)
    expected = written_out(x, mask)
    assert_equal([actual, *torch.autograd.grad(actual.square().mean(), list(module.parameters()))],
                 [expected, *torch.autograd.grad(expected.square().mean(), list(module.parameters()))])


@cpu_only
def test_autocast_leaves_float64_alone_as_pytorch_does():
    mask, inputs = packed_mask(), random_inputs(1, 4, 2, 40, 40, 32)
    q, k, v = inputs[:3]
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal([attention(q, k, v, mask, softcap=2.0)], [attention(q.clone(), k, v, mask, softcap=2.0)])
        actual = attention(q, k, v, mask, softcap=2.0)
        with pytest.raises(ValueError, match="k is torch.bfloat16 .* and q is torch.float64"):
            attention(q, k.float(), v.float(), mask)
    assert_equal([actual], [attention(q, k, v, mask, softcap=2.0)])


@traced
@pytest.mark.parametrize("inside", [True, False], ids=["autocast inside", "autocast around"])
def test_autocast_compiles_whole(inside):
    torch._dynamo.reset()
    mask, inputs = packed_mask(), random_inputs(1, 4, 2, 40, 40, 32)
    q, k, v = leaves(inputs, *(torch.float32,) * 3)

    def plain(q, k, v, mask):
        return attention(q, k, v, mask, softcap=2.0)

    def cast(q, k, v, mask):
        with torch.autocast(DEVICE, torch.bfloat16):
            return plain(q, k, v, mask)

    expected = cast(q, k, v, mask)
    compiled = torch.compile(cast if inside else plain, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=not inside):
        actual = compiled(q, k, v, mask)
    dout = torch.randn_like(expected)
    assert_equal([actual, *torch.autograd.grad(actual, (q, k, v), dout)],
                 [expected, *torch.autograd.grad(expected, (q, k, v), dout)])


class FromSpans(Block):
    def forward(self, x, spans):
        return super().forward(x, TransfusionMask.from_spans(spans, x.shape[1]))


class FromIntegers(Block):
    def forward(self, x, lo, hi, since, until):
        return super().forward(x, TransfusionMask(lo, hi, since, until))


@traced
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_with_its_mask_built_inside_serves_other_lengths_and_spans(strict):
    module = made(FromSpans)
    first = [[3, 19], [19, 50]], [[5, 7], [0, 0]]
    shapes = {"x": {1: torch.export.Dim("tokens", min=3, max=4096)}, "spans": {1: torch.export.Dim("spans", max=64)}}
    exported = torch.export.export(module, (tokens(2, 64), torch.tensor(first, device=DEVICE)), dynamic_shapes=shapes,
                                   strict=strict).module()
    for seq_len, spans in ((64, first), (37, [[[1, 9], [9, 11], [20, 37]], [[0, 36], [0, 0], [0, 0]]]),
                           (130, [[[60, 70]], [[100, 130]]])):
        inputs = tokens(2, seq_len), torch.tensor(spans, device=DEVICE)
        assert_close(loss_and_gradients(exported, *inputs), loss_and_gradients(module, *inputs))


@traced
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_with_the_masks_integers_as_inputs_serves_other_lengths(strict):
    module = made(FromIntegers)
    length = torch.export.Dim("tokens", min=3, max=4096)

    def inputs(seq_len, spans):
        mask = TransfusionMask.from_spans(spans, seq_len, device=DEVICE)
        return tokens(2, seq_len), mask.lo, mask.hi, mask.key_since, mask.key_until

    exported = torch.export.export(
        module, inputs(64, [[(3, 40)], []]), dynamic_shapes=({1: length},) * 5, strict=strict
    ).module()
    for given in (inputs(37, [[(1, 30)], [(0, 37)]]), inputs(130, [[], [(100, 130)]])):
        assert_close(loss_and_gradients(exported, *given), loss_and_gradients(module, *given))


def save_attention(context, op, *args, **kwargs):
    return (CheckpointPolicy.MUST_SAVE
            if op == torch.ops.tfkernels.attention_forward.default else CheckpointPolicy.PREFER_RECOMPUTE)


def selective():
    return create_selective_checkpoint_contexts(save_attention)


recomputed = pytest.mark.parametrize("context_fn,forwards", [(None, 4), (selective, 2)],
                                     ids=["everything again", "attention saved"])


class Calls(TorchDispatchMode):
    """Counts the runs of the operator, forward and backward; one that a checkpoint's policy answers from memory does
    not reach it."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.forward += op is torch.ops.tfkernels.attention_forward.default
        self.backward += op is torch.ops.tfkernels.attention_backward.default
        return op(*args, **(kwargs or {}))


@recomputed
def test_checkpointed_blocks_give_equal_gradients_and_run_attention_again_only_where_it_was_not_saved(context_fn,
                                                                                                      forwards):
    plain, again = made(Stack), made(CheckpointedStack)
    again.context_fn = context_fn
    x, mask = tokens(1, 40), packed_mask()
    with Calls() as calls:
        actual = loss_and_gradients(again, x, mask)
    assert (calls.forward, calls.backward) == (forwards, 2)
    assert_equal(actual, loss_and_gradients(plain, x, mask))


@traced
@recomputed
def test_compiled_checkpoints_do_the_same(context_fn, forwards):
    torch._dynamo.reset()
    plain, again = made(Stack), made(CheckpointedStack)
    again.context_fn = context_fn
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    x, mask = tokens(1, 40), packed_mask()
    expected = loss_and_gradients(compiled, x, mask)
    with profile(activities=[ProfilerActivity.CPU]) as calls:  # a dispatch mode would forbid compiling
        actual = loss_and_gradients(compiled, x, mask)
    counts = {event.key: event.count for event in calls.key_averages()}
    assert (counts["tfkernels::attention_forward"], counts["tfkernels::attention_backward"]) == (forwards, 2)
    assert_equal(actual, expected)
    assert_close(actual, loss_and_gradients(plain, x, mask))


SPANS = [[(3, 19)], [(19, 50)], [], [(0, 33), (40, 64)]]
STEPS = 3


def train(module, x, mask):
    """Return the losses and each step's gradients of a few steps of SGD; sharded gradients are gathered."""
    optimizer, record = torch.optim.SGD(module.parameters(), lr=0.1), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = module(x, mask).square().mean()
        loss.backward()
        record.append([loss.detach(),
                       *(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
                         for p in module.parameters())])
        optimizer.step()
    return record


def train_shard(rank, folder):
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    module = Stack()
    for part in (*module.blocks, module):
        # walks the arguments, the mask's fields too
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    mine = slice(2 * rank, 2 * rank + 2)
    x = torch.randn(4, 64, WIDTH, generator=torch.Generator().manual_seed(1))[mine]
    torch.save(train(module, x, TransfusionMask.from_spans(SPANS[mine], 64)), folder / f"{rank}.pt")


@pytest.mark.skipif(INTERPRET,
                    reason="FSDP2 does not see which implementation runs; once, without the interpreter, is enough")
@needs_gloo
def test_two_fsdp2_processes_train_as_one(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 64, WIDTH, generator=torch.Generator().manual_seed(1))
    whole = train(Stack(), x, TransfusionMask.from_spans(SPANS, 64))
    run_together(2, train_shard, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (loss, *grads), (loss0, *grads0), (loss1, *grads1) in zip(whole, first, second):
        assert_close([(loss0 + loss1) / 2, *grads0], [loss, *grads])
        assert_equal(grads0, grads1)


@traced
def test_compiles_whole_with_the_mask_built_inside_in_at_most_two_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(q, k, v, spans):
        return attention(q * 2, k, v, TransfusionMask.from_spans(spans, q.shape[2])).square().mean()

    compiled, frames = torch.compile(step, fullgraph=True, backend="aot_eager"), []
    for seq_len, spans in ((96, [[3, 19], [20, 30]]), (64, [[5, 30], [0, 0]]), (80, [[40, 60], [60, 80]]),
                           (112, [[1, 2], [4, 112]])):
        spans = torch.tensor([spans], device=DEVICE)
        q, k, v = leaves(random_inputs(2, 4, 2, seq_len, seq_len, 32), *(torch.float32,) * 3)
        actual, expected = compiled(q, k, v, spans), step(q, k, v, spans)
        assert_close([actual, *torch.autograd.grad(actual, (q, k, v))],
                     [expected, *torch.autograd.grad(expected, (q, k, v))])
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[-1] <= 2, f"graphs compiled after each call: {frames}"  # one static, one with a dynamic length


@traced
def test_inductor_gives_the_same_numbers():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"inductor needs a C++ compiler: {error}")
    torch._dynamo.reset()
    module = made(FromSpans)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for seq_len, spans in ((64, [[3, 19], [19, 50]]), (90, [[5, 7], [60, 90]])):
        inputs = tokens(1, seq_len), torch.tensor([spans], device=DEVICE)
        assert_close(loss_and_gradients(compiled, *inputs), loss_and_gradients(module, *inputs))


def step_from_spans(q, k, v, dout, spans, documents):
    """Build a mask from device tensors, run forward and backward: all that a training step asks of tfkernels."""
    mask = TransfusionMask.from_spans(spans, q.shape[2], documents=documents, hidden=spans[:, :1], window=40)
    out = attention(q, k, v, mask)
    return [out, *torch.autograd.grad(out, (q, k, v), dout)]


def step_inputs(seed):
    """q, k, v, dout, spans and documents; both seeds' spans differ in place and size."""
    q, k, v, dout = (x.to(DEVICE, torch.float16) for x in random_inputs(2, 4, 2, 200, 200, 64, seed=seed)[:4])
    spans = torch.tensor([[[3, 19], [30, 90]], [[100, 150], [0, 0]]]) + 7 * seed
    documents = (torch.arange(200) >= 95 + seed).long().repeat(2, 1)
    return [q, k, v, dout, spans.to(DEVICE), documents.to(DEVICE)]


@needs_cuda
def test_a_captured_step_replays_with_other_images_and_tokens():
    torch.use_deterministic_algorithms(False)  # its fills and sorts are not what production captures
    static = step_inputs(0)
    leaf = [x.requires_grad_() for x in static[:3]]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step_from_spans(*leaf, *static[3:])
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step_from_spans(*leaf, *static[3:])
    before = None
    for seed in (1, 2, 0):
        given = step_inputs(seed)
        with torch.no_grad():
            for old, new in zip(static, given):
                old.copy_(new)
        graph.replay()
        expected = step_from_spans(*(x.requires_grad_() for x in given[:3]), *given[3:])
        assert_equal(captured, expected)
        assert before is None or not torch.equal(captured[0], before)
        before = captured[0].clone()


@needs_cuda
def test_a_step_never_waits_for_the_device():
    torch.use_deterministic_algorithms(False)  # deterministic scatters may wait; production does not ask for them
    given = step_inputs(1)
    for x in given[:3]:
        x.requires_grad_()
    expected = step_from_spans(*given)  # compiles the kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            given[0].sum().item()  # the mode does see a wait
        actual = step_from_spans(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(actual, expected)


def apart(x, dim, stride, storage):
    """Copy x into `storage`, `stride` elements from one index of `dim` to the next; the rest is compact."""
    strides = list(x.narrow(dim, 0, 1).contiguous().stride())
    strides[dim] = stride
    return x.new_empty(0).set_(storage, 0, x.shape, strides).copy_(x)


def attend(q, k, v, dout, mask):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, mask)
    return [out, *torch.autograd.grad(out, (q, k, v), dout)]


TOKENS, TILE = (70, 64) if INTERPRET else (300, 256)  # TILE begins a tile of any block size
# shape, the dimension whose last index stands beyond element 2**31, and its stride: indices and strides alone fit int32
FAR = {
    "batch": ((3, 1, 20, 16), 0, 2**30 + 64),
    "head": ((1, 3, 20, 16), 1, 2**30 + 64),
    "token": ((1, 1, TOKENS, 16), 2, 2**31 // TILE + 64),
    "token of the same tile": ((1, 1, 12, 16), 2, 2**31 // 11 + 64),
}


@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("place", FAR)
def test_elements_beyond_two_to_the_31_are_read_like_any_other(place, tensor):
    shape, dim, stride = FAR[place]
    elements = shape[dim] * stride
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 2 * elements + 2**30:
        pytest.skip(f"{(2 * elements + 2**30) / 2**30:.0f} GiB of GPU memory needed, "
                    f"{torch.cuda.mem_get_info()[0] / 2**30:.0f} free")
    batch, heads, seq_len, head_dim = shape
    given = random_inputs(batch, heads, heads, seq_len, seq_len, head_dim)
    inputs = {name: x.to(DEVICE, torch.float16) for name, x in zip(("q", "k", "v", "dout"), given)}
    mask = TransfusionMask.from_spans([[(2, 7), (8, seq_len - 3)]], seq_len, device=DEVICE)
    expected = attend(**inputs, mask=mask)
    # untouched pages cost the CPU nothing; torch.empty would fill them
    storage = torch.UntypedStorage(2 * elements, device=DEVICE)
    far = inputs[tensor] = apart(inputs[tensor], dim, stride, storage)
    assert far.select(dim, -1).storage_offset() >= 2**31
    assert_equal(attend(**inputs, mask=mask), expected)
