"""The page of stimg without a browser: what it does with uploads, slides and sessions."""

import gzip
import os
import runpy
import socket
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from command_line import stimg
from slide_files import make_slide, write_space_ranger

from modeling_stimg import (
    STImageMAEModel,
    STPatchProcessor,
    app,
    app_uploads,
    embed_slide,
    find_domains,
    read_slide,
    reconstruct_region,
)
from modeling_stimg.app_slides import (
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
from modeling_stimg.app_uploads import check_hdf5, read_upload
from modeling_stimg.embedding import measured_expression
from modeling_stimg.loading import LoadedModel, load_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(str(checkpoint))


@pytest.fixture(scope="module")
def whole(slides: dict[str, AnnData], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an .h5ad."""
    path = tmp_path_factory.mktemp("whole") / "slide.h5ad"
    slides["staggered"].write_h5ad(path)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the app."""
    (tmp_path / "app").mkdir()
    return tmp_path / "app"


def upload(folder: Path, name: str, content: bytes) -> Path:
    """A file as the server keeps it: in a folder of its own."""
    path = folder / "d1f2" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def slide(folder: Path, whole: bytes, loaded: LoadedModel) -> OpenSlide:
    return open_slide(upload(folder, "A tissue.h5ad", whole), loaded, folder)


def zipped(folder: Path, path: Path, top: str = "") -> Path:
    """A zip of all files of a folder, below `top`."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{top}{file.relative_to(folder).as_posix()}")
    return path


# What is dropped


@pytest.mark.parametrize("matrix", ["h5", "mtx.gz"])
@pytest.mark.parametrize("top", ["", "outs/", "Sample 1/outs/"])
def test_a_zipped_space_ranger_folder_is_the_same_slide_wherever_it_lies_in_the_zip(
    tmp_path: Path, folder: Path, matrix: str, top: str
):
    outs = write_space_ranger(tmp_path / "outs", make_slide(), matrix=matrix)
    path = zipped(outs, tmp_path / "run.zip", top)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._outs", b"what a Mac adds")
    expected, found = read_slide(outs), read_upload(path, folder)
    assert (found.X != expected.X).nnz == 0
    assert list(found.obs_names) == list(expected.obs_names)
    np.testing.assert_array_equal(found.obs[["array_row", "array_col"]], expected.obs[["array_row", "array_col"]])
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("../evil.h5", b"x", "lies outside of the folder"),
        ("/tmp/evil.h5", b"x", "lies outside of the folder"),
        ("outs/link", "../../../../etc/passwd", "points outside"),
        ("outs/filtered_feature_bc_matrix.h5", b"0" * 3_000_000, "the most that is allowed"),
        ("outs/readme.txt", b"x", "not a Space Ranger output folder"),
        ("outs/zarr.json", b"{}", "not a Space Ranger output folder"),
    ],
)
def test_unsafe_and_strange_zips_are_refused_in_a_sentence_and_leave_nothing(
    tmp_path: Path, folder: Path, loaded: LoadedModel, member: str, content: bytes | str, message: str
):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(member)
        info.create_system, info.compress_type = 3, zipfile.ZIP_DEFLATED
        info.external_attr = (0o120777 if isinstance(content, str) else 0o100644) << 16
        archive.writestr(info, content)
    given = upload(folder, "bad one.zip", path.read_bytes())
    with pytest.raises(ValueError, match=message) as told:
        open_slide(given, loaded, folder, max_bytes=2_000_000)
    sentence = str(told.value)
    assert "bad one.zip" in sentence
    assert "\n" not in sentence
    assert str(folder) not in sentence
    assert not list(folder.iterdir())
    assert not (tmp_path / "evil.h5").exists()


def test_a_store_and_tables_that_grow_are_refused(tmp_path: Path, folder: Path):
    outs = write_space_ranger(tmp_path / "outs", make_slide(), matrix="mtx.gz")
    (outs / "filtered_feature_bc_matrix" / "more.tsv.gz").write_bytes(gzip.compress(b"0" * 2_000_000))
    with pytest.raises(ValueError, match=r"run\.zip: the tables of counts hold more than 1\.0 MiB"):
        read_upload(zipped(outs, tmp_path / "run.zip"), folder, max_bytes=2**20)
    (outs / "zarr.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.zip: a zarr store"):
        read_upload(zipped(outs, tmp_path / "run.zip"), folder)


@pytest.mark.parametrize("kind", ["external link", "external array", "virtual array", "endless array", "soft link"])
def test_an_hdf5_file_that_reaches_beyond_itself_is_refused(
    tmp_path: Path, folder: Path, whole: bytes, loaded: LoadedModel, kind: str
):
    secret = tmp_path / "secret"
    secret.write_bytes(b"\1" * 80)
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["values"] = np.ones(10)
    path = upload(folder, "slide.h5ad", whole)
    with h5py.File(path, "a") as file:
        place = file.require_group("uns/deep")
        if kind == "external link":
            place["secret"] = h5py.ExternalLink(str(other), "/values")
        elif kind == "external array":
            place.create_dataset("secret", (10,), "f8", external=[(str(secret), 0, 80)])
        elif kind == "virtual array":
            layout = h5py.VirtualLayout((10,), "f8")
            layout[:] = h5py.VirtualSource(str(other), "values", (10,))
            place.create_virtual_dataset("secret", layout)
        elif kind == "endless array":
            place.create_dataset("secret", (2**44,), "f8", chunks=(1024,))
        else:
            place["again"] = h5py.SoftLink("/X")
    if kind == "soft link":  # within the file: nothing is wrong with that
        check_hdf5(path)
        return
    message = "takes 131,072.0 GiB in memory" if kind == "endless array" else "keeps 'uns/deep/secret' in another file"
    with pytest.raises(ValueError, match=message):
        open_slide(path, loaded, folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.h5ad", slice(0, 20_000), r"cut\.h5ad is damaged, cut short or not HDF5"),
        ("text.h5ad", b"spot\tgene\n", r"text\.h5ad is damaged, cut short or not HDF5"),
        ("empty.h5ad", b"", r"empty\.h5ad is damaged"),
        ("cut.zip", b"PK\3\4 and no more", r"cut\.zip is cut short, damaged or no archive"),
        ("no.zip", b"not a zip", r"no\.zip is cut short, damaged or no archive"),
        ("counts.tsv", b"spot\tgene\n", r"counts\.tsv is neither \.h5ad nor \.zip"),
    ],
)
def test_bad_files_end_in_a_sentence_and_are_removed(
    folder: Path, whole: bytes, loaded: LoadedModel, name: str, content: bytes | slice, message: str
):
    path = upload(folder, name, whole[content] if isinstance(content, slice) else content)
    with pytest.raises(ValueError, match=message) as told:
        open_slide(path, loaded, folder)
    assert "\n" not in str(told.value)
    assert str(folder) not in str(told.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", ["no counts", "no gene known", "no positions"])
def test_slides_that_a_model_cannot_take_are_refused(
    folder: Path, slides: dict[str, AnnData], loaded: LoadedModel, tmp_path: Path, kind: str
):
    adata = slides["square"].copy()
    if kind == "no counts":
        adata.X = adata.X * 0.5
    elif kind == "no gene known":
        adata.var_names = [f"foreign {i}" for i in range(adata.n_vars)]
    else:
        adata = AnnData(adata.X, var=adata.var)
    adata.write_h5ad(tmp_path / "s.h5ad")
    message = {"no counts": "non-integers", "no gene known": "of 120 genes", "no positions": "no array positions"}[kind]
    with pytest.raises(ValueError, match=message):
        open_slide(upload(folder, "s.h5ad", (tmp_path / "s.h5ad").read_bytes()), loaded, folder)
    assert not list(folder.iterdir())


# What is done with a slide


def test_an_open_slide_tells_what_inspect_tells(slide: OpenSlide, slides: dict[str, AnnData], folder: Path):
    assert slide.inspection.lines()["spots"] == f"{slides['staggered'].n_obs}"
    assert slide.inspection.lines()["vocabulary"] == "120 of its genes measured, 0 columns unmatched"
    assert slide.notes == []
    assert not (folder / "d1f2").exists()  # in memory from here on
    (axes, _) = counts_map(slide).axes  # with a colour bar
    np.testing.assert_array_equal(axes.collections[0].get_array(), np.asarray(slides["staggered"].X.sum(1)).ravel())
    variances = np.log1p(slides["staggered"].X.toarray() / slides["staggered"].X.sum(1) * 1e4).var(0)
    expected = slides["staggered"].var_names[np.argsort(-np.asarray(variances).ravel())]
    assert [value for _, value in slide.genes][:20] == list(expected[:20])


def test_notes_tell_what_the_reader_warned_of_and_genes_have_their_symbols(
    folder: Path, slides: dict[str, AnnData], loaded: LoadedModel, tmp_path: Path
):
    adata = slides["square"].copy()
    adata.layers["counts"], adata.X = adata.X.copy(), adata.X * 0.5
    adata.var["gene_name"] = symbols = list(adata.var_names)
    adata.var_names = [f"id {i}" for i in range(adata.n_vars)]
    adata.write_h5ad(tmp_path / "s.h5ad")
    opened = open_slide(upload(folder, "s.h5ad", (tmp_path / "s.h5ad").read_bytes()), loaded, folder)
    assert any("counts" in note and "taken" in note for note in opened.notes)
    shown, name = opened.genes[0]
    assert name == f"id {symbols.index(shown)}"


def test_the_download_holds_what_embed_slide_and_find_domains_give(
    slide: OpenSlide, loaded: LoadedModel, checkpoint: Path, slides: dict[str, AnnData]
):
    with pytest.raises(ValueError, match="no embedding yet"):
        write_result(slide)
    figure = domain_map(slide, loaded, 4)
    assert figure.axes[0].get_title() == "A tissue: 4 domains"
    expected = slides["staggered"].copy()
    embed_slide(
        expected,
        STImageMAEModel.from_pretrained(checkpoint),
        STPatchProcessor.from_pretrained(checkpoint),
        progress=False,
    )
    find_domains(expected, 4)
    path = write_result(slide)
    assert path.parent == slide.folder
    assert [p.name for p in slide.folder.iterdir()] == ["A tissue_stimg.h5ad"]
    written = read_h5ad(path)
    np.testing.assert_array_equal(written.obsm["X_stimg"], expected.obsm["X_stimg"])
    assert list(written.obs["stimg_domain"]) == list(expected.obs["stimg_domain"])
    assert (written.X != slides["staggered"].X).nnz == 0
    assert written.uns["stimg"]["domains"]["stimg_domain"]["n_domains"] == 4

    # Other domains, of the embedding that is there.
    before = slide.adata.obsm["X_stimg"]
    domain_map(slide, loaded, None)
    assert slide.adata.obsm["X_stimg"] is before
    find_domains(expected, None)
    assert list(read_h5ad(write_result(slide)).obs["stimg_domain"]) == list(expected.obs["stimg_domain"])


def test_regions_are_squares_around_the_middle_or_domains(slide: OpenSlide, loaded: LoadedModel):
    with pytest.raises(ValueError, match="no domains yet"):
        region(slide, DOMAIN_REGION, None, 4)
    domain_map(slide, loaded, 3)
    np.testing.assert_array_equal(region(slide, DOMAIN_REGION, "1", 4), slide.adata.obs["stimg_domain"] == "1")
    with pytest.raises(ValueError, match="no domain 'x': choose one of 0, 1, 2"):
        region(slide, DOMAIN_REGION, "x", 4)
    with pytest.raises(ValueError, match="expected 'spots of one domain'"):
        region(slide, "elsewhere", None, 4)
    sizes = [region(slide, SQUARE_REGION, None, side).sum() for side in (1, 3, 4, 40)]
    assert sizes[0] == 1
    assert 6 <= sizes[1] <= 9
    assert sizes[1] < sizes[2] <= 16
    assert sizes[3] == slide.adata.n_obs
    inside = region(slide, SQUARE_REGION, None, 4)
    rows = slide.adata.obs["array_row"][inside]
    assert rows.max() - rows.min() == 3
    assert abs(rows.mean() - slide.adata.obs["array_row"].mean()) < 2


def test_a_gene_is_shown_measured_and_predicted(slide: OpenSlide, loaded: LoadedModel):
    gene = slide.genes[3][1]
    spots = region(slide, SQUARE_REGION, None, 5)
    assert gene_map(slide, gene).axes[0].get_title() == gene
    measured, hidden, predicted = reconstruction_maps(slide, loaded, gene, spots).axes[:3]
    values = measured.collections[0].get_array()
    counts = slide.adata.X.toarray()
    expected = np.log1p(counts[:, slide.adata.var_names.get_loc(gene)] / counts.sum(1) * 1e4)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_array_equal(hidden.collections[0].get_array().mask, spots)
    asked = reconstruct_region(slide.adata, loaded.network, loaded.processor, spots, genes=[gene], progress=False)
    np.testing.assert_allclose(predicted.collections[0].get_array()[spots], asked[gene], rtol=1e-6)
    for name in (None, ""):
        with pytest.raises(ValueError, match="No gene is chosen"):
            gene_map(slide, name)
    with pytest.raises(ValueError, match="no gene 'NOTHING'"):
        gene_map(slide, "NOTHING")
    with pytest.raises(ValueError, match="holds all 157 array positions"):
        reconstruction_maps(slide, loaded, gene, np.ones(len(spots), dtype=bool))


def test_measured_values_of_a_gene_that_the_slide_lacks_are_unknown(
    slides: dict[str, AnnData], processor: STPatchProcessor
):
    names = list(slides["square"].var_names[:2])
    part = slides["square"][:, 1:].copy()
    measured = measured_expression(part, processor, names)
    assert measured[names[0]].isna().all()
    counts = part.X.toarray()
    np.testing.assert_allclose(measured[names[1]], np.log1p(counts[:, 0] / counts.sum(1) * 1e4), rtol=1e-5)


def test_an_encoder_alone_gives_domains_and_says_that_it_cannot_reconstruct(
    slide: OpenSlide, checkpoint: Path, processor: STPatchProcessor, tmp_path: Path
):
    STImageMAEModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    encoder, whole = load_model(str(tmp_path / "encoder")), load_model(str(checkpoint))
    assert (encoder.name, encoder.has_decoder, whole.has_decoder) == ("encoder", False, True)
    state = whole.network.base_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.network.state_dict().items())
    domain_map(slide, encoder, 3)
    with pytest.raises(ValueError, match="encoder was saved without its decoder"):
        reconstruction_maps(slide, encoder, slide.genes[0][1], region(slide, SQUARE_REGION, None, 3))


# Sessions


def opened(folder: Path, name: str) -> OpenSlide:
    (folder / name).mkdir()
    (folder / name / "result.h5ad").write_bytes(b"x")
    return OpenSlide(name, AnnData(np.ones((2, 2))), None, [], [], folder / name)


def test_every_session_has_its_own_slide_and_leaves_nothing(folder: Path):
    slides = OpenSlides(capacity=2)
    for session in ("a", "b"):
        slides.put(session, opened(folder, session))
    assert slides.get("a").name == "a"
    slides.put("b", opened(folder, "b2"))
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b2"]
    slides.get("a")
    slides.put("c", opened(folder, "c"))  # too many: the longest unused is closed
    with pytest.raises(ValueError, match="No slide is open here"):
        slides.get("b")
    slides.close("a")
    slides.close("a")
    assert sorted(p.name for p in folder.iterdir()) == ["c"]
    with pytest.raises(ValueError, match="No slide is open here"):
        slides.get("nobody")


def test_a_slide_that_rests_is_closed(folder: Path):
    slides = OpenSlides(idle_seconds=100)
    slides.put("a", opened(folder, "a"))
    slides.get("a").used -= 99
    slides.get("a").used -= 101
    with pytest.raises(ValueError, match="No slide is open here"):
        slides.get("a")
    assert not list(folder.iterdir())


# Around the page


def test_without_gradio_the_command_says_what_to_install(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        monkeypatch.setenv(name, "")
    run = stimg("app", "--model", checkpoint)
    assert run.returncode == 2
    assert run.stderr == "error: The page needs Gradio: pip install 'stimg[app]'.\n"
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert Path(os.environ["GRADIO_TEMP_DIR"]).stat().st_mode & 0o077 == 0
    Path(os.environ["GRADIO_TEMP_DIR"]).rmdir()


def test_addresses_that_cannot_be_listened_to_are_told_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = stimg("app", "--model", "nothing", "--port", str(taken.getsockname()[1]), "--quiet")
    assert run.returncode == 2
    assert run.stderr.startswith(
        f"error: The page cannot be at port {run.args[-2]} of 127.0.0.1 (Address already in use)"
    )
    run = stimg("app", "--model", "nothing", "--host", "256.1.1.1")
    assert run.returncode == 2
    assert run.stderr.startswith("error: The page cannot be at port 7860 of 256.1.1.1 (")


def test_the_command_passes_its_options_on_and_shares_nothing_of_itself(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(app, "launch", lambda *args, **options: calls.append((args, options)))
    assert stimg("app").returncode == 0
    expected = {"revision": None, "device": None, "host": "127.0.0.1", "port": 7860, "share": False, "quiet": False}
    assert calls == [((None,), expected)]
    run = stimg("app", "--model", "m", "--port", "9000", "--host", "0.0.0.0", "--share", "--quiet", "--device", "cpu")
    assert run.returncode == 0
    assert calls[1][0] == ("m",)
    assert calls[1][1] == expected | {"port": 9000, "host": "0.0.0.0", "share": True, "quiet": True, "device": "cpu"}


def test_errors_on_the_page_are_one_sentence_without_markup_or_places(
    tmp_path: Path, capsys: pytest.CaptureFixture, slide: OpenSlide
):
    gr = pytest.importorskip("gradio", reason="the page needs gradio")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modeling_stimg import app_page

    def said(error: BaseException) -> str:
        with pytest.raises(gr.Error) as told, app_page.one_sentence(tmp_path):
            raise error
        return told.value.message

    assert (
        said(ValueError(f"{tmp_path}/ab/x.h5ad holds\n <b>2</b> genes")) == "ab/x.h5ad holds &lt;b&gt;2&lt;/b&gt; genes"
    )
    assert "not enough memory" in said(MemoryError())
    assert capsys.readouterr().err == ""
    assert said(KeyError("inside")).startswith("Something went wrong here (KeyError)")
    assert "Traceback" in capsys.readouterr().err  # of the server alone
    slide.notes.append("<script>x</script>")
    assert "<td>&lt;script&gt;x&lt;/script&gt;</td>" in app_page.table(slide)


def test_the_space_asks_for_what_the_package_asks_for_and_launches_its_model(monkeypatch: pytest.MonkeyPatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [line for line in (ROOT / "space/requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert asked == project["dependencies"] + project["optional-dependencies"]["app"]
    pinned = next(p for p in (ROOT / "constraints.txt").read_text().splitlines() if p.startswith("gradio=="))
    assert f"sdk_version: {pinned.removeprefix('gradio==')}\n" in (ROOT / "space/README.md").read_text()
    calls = []
    monkeypatch.setattr(app, "launch", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setenv("STIMG_MODEL", "ORG/NAME@v1")
    runpy.run_path(str(ROOT / "space/app.py"), run_name="__main__")
    assert calls == [(("ORG/NAME@v1",), {"host": "0.0.0.0", "port": 7860})]


def test_limits_are_what_the_documentation_says():
    text = (ROOT / "docs/app.md").read_text()
    assert f"{app_uploads.MAX_UPLOAD // 2**30} GiB" in text
    assert f"{app_uploads.MAX_UNPACKED // 2**30} GiB" in text
