"""Maps that show what they say: values and colours at the right spots, on axes of the user's."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from modeling_stimg import pl
from modeling_stimg.palette import CLASS_COLOURS, class_colours
from modeling_stimg.plotting import spot_pitch


@pytest.fixture
def slide(slides: dict[str, AnnData]) -> AnnData:
    adata = slides["staggered"].copy()
    adata.obs["stimg_domain"] = pd.Categorical((np.arange(adata.n_obs) % 3).astype(str))
    adata.obsm["X_stimg"] = np.random.default_rng(0).normal(size=(adata.n_obs, 6)).astype(np.float32)
    return adata


def face_colours(ax) -> list[str]:
    return [to_hex(colour) for colour in ax.collections[0].get_facecolor()]


def test_domains_take_the_colours_that_the_slide_tells(slide: AnnData):
    own = ["#112233", "#445566", "#778899"]
    assert face_colours(pl.domains(slide)) == [class_colours(3)[i % 3].lower() for i in range(slide.n_obs)]
    slide.uns["stimg_domain_colors"] = np.array(own)
    ax = Figure().subplots()
    assert pl.domains(slide, ax=ax, title="mine") is ax
    assert face_colours(ax) == [own[i % 3] for i in range(slide.n_obs)]
    assert ax.get_title() == "mine"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1", "2"]
    slide.uns["stimg_domain_colors"] = own[:2]  # of an earlier run with fewer domains
    assert face_colours(pl.domains(slide))[2] == class_colours(3)[2].lower()
    slide.obs.loc[slide.obs_names[4], "stimg_domain"] = None
    assert pl.domains(slide).get_legend().get_texts()[-1].get_text() == "no label"
    with pytest.raises(ValueError, match="obs has no 'domain'"):
        pl.domains(slide, "domain")


def test_colours_of_many_domains_are_all_different():
    assert len({colour.upper() for colour in CLASS_COLOURS}) == 25
    assert class_colours(27)[25:] == class_colours(2)


def test_genes_are_drawn_by_any_name_as_log_values_of_counts(slide: AnnData):
    slide.var["gene_name"] = [f"symbol {i}" for i in range(slide.n_vars)]
    dense = slide.X.toarray().astype(float)
    expected = np.log1p(dense[:, 7] / np.maximum(dense.sum(1), 1) * 1e4)
    for name in (slide.var_names[7], "symbol 7"):
        ax = pl.gene(slide, name)
        np.testing.assert_allclose(ax.collections[0].get_array(), expected)
        assert ax.get_title() == name
    slide.layers["scaled"] = dense - 0.5
    np.testing.assert_allclose(pl.gene(slide, "symbol 7", layer="scaled").collections[0].get_array(), dense[:, 7] - 0.5)
    slide.X = dense - 0.25
    np.testing.assert_allclose(pl.gene(slide, "symbol 7").collections[0].get_array(), dense[:, 7] - 0.25)
    for given, message in ((("nothing",), "has no gene 'nothing'"), (("symbol 7", "x"), "has no layer 'x'")):
        with pytest.raises(ValueError, match=message):
            pl.gene(slide, *given)


def test_embeddings_are_drawn_as_colours_or_by_component(slide: AnnData):
    near = slide.obsm["X_stimg"].copy()
    near[1] = near[0]
    slide.obsm["X_stimg"] = near
    colours = pl.embedding(slide).collections[0].get_facecolor()
    np.testing.assert_allclose(colours[0], colours[1], atol=1e-9)
    assert len(np.unique(colours, axis=0)) > slide.n_obs // 2
    first = pl.embedding(slide, component=0).collections[0].get_array()
    others = [pl.embedding(slide, component=i).collections[0].get_array().var() for i in range(1, 6)]
    assert first.var() > max(others)
    with pytest.raises(ValueError, match="has 6 components"):
        pl.embedding(slide, component=6)


def test_reconstructions_show_what_was_measured_hidden_and_predicted(slide: AnnData):
    hidden = np.arange(slide.n_obs) % 5 == 0
    genes = [str(slide.var_names[2]), "of another slide"]
    values = np.random.default_rng(1).random((hidden.sum(), 2)).astype(np.float32)
    predicted = pd.DataFrame(values, index=slide.obs_names[hidden], columns=genes)[::-1]
    axes = pl.reconstruction(slide, predicted)
    measured, shown, filled = (ax.collections[0].get_array() for ax in axes)
    np.testing.assert_allclose(measured, pl.expression(slide, genes[0]))
    assert (np.ma.getmaskarray(shown) == hidden).all()
    np.testing.assert_allclose(filled[hidden], values[:, 0])
    np.testing.assert_allclose(filled[~hidden], measured[~hidden])
    assert len({ax.collections[0].get_clim() for ax in axes}) == 1
    own = Figure().subplots(1, 3)
    axes = pl.reconstruction(slide, predicted, genes[1], ax=own)
    assert list(axes) == list(own)
    assert np.ma.getmaskarray(axes[0].collections[0].get_array()).all(), "not measured on this slide"
    np.testing.assert_allclose(axes[2].collections[0].get_array()[hidden], values[:, 1])
    with pytest.raises(ValueError, match="expected a prediction for this very slide"):
        pl.reconstruction(slide[1:], predicted)


def test_a_scale_bar_where_the_pitch_is_known(slide: AnnData):
    assert spot_pitch(slide) is None
    ax = pl.domains(slide)
    assert not ax.lines
    assert not ax.texts
    slide.uns["spatial"] = {"lib": {"scalefactors": {"spot_diameter_fullres": 89.4}}}
    assert spot_pitch(slide) == 100
    ax = pl.domains(slide)
    (bar,), (text,) = ax.lines, ax.texts
    micrometres = np.ptp(bar.get_xdata()) / 2 * 100  # neighbours are two columns apart
    assert text.get_text() == f"{micrometres:g} µm"
    assert 100 <= micrometres <= 500
    assert bar.get_ydata()[0] > ax.collections[0].get_offsets()[:, 1].max()
    (text,) = pl.domains(slide, pitch=2000).texts
    assert text.get_text().endswith(" mm")
    slide.uns["spatial"]["lib"]["scalefactors"]["bin_size_um"] = 8
    assert spot_pitch(slide) == 8


def test_slides_whose_positions_have_other_names_are_drawn(slide: AnnData):
    offsets = pl.domains(slide).collections[0].get_offsets()
    slide.obs = slide.obs.rename(columns={"array_row": "array_y", "array_col": "array_x"})
    np.testing.assert_array_equal(pl.domains(slide).collections[0].get_offsets(), offsets)
