"""The `stimg` command as a user meets it: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from anndata import AnnData

from modeling_stimg import STImageMAEModel, STPatchProcessor, embed_slide, plot_domains
from modeling_stimg.plotting import save_figure


def stimg(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "modeling_stimg.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, slides: dict[str, AnnData]) -> Path:
    path = tmp_path_factory.mktemp("cli") / "slide.h5ad"
    slides["staggered"].write_h5ad(path)
    return path


def test_embed_writes_the_slide_with_an_embedding_and_a_map(
    slide: Path, checkpoint: Path, slides: dict[str, AnnData], tmp_path: Path
):
    run = stimg("embed", slide, "--model", checkpoint, "--output", tmp_path / "a.h5ad", "--plot", tmp_path / "a.png")
    assert run.returncode == 0, run.stderr
    assert "matched 120 of 120 genes" in run.stderr
    written, original = anndata.read_h5ad(tmp_path / "a.h5ad"), slides["staggered"]
    assert list(written.obs_names) == list(original.obs_names)
    assert (written.X != original.X).nnz == 0
    here = original.copy()
    embed_slide(
        here, STImageMAEModel.from_pretrained(checkpoint), STPatchProcessor.from_pretrained(checkpoint), progress=False
    )
    np.testing.assert_allclose(written.obsm["X_stimg"], here.obsm["X_stimg"], atol=1e-5)
    assert written.obs["stimg_domain"].nunique() == 7
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "a.png"]

    assert stimg("embed", slide, "--model", checkpoint, "--output", tmp_path / "b.h5ad").returncode == 0
    again = anndata.read_h5ad(tmp_path / "b.h5ad")
    np.testing.assert_array_equal(again.obsm["X_stimg"], written.obsm["X_stimg"])


def test_inspect_tells_what_a_slide_holds(slide: Path, checkpoint: Path, slides: dict[str, AnnData]):
    run = stimg("inspect", slide, "--model", checkpoint)
    assert run.returncode == 0, run.stderr
    assert f"spots:           {slides['staggered'].n_obs}\n" in run.stdout
    assert "staggered, 14 x 12 sites" in run.stdout
    assert "matched 120 of 120 genes" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "missing.h5ad", "--model", "{model}", "--output", "{out}/x.h5ad"], "missing.h5ad"),
        (["embed", "{slide}", "--model", "{out}", "--output", "{out}/x.h5ad"], "holds no preprocessor_config.json"),
        (["embed", "{slide}", "--model", "./nowhere", "--output", "{out}/x.h5ad"], "There is no model folder"),
        (["embed", "{slide}", "--model", "{model}", "--output", "{out}/x.csv"], "ends in .h5ad"),
        (["embed", "{slide}", "--model", "{model}", "--output", "{out}/no/x.h5ad"], "does not exist"),
        (
            ["embed", "{slide}", "--model", "{model}", "--output", "{out}/x.h5ad", "--readout", "all"],
            "readout is 'all'",
        ),
        (["embed", "{slide}", "--model", "{model}", "--output", "{out}/x.h5ad", "--batch-size", "0"], "batch-size"),
        (
            ["embed", "{slide}", "--model", "{model}", "--output", "{out}/x.h5ad", "--device", "cuda:99"],
            "cannot be used",
        ),
        (
            ["embed", "{slide}", "--model", "{model}", "--output", "{out}/x.h5ad", "--plot", "{out}/map"],
            "no image file",
        ),
        (
            [
                "embed",
                "{slide}",
                "--model",
                "{model}",
                "--output",
                "{out}/x.h5ad",
                "--plot",
                "{out}/m.png",
                "--num-domains",
                "9999",
            ],
            "--num-domains is 9999",
        ),
        (["inspect", "missing.h5ad"], "missing.h5ad"),
    ],
)
def test_mistakes_end_in_one_sentence_status_2_and_no_files(
    slide: Path, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
):
    run = stimg(*(a.format(slide=slide, model=checkpoint, out=tmp_path) for a in arguments))
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_normalised_slide_is_refused(slide: Path, checkpoint: Path, slides: dict[str, AnnData], tmp_path: Path):
    adata = slides["staggered"].copy()
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "half.h5ad")
    run = stimg("embed", tmp_path / "half.h5ad", "--model", checkpoint, "--output", tmp_path / "x.h5ad")
    assert run.returncode == 2
    assert "non-integers" in run.stderr
    assert not (tmp_path / "x.h5ad").exists()


@pytest.mark.parametrize("kind", ["classes", "numbers", "missing"])
def test_maps_are_drawn_for_classes_numbers_and_missing_labels(slides: dict[str, AnnData], kind: str, tmp_path: Path):
    adata = slides["staggered"]
    values = {
        "classes": adata.obs["label"],
        "numbers": adata.obs["array_row"].to_numpy(float),
        "missing": [None if i % 3 else "a" for i in range(adata.n_obs)],
    }[kind]
    ax = plot_domains(adata, values, title="a map")
    assert ax.get_title() == "a map"
    (discs,) = ax.collections
    assert len(discs.get_offsets()) == adata.n_obs
    if kind != "numbers":
        texts = [t.get_text() for t in ax.get_legend().get_texts()]
        assert texts == (["a", "no label"] if kind == "missing" else sorted(set(values)))
    save_figure(ax.figure, tmp_path / "map.png")
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
