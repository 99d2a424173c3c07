"""Processes that split weights, rows and the tokens of rows take the step of one process."""
import pytest
import torch

from tests.gloo_processes import needs_gloo, run_together
from tests.transfusion.train.sharing_processes import NAMES, alone, run
from tests.transfusion.train.two_processes import ROWS
from transfusion.sequence import CONTEXT_ATTENTION

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What four processes found."""
    folder = tmp_path_factory.mktemp("sharing")
    run_together(4, run, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_shards_rows_and_tokens_may_be_split_together(together, name, kind):
    expected_means, expected, expected_norm = alone(name, kind)
    limit = 1e-6 if name.endswith(("lora", "images")) else 1e-10  # logits of an adapted head are float32
    for way in CONTEXT_ATTENTION:
        means, gradients, norm = together[name, kind, way]
        assert means.keys() == expected_means.keys() and gradients.keys() >= expected.keys()
        for key, mean in means.items():
            torch.testing.assert_close(mean.double(), expected_means[key].double(), rtol=1e-6, atol=1e-6)
        for key, gradient in gradients.items():  # one process leaves out what no row of it reaches
            whole = expected.get(key, torch.zeros_like(gradient))
            assert (gradient - whole).abs().max() <= limit * whole.abs().max().clamp(min=1e-6), (way, key)
        torch.testing.assert_close(norm, expected_norm, rtol=limit, atol=0)
        assert norm > 0.01
