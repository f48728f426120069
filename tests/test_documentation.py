"""The pages are true: their Python runs, their commands exist, links lead somewhere, what is made is up to date."""

import copy
import re
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from anndata import AnnData
from documents import PAGES, ROOT, anchors, blocks, check_command, command_lines, links, page, run_command, write_desk
from documents import no_further_than_parsing as no_further_than_parsing  # a fixture
from PIL import Image

from data_processing.phantom import PhantomTissue
from modeling_stimg import GeneVocabulary, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor, hub

# Libraries of others that pages go on with; their blocks have a test of their own.
FURTHER = ("import scanpy", "import squidpy")
RUN = ("README.md", "docs/howto.md", "docs/walkthrough.md", "docs/domains.md", "docs/hub.md")
# Pushing is tested against a Hub of its own in test_hub.py.
NOT_RUN = ("push_to_hub",)
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
FIGURES = sorted((ROOT / "docs" / "images").glob("walkthrough_*.png"))


@pytest.fixture(scope="module")
def named_tissue(tissue: PhantomTissue) -> PhantomTissue:
    """The phantom with two genes that pages name."""
    return replace(tissue, gene_names=("KRT8", "COL1A1", *tissue.gene_names[2:]))


@pytest.fixture(scope="module")
def named_slides(named_tissue: PhantomTissue) -> list[AnnData]:
    return [named_tissue.slide(seed, height=14, width=12, median_counts=200) for seed in range(3)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, config: STImageMAEConfig, named_slides: list[AnnData]) -> Path:
    """A tiny model in place of the published one, which knows how much there is of each gene."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = GeneVocabulary.from_slides(named_slides)
    counts = sum(np.asarray(adata.X.sum(axis=0)).ravel() for adata in named_slides)
    of_gene = np.zeros(len(vocabulary))
    of_gene[vocabulary.encode(named_slides[0].var_names)] = counts
    vocabulary = vocabulary.with_statistics(share=of_gene / of_gene.sum())
    config = copy.deepcopy(config)
    config.mask_unit = "mixed"
    torch.manual_seed(0)
    STImageMAEForPreTraining(config).save_pretrained(folder)
    STPatchProcessor(vocabulary, window_size=6, num_channels=32).save_pretrained(folder)
    return folder


@pytest.fixture
def desk(tmp_path: Path, published: Path, named_slides: list[AnnData], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which everything is that pages name."""
    write_desk(tmp_path, published, named_slides)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "PUBLISHED", tmp_path / "model_cards" / "stimg-mae-16x16x512")
    # Where transformers puts the code of a repository.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def execute(name: str, namespace: dict) -> int:
    """Run a page from top to bottom, Python and `stimg`; how many blocks and commands that were."""
    done = 0
    for block in blocks(page(name)):
        if block.language == "python":
            if not any(word in block.text for word in (*FURTHER, *NOT_RUN)):
                # Empty lines, so that a traceback shows the page's own line.
                exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
                done += 1
        elif block.language == "bash":
            for words in command_lines(block.text):
                # `stimg app` serves until it is stopped.
                ends = words[:2] != ["stimg", "app"] and ("cuda" not in words or torch.cuda.is_available())
                if words[0] == "stimg" and ends:
                    run = run_command(words)
                    assert run.returncode == 0, f"{name}: {' '.join(words)}: {run.stderr}"
                    done += 1
    return done


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUN)
def test_python_and_commands_of_a_page_run(name: str, desk: Path):
    namespace: dict = {"__name__": "page"}
    if name in ("docs/domains.md", "docs/hub.md"):  # they go on from the README
        exec(blocks(page("README.md"))[1].text, namespace)
        namespace["other"] = namespace["adata"].copy()
    assert execute(name, namespace) >= 1
    adata = namespace["adata"]
    if name == "docs/hub.md":
        assert namespace["embedding"].shape[0] == adata.n_obs
        return
    assert adata.obsm["X_stimg"].dtype == np.float32
    if name == "README.md":
        np.testing.assert_array_equal(namespace["embedding"], adata.obsm["X_stimg"])
        assert list(namespace["predicted"].index) == list(adata.obs_names[namespace["hole"]])
        assert len(namespace["cells"].obsm["X_stimg"]) == namespace["cells"].n_obs > namespace["bins"].n_obs


def test_no_page_with_python_is_left_out():
    assert {name for name in PAGES if any(block.language == "python" for block in blocks(page(name)))} == {
        *RUN,
        "docs/api.md",  # signatures
    }


@pytest.mark.filterwarnings("ignore")
def test_what_goes_on_with_other_libraries_runs(desk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    pytest.importorskip("scanpy", reason="scanpy is not installed: pip install 'stimg[interop]', about 300 MB")
    namespace: dict = {}
    exec(blocks(page("README.md"))[1].text, namespace)
    exec("from modeling_stimg import find_domains; find_domains(adata, n_domains=4)", namespace)
    for block in blocks(page("docs/howto.md")):
        if any(word in block.text for word in FURTHER):
            if "squidpy" in block.text:
                pytest.importorskip("squidpy", reason="squidpy is not installed, and in no extra: pip install squidpy")
            exec(block.text, namespace)


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_exist_with_their_options(name: str, desk: Path, no_further_than_parsing: None):
    for block in blocks(page(name)):
        if block.language == "bash":
            for words in command_lines(block.text):
                try:
                    check_command(words)
                except SystemExit:
                    pytest.fail(f"{name}: {' '.join(words)}: its parser refuses it")
                for word in words:  # files of the project
                    if re.fullmatch(r"(train|eval|data_processing|docs|model_cards)/[\w/]+\.(yaml|tsv|py)", word):
                        assert (ROOT / word).is_file(), f"{name}: {word}"


@pytest.mark.parametrize("line", ["stimg embed a.h5ad --output b.h5ad --no-such 1", "stimg sing a.h5ad", "make tea"])
def test_a_command_that_is_not_there_is_found_out(line: str, no_further_than_parsing: None):
    with pytest.raises(AssertionError, match=r"No such option|no command|no target tea"):
        check_command(line.split())


@pytest.mark.parametrize(
    "line", ["python eval/run_domain_detection.py --output_dir a --no_such 1", "python eval/run_domain_detection.py"]
)
def test_an_option_that_is_not_there_is_found_out(line: str, no_further_than_parsing: None):
    with pytest.raises(SystemExit):
        check_command(line.split())


def test_extras_that_pages_name_exist():
    import tomllib

    extras = tomllib.loads(page("pyproject.toml"))["project"]["optional-dependencies"]
    named = {name for text in map(page, PAGES) for found in re.findall(r"(?:stimg|\.)\[([\w,]+)\]", text)
             for name in found.split(",")}  # fmt: skip
    assert len(named) > 3
    assert named <= set(extras)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name: str):
    text = page(name)
    for link in links(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {link}"
    for mentioned in re.findall(r"\bdocs/\w+\.(?:md|py|ipynb)\b", text):
        assert (ROOT / mentioned).exists(), f"{name}: {mentioned}"


def test_file_map_names_every_module_and_no_other():
    """A room's line begins a room; names below it are files in it. Families are named by their pattern."""
    (map_of_files,) = re.findall(r"## The file map\n\n```\n(.*?)\n```", page("README.md"), re.DOTALL)
    rooms: dict[str, str] = {}
    room = ""
    for line in map_of_files.splitlines():
        if not line.startswith(" "):
            room = line.split("/")[0]
        rooms[room] = rooms.get(room, "") + line + "\n"
    for room, text in rooms.items():
        named = set(re.findall(r"\b(\w+\.(?:py|tsv|yaml|ipynb))\b", text))
        files = [p for p in (ROOT / room).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        there = {path.name for path in files}
        assert named <= there, f"{room}: {sorted(named - there)} are not there"
        if room not in ("tests", "docs"):
            folder = ROOT / room
            modules = {p.name for p in folder.glob("*.py")} - {"__init__.py"}
            assert modules <= named, f"{room}: {sorted(modules - named)} are missing in the file map"


def test_api_reference_is_what_the_docstrings_say():
    from docs.api import page as made

    assert made() == page("docs/api.md"), "a docstring has changed: python docs/api.py"


def test_figures_are_small_and_all_of_them_shown():
    from docs.figures import NAMES

    assert {path.name for path in FIGURES} == {f"walkthrough_{name}.png" for name in NAMES}
    for path in FIGURES:
        assert path.stat().st_size < 120_000, path.name
        assert any(f"images/{path.name}" in page(name) for name in PAGES), f"no page shows {path.name}"


def test_figures_are_drawn_by_their_command(published: Path, tmp_path: Path):
    from docs.figures import main

    main(model=str(published), output=tmp_path, only=["windows", "masks"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["walkthrough_masks.png", "walkthrough_windows.png"]
    with Image.open(tmp_path / "walkthrough_masks.png") as figure:
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 8


def test_notebook_is_committed_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_notebook_runs(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("STIMG_MODEL", str(published))
    monkeypatch.delenv("STIMG_SLIDE", raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Seconds on an idle machine; a busy one is no failure.
    where = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=1800, startup_timeout=600, resources=where)
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not any(output.output_type == "error" for output in outputs)
