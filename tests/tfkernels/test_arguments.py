"""What every public function does with arguments of the wrong kind: a ValueError that names the function and the
caller's argument."""
import inspect
import math

import pytest
import torch

import tfkernels
from tests.conftest import DEVICE
from tfkernels import _arguments


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def whole(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def packed():
    # 4 and 3 tokens of 12 elements
    return tfkernels.pack_latents([numbers(3, 4, 4), numbers(3, 2, 6)], 2)


def head_loss(op):
    return lambda: (
        op,
        {
            "hidden": numbers(12, 8),
            "places": torch.arange(8, device=DEVICE),
            "scale": numbers(2, 8),
            "shift": numbers(2, 8),
            "weight": numbers(12, 8),
            "bias": numbers(12),
            "x0": numbers(2, 3, 4, 4),
            "p": numbers(2),
            "q": numbers(2),
            "loss_weight": numbers(2),
            "seed": 3,
            "patch_size": 2,
            "eps": 1e-6,
        },
    )


CALLS = {
    "linear_cross_entropy": lambda: (
        tfkernels.linear_cross_entropy,
        {
            "hidden": numbers(6, 8),
            "weight": numbers(5, 8),
            "targets": whole([0, 4, -1]),
            "rows": whole([5, 0, 2]),
            "bias": numbers(5),
            "row_weight": numbers(3),
        },
    ),
    "linear_cross_entropy_with_lse": lambda: (
        tfkernels.linear_cross_entropy_with_lse,
        CALLS["linear_cross_entropy"]()[1],
    ),
    "diffusion_loss": lambda: (
        tfkernels.diffusion_loss,
        {
            "prediction": numbers(8, 12),
            "x0": numbers(2, 3, 4, 4),
            "p": numbers(2),
            "q": numbers(2),
            "weight": numbers(2),
            "seed": 3,
            "patch_size": 2,
        },
    ),
    "min_snr_weight": lambda: (
        tfkernels.min_snr_weight,
        {"signal": numbers(2), "noise": numbers(2), "p": numbers(2), "q": numbers(2), "gamma": 5.0},
    ),
    "modulated_layer_norm_diffusion_loss": head_loss(tfkernels.modulated_layer_norm_diffusion_loss),
    "modulated_rms_norm_diffusion_loss": head_loss(tfkernels.modulated_rms_norm_diffusion_loss),
    "embed_patches": lambda: (
        tfkernels.embed_patches,
        {
            "hidden": numbers(9, 8),
            "patches": numbers(4, 6),
            "weight": numbers(8, 6),
            "condition": numbers(2, 8),
            "places": whole([3, 4, 7, -1]),
            "offsets": whole([0, 2, 4], torch.int32),
        },
    ),
    "patchify": lambda: (tfkernels.patchify, {"x": numbers(2, 3, 4, 4), "patch_size": 2}),
    "unpatchify": lambda: (
        tfkernels.unpatchify,
        {"tokens": numbers(8, 12), "patch_size": 2, "height": 4, "width": 4},
    ),
    "patchify_packed": lambda: (tfkernels.patchify_packed, {"x": packed()}),
    "unpatchify_packed": lambda: (tfkernels.unpatchify_packed, {"tokens": numbers(7, 12), "like": packed()}),
    "pack_latents": lambda: (tfkernels.pack_latents, {"latents": [numbers(3, 4, 4)], "patch_size": 2}),
    "noise_patchify": lambda: (
        tfkernels.noise_patchify,
        {
            "x0": numbers(7, 12),
            "signal": numbers(2),
            "noise": numbers(2),
            "seed": whole([3, 1]),
            "offsets": whole([0, 4, 7], torch.int32),
        },
    ),
    "modulated_rms_norm": lambda: (
        tfkernels.modulated_rms_norm,
        {
            "x": numbers(6, 8),
            "weight": numbers(8),
            "scale": numbers(2, 8),
            "shift": numbers(2, 8),
            "index": whole([-1, 0, 0, 1, 1, -1]),
            "eps": 1e-6,
        },
    ),
    "modulated_layer_norm": lambda: (
        tfkernels.modulated_layer_norm,
        {
            "x": numbers(6, 8),
            "weight": numbers(8),
            "bias": numbers(8),
            "scale": numbers(2, 8),
            "shift": numbers(2, 8),
            "index": whole([-1, 0, 0, 1, 1, -1]),
            "eps": 1e-6,
        },
    ),
    "gated_residual": lambda: (
        tfkernels.gated_residual,
        {
            "residual": numbers(6, 8),
            "branch": numbers(6, 8),
            "gate": numbers(2, 8),
            "index": whole([-1, 0, 0, 1, 1, -1]),
        },
    ),
    "gated_residual_rms_norm": lambda: (
        tfkernels.gated_residual_rms_norm,
        {
            "residual": numbers(6, 8),
            "branch": numbers(6, 8),
            "gate": numbers(2, 8),
            "weight": numbers(8),
            "scale": numbers(2, 8),
            "shift": numbers(2, 8),
            "index": whole([-1, 0, 0, 1, 1, -1]),
            "eps": 1e-6,
        },
    ),
    "qk_norm_rotary": lambda: (
        tfkernels.qk_norm_rotary,
        {
            "q": numbers(1, 4, 5, 8),
            "k": numbers(1, 2, 5, 8),
            "q_weight": numbers(8),
            "k_weight": numbers(8),
            "cos": numbers(5, 4),
            "sin": numbers(5, 4),
            "eps": 1e-6,
        },
    ),
    "rotary_table": lambda: (
        tfkernels.rotary_table,
        {"positions": whole([[0, 1], [2, 3]]), "frequencies": numbers(4), "axes": whole([0, 1, 0, 1])},
    ),
    "grid_positions": lambda: (
        tfkernels.grid_positions,
        {"positions": whole([[0, 1, 2, 3, 4]]), "index": whole([[-1, 0, 0, 0, 0]]), "columns": whole([2])},
    ),
}
OPTIONAL = {
    "bias",
    "row_weight",
    "weight",
    "loss_weight",
    "shift",
    "q_weight",
    "k_weight",
    "axes",
    "patch_size",
    "offsets",
}
PER_OP = {
    "linear_cross_entropy": {"weight"},
    "linear_cross_entropy_with_lse": {"weight"},
    "embed_patches": {"weight", "offsets"},
    "modulated_layer_norm_diffusion_loss": {"weight"},
    "modulated_rms_norm_diffusion_loss": {"weight"},
    "patchify": {"patch_size"},
    "unpatchify": {"patch_size"},
    "pack_latents": {"patch_size"},
}


def test_every_public_operator_is_here():
    public = {name
              for name in tfkernels.__all__
              if inspect.isfunction(getattr(tfkernels, name)) and not name.endswith("_reference")}
    assert public - set(CALLS) == {"attention", "attention_with_lse", "paged_attention"}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_another_kind_are_refused_by_the_callers_name(name):
    function, arguments = CALLS[name]()
    function(**arguments)
    for argument in arguments:
        wrong = ["tensor", [[1.0], 2], torch.nn.Linear(2, 2), object(), 1j]
        wrong += [] if argument in OPTIONAL - PER_OP.get(name, set()) else [None]
        wrong += [1.5, True] if argument not in ("eps", "gamma") else []
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{name}: {argument}(\[0\])? (is|has) .*fit"):
                function(**arguments | {argument: value})


@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_another_dtype_or_shape_are_refused_by_the_callers_name(name):
    function, arguments = CALLS[name]()
    for argument, value in arguments.items():
        if not isinstance(value, torch.Tensor) or name == "min_snr_weight":
            continue
        for wrong in (value.to(torch.complex64), value.bool(), value[None, None, None], value.flatten()[0]):
            if name == "rotary_table" and argument == "positions" and wrong.ndim > 1 and wrong.dtype == value.dtype:
                continue
            with pytest.raises(ValueError, match=rf"^{name}: .*{argument}"):
                function(**arguments | {argument: wrong})


@pytest.mark.parametrize("name", [name for name in CALLS if "eps" in CALLS[name]()[1]])
@pytest.mark.parametrize("eps", [-1e-9, math.nan, math.inf, True, None, "1e-6", torch.tensor(1e-6)])
def test_eps_is_a_finite_number_of_zero_or_more(name, eps):
    function, arguments = CALLS[name]()
    with pytest.raises(ValueError, match=f"^{name}: eps is .*; 0 or more fits"):
        function(**arguments | {"eps": eps})


@pytest.mark.parametrize("gamma", [0, -1.0, math.nan, math.inf, None, "5", True])
def test_gamma_is_a_positive_number(gamma):
    with pytest.raises(ValueError, match="^min_snr_weight: gamma is .*; a positive number fits"):
        tfkernels.min_snr_weight(*(numbers(2) for _ in range(4)), gamma=gamma)


@pytest.mark.parametrize("name", ["patchify", "unpatchify", "pack_latents", "diffusion_loss"])
@pytest.mark.parametrize("patch_size", [0, -2, 3, 2.0])
def test_a_patch_size_is_a_positive_int_that_divides(name, patch_size):
    function, arguments = CALLS[name]()
    with pytest.raises(ValueError, match=f"^{name}: .*patch_size"):
        function(**arguments | {"patch_size": patch_size})


@pytest.mark.parametrize("size", [0, -4, 4.0, None])
def test_images_have_sides(size):
    for change in ({"height": size}, {"width": size}):
        with pytest.raises(ValueError, match="^unpatchify: (height|width) is .*; an int from 1"):
            tfkernels.unpatchify(numbers(8, 12), 2, **{"height": 4, "width": 4} | change)
    for shape in ((2, 3, 0, 4), (2, 3, 4, 0), (2, 0, 4, 4)):
        with pytest.raises(ValueError, match="^patchify: x has shape .*; at least one channel and one patch fit"):
            tfkernels.patchify(torch.zeros(shape, device=DEVICE), 2)
        with pytest.raises(ValueError, match=r"^pack_latents: latents\[1\] has shape .*; at least one channel and "
                                             r"one patch fit"):
            tfkernels.pack_latents([numbers(3, 4, 4), torch.zeros(shape[1:], device=DEVICE)], 2)


OFFSETS = {
    "falls from 5 to 2 at image 1": [0, 5, 2],
    "goes from -1 to 7": [-1, 4, 7],
    "goes from 0 to 9": [0, 4, 9],
    "falls from 2147483647 to 7": [0, 2**31 - 1, 7],
}


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU looking would synchronise")
@pytest.mark.parametrize("message", OFFSETS)
def test_offsets_that_fall_or_leave_the_rows_are_refused_where_looking_costs_nothing(message):
    offsets, x = whole(OFFSETS[message], torch.int32), numbers(7, 12)
    pair = numbers(2), numbers(2)
    calls = {
        "noise_patchify": lambda: tfkernels.noise_patchify(x, *pair, 0, offsets=offsets),
        "diffusion_loss": lambda: tfkernels.diffusion_loss(x, x, *pair, None, 0, offsets=offsets),
        "modulated_rms_norm_diffusion_loss": lambda: tfkernels.modulated_rms_norm_diffusion_loss(
            x, torch.arange(7), numbers(2, 12), None, numbers(12, 12), None, x, *pair, None, 0, offsets=offsets
        ),
        "embed_patches": lambda: tfkernels.embed_patches(
            numbers(9, 8), x, numbers(8, 12), numbers(2, 8), torch.arange(7), offsets
        ),
        "patchify_packed": lambda: tfkernels.patchify_packed(packed()._replace(offsets=offsets)),
        "unpatchify_packed": lambda: tfkernels.unpatchify_packed(x, packed()._replace(offsets=offsets)),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name}: ((x|like)\.)?offsets {message}"):
            call()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU looking would synchronise")
@pytest.mark.parametrize("columns", [[2, 2], [0, 3], [-2, 3], [5, 3]])
def test_columns_that_do_not_divide_an_images_tokens_are_refused_where_looking_costs_nothing(columns):
    with pytest.raises(ValueError, match=r"^patchify_packed: x.columns holds .* for image [01] of [34] tokens; a "
                                         r"divisor of them"):
        tfkernels.patchify_packed(packed()._replace(columns=whole(columns, torch.int32)))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU looking would synchronise")
def test_numbers_that_name_nothing_are_refused_where_looking_costs_nothing():
    function, arguments = CALLS["grid_positions"]()
    for change, message in (({"index": whole([[-1, 0, 0, 0, 1]])}, "index holds 1; .* to 0 fits"),
                            ({"columns": whole([0])}, "columns holds 0; 1 to")):
        with pytest.raises(ValueError, match=f"^grid_positions: {message}"):
            function(**arguments | change)
    function, arguments = CALLS["rotary_table"]()
    for axes in ([0, 1, 2, 0], [0, -1, 0, 1]):
        with pytest.raises(ValueError, match="^rotary_table: axes holds (2|-1); 0 to 1 fits"):
            function(**arguments | {"axes": whole(axes)})


def test_values_are_not_looked_at_where_a_graph_is_traced_or_a_device_would_wait():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert (_arguments.looks(torch.zeros(2), None)
            and not _arguments.looks(torch.zeros(2), torch.zeros(2, device="meta")))
    with FakeTensorMode():
        assert not _arguments.looks(torch.zeros(2))
    seen = []
    torch.compile(lambda x: seen.append(_arguments.looks(x)) or x + 1, backend="eager")(torch.zeros(2))
    assert seen == [False]
