"""The names of the library: what each face offers, and where an op's specification is found."""
import importlib

import pytest

import tfkernels

FACES = ("attention", "losses", "mask", "norm", "parallel", "patches", "rotary")


@pytest.mark.parametrize("face", FACES)
def test_a_face_offers_what_it_has_and_the_library_offers_the_same(face):
    module = importlib.import_module(f"tfkernels.{face}")
    assert all(hasattr(module, name) for name in module.__all__)
    for name in set(module.__all__) & set(tfkernels.__all__):
        assert getattr(tfkernels, name) is getattr(module, name)


def test_every_name_offered_is_there_and_no_reference_is_among_them():
    assert all(hasattr(tfkernels, name) for name in tfkernels.__all__)
    assert not [name for name in tfkernels.__all__ if name.endswith("_reference")]


@pytest.mark.parametrize("name,folder", [
    ("attention_reference", "attention"), ("paged_attention_reference", "attention"),
    ("diffusion_loss_reference", "losses"), ("linear_cross_entropy_reference", "losses"),
    ("linear_cross_entropy_with_lse_reference", "losses"),
    ("modulated_layer_norm_diffusion_loss_reference", "losses"),
    ("modulated_rms_norm_diffusion_loss_reference", "losses"), ("gated_residual_reference", "norm"),
    ("gated_residual_rms_norm_reference", "norm"), ("modulated_layer_norm_reference", "norm"),
    ("modulated_rms_norm_reference", "norm"), ("embed_patches_reference", "patches"),
    ("qk_norm_rotary_reference", "rotary")])
def test_a_reference_is_beside_its_op_and_an_attribute_of_the_library(name, folder):
    found = importlib.import_module(f"tfkernels.{folder}.reference")
    face = importlib.import_module(f"tfkernels.{folder}")
    assert getattr(tfkernels, name) is getattr(found, name) is getattr(face, name) and name in face.__all__


def test_the_masks_key_side_answers_to_its_older_names():
    mask = tfkernels.TransfusionMask.causal(4)
    assert mask.query_lo is mask.key_since and mask.query_hi is mask.key_until
