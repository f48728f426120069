"""The page of stimg in a process of its own: what it serves, and a real browser on it."""

import json
import signal
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData, read_h5ad
from app_browser import PATIENCE, missing, opened_page, running_app, wait

from modeling_stimg import STImageMAEModel, STPatchProcessor, embed_slide, find_domains

pytest.importorskip("gradio", reason="the page needs gradio")
NUM_DOMAINS = 5


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the process of the page puts its temporary files, and the browser what it downloads."""
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def served(checkpoint: Path, temporary: Path) -> Iterator[tuple[str, Any]]:
    with running_app(checkpoint, temporary) as (address, process):
        yield address, process


def status(address: str, path: str) -> int:
    try:
        with urllib.request.urlopen(address + path, timeout=20) as response:
            response.read()
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_page_and_its_own_files_are_served(served: tuple[str, Any], temporary: Path):
    address, _ = served
    (folder,) = temporary.glob("stimg-app-*")
    assert folder.stat().st_mode & 0o077 == 0
    own = folder / "own.h5ad"
    own.write_bytes(b"x")
    (temporary / "foreign.h5ad").write_bytes(b"x")
    assert status(address, f"gradio_api/file={own}") == 200
    own.unlink()
    refused = [
        f"file={temporary / 'foreign.h5ad'}",
        "file=/etc/passwd",
        f"file={folder}/../foreign.h5ad",
        "file=https://example.com/x",
        "file=%68TTPS://example.com/x",
        "proxy=https://example.com/x",
        "deep_link?session_hash=x",
        "runs",
    ]
    assert [status(address, f"gradio_api/{path}") for path in refused] == [403] * len(refused)
    config = json.loads(urllib.request.urlopen(f"{address}config", timeout=20).read())
    assert config["analytics_enabled"] is False
    # No name under which a program could ask for what the buttons do.
    information = json.loads(urllib.request.urlopen(f"{address}gradio_api/info", timeout=20).read())
    assert information == {"named_endpoints": {}, "unnamed_endpoints": {}}


@pytest.mark.skipif(bool(missing()), reason=f"no browser to drive: {missing()} lacking")
def test_a_browser_sees_tissue_domains_and_genes_and_downloads_what_the_library_gives(
    served: tuple[str, Any], temporary: Path, slides: dict[str, AnnData], checkpoint: Path
):
    address, process = served
    slides["staggered"].write_h5ad(temporary / "phantom.h5ad")
    (temporary / "cut.h5ad").write_bytes((temporary / "phantom.h5ad").read_bytes()[:20_000])
    slides["square"].write_h5ad(temporary / "other.h5ad")
    with opened_page(address, temporary) as page:
        page.click("find")
        assert "No slide is open here" in page.complaint()

        page.drop(temporary / "phantom.h5ad")
        tissue, measured = page.map("tissue"), page.map("measured")
        assert tissue.startswith("data:image/png;base64,")
        facts = page.text("facts").replace("\t", " ")
        assert f"spots {slides['staggered'].n_obs}" in facts
        assert "120 of its genes measured" in facts

        page.type("number", str(NUM_DOMAINS))
        page.click("find")
        domains = page.map("domains")
        page.click("make")
        written = read_h5ad(page.download())
        expected = slides["staggered"].copy()
        model, processor = STImageMAEModel.from_pretrained(checkpoint), STPatchProcessor.from_pretrained(checkpoint)
        embed_slide(expected, model, processor, progress=False)
        find_domains(expected, NUM_DOMAINS)
        # Another process may use as many threads as it likes.
        np.testing.assert_allclose(written.obsm["X_stimg"], expected.obsm["X_stimg"], atol=1e-5)
        assert written.obs["stimg_domain"].nunique() == NUM_DOMAINS
        assert list(written.obs_names) == list(expected.obs_names)
        assert (written.X != expected.X).nnz == 0

        page.choose("gene", slides["staggered"].var_names[7])
        measured = page.map("measured", before=measured)
        page.type("side", "4")
        page.click("rebuild")
        page.map("predicted")
        page.choose("gene", "NOTHING")
        assert "no gene 'NOTHING'" in page.complaint()

        page.drop(temporary / "cut.h5ad")
        complaint = page.complaint()
        assert "cut.h5ad is damaged, cut short or not HDF5" in complaint
        assert "Traceback" not in complaint
        assert str(temporary) not in complaint
        assert page.map("tissue") == tissue
        assert page.map("domains") == domains

        page.drop(temporary / "other.h5ad")
        page.map("tissue", before=tissue)
        assert f"spots {slides['square'].n_obs}" in page.text("facts").replace("\t", " ")
        page.wait(lambda: not page.script("return document.querySelector('#domains img')"), "the old map to go")
        assert page.asked_hosts() == {urllib.parse.urlsplit(address).hostname}
        (folder,) = temporary.glob("stimg-app-*")
        assert len(list(folder.glob("slide-*"))) == 1
        assert not list(folder.rglob("*.h5ad"))
    # The browser has gone, and the session with it.
    wait(lambda: not list(folder.glob("slide-*")), "the slide's folder to go", PATIENCE)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert not folder.exists()
    assert "Traceback" not in process.stderr.read()
