"""`reconstruction="residual"`: what other sites say of a gene, against plain loops, and what it must not see."""

import numpy as np
import pytest
import torch

from modeling_stimg import STImageMAEConfig, STImageMAEForPreTraining
from modeling_stimg.layers_stimg import STImageMAELocalMean


def residual_model(config: STImageMAEConfig, **fields) -> STImageMAEForPreTraining:
    torch.manual_seed(0)
    model = STImageMAEForPreTraining(type(config)(**{**config.to_dict(), "reconstruction": "residual", **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "local_mean" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def batch(images, processor) -> dict[str, torch.Tensor]:
    batch = dict(processor(images["staggered"], num_windows=3, seed=1, return_tensors="pt"))
    del batch["spot_index"]
    batch["noise"] = torch.rand(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(4))
    return batch


def plain_local_mean(module, hidden, observed, values, visible) -> np.ndarray:
    query, key = (layer(hidden).detach().double().numpy() for layer in (module.query, module.key))
    found = np.zeros(values.shape)
    for b, site in np.argwhere(observed.numpy()):
        others = [v for v in np.flatnonzero(observed[b]) if v != site]
        scores = np.array([query[b, site] @ key[b, v] * module.scaling for v in others])
        attention = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        for gene in range(values.shape[2]):
            seen = visible[b, others, gene].numpy()
            if seen.any():
                shown = values[b, others, gene].numpy()
                found[b, site, gene] = (attention * shown)[seen].sum() / attention[seen].sum()
    return found


def test_local_mean_is_that_of_plain_loops(config):
    torch.manual_seed(1)
    module = STImageMAELocalMean(config)
    hidden, observed = torch.randn(2, 9, config.decoder_hidden_size), torch.rand(2, 9) < 0.7
    values, visible = torch.randn(2, 9, 5), torch.rand(2, 9, 5) < 0.6
    visible &= observed[:, :, None]
    visible[0, :, 3] = False  # nothing of this gene can be seen
    with torch.no_grad():
        found = module(hidden, observed, values, visible).numpy()
    np.testing.assert_allclose(found, plain_local_mean(module, hidden, observed, values, visible), atol=1e-5)
    assert not found[0, :, 3].any()
    assert not found[~observed.numpy()].any(), "empty sites"


def test_windows_with_few_spots_are_predicted_as_when_all_sites_are_worked_on(config, batch):
    """Sites are gathered where that saves work, which must not show."""
    model = residual_model(config)
    few = {key: value.clone() for key, value in batch.items()}
    few["pixel_mask"] &= torch.rand(few["pixel_mask"].shape, generator=torch.Generator().manual_seed(1)) < 0.4
    few["pixel_values"] *= few["pixel_mask"][:, None]
    full = {key: value[:1].clone() for key, value in few.items()}
    full["pixel_mask"][:] = True  # beside it, nothing can be gathered
    together = {key: torch.cat([few[key], full[key]]) for key in few}
    with torch.no_grad():
        apart, beside = model(**few), model(**together)
    torch.testing.assert_close(apart.reconstruction, beside.reconstruction[:-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(apart.mask, beside.mask[:-1])


@pytest.mark.parametrize("mask_unit", ["entry", "site", "mixed"])
def test_what_is_masked_changes_no_bit_of_the_prediction(config, batch, mask_unit: str):
    model = residual_model(config, mask_unit=mask_unit)
    with torch.no_grad():
        before = model(**batch)
        batch["pixel_values"] = torch.where(before.mask, 1e3, batch["pixel_values"])
        after = model(**batch)
    assert before.mask.any()
    assert torch.equal(before.reconstruction, after.reconstruction)
    assert before.loss < after.loss


def test_values_that_can_be_seen_move_predictions_at_other_sites(config, batch):
    """Also of a gene whose own embedding is zero, of which the product can say nothing."""
    model = residual_model(config)
    gene = int(batch["gene_ids"][0, 0])
    with torch.no_grad():
        model.get_input_embeddings().weight[gene] = 0
        reconstruction = model(**batch).reconstruction[0, 0][batch["pixel_mask"][0]]
    seen = batch["pixel_values"][0, 0][batch["pixel_mask"][0]]
    assert reconstruction.abs().sum() > 0
    assert reconstruction.min() >= seen.min() - 1e-5
    assert reconstruction.max() <= seen.max() + 1e-5


def test_a_product_model_has_no_such_part(config, model):
    assert model.decoder.local_mean is None
    assert not any("local_mean" in name for name in model.state_dict())


def test_a_lone_spot_and_a_window_with_nothing_visible_stay_finite(config, batch):
    model = residual_model(config)
    alone = {key: value.clone() for key, value in batch.items()}
    alone["pixel_mask"][:] = False
    alone["pixel_mask"][:, 2, 2] = True
    for given in (alone, {**batch, "mask_ratio": 1.0}):
        outputs = model.train()(**given)
        outputs.loss.backward()
        assert outputs.reconstruction.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.zero_grad()


def test_it_survives_files_and_asks_for_values(config, batch, tmp_path):
    model = residual_model(config)
    model.save_pretrained(tmp_path)
    again = STImageMAEForPreTraining.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).reconstruction, model(**batch).reconstruction)
        encoded = model.stimg(**{k: v for k, v in batch.items() if k != "noise"}).last_hidden_state
        with pytest.raises(ValueError, match="pass pixel_values and visible"):
            model.reconstruct(encoded, batch["gene_ids"], batch["pixel_mask"])


def test_an_unknown_reconstruction_is_refused(config):
    with pytest.raises(Exception, match="expected one of \\('product', 'residual'\\)"):
        type(config)(**{**config.to_dict(), "reconstruction": "mean"})
