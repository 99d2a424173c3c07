"""The text head's cross-entropy without its logits: hidden rows times the vocabulary's weight, chunk by chunk.

    z_r = weight @ hidden[rows_r] + bias        losses_r = logsumexp(z_r) - z_r[targets_r]
    loss = sum_r row_weight_r * losses_r        dz_r = row_weight_r * (softmax(z_r) - onehot(targets_r))
    dhidden[rows_r] = weight^T dz_r             dweight = sum_r dz_r hidden[rows_r]^T             dbias = sum_r dz_r

With a bound c of the logits, label smoothing e over V words and a z-loss of weight l, in the same passes over them:

    s_r = c tanh(z_r / c)                       lse_r = logsumexp(s_r)
    losses_r = lse_r - (1 - e) s_r[targets_r] - e mean(s_r) + l lse_r^2
    dz_r = (row_weight_r ((1 + 2 l lse_r) softmax(s_r) - (1 - e) onehot(targets_r) - e / V) + dlse_r softmax(s_r))
           (1 - (s_r / c)^2)

Only the rows that have a target are multiplied: images cost no logits. The logits of a chunk come from one matrix
product. A program per row turns them into the row's loss and, where a gradient is wanted, into dz, which two more
products turn into dhidden and dweight. The gradients are thus made in the forward (arXiv:2410.10989, section 3.2), and
the backward scales them by dloss. Where a gradient arrives at losses or lse too, the backward makes them anew with row
weights dloss * row_weight + dlosses: another 6 R V C operations. Sums over rows are float32, in an order that depends
on the sizes alone. The specification is in `reference.py`, the kernel is in `triton/cross_entropy.py`.

With R rows, V words, C columns, e bytes an element and K rows in a chunk, the memory beside inputs and gradients is K V
e bytes of logits, which LOGITS_BYTES bounds, K C e of a chunk's rows, R C e of dhidden's and 4 V C of dweight. dweight
stays float32 until dloss has scaled it, so that it is rounded once and no sum overflows float16. hidden and weight
themselves are kept for a gradient of losses. Products take 2 R V C operations for the loss alone and 6 R V C with all
gradients; to keep no gradient between the passes would take 8.

liger-kernel's `fused_linear_cross_entropy_forward` (0.8.5) divides the work likewise. It is not called from here for
three reasons. It counts the targets with `.item()`, which makes the host wait for the device in each step. A target
outside the vocabulary makes its kernel read and write beyond the row. And losses by row need its reduction "none",
whose row weights pass over the logits again. `benchmarks/cross_entropy.py` times it.
"""
import math
import sys

import torch
from torch import Tensor

from tfkernels._arguments import need_between, need_tensors
from tfkernels._launch import cdiv
from tfkernels._library import INTERPRET, register
from tfkernels.losses import cpu
from tfkernels.losses.reference import (
    EntropyOptions,
    LinearCrossEntropy,
    LinearCrossEntropyLSE,
    statistics_dtype,
    weighted,
)
from tfkernels.losses.triton import cross_entropy as kernels
from tfkernels.patches.latents import check_constant, check_floating

# What a chunk's logits may take. Each chunk reads and writes dweight's float32 sums once, 8 V C bytes: half of it
# doubles that traffic, and twice as much halves it. From about 1000 rows on, a chunk's 2 K V C operations outlast it,
# so that no chunk has fewer, and from V = 131,072 on in 16 bits the logits take more.
LOGITS_BYTES = 2**10 if INTERPRET else 2**28
FEWEST_ROWS = 8 if INTERPRET else 1024
TILE_ROWS = 8 if INTERPRET else 128     # of a matrix product's tile: a chunk of whole tiles leaves none half empty
ALIGNMENT = 16                          # the kernel's rows begin at multiples of so many elements, whatever V is


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, *, bias: Tensor | None = None,
    row_weight: Tensor | None = None, softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> LinearCrossEntropy:
    """Return the cross-entropy of weight @ hidden[rows] + bias and targets, summed with weights; the caller divides.

        losses_r = cross_entropy(weight @ hidden[rows_r] + bias, targets_r)      loss = sum_r row_weight_r * losses_r

    Args:
        hidden: (T, C) or (B, S, C) in float16, bfloat16 or float32 (float64 on CPU); any strides, only the named rows
            are read.
        weight: (V, C) in hidden's dtype.
        targets: (R,) int64 in [0, V), or negative: no loss and no gradient, whatever its row of hidden and its
            row_weight hold. V or more raises on a CPU; on a GPU, where looking would synchronise, the loss and the
            gradients that such a row reaches are NaN.
        rows: (R,) int64, the flat rows of hidden that have a target (b S + s of a batch; `places` in other ops), in any
            order, each at most once; a row outside [0, T) is treated like a target outside the vocabulary. One named
            twice raises on a CPU; on a GPU its loss counts twice and its gradient in hidden is that of one of them. R
            may be 0.
        bias: (V,) in hidden's dtype, or None for 0.
        row_weight: (R,) floating-point constants, or None for 1.
        softcap: bound c of the logits, c * tanh(logits / c) (Gemma 2, arXiv:2408.00118); None for no bound.
        label_smoothing: share of the target that goes to all words alike, 0 to 1, as in torch's cross_entropy. A word
            ruled out by a logit of -inf makes it infinite.
        z_loss: weight of the log-sum-exp's square, which is added to each row's loss (PaLM, arXiv:2204.02311), 0 or
            more.

    Returns:
        `LinearCrossEntropy`, float32 (float64 for float64), 0 for no rows. Gradients flow from loss and losses to
        hidden, weight and bias and are deterministic. Those of loss are computed in the forward, for those of the three
        that require them; a backward from losses (row weights of one's own) computes them anew, so that row_weight is
        the cheaper way. A second backward through the gradients is refused. Under torch.autocast hidden, weight and
        bias are cast to its dtype (float64 stays), as F.linear does.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit, named; also a row_weight that requires a
            gradient.
        RuntimeError: the backward runs with create_graph=True.
    """
    options = _options("linear_cross_entropy", softcap, label_smoothing, z_loss)
    return LinearCrossEntropy(*_called("linear_cross_entropy", hidden, weight, targets, rows, bias, row_weight, options,
                                       False)[:2])


def linear_cross_entropy_with_lse(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, *, bias: Tensor | None = None,
    row_weight: Tensor | None = None, softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> LinearCrossEntropyLSE:
    """Return `linear_cross_entropy` and each row's log-sum-exp of the (bounded) logits, differentiable as losses are:
    for z-losses of one's own, for what each part of the loss is, and for merging vocabularies."""
    op = "linear_cross_entropy_with_lse"
    options = _options(op, softcap, label_smoothing, z_loss)
    loss, losses, *_, lse = _called(op, hidden, weight, targets, rows, bias, row_weight, options, True)
    return LinearCrossEntropyLSE(loss, losses, lse)


def _called(op: str, hidden, weight, targets, rows, bias, row_weight, options: EntropyOptions, lse_wanted: bool):
    """Check the tensors and call the operator."""
    need_tensors(op, {"hidden": hidden, "weight": weight, "targets": targets, "rows": rows, "bias": bias,
                      "row_weight": row_weight}, ("bias", "row_weight"))
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)
                                for x in (hidden, weight, bias))
        with torch.autocast(hidden.device.type, enabled=False):
            return _called(op, hidden, weight, targets, rows, bias, row_weight, options, lse_wanted)
    _check(op, hidden, weight, targets, rows, bias, row_weight)
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    row_weight = row_weight if row_weight is None else row_weight.to(statistics_dtype(hidden)).contiguous()
    top = None
    if row_weight is not None and hidden.dtype == torch.float16:  # dz, of its dtype, is rounded at about 1
        top = _largest(torch.where(targets < 0, 0, row_weight))
        top = torch.where(top > 0, top.log2().floor().exp2(), 1)  # a power of two, by which all is exact
        row_weight = row_weight / top
    loss, *others = _forward(hidden, weight, targets.contiguous(), rows.contiguous(), bias, row_weight, *wanted,
                             *options, lse_wanted)
    return loss if top is None else loss * top, *others


def _options(op: str, softcap: float | None, label_smoothing: float, z_loss: float) -> EntropyOptions:
    """Check the numbers; 0 stands for no bound."""
    if softcap is not None:
        need_between(op, "softcap", softcap, 0, math.inf, "a positive, finite bound fits; pass None for no bound",
                     ends=False)
    need_between(op, "label_smoothing", label_smoothing, 0, 1, "a number from 0 to 1 fits")
    need_between(op, "z_loss", z_loss, 0, sys.float_info.max, "a finite number of at least 0 fits")
    return EntropyOptions(float(softcap or 0), float(label_smoothing), float(z_loss))


def chunk_rows(rows: int, vocabulary: int, element_size: int) -> int:
    """Return how many rows' logits are in memory together: whole tiles, about as many in each chunk.

    They take LOGITS_BYTES at most, or are FEWEST_ROWS.
    """
    most = max(FEWEST_ROWS, LOGITS_BYTES // (vocabulary * element_size) // TILE_ROWS * TILE_ROWS)
    return cdiv(cdiv(rows, max(1, cdiv(rows, most))), TILE_ROWS) * TILE_ROWS


def _check(op, hidden, weight, targets, rows, bias, row_weight):
    if hidden.ndim not in (2, 3):
        raise ValueError(f"{op}: hidden has shape {tuple(hidden.shape)}; (tokens, C) or (batch, tokens, C) fits")
    check_floating(op, "hidden", hidden)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype != hidden.dtype or x.device != hidden.device):
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device} and hidden {hidden.dtype} on {hidden.device}; "
                             f"one dtype and device fit; convert {name}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)} and hidden {hidden.shape[-1]} columns; "
                         f"(words, {hidden.shape[-1]}) fits, at least one of each")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)} and weight {weight.shape[0]} words; "
                         f"({weight.shape[0]},) or None fits")
    for name, x in (("rows", rows), ("targets", targets)):
        if x.dtype != torch.int64 or x.ndim != 1 or x.shape != rows.shape or x.device != hidden.device:
            raise ValueError(f"{op}: {name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}; int64 (R,) on "
                             f"{hidden.device} fits, one of each for every row of hidden that has a target")
    if row_weight is not None:
        check_constant(op, "row_weight", row_weight)
        if row_weight.shape != rows.shape or not row_weight.is_floating_point() or row_weight.device != hidden.device:
            raise ValueError(f"{op}: row_weight is {row_weight.dtype} of shape {tuple(row_weight.shape)} on "
                             f"{row_weight.device}; floating-point numbers {tuple(rows.shape)} on {hidden.device} "
                             "fit, or None for 1")


def _gather(hidden: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Return the rows of hidden at the flat `places`, some row for a place that is not there.

    A batch whose rows have no one stride between them is not copied.
    """
    places = places.clamp(0, tokens - 1)
    return (hidden.index_select(0, places)
            if hidden.ndim == 2 else hidden[places // hidden.shape[1], places % hidden.shape[1]])


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's dtype."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _walk(entropy, alignment, hidden, weight, targets, places, bias, row_weight, hidden_wanted, weight_wanted,
          bias_wanted, softcap=0.0, smoothing=0.0, z_loss=0.0, lse_wanted=False, lse_weight=None):
    """The operator, chunk by chunk; `entropy` turns logits, whose rows begin at multiples of `alignment` elements, into
    losses and dz."""
    _, losses, dx, dweight, dbias, lse = _forward_fake(hidden, weight, targets, places, bias, row_weight, hidden_wanted,
                                                       weight_wanted, bias_wanted, lse_wanted=lse_wanted)
    tokens, count, vocabulary = hidden.shape[:-1].numel(), len(places), len(weight)
    if count > tokens:
        raise ValueError(f"linear_cross_entropy: rows names {count} rows and hidden has {tokens}; each row at most "
                         "once fits")
    dweight.zero_(), dbias.zero_()
    size = max(1, chunk_rows(count, vocabulary, weight.element_size()))
    options = EntropyOptions(softcap, smoothing, z_loss)
    buffer = weight.new_empty(min(size, count), cdiv(vocabulary, alignment) * alignment)[:, :vocabulary]
    for start in range(0, count, size):
        part = slice(start, start + size)
        # 0 * NaN would reach dweight
        x = _gather(hidden, places[part], tokens).masked_fill_(targets[part, None] < 0, 0)
        z = buffer[:len(x)]
        if bias is None:
            torch.mm(x, weight.mT, out=z)
        else:
            torch.addmm(bias, x, weight.mT, out=z)
        weights = (None if w is None else w[part] for w in (row_weight, lse_weight))
        dz = entropy(z, targets[part], places[part], *weights, losses[part], lse[part] if lse_wanted else None, tokens,
                     hidden_wanted or weight_wanted or bias_wanted, options)
        if hidden_wanted:
            torch.mm(dz, weight, out=dx[part])
        if weight_wanted:
            _accumulate(dweight, dz.mT, x)
        if bias_wanted:
            dbias += dz.sum(0, dtype=dbias.dtype)
    return weighted(losses, targets, row_weight).sum(), losses, dx, dweight, dbias, lse


def _forward_kernel(
    hidden: Tensor, weight: Tensor, targets: Tensor, places: Tensor, bias: Tensor | None, row_weight: Tensor | None,
    hidden_wanted: bool, weight_wanted: bool, bias_wanted: bool, softcap: float = 0.0, smoothing: float = 0.0,
    z_loss: float = 0.0, lse_wanted: bool = False, lse_weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    targets, places, row_weight, lse_weight = (x if x is None else x.contiguous()
                                               for x in (targets, places, row_weight, lse_weight))
    return _walk(kernels.entropy, ALIGNMENT, hidden, weight, targets, places, bias, row_weight, hidden_wanted,
                 weight_wanted, bias_wanted, softcap, smoothing, z_loss, lse_wanted, lse_weight)


def _forward_cpu(hidden, weight, targets, places, *others):
    cpu.look(targets, places, hidden.shape[:-1].numel(), len(weight))
    return _walk(cpu.entropy, 1, hidden, weight, targets, places, *others)


def _forward_fake(hidden, weight, targets, places, bias, row_weight, hidden_wanted, weight_wanted, bias_wanted,
                  softcap=0.0, smoothing=0.0, z_loss=0.0, lse_wanted=False, lse_weight=None):
    """Return loss, losses, for dloss = 1 dhidden's rows (R, C), dweight and dbias, and lse; not wanted: without
    rows."""
    (words, width), count, wide = weight.shape, places.shape[0], statistics_dtype(hidden)
    return (hidden.new_empty((), dtype=wide), hidden.new_empty(count, dtype=wide),
            hidden.new_empty(count if hidden_wanted else 0, width),
            hidden.new_empty(words if weight_wanted else 0, width, dtype=wide),
            hidden.new_empty(words if bias_wanted else 0, dtype=wide),
            hidden.new_empty(count if lse_wanted else 0, dtype=wide))


def _backward(
    dloss: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, places: Tensor, shape: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden of `shape`, dweight and dbias in the inputs' dtype."""
    factor = dloss.reshape(1)  # (1,) and not (), which would be rounded to x's dtype first

    def scaled(x):
        result = x.new_empty(x.shape, dtype=dx.dtype)
        return torch.mul(x, factor, out=result) if x.shape[0] else result

    dhidden = dx.new_zeros(shape)
    dhidden.view(-1, dx.shape[1]).index_copy_(0, places.clamp(0, max(0, dhidden.shape[:-1].numel() - 1)), scaled(dx))
    return dhidden, scaled(dweight), scaled(dbias)


def _backward_fake(dloss, dx, dweight, dbias, places, shape):
    return dx.new_empty(shape), dx.new_empty(dweight.shape), dx.new_empty(dbias.shape)


_forward = register("linear_cross_entropy", kernel=_forward_kernel, cpu=_forward_cpu, fake=_forward_fake)
_scale = register("linear_cross_entropy_backward", kernel=_backward, cpu=_backward, fake=_backward_fake)


def _save(ctx, inputs, output):
    hidden, weight, targets, places, bias, row_weight, *wanted_and_options, lse_wanted, _ = inputs
    ctx.wanted, ctx.options = wanted_and_options[:3], wanted_and_options[3:]
    ctx.shape = hidden.shape if ctx.wanted[0] else (0, hidden.shape[-1])
    made = output[2:5] if lse_wanted else output[2:]
    ctx.mark_non_differentiable(*made)
    ctx.set_materialize_grads(False)
    given = (hidden, weight, targets, places, bias, row_weight) if any(ctx.wanted) else (None,) * 6
    ctx.save_for_backward(*output[2:5], *given)


def _gradients(ctx, dloss, dlosses, _dx, _dweight, _dbias, dlse):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy: the backward runs with create_graph=True; gradients of its "
                           "gradients are not computed; False fits; take linear_cross_entropy_reference where they "
                           "are needed")
    if dloss is None and dlosses is None and dlse is None:
        return (None,) * 14
    dx, dweight, dbias, *inputs = ctx.saved_tensors
    if dlosses is not None or dlse is not None:
        dloss, dx, dweight, dbias = _from_rows(dloss, dlosses, dlse, *inputs, ctx.wanted, ctx.options)
    places = inputs[3] if ctx.wanted[0] else inputs[3][:0]
    found = _scale(dloss, dx, dweight, dbias, places, list(ctx.shape))
    dhidden, dweight, dbias = (g if wanted else None for g, wanted in zip(found, ctx.wanted))
    return dhidden, dweight, None, None, dbias, *(None,) * 9


def _from_rows(dloss, dlosses, dlse, hidden, weight, targets, places, bias, row_weight, wanted, options):
    """The gradients made with each row's own factors: what is left to scale by, and dhidden's rows, dweight and
    dbias."""
    factor = dlse.new_zeros(dlse.shape) if dlosses is None else dlosses
    factor = factor if dloss is None else factor + dloss * (1 if row_weight is None else row_weight)
    factor, dlse = (x if x is None else torch.where(targets < 0, 0, x) for x in (factor, dlse))
    # dz is rounded at about 1, as in the forward
    top = _largest(factor) if dlse is None else torch.maximum(_largest(factor), _largest(dlse))
    top = torch.where(top > 0, top, 1)
    dlse = dlse if dlse is None else dlse / top
    with torch.autocast(hidden.device.type, enabled=False):
        _, _, dx, dweight, dbias, _ = _forward(hidden, weight, targets, places, bias, factor / top, *wanted, *options,
                                               False, dlse)
    return top, dx, dweight, dbias


def _largest(x: Tensor) -> Tensor:
    """The largest finite absolute value, 1 of none."""
    return torch.where(x.isfinite(), x.abs(), 0).amax() if x.shape[0] else x.new_ones(())


_forward.register_autograd(_gradients, setup_context=_save)
