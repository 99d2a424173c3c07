"""A step on two processes is the step of one, for every backbone and image layer, whatever rows a process has."""
import pytest
import torch

from tests.compare import assert_as_accurate
from tests.gloo_processes import needs_gloo, run_together
from tests.transfusion.conftest import tiny_model
from tests.transfusion.train.two_processes import MODELS, ROWS, alone, run

pytestmark = needs_gloo

@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two gloo processes found, once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    run_together(2, run, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", MODELS)
def test_one_step_on_two_processes_is_the_step_of_one(together, name):
    rounded, exact = (alone(MODELS[name], dtype) for dtype in (torch.float32, torch.float64))
    for kind in ROWS:
        means, gradients, norm, wanted, share = together[name, kind]
        expected_means, expected, expected_norm = rounded[kind]
        assert gradients.keys() == wanted >= expected.keys(), f"{kind}: a gradient is None"
        assert means.keys() == expected_means.keys() == {"loss", "text_loss", "diffusion_loss"}
        for key, mean in means.items():
            torch.testing.assert_close(mean, expected_means[key].detach(), rtol=1e-6, atol=1e-6)
        for key, gradient in gradients.items():
            if key not in expected:  # one process leaves out what no row of it reaches
                assert not gradient.any(), f"{kind}: {key}"
                continue
            assert_as_accurate(f"{kind}: {key}", gradient, expected[key], exact[kind][1][key],
                               terms=exact[kind][1][key].abs().amax().expand_as(gradient))
        torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)
        assert norm > 0.01 and (share == 1 if "a copy each" in name else 0.4 < share < 0.6)


def test_in_bfloat16_times_patches_and_gradients_stay_float32(together):
    found = together["bfloat16"]
    assert found["dtypes"] == {"times": torch.float32, "noised patches": torch.float32,
                               "inside a layer": torch.bfloat16, "gradients": {torch.float32}}
    means, _, _ = alone(dict(backbone="adaln", positions="2d"), torch.float32)["uneven micro-batches"]
    for name, mean in found["means"].items():
        torch.testing.assert_close(mean, means[name].detach(), rtol=0.03, atol=0)


@pytest.mark.parametrize("backbone", ["adaln", "mixture_of_transformers"])
def test_a_decoder_in_adaln_blocks_still_runs_by_itself(backbone):
    model, plain = tiny_model(backbone=backbone), tiny_model()
    plain.backbone.decoder.load_state_dict(model.backbone.decoder.state_dict())
    tokens = torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.text_logits(tokens), plain.text_logits(tokens))
