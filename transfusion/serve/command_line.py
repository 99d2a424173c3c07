"""The commands `transfusion serve` and `transfusion app`: the same engine and interface, alone or with a page."""
import contextlib
import ctypes
import os
from collections.abc import Iterator
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
class HostSettings:
    """What `serve` and `app` have in common."""

    model: Path
    """directory of a checkpoint"""
    host: str = "127.0.0.1"
    """address to listen on; 127.0.0.1 serves this machine alone, 0.0.0.0 all networks"""
    port: Annotated[int, Range(1, 65535)] = 8000
    """port to listen on"""
    name: str | None = None
    """what clients call the model; by default the directory's name"""
    template: Annotated[str, OneOf(TEMPLATE_NAMES)] = NO_TEMPLATE
    """how messages become a prompt: none, their texts and pictures in order, or the template of training"""
    allow_remote: bool = False
    """also fetch pictures by http(s) URLs, from public addresses"""
    max_megabytes: Count = 32
    """largest size of a request, and of a picture that is fetched"""
    rows: Count = 16
    """requests that run at once"""
    queue: Count = 64
    """requests that wait at most; more are answered 429"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    limits: Limits = Limits()

    @property
    def called(self) -> str:
        """The model's name."""
        return self.name or self.model.resolve().name


@dataclass(frozen=True)
class ServeSettings(HostSettings):
    """Serve a model over HTTP with OpenAI's interface; Ctrl-C finishes what runs and ends."""

    api_key: str | None = None
    """key that clients must send; None: no key is asked for, not even with --host 0.0.0.0"""

    def __post_init__(self):
        check("serve", self)


@dataclass(frozen=True)
class AppSettings(HostSettings):
    """Talk and draw with a model on a page in the browser; beside it lies the HTTP interface of `serve`."""

    port: Annotated[int, Range(1, 65535)] = 7860
    """port to listen on"""
    examples: tuple[str, ...] = ("a handwritten seven", "a handwritten two", "a handwritten five")
    """prompts to click"""

    def __post_init__(self):
        check("app", self)


def serve(settings: ServeSettings) -> None:
    """Run `transfusion serve`."""
    with _extra("serve"):
        import uvicorn

        from transfusion.serve.listening import AnnouncedServer
        from transfusion.serve.server import make_app
    engine = _engine(settings)
    api = make_app(engine, settings.called, **_options(settings), api_key=settings.api_key)
    line = f"serving {settings.model} at http://{settings.host}:{settings.port}/v1 (Ctrl-C ends)"
    _listen(engine, AnnouncedServer(uvicorn.Config(api, **_address(settings)), line, engine))


def app(settings: AppSettings) -> None:
    """Run `transfusion app`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    with _extra("app"):
        import uvicorn

        from transfusion.serve.page import Page, PageServer, add_page
        from transfusion.serve.server import make_app
    engine = _engine(settings)
    page = Page(engine, settings.called, template=settings.template, examples=settings.examples)
    both = add_page(make_app(engine, settings.called, **_options(settings)), page, settings.max_megabytes)
    line = f"the page of {settings.model} is at http://{settings.host}:{settings.port} (Ctrl-C ends)"
    _listen(engine, PageServer(uvicorn.Config(both, **_address(settings)), line, page))


@contextlib.contextmanager
def _extra(command: str) -> Iterator[None]:
    """While the packages of a command's extra are imported, one that is missing is said in one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{command}: {error.name} is not installed; pip install 'tfkernels[{command}]' fits") from None


def _engine(settings: HostSettings) -> Engine:
    share_one_arena()
    return Engine(load_model(settings.model, settings.device), settings.rows, settings.queue, limits=settings.limits)


def _options(settings: HostSettings) -> dict:
    """What the HTTP interface is told by either command."""
    return {name: getattr(settings, name) for name in ("template", "allow_remote", "max_megabytes")}


def _address(settings: HostSettings) -> dict:
    """Where uvicorn listens."""
    return {"host": settings.host, "port": settings.port, "log_level": "warning"}


def _listen(engine: Engine, server) -> None:
    """Answer until Ctrl-C; what runs then is finished, unless a second Ctrl-C comes."""
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn repeats the signal after it has shut down
        engine.close(drain=not server.force_exit)
        print("stopped; what ran is " + ("left unfinished" if server.force_exit else "finished"), flush=True)
    finally:
        engine.close(drain=False)


def share_one_arena() -> None:
    """Let all threads take memory from one arena of malloc, where the C library is glibc.

    By default each of the threads that come and go with requests gets one of up to eight arenas a core, which hold
    what was freed in them; memory then grows for hours though nothing is kept.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
