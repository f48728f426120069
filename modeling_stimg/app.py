"""The page of stimg: `stimg app`, or a Space of the Hub (docs/app.md).

Whatever is dropped on it stays on this machine: in memory while its page is open, in a temporary folder that is removed
in the end, and nowhere else. Gradio (the extra `app`) is imported when the page is built.
"""

import atexit
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradio import Blocks

PORT, HOST = 7860, "127.0.0.1"
# What Gradio would serve and this page does not need: addresses of others, fetched by this machine; states of pages,
# written to its disk; runs, kept in a bucket of the Hub.
_REFUSED = re.compile(
    r"/gradio_api/(?:deep_link|proxy=|runs|run-history|file[=/]\s*[a-z][a-z0-9+.-]*:/)", re.IGNORECASE
)


def build_app(model: str | None = None, *, revision: str | None = None, device: str | None = None) -> "Blocks":
    """The page, with a model that is loaded now and once.

    Uploads and downloads lie in a new folder of the system's temporary one (`GRADIO_TEMP_DIR` is set to it), which is
    removed when this process ends.

    Args:
        model: folder or Hub id, as `find_model` takes it; None = the published one of this checkout. revision: of a Hub
            model. device: e.g. `"cuda"`; None = a GPU where there is one.

    Returns:
        `gradio.Blocks`, to be launched by `launch`, which serves it with all that is told in docs/app.md.

    Raises:
        ImportError: no Gradio, or no Matplotlib. ValueError, OSError: no such model or device.
    """
    from .loading import load_model
    from .plotting import new_figure

    folder = Path(tempfile.mkdtemp(prefix="stimg-app-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _import_gradio(folder)
    new_figure(1, 1)
    loaded = load_model(model, revision, device)
    from .app_page import page

    return page(loaded, folder)


def launch(
    model: str | None = None,
    *,
    revision: str | None = None,
    device: str | None = None,
    host: str = HOST,
    port: int = PORT,
    share: bool = False,
    quiet: bool = False,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM, and leave nothing behind.

    Args:
        model, revision, device: as `build_app`. host: which addresses are listened to; `"0.0.0.0"` = all of them.
        port: refused where it is taken. share: also serve the page through a public address of Gradio's, which passes
            everything on through their servers. quiet: say nothing but warnings and errors.

    Raises:
        As `build_app`; OSError: the port is taken, or no such host. Told before the model is loaded.
    """
    check_port(host, port)
    with _ended_by_sigterm(), _no_reports() if quiet else nullcontext():
        page = build_app(model, revision=revision, device=device)
        try:
            _, address, shared = serve(page, host, port, share)
            if not quiet:
                print(f"The page is at {shared or address} (Ctrl-C ends it).", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.close(verbose=False)
            shutil.rmtree(os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)


def serve(page: "Blocks", host: str, port: int, share: bool = False) -> tuple[Any, str, str | None]:
    """Launch a page of `build_app` in the background: the application, its address, and its public one, if any."""
    from gradio.themes import Default
    from starlette.middleware import Middleware

    from .app_uploads import MAX_UPLOAD

    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=MAX_UPLOAD,
        # Fonts of the reader's own machine: no file of another host, nor of this one.
        theme=Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        app_kwargs={"middleware": [Middleware(OwnFilesAlone)], "docs_url": None, "redoc_url": None},
    )


class OwnFilesAlone:
    """ASGI middleware: refuses what reaches beyond this page (`_REFUSED`), with status 403."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and _REFUSED.search(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This page serves its own files alone."})
            return
        await self.app(scope, receive, send)


def check_port(host: str, port: int) -> None:
    """Raise OSError, in one sentence, where nothing can listen at an address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OSError(
            f"The page cannot be at port {port} of {host} ({error.strerror}): name another --port, or another --host."
        ) from error


def _import_gradio(folder: Path) -> None:
    """Import Gradio with its reports to others switched off, and its files in `folder`: both are read on import.

    Raises:
        ImportError: in one sentence, without Gradio.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("The page needs Gradio: pip install 'stimg[app]'.") from error


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, with which services and containers are ended, do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _no_reports() -> Iterator[None]:
    """Keep lines such as that of the matched genes from this process' terminal; bars show on the page alone anyway."""
    from tqdm.std import tqdm

    before = tqdm.__dict__["write"]
    tqdm.write = classmethod(lambda *_args, **_options: None)
    try:
        yield
    finally:
        tqdm.write = before
