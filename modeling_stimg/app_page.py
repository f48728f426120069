"""How the page looks, and what its buttons do (`app_slides`). Imports Gradio: `app.build_app` alone imports this."""

import html
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from .app_slides import (
    DOMAIN_REGION,
    SQUARE_REGION,
    OpenSlide,
    OpenSlides,
    counts_map,
    domain_map,
    gene_map,
    open_slide,
    reconstruction_maps,
    region,
    write_result,
)
from .app_uploads import SUFFIXES
from .cli_slides import TOLD, sentence
from .loading import LoadedModel

_ABOUT = """# stimg: spatial transcriptomics as images

Drop a slide, see its tissue, find its domains, and have a gene predicted where it was hidden. The model is `{model}`.
Files stay on the machine that runs this page and are forgotten when it is closed. Not for clinical use.
"""
_NO_DECODER = "This model was saved without its decoder: it gives embeddings and domains, and cannot reconstruct genes."
# One computation at a time, whoever asks: they would share the same cores.
_QUEUED = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
_AT_ONCE = {"queue": False, "api_visibility": "private"}
_PROGRESS = gr.Progress(track_tqdm=True)
_NO_FILE_YET = {"value": None, "label": "Download", "interactive": False}
_REGIONS = (SQUARE_REGION, DOMAIN_REGION)
_MAX_DOMAINS = 20


def page(model: LoadedModel, folder: Path) -> gr.Blocks:
    """The page of a model.

    Args:
        folder: where uploads and downloads are for the while; nothing else is served.
    """
    does = _Buttons(model, folder)
    with gr.Blocks(title="stimg", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(_ABOUT.format(model=model.name.replace("`", "")))
        with gr.Row():
            with gr.Column(scale=1):
                upload = gr.File(
                    label="A slide: an .h5ad, or a zipped Space Ranger folder",
                    file_types=list(SUFFIXES),
                    elem_id="upload",
                    height=160,
                )
                facts = gr.HTML(elem_id="facts")
            tissue = _map("Tissue", "tissue", scale=2)
        gr.Markdown("## Domains")
        with gr.Row():
            with gr.Column(scale=1):
                automatic = gr.Checkbox(label="As many as there are (Leiden)", elem_id="automatic")
                number = gr.Slider(2, _MAX_DOMAINS, value=7, step=1, label="Number of domains", elem_id="number")
                find = gr.Button("Find domains", variant="primary", elem_id="find")
                make = gr.Button("Make the .h5ad with embedding and domains", elem_id="make")
                download = gr.DownloadButton("Download", interactive=False, elem_id="download")
            domains = _map("Domains", "domains", scale=2)
        gr.Markdown("## A gene")
        with gr.Row():
            with gr.Column(scale=1):
                gene = gr.Dropdown(
                    [], label="Gene: the most variable first; type to search", allow_custom_value=True, elem_id="gene"
                )
                with gr.Column(visible=model.has_decoder):
                    kind = gr.Radio(list(_REGIONS), value=SQUARE_REGION, label="Region to hide", elem_id="kind")
                    side = gr.Slider(1, 30, value=8, step=1, label="Side of the square, in sites", elem_id="side")
                    domain = gr.Dropdown([], label="Domain", elem_id="domain")
                    rebuild = gr.Button("Hide the region and predict it", variant="primary", elem_id="rebuild")
            measured = _map("Measured", "measured", scale=2)
        predicted = _map("Measured, hidden, predicted", "predicted", visible=model.has_decoder)
        gr.Markdown(_NO_DECODER, elem_id="no-decoder", visible=not model.has_decoder)

        opened = [facts, tissue, domains, download, gene, measured, domain, predicted]
        reading = upload.upload(does.open, upload, opened, show_progress_on=tissue, **_QUEUED)
        # Whatever came of it, the file itself is gone, and the next one may be dropped. (`then` waits for a success.)
        reading.success(lambda: None, None, upload, **_AT_ONCE)
        reading.failure(lambda: None, None, upload, **_AT_ONCE)
        find.click(does.find, [automatic, number], [domains, download, domain], show_progress_on=domains, **_QUEUED)
        automatic.change(lambda chosen: gr.Slider(interactive=not chosen), automatic, number, **_AT_ONCE)
        make.click(does.make, None, download, **_QUEUED)
        gene.input(does.show, gene, measured, **_QUEUED)
        rebuild.click(does.rebuild, [gene, kind, domain, side], predicted, **_QUEUED)
        blocks.unload(does.close)
    return blocks.queue(max_size=32)


class _Buttons:
    """What happens when something is dropped, chosen or pressed, in the session of who did it."""

    def __init__(self, model: LoadedModel, folder: Path) -> None:
        self.model, self.folder, self.slides = model, folder, OpenSlides()

    def open(self, path: str, request: gr.Request, progress: gr.Progress = _PROGRESS) -> list[Any]:
        with one_sentence(self.folder):
            progress(0.0, desc="Reading the slide")
            slide = open_slide(Path(path), self.model, self.folder)
            self.slides.put(request.session_hash, slide)
            first = slide.genes[0][1]
            maps = counts_map(slide), gene_map(slide, first)
            gene, domain = gr.Dropdown(slide.genes, value=first), gr.Dropdown([], value=None)
            return [table(slide), maps[0], None, gr.update(**_NO_FILE_YET), gene, maps[1], domain, None]

    def find(self, automatic: bool, number: int, request: gr.Request, progress: gr.Progress = _PROGRESS) -> list[Any]:
        with one_sentence(self.folder):
            slide = self.slides.get(request.session_hash)
            progress(0.0, desc="Looking at the slide")
            drawn = domain_map(slide, self.model, None if automatic else int(number))
            return [drawn, gr.update(**_NO_FILE_YET), gr.Dropdown(slide.domains, value=slide.domains[0])]

    def make(self, request: gr.Request) -> Any:
        with one_sentence(self.folder):
            path = write_result(self.slides.get(request.session_hash))
            label = f"Download {path.name} ({path.stat().st_size / 2**20:,.1f} MB)"
            return gr.DownloadButton(label, value=str(path), interactive=True)

    def show(self, gene: str | None, request: gr.Request) -> Any:
        with one_sentence(self.folder):
            return gene_map(self.slides.get(request.session_hash), gene)

    def rebuild(
        self,
        gene: str | None,
        kind: str,
        domain: str | None,
        side: int,
        request: gr.Request,
        progress: gr.Progress = _PROGRESS,
    ) -> Any:
        with one_sentence(self.folder):
            slide = self.slides.get(request.session_hash)
            progress(0.0, desc="Hiding the region")
            return reconstruction_maps(slide, self.model, gene, region(slide, kind, domain, int(side)))

    def close(self, request: gr.Request) -> None:
        self.slides.close(request.session_hash)


def _map(label: str, name: str, **options: Any) -> gr.Plot:
    return gr.Plot(label=label, show_label=False, format="png", elem_id=name, **options)


def table(slide: OpenSlide) -> str:
    """What `stimg inspect` tells of a slide, and what its reader warned of, as HTML; nothing of it is believed."""
    rows = [("slide", slide.name), *slide.inspection.lines().items(), *(("note", note) for note in slide.notes)]
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


@contextmanager
def one_sentence(folder: Path) -> Iterator[None]:
    """Show errors as one sentence on the page, without places of this machine; unexpected ones are logged here."""
    try:
        yield
    except gr.Error:
        raise
    except MemoryError:
        told = "There is not enough memory here for this slide: run stimg on the command line on a larger machine."
    except TOLD as error:
        told = sentence(error).replace(f"{folder}/", "").replace(str(folder), "the page's folder")
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        told = f"Something went wrong here ({type(error).__name__}): the page goes on, try another slide or choice."
    else:
        return
    # The page takes it for HTML.
    raise gr.Error(html.escape(told), duration=None, print_exception=False)
