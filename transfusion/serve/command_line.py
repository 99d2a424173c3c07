"""The command `transfusion serve`."""
import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transfusion.model.loading import load_model
from transfusion.serve.engine import Engine
from transfusion.serve.request import Limits
from transfusion.serve.turns import NO_TEMPLATE, TEMPLATE_NAMES
from transfusion.settings import Count, OneOf, Range, check

M_ARENA_MAX = -8  # of glibc's malloc.h


@dataclass(frozen=True)
class ServeSettings:
    """Serve a model over HTTP with OpenAI's interface; Ctrl-C finishes what runs and ends."""

    model: Path
    """directory of a checkpoint"""
    host: str = "127.0.0.1"
    """address to listen on: this machine alone; 0.0.0.0 for all, and then set --api-key"""
    port: Annotated[int, Range(1, 65535)] = 8000
    """port to listen on"""
    name: str | None = None
    """what clients call the model; by default the directory's name"""
    api_key: str | None = None
    """what clients must send as their key; none is asked for by default"""
    template: Annotated[str, OneOf(TEMPLATE_NAMES)] = NO_TEMPLATE
    """how messages become a prompt: none, their texts and pictures in order, or the template of training"""
    allow_remote: bool = False
    """also fetch pictures by http(s) URLs, from public addresses"""
    max_megabytes: Count = 32
    """of a request, and of a picture that is fetched"""
    rows: Count = 16
    """requests that run at once"""
    queue: Count = 64
    """requests that wait at most; more are answered 429"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    limits: Limits = Limits()

    def __post_init__(self):
        check("serve", self)


def serve(settings: ServeSettings) -> None:
    """Run `transfusion serve`."""
    try:
        import uvicorn

        from transfusion.serve.server import AnnouncedServer, make_app
    except ImportError as error:
        raise ValueError(f"serve: {error.name} is not installed; pip install 'tfkernels[serve]' fits") from None
    share_one_arena()
    engine = Engine(load_model(settings.model, settings.device), settings.rows, settings.queue, limits=settings.limits)
    app = make_app(engine, settings.name or settings.model.resolve().name, template=settings.template,
                   api_key=settings.api_key, allow_remote=settings.allow_remote, max_megabytes=settings.max_megabytes)
    server = AnnouncedServer(uvicorn.Config(app, host=settings.host, port=settings.port, log_level="warning"),
                             f"serving {settings.model} at http://{settings.host}:{settings.port}/v1 (Ctrl-C ends)")
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn repeats the signal after it has shut down
        print("stopped; what ran is finished", flush=True)
    finally:
        engine.close()


def share_one_arena() -> None:
    """Let all threads take memory from one arena of malloc, where the C library is glibc.

    By default each of the threads that come and go with requests gets one of up to eight arenas a core, which hold
    what was freed in them; memory then grows for hours though nothing is kept.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
