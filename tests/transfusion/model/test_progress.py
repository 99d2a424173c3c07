"""Saving and loading a model shows no progress bars of other libraries, and leaves their settings as they were."""
import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_vae import autoencoder
from transfusion import Transfusion
from transfusion.model.vae import VAE


@pytest.fixture
def bars():
    """Switch the bars of both libraries on for a test."""
    before = transformers_logging.is_progress_bar_enabled(), diffusers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    diffusers_logging.enable_progress_bar()
    yield
    for library, shown in zip((transformers_logging, diffusers_logging), before):
        (library.enable_progress_bar if shown else library.disable_progress_bar)()


def test_saving_and_loading_write_no_bar(tmp_path, capfd, bars):
    model = tiny_model()
    model.vae = VAE(autoencoder())
    super(Transfusion, model).save_pretrained(tmp_path / "plain")
    assert "Writing model shards" in capfd.readouterr().err  # what transformers shows by itself
    model.save_pretrained(tmp_path / "model")
    Transfusion.from_pretrained(tmp_path / "model")
    assert capfd.readouterr().err == ""


def test_what_the_user_set_for_bars_comes_back_after_an_error_too(tmp_path, bars):
    seen, model = [], tiny_model()

    def hook(make_bar, arguments, options):
        seen.append(options)
        return make_bar(*arguments, **options)

    before = transformers_logging.set_tqdm_hook(hook)
    try:
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="holds no config.json"):
            Transfusion.from_pretrained(tmp_path / "nowhere")
        assert (
            not seen and transformers_logging.is_progress_bar_enabled() and diffusers_logging.is_progress_bar_enabled()
        )
        assert list(transformers_logging.tqdm([3], disable=True)) == [3] and seen == [{"disable": True}]
    finally:
        transformers_logging.set_tqdm_hook(before)
    diffusers_logging.disable_progress_bar()
    Transfusion.from_pretrained(tmp_path / "model")
    assert not diffusers_logging.is_progress_bar_enabled()
