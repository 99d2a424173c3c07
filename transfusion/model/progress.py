"""Progress bars of the libraries that read and write weights, which would tear the bar of a training run."""
import contextlib
from collections.abc import Iterator

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Show no progress bar of transformers and diffusers meanwhile; whatever the user has set for them comes back."""
    hook = transformers_logging.set_tqdm_hook(_hidden)  # its disable_progress_bar would change huggingface_hub too
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        if shown:
            diffusers_logging.enable_progress_bar()


def _hidden(make_bar, arguments: tuple, options: dict):
    return make_bar(*arguments, **options | {"disable": True})
