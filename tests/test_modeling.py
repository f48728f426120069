"""The model: masks with exact counts, tokens that keep their scale, empty sites and padding without a say, Eq. 8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stimg import STImageMAEConfig, STImageMAEForPreTraining
from modeling_stimg.masking_stimg import draw_mask
from modeling_stimg.positions_stimg import (
    Locality,
    rotary_embeddings,
    rotary_frequencies,
    rotate,
    sine_cosine_positions,
)


@pytest.fixture
def batch(images, processor) -> dict[str, torch.Tensor]:
    """Four windows, some sites of them empty, the last two channels of the last window padded."""
    batch = dict(processor(images["staggered"], num_windows=4, seed=1, return_tensors="pt"))
    del batch["spot_index"]
    batch["gene_ids"][3, -2:] = processor.vocabulary.pad_id
    batch["channel_mask"][3, -2:] = False
    batch["pixel_values"][3, -2:] = 0
    assert not batch["pixel_mask"].all()
    return batch


def noise_like(values: torch.Tensor, seed: int = 0, levels: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(values.shape, generator=generator)
    return noise if levels is None else (noise * levels).floor() / levels


@given(st.integers(0, 2**31), st.floats(0, 1), st.sampled_from([None, 4]))
@settings(deadline=None, max_examples=60)
def test_entry_masks_hold_the_lowest_noise_and_an_exact_count(seed: int, ratio: float, levels: int | None):
    """Also when many noises are equal (`levels`)."""
    generator = torch.Generator().manual_seed(seed)
    noise = noise_like(torch.empty(3, 5, 4, 4), seed, levels)
    channels = torch.rand(3, 5, generator=generator) < 0.7
    pixels = torch.rand(3, 4, 4, generator=generator) < 0.7
    mask = draw_mask(noise, channels, pixels, ratio, "entry")
    maskable = channels[:, :, None, None] & pixels[:, None]
    assert not (mask & ~maskable).any()
    for b in range(3):
        n = int(maskable[b].sum())
        assert int(mask[b].sum()) == round(ratio * n)
        if 0 < mask[b].sum() < n:
            assert noise[b][mask[b]].max() <= noise[b][maskable[b] & ~mask[b]].min()
        # Equal noises go by position, and a window's mask does not depend on its batch.
        order = torch.argsort(noise[b][maskable[b]], stable=True)[: round(ratio * n)]
        assert set(mask[b][maskable[b]].nonzero().flatten().tolist()) == set(order.tolist())


@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_site_masks_hide_whole_sites_by_channel_0(seed: int, ratio: float):
    noise = noise_like(torch.empty(2, 5, 4, 4), seed)
    channels = torch.ones(2, 5, dtype=torch.bool)
    channels[:, 3] = False
    pixels = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask = draw_mask(noise, channels, pixels, ratio, "site")
    assert not mask[:, 3].any()
    assert torch.equal(mask[:, 0], mask[:, 4])
    for b in range(2):
        n = int(pixels[b].sum())
        chosen = mask[b, 0]
        assert int(chosen.sum()) == round(ratio * n)
        if 0 < chosen.sum() < n:
            assert noise[b, 0][chosen].max() <= noise[b, 0][pixels[b] & ~chosen].min()


def test_mixed_masks_hide_sites_and_then_entries_of_the_others_evenly_over_channels():
    noise = noise_like(torch.empty(400, 6, 5, 5))
    channels, pixels = torch.ones(400, 6, dtype=torch.bool), torch.ones(400, 5, 5, dtype=torch.bool)
    mask = draw_mask(noise, channels, pixels, 0.4, "mixed")
    whole = mask.all(1)
    assert (mask.flatten(1).sum(1) == 10 * 6 + round(0.4 * 15 * 6)).all()
    assert (whole.flatten(1).sum(1) >= 10).all()
    share = (mask & ~whole[:, None]).float().mean((0, 2, 3))
    assert share.std() < 0.02 * share.mean(), "channel 0, which chose the sites, is masked as often as the others"


def test_loss_is_the_mean_over_windows_of_each_windows_masked_error(model: STImageMAEForPreTraining, batch):
    noise = noise_like(batch["pixel_values"])
    noise[1] = torch.rand(1)
    batch["pixel_mask"][1] = False  # a window without a maskable entry does not count
    output = model(**batch, noise=noise)
    errors = []
    for b in range(4):
        masked = output.mask[b]
        if masked.any():
            errors.append(((output.reconstruction[b] - batch["pixel_values"][b])[masked] ** 2).mean())
    assert len(errors) == 3
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())
    halves = [model(**{k: v[i] for k, v in batch.items()}, noise=noise[i]).loss for i in (slice(0, 1), slice(2, 4))]
    torch.testing.assert_close(output.loss, (halves[0] + 2 * halves[1]) / 3)


def test_no_mask_anywhere_gives_a_loss_of_zero_that_can_be_trained_on(model: STImageMAEForPreTraining, batch):
    loss = model(**batch, mask_ratio=0.0).loss
    assert loss == 0
    loss.backward()


def test_reconstruction_is_a_dot_product_with_gene_embeddings(model: STImageMAEForPreTraining, batch):
    encoded = model.stimg(**batch).last_hidden_state
    prediction = model.reconstruct(encoded, batch["gene_ids"], batch["pixel_mask"])
    doubled = model.get_input_embeddings().weight.data[batch["gene_ids"][0, 4]].clone()
    others = batch["gene_ids"].clone()
    others[:, 0] = batch["gene_ids"][0, 4]
    again = model.reconstruct(encoded, others, batch["pixel_mask"])
    torch.testing.assert_close(again[0, 0], prediction[0, 4])
    torch.testing.assert_close(again[:, 1:], prediction[:, 1:])
    assert doubled.abs().sum() > 0
    assert not prediction[3, -2:].any(), "the padding gene's embedding is zero"


def test_masked_values_have_no_say(model: STImageMAEForPreTraining, batch):
    """Whatever stands at a masked entry: prediction and features keep every bit."""
    mask = draw_mask(noise_like(batch["pixel_values"]), batch["channel_mask"], batch["pixel_mask"], 0.4, "mixed")
    before = model(**batch, bool_masked_entries=mask)
    batch["pixel_values"] = torch.where(mask, torch.full_like(batch["pixel_values"], 77.0), batch["pixel_values"])
    after = model(**batch, bool_masked_entries=mask)
    assert torch.equal(before.reconstruction, after.reconstruction)
    assert before.loss != after.loss


def test_masked_site_enters_as_the_mask_token(model: STImageMAEForPreTraining, batch):
    site = tuple(batch["pixel_mask"][0].nonzero()[0].tolist())
    mask = torch.zeros_like(batch["pixel_values"], dtype=torch.bool)
    mask[0, :, site[0], site[1]] = True
    hidden = model.stimg(**batch, bool_masked_entries=mask).last_hidden_state
    with torch.no_grad():
        model.stimg.embeddings.mask_token.add_(torch.randn_like(model.stimg.embeddings.mask_token))
    moved = model.stimg(**batch, bool_masked_entries=mask).last_hidden_state
    assert not torch.allclose(hidden[0], moved[0])
    torch.testing.assert_close(hidden[1:], moved[1:])


def test_nothing_is_masked_unless_a_mask_is_given(model: STImageMAEForPreTraining, batch):
    none = torch.zeros_like(batch["pixel_values"], dtype=torch.bool)
    assert torch.equal(
        model.stimg(**batch).last_hidden_state, model.stimg(**batch, bool_masked_entries=none).last_hidden_state
    )


def test_empty_sites_neither_attend_nor_are_attended_to(model: STImageMAEForPreTraining, batch):
    hidden = model.stimg(**batch)
    empty = ~batch["pixel_mask"]
    assert not hidden.last_hidden_state[empty.flatten(1)].any()
    batch["pixel_values"] = batch["pixel_values"].masked_fill(empty[:, None], 5.0)
    again = model.stimg(**batch)
    torch.testing.assert_close(again.last_hidden_state, hidden.last_hidden_state)
    observed = (~empty).flatten(1)[..., None]
    mean = (hidden.last_hidden_state * observed).sum(1) / observed.sum(1)
    torch.testing.assert_close(hidden.pooler_output, mean)


def test_window_without_any_spot_stays_finite(model: STImageMAEForPreTraining, batch):
    batch["pixel_mask"][0] = False
    output = model(**batch, noise=noise_like(batch["pixel_values"]))
    assert output.loss.isfinite()
    assert output.reconstruction.isfinite().all()


def test_padding_channels_and_their_order_have_no_say(model: STImageMAEForPreTraining, batch):
    hidden = model.stimg(**batch).last_hidden_state
    wide = dict(batch)
    pad = torch.full((4, 9), model.config.pad_token_id)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    wide["gene_ids"] = torch.cat([batch["gene_ids"], pad], 1)[:, order]
    wide["channel_mask"] = torch.cat([batch["channel_mask"], torch.zeros_like(pad).bool()], 1)[:, order]
    wide["pixel_values"] = torch.cat([batch["pixel_values"], torch.randn(4, 9, 6, 6)], 1)[:, order]
    torch.testing.assert_close(model.stimg(**wide).last_hidden_state, hidden, atol=2e-5, rtol=1e-4)


def test_masks_default_to_all_sites_and_all_but_padding(model: STImageMAEForPreTraining, batch):
    explicit = {**batch, "pixel_mask": torch.ones_like(batch["pixel_mask"])}
    implicit = {k: batch[k] for k in ("pixel_values", "gene_ids")}
    assert torch.equal(model.stimg(**explicit).last_hidden_state, model.stimg(**implicit).last_hidden_state)


def test_token_scale_does_not_depend_on_the_number_of_visible_genes(model: STImageMAEForPreTraining):
    """Before layer normalisation, which would hide it: 64 genes of one kind, all, half or an eighth of them visible."""
    embeddings = model.stimg.embeddings
    embeddings.layernorm = torch.nn.Identity()
    values, ids = torch.ones(1, 64, 2, 2), torch.full((1, 64), 5)
    every = embeddings(values, ids, torch.ones(1, 64, dtype=torch.bool))
    torch.testing.assert_close(every[0, 0], 64 * embeddings.gene_embeddings.weight[5])
    for visible in (32, 8):
        channels = (torch.arange(64) < visible)[None]
        masked = (torch.arange(64) >= visible)[None, :, None, None].expand(1, 64, 2, 2)
        by_padding = embeddings(values, ids, channels)
        by_mask = embeddings(values, ids, torch.ones_like(channels), masked)
        torch.testing.assert_close(by_padding, every)
        torch.testing.assert_close(by_mask, every)


@pytest.mark.parametrize("radius", [0, 1, 2, 9])
def test_smoothed_targets_are_means_over_observed_sites(config: STImageMAEConfig, batch, radius: int):
    """The loss of a model that predicts 0 is the mean square of what it should have predicted."""
    model = STImageMAEForPreTraining(STImageMAEConfig(**{**config.to_dict(), "target_smoothing": radius})).eval()
    with torch.no_grad():
        model.decoder.project.weight.zero_()
        model.decoder.project.bias.zero_()
        output = model(**batch, noise=noise_like(batch["pixel_values"]))
    seen, values, losses = batch["pixel_mask"], batch["pixel_values"], []
    for b in range(len(values)):
        squares = []
        for channel, row, col in output.mask[b].nonzero().tolist():
            place = (slice(max(row - radius, 0), row + radius + 1), slice(max(col - radius, 0), col + radius + 1))
            squares.append(values[b, channel][place][seen[b][place]].mean() ** 2)
        losses.append(torch.stack(squares).mean())
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_any_window_size_and_number_of_channels_work(model: STImageMAEForPreTraining):
    for channels, size in ((1, 1), (3, 9), (50, 2)):
        ids = torch.arange(channels)[None].expand(2, -1)
        output = model(pixel_values=torch.rand(2, channels, size, size), gene_ids=ids, mask_ratio=0.5)
        assert output.reconstruction.shape == (2, channels, size, size)


def test_slide_positions_use_coordinates(config: STImageMAEConfig, batch):
    config = STImageMAEConfig(**{**config.to_dict(), "position_embedding_type": "slide"})
    torch.manual_seed(0)
    model = STImageMAEForPreTraining(config).eval()
    here = model.stimg(**batch).last_hidden_state
    moved = model.stimg(**{**batch, "coordinates": batch["coordinates"] * 0.5}).last_hidden_state
    assert not torch.allclose(here, moved)
    with pytest.raises(ValueError, match="pass coordinates"):
        model.stimg(**{k: v for k, v in batch.items() if k != "coordinates"})


@pytest.mark.parametrize("kind", ["rotary", "window"])
def test_rotary_positions_tell_how_sites_lie_to_each_other_and_not_where(config: STImageMAEConfig, kind: str):
    """A piece of tissue at two places of a window."""
    torch.manual_seed(0)
    model = STImageMAEForPreTraining(STImageMAEConfig(**{**config.to_dict(), "position_embedding_type": kind})).eval()
    ids, tissue = torch.arange(12)[None], torch.randn(1, 12, 5, 4)
    mask = torch.rand(tissue.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:, :, 2, 1] = True  # a site that is known from its place among others alone

    def read(tissue: torch.Tensor, mask: torch.Tensor, top: int, left: int) -> torch.Tensor:
        values, hidden = torch.zeros(1, 12, 9, 9), torch.zeros(1, 12, 9, 9, dtype=torch.bool)
        place = (..., slice(top, top + 5), slice(left, left + 4))
        values[place], hidden[place] = tissue, mask
        seen = torch.zeros(1, 9, 9, dtype=torch.bool)
        seen[place] = True
        encoded = model.stimg(values, ids, seen, bool_masked_entries=hidden).last_hidden_state
        parts = encoded, model.reconstruct(encoded, ids, seen, pixel_values=values, visible=~hidden).flatten(2).mT
        return torch.cat([part.unflatten(1, (9, 9))[:, place[1], place[2]] for part in parts], -1)

    here = read(tissue, mask, 0, 0)
    assert torch.allclose(read(tissue, mask, 4, 5), here, atol=1e-5) == (kind == "rotary")


@pytest.mark.parametrize("head_dim", [4, 16, 32, 64])
def test_rotary_heads_start_as_gaussians_of_growing_width(head_dim: int):
    """Attention of queries and keys without content, over a window of 16 x 16 sites, from its middle."""
    locality = Locality(6, head_dim)
    with torch.no_grad():
        locality.strength.copy_(locality.start())
    sites = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))[None]
    turned = rotate(locality().expand(1, -1, 256, -1), rotary_embeddings(sites, head_dim))
    weights = (turned @ turned.mT / head_dim**0.5).softmax(-1)[0, :, 8 * 16 + 8].view(6, 16, 16)
    offsets = torch.arange(16.0) - 8
    deviations = (weights * offsets[:, None] ** 2).sum((1, 2)).sqrt()
    wanted = Locality.NEAREST * (Locality.FARTHEST / Locality.NEAREST) ** (torch.arange(3) / 5)
    # From about 4 sites on the window cuts them off.
    torch.testing.assert_close(deviations[:3], wanted, rtol=0.15, atol=0.05)
    assert (deviations.diff() > 0).all()
    torch.testing.assert_close(weights, weights.mT)


def test_queries_and_keys_turn_as_complex_numbers_do_by_angles_that_all_layers_share(config, batch, monkeypatch):
    """Against every layer's angles computed for itself, from the positions."""
    torch.manual_seed(0)
    rotary = STImageMAEConfig(**{**config.to_dict(), "position_embedding_type": "rotary"})
    model = STImageMAEForPreTraining(rotary).eval()
    shared, computed = model(**batch, noise=noise_like(batch["pixel_values"])), []

    def positions_themselves(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, int]:
        computed.append(head_dim)
        return positions, head_dim

    def turn(heads: torch.Tensor, given: tuple[torch.Tensor, int]) -> torch.Tensor:
        angles = (given[0][..., None] * rotary_frequencies(given[1])).flatten(-2)[:, None]
        turned = torch.complex(*heads.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    monkeypatch.setattr("modeling_stimg.layers_stimg.rotary_embeddings", positions_themselves)
    monkeypatch.setattr("modeling_stimg.layers_stimg.rotate", turn)
    plain = model(**batch, noise=noise_like(batch["pixel_values"]))
    torch.testing.assert_close(plain.reconstruction, shared.reconstruction)
    assert computed == [8, 4], "once for the encoder, once for the decoder"


def test_position_codes_tell_all_sites_of_a_large_window_apart():
    sites = torch.stack(torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij"), -1).flatten(0, 1)
    codes = sine_cosine_positions(sites.float(), 32)
    assert torch.cdist(codes, codes).fill_diagonal_(9).min() > 0.1


def test_half_precision_autocast_agrees(model: STImageMAEForPreTraining, batch):
    noise = noise_like(batch["pixel_values"])
    exact = model(**batch, noise=noise).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(**batch, noise=noise).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30}, "not a multiple of num_attention_heads"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "not a multiple of 4"),
        ({"mask_unit": "gene"}, "mask_unit is 'gene'"),
        ({"mask_ratio": 1.5}, "mask_ratio is 1.5"),
        ({"position_embedding_type": "learned"}, "expected one of"),
        ({"pad_token_id": 10**6}, "pad_token_id"),
    ],
)
def test_bad_configs_get_one_clear_sentence(fields: dict, message: str):
    with pytest.raises(Exception, match=message):
        STImageMAEConfig(**fields)


def test_mismatched_shapes_get_one_clear_sentence(model: STImageMAEForPreTraining):
    with pytest.raises(ValueError, match=r"expected \(B, C, S, S\) and \(B, C\)"):
        model(pixel_values=torch.rand(2, 3, 4, 4), gene_ids=torch.zeros(2, 4, dtype=torch.long))
