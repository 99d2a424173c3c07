"""Real quantisers, where they are installed: the decoder in 8 and 4 bits answers nearly what it answered before."""
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers import quantizer_bnb_8bit

from tests.transfusion.conftest import tiny_model
from transfusion import Transfusion
from transfusion.model.config import BACKBONES


def torchao(bits):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    if bits == 8:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))


def bitsandbytes(bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4")


def logits(model):
    tokens = torch.randint(5, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.text_logits(tokens)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("bits, most", [(8, 0.02), (4, 0.2)])
@pytest.mark.parametrize("config", [torchao, bitsandbytes])
def test_a_decoder_in_few_bits_answers_nearly_as_before_and_travels_in_its_checkpoint(
        tmp_path, config, bits, most, backbone):
    """Steps of 2^-7 of a row's largest weight err about 0.5 % of its norm, steps of 2^-3 about 8 %."""
    tiny_model(backbone=backbone, hidden_size=64, head_dim=16).save_pretrained(tmp_path / "whole")
    whole = Transfusion.from_pretrained(tmp_path / "whole")
    small = Transfusion.from_pretrained(tmp_path / "whole", quantization_config=config(bits))
    changed = {name for name, module in small.named_modules() if isinstance(module, nn.Linear)
               and type(module.weight) is not nn.Parameter}
    assert changed and all(name.startswith("backbone.decoder.model.layers.") for name in changed)
    error = (logits(small) - logits(whole)).norm() / logits(whole).norm()
    assert 0 < error < most
    draw = dict(steps=2, guidance=2.0)
    image, same = (one.draw(["a handwritten seven"], **draw)[0].latent for one in (small, whole))
    assert 0 < (image - same).norm() / same.norm() < 2 * most
    small.save_pretrained(tmp_path / "small")
    again = Transfusion.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))
    assert torch.equal(again.draw(["a handwritten seven"], **draw)[0].latent, image)


def test_a_quantiser_that_is_not_installed_is_named_in_one_line(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(quantizer_bnb_8bit, "is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(ValueError, match="quantization_config asks for a package that is not here .*bitsandbytes"):
        Transfusion.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
