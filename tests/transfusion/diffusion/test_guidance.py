"""Guidance: its formulas, when it is on, and what the sampler asks for it."""
import pytest
import torch

from transfusion import Text
from transfusion.diffusion.guidance import Guidance

WHOLE, IMAGES, NOTHING = torch.randn(3, 2, 5, 4, dtype=torch.float64)


def test_scale_one_is_the_whole_prompts_prediction_and_two_goes_on_as_far_again():
    pair = torch.stack([WHOLE, NOTHING])
    torch.testing.assert_close(Guidance(1.0 + 1e-12).combine(pair), WHOLE)
    torch.testing.assert_close(Guidance(2.0).combine(pair), 2 * WHOLE - NOTHING)
    assert Guidance(1.0).contexts == ("whole",) and torch.equal(Guidance(1.0).combine(WHOLE[None]), WHOLE)


def test_text_and_image_have_scales_of_their_own():
    three = torch.stack([WHOLE, IMAGES, NOTHING])
    torch.testing.assert_close(
        Guidance(3.0, image=1.5).combine(three), NOTHING + 1.5 * (IMAGES - NOTHING) + 3 * (WHOLE - IMAGES)
    )
    torch.testing.assert_close(Guidance(1.0, image=1.0).combine(three), WHOLE)
    torch.testing.assert_close(
        Guidance(2.0, image=2.0).combine(three), Guidance(2.0).combine(torch.stack([WHOLE, NOTHING]))
    )


def test_rescaling_gives_each_image_the_spread_of_the_unguided_one():
    guided = Guidance(5.0, rescale=1.0).combine(torch.stack([WHOLE, NOTHING]))
    torch.testing.assert_close(guided.std((1, 2)), WHOLE.std((1, 2)))
    half = Guidance(5.0, rescale=0.5).combine(torch.stack([WHOLE, NOTHING]))
    torch.testing.assert_close(half, (guided + Guidance(5.0).combine(torch.stack([WHOLE, NOTHING]))) / 2)


def test_guidance_is_on_within_its_interval_alone():
    guidance = Guidance(3.0, interval=(0.2, 0.8))
    assert [guidance.active(t) for t in (0.1, 0.2, 0.5, 0.8, 0.9)] == [False, True, True, True, False] and not Guidance(
        1.0
    ).active(0.5)


@pytest.fixture
def asked(model, monkeypatch):
    """How many rows the decoder was asked about at each denoising step."""
    rows, backbone = [], model.backbone.forward
    def forward(x, *rest):
        if x.shape[1] == 16:
            rows.append(len(x))
        return backbone(x, *rest)

    monkeypatch.setattr(model.backbone, "forward", forward)
    return rows


def test_no_row_is_run_in_vain(model, asked):
    for guidance, expected in (
        (1.0, [2] * 4),
        (3.0, [4] * 4),
        (Guidance(3.0, image=1.5), [6] * 4),
        (Guidance(3.0, interval=(0.3, 0.7)), [2, 2, 4, 2]),
    ):
        model.draw(["a", "a handwritten seven"], steps=4, guidance=guidance)
        assert asked == expected, guidance
        asked.clear()


def test_an_edit_follows_the_image_and_the_text_each_as_far_as_its_scale_says(model, pictures):
    def draw(*parts, **guidance):
        return model.draw([list(parts)], steps=4, seed=2, guidance=Guidance(**guidance))[0].latent

    image, words = pictures[0], Text(" a handwritten two")
    # images alone
    torch.testing.assert_close(draw(image, words, text=0.0, image=1.0), draw(image, text=1.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        draw(image, words, text=1.0, image=1.0), draw(image, words, text=1.0), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        draw(image, words, text=2.0, image=2.0), draw(image, words, text=2.0), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(draw(image, words, text=1.0, image=3.0), draw(image, words, text=1.0), atol=1e-3)


@pytest.mark.parametrize(
    "options,message",
    [({"interval": (0.5, 0.2)}, "interval is .0.5, 0.2.; two times"), ({"rescale": 2.0}, "rescale is 2.0; a number")],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


@pytest.mark.parametrize(
    "name,value",
    [
        ("text", float("nan")),
        ("text", float("inf")),
        ("text", -1.0),
        ("text", 1e300),
        ("image", 10001.0),
        ("text", "3"),
        ("text", None),
        ("image", float("nan")),
        ("image", -0.5),
        ("image", True),
        ("interval", (0.2, float("nan"))),
        ("interval", (0.5,)),
        ("interval", 0.5),
        ("interval", (0.8, 0.2)),
        ("interval", (-0.1, 1)),
        ("rescale", float("nan")),
        ("rescale", 1.5),
        ("rescale", "1"),
    ],
)
def test_a_scale_that_nothing_can_be_moved_by_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"Guidance: {name} is .* fit"):
        Guidance(**{name: value})
