"""FID's Inception: its file is known by its hash, and its layers are those of the published network."""
import pytest
import torch

import transfusion.eval.inception as inception
from transfusion.eval.inception import FILES, Inception, inception_file, is_fid_file


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights with the head that the published one has."""
    path = tmp_path_factory.mktemp("inception") / FILES[0]
    torch.manual_seed(0)
    network = Inception()
    for convolution in (module for module in network.modules() if isinstance(module, torch.nn.Conv2d)):
        torch.nn.init.kaiming_normal_(convolution.weight)  # with less the features vanish on the way
    state = network.state_dict()
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_the_file_is_that_of_fid_by_its_hash_alone(weights, monkeypatch):
    assert not is_fid_file(weights), "the name makes it so"
    monkeypatch.setattr(inception, "FID_HASH", inception.weights_hash(weights)[:8])
    assert is_fid_file(weights)


def test_features_are_2048_numbers_of_each_picture_alone(weights):
    network = Inception.from_file(weights)
    assert sum(x.numel() for x in network.parameters()) == 21_785_568  # Inception v3 without its heads
    pictures = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        both, alone = network(pictures), network(pictures[1:])
    assert both.shape == (2, 2048)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.01 * both.abs().max()


def test_pixels_become_what_tensorflows_graph_makes_of_them(weights):
    network, seen = Inception.from_file(weights), []
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pixels = torch.tensor([0.0, 128, 255]).view(1, 3, 1, 1).expand(-1, -1, 299, 299)
    with torch.inference_mode():
        network(pixels / 127.5 - 1)
    torch.testing.assert_close(seen[0][0, :, 0, 0], (torch.tensor([0.0, 128, 255]) - 128) / 128, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool, expected", [
    (inception.average, [1.0, 1.0, 1.0]), (inception.maximum, [1.0, 1.0, 1.0])])
def test_pooling_leaves_the_padding_out(pool, expected):
    assert pool(torch.ones(1, 1, 3, 3))[0, 0, 0].tolist() == expected
    ramp = torch.arange(9.0).view(1, 1, 3, 3)
    corner = {inception.average: (0 + 1 + 3 + 4) / 4, inception.maximum: 4.0}[pool]
    assert pool(ramp)[0, 0, 0, 0] == corner


def test_the_file_is_looked_for_in_the_cache_of_torch_hub(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="are not there; pt_inception-2015-12-05-6726825d.pth or"):
        inception_file()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / FILES[1]).symlink_to(weights)
    assert inception_file() == tmp_path / "checkpoints" / FILES[1]
    assert inception_file(weights) == weights


def test_other_files_are_refused_by_name(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"no weights")
    for name in ("a.pth", "b.pth"):
        with pytest.raises(ValueError, match=f"{name}', which holds no weights of Inception"):
            Inception.from_file(tmp_path / name)
