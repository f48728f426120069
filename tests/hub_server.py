"""A small Hugging Face Hub on the loopback interface: repositories with revisions, large files, tokens, cut uploads.

It answers what huggingface_hub, transformers, the Trainer and datasets ask of the real one, in the same way as far as
they look (`hub_routes.py`). A fresh process comes here with the variables of `Hub.environment()`, this one with
`Hub.here()`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hub_repositories import USER, HubError, Repository
from hub_routes import Handler
from loopback import QuietServer

TOKEN, ORGANISATION = "hf_loopbackwritetoken", "lab"


class Hub:
    """The server and what it holds; use `serving_hub()`.

    Attributes:
        repositories: by (kind, id), kind being model, dataset or space.
        tokens: namespaces that a token may read privately and write to.
        requests: (method, path, status, token) of every request; token "" without one.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: dict[str, set[str]] = {TOKEN: {USER, ORGANISATION}}
        self.requests: list[tuple[str, str, int, str]] = []
        self.lock = threading.RLock()
        self._cuts, self._cut_after = 0, 0
        self._server = QuietServer(("127.0.0.1", 0), partial(Handler, self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that send every client of a fresh process here, with a token or without."""
        found = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**found, **({} if token is None else {"HF_TOKEN": token})}

    def here(self, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = TOKEN) -> None:
        """Send huggingface_hub and transformers of this process here, with a cache of their own."""
        from huggingface_hub import constants
        from transformers.utils import hub

        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": self.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
        for name, value in {**values, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)

    def cut_uploads(self, times: int, after: int = 0) -> None:
        """Cut the connection of the next uploads of large files when so many bytes of them have come."""
        self._cuts, self._cut_after = times, after

    def cut_here(self) -> int | None:
        """Bytes after which this upload is cut; None: it is not."""
        with self.lock:
            if self._cuts == 0:
                return None
            self._cuts -= 1
            return self._cut_after

    def repository(self, id: str, kind: str = "model") -> Repository:
        """A repository that is there.

        Raises:
            HubError: it is not.
        """
        found = self.repositories.get((kind, id))
        if found is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return found

    def files(self, id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Content of every file of a revision, but for the `.gitattributes` that the Hub itself puts there."""
        files = self.repository(id, kind).commit(revision).files
        return {name: content for name, content in files.items() if name != ".gitattributes"}


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A running Hub without any repository."""
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
