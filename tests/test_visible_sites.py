"""Encoding only the sites that matter: the results of encoding all, fewer tokens, and nothing seen that is hidden."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stimg import STImageMAEConfig, STImageMAEForPreTraining, visible_sites_stimg
from modeling_stimg.configuration_stimg import MASK_UNITS
from modeling_stimg.masking_stimg import draw_mask
from modeling_stimg.visible_sites_stimg import select_sites

SIZE, CHANNELS, GENES = 6, 8, 30
CONFIG = STImageMAEConfig(
    window_size=SIZE,
    num_channels=CHANNELS,
    vocab_size=GENES + 1,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=24,
)


def make_model(mask_unit: str, **fields) -> STImageMAEForPreTraining:
    """Random weights, larger than usual, so that differences show."""
    config = copy.deepcopy(CONFIG)
    config.mask_unit = mask_unit
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = STImageMAEForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_input_embeddings().weight[config.pad_token_id] = 0
    return model


def make_batch(seed: int, shares: tuple[float, ...] = (0.3, 0.5, 0.0)) -> dict[str, torch.Tensor]:
    """A window for each share of observed sites, with the noise of its mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(shares), CHANNELS, SIZE, SIZE)
    pixels = torch.rand(len(shares), SIZE, SIZE, generator=generator)
    return {
        "pixel_values": torch.randn(shape, generator=generator),
        "gene_ids": torch.stack([torch.randperm(GENES, generator=generator)[:CHANNELS] for _ in shares]),
        "pixel_mask": pixels < torch.tensor(shares)[:, None, None],
        "noise": torch.rand(shape, generator=generator),
    }


def results(model: STImageMAEForPreTraining, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, reconstruction and all gradients of one step."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": output.loss.detach(), "reconstruction": output.reconstruction.detach(), **gradients}


def encoder_tokens(model: STImageMAEForPreTraining, **inputs) -> int:
    """Tokens of a window in the encoder's last layer."""
    seen = []
    hook = model.stimg.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    model(**inputs)
    hook.remove()
    return seen[-1]


@given(st.integers(0, 2**31), st.floats(0, 1), st.booleans())
@settings(deadline=None, max_examples=60)
def test_gathered_tokens_find_back_to_their_sites(seed: int, share: float, gather: bool):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(3, 20, generator=generator) < share
    sites = torch.randn(3, 20, 4, generator=generator)
    selection = select_sites(kept, gather)
    tokens = selection.gather(sites)
    assert torch.equal(selection.scatter(tokens), sites * kept[..., None])
    most = max(int(kept.sum(1).max()), 1)
    assert tokens.shape[1] == (most if gather and most <= 20 * 15 / 16 else 20)
    if selection.keys is not None:
        for window in range(3):
            attended = tokens[window][selection.keys[window]]
            expected = sites[window][kept[window]] if kept[window].any() else tokens[window]
            assert torch.equal(attended, expected)


def test_full_windows_take_the_plain_path():
    kept = torch.ones(2, 9, dtype=torch.bool)
    selection = select_sites(kept)
    assert selection.rows is None
    assert selection.keys is None
    kept[0, 3] = False
    assert select_sites(kept).rows is None, "one window is full: nothing to gain"
    kept[1, 3:5] = False
    assert select_sites(kept).rows.shape == (2, 8)


@pytest.mark.parametrize("mask_unit", MASK_UNITS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gathering_changes_no_result(mask_unit: str, attention: str):
    model = make_model(mask_unit)
    model.set_attn_implementation(attention)

    @given(st.integers(0, 2**31), st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.8]), min_size=1, max_size=4))
    @settings(deadline=None, max_examples=8)
    def check(seed: int, shares: list[float]) -> None:
        batch = make_batch(seed, tuple(shares))
        gathered = results(model, batch)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(visible_sites_stimg, "WORTH_GATHERING", -1.0)
            assert encoder_tokens(model, **batch) == SIZE**2
            plain = results(model, batch)
        for name, value in plain.items():
            torch.testing.assert_close(gathered[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")

    check()


def test_only_observed_sites_are_encoded():
    model, batch = make_model("entry"), make_batch(1)
    assert encoder_tokens(model, **batch) == batch["pixel_mask"].flatten(1).sum(1).max() < SIZE**2
    hidden = model.stimg(batch["pixel_values"], batch["gene_ids"], batch["pixel_mask"]).last_hidden_state
    assert not hidden[~batch["pixel_mask"].flatten(1)].any()
    output = model(**batch)
    assert not output.reconstruction.transpose(0, 1)[:, ~batch["pixel_mask"]].any(), "0 at empty sites"


def test_site_masks_keep_sites_out_of_the_encoder_and_other_masks_do_not():
    batch = make_batch(2, (1.1, 1.1))
    kept = SIZE**2 - round(0.3 * SIZE**2)
    assert encoder_tokens(make_model("site"), **batch) == kept
    assert encoder_tokens(make_model("entry"), **batch) == SIZE**2
    assert encoder_tokens(make_model("mixed"), **batch) == SIZE**2
    given_mask = {k: v for k, v in batch.items() if k != "noise"}
    square = torch.zeros_like(batch["pixel_values"], dtype=torch.bool)
    square[:, :, 1:4, 1:4] = True
    assert encoder_tokens(make_model("site"), **given_mask, bool_masked_entries=square) == SIZE**2 - 9
    square[:, 0] = False
    assert encoder_tokens(make_model("site"), **given_mask, bool_masked_entries=square) == SIZE**2


def test_unmeasured_channels_do_not_keep_a_site_in():
    model, batch = make_model("site"), make_batch(2, (1.1, 1.1))
    batch["channel_mask"] = torch.arange(CHANNELS).expand(2, -1) < 5
    mask = torch.zeros_like(batch["pixel_values"], dtype=torch.bool)
    mask[:, :5, 2, :4] = True
    assert encoder_tokens(model, **batch, bool_masked_entries=mask) == SIZE**2 - 4


def test_mask_token_stands_for_sites_that_did_not_enter():
    model, batch = make_model("site").eval(), make_batch(3, (0.9, 0.6))
    noise = batch.pop("noise")
    channels = torch.ones_like(batch["gene_ids"], dtype=torch.bool)
    mask = draw_mask(noise, channels, batch["pixel_mask"], 0.4, "site")
    output = model.stimg(**batch, bool_masked_entries=mask)
    hidden = mask[:, 0].flatten(1)
    token = model.stimg.embeddings.mask_token
    assert torch.equal(output.last_hidden_state[hidden], token.expand(int(hidden.sum()), -1))
    seen = (batch["pixel_mask"].flatten(1) & ~hidden)[..., None]
    mean = (output.last_hidden_state * seen).sum(1) / seen.sum(1)
    torch.testing.assert_close(output.pooler_output, mean)


def test_the_rest_of_a_window_is_encoded_as_if_site_masked_sites_were_not_there():
    model, batch = make_model("site").eval(), make_batch(4, (0.9, 0.7))
    noise = batch.pop("noise")
    channels = torch.ones_like(batch["gene_ids"], dtype=torch.bool)
    mask = draw_mask(noise, channels, batch["pixel_mask"], 0.4, "site")
    masked = model.stimg(**batch, bool_masked_entries=mask).last_hidden_state
    absent = {**batch, "pixel_mask": batch["pixel_mask"] & ~mask[:, 0]}
    seen = absent["pixel_mask"].flatten(1)
    torch.testing.assert_close(masked[seen], model.stimg(**absent).last_hidden_state[seen])


@pytest.mark.parametrize("mask_unit", MASK_UNITS)
def test_prediction_keeps_every_bit_whatever_stands_under_the_mask(mask_unit: str):
    model, batch = make_model(mask_unit), make_batch(5, (0.9, 0.5, 0.0))
    before = model(**batch)
    for value in (77.0, -1e6, float("nan")):
        changed = {**batch, "pixel_values": batch["pixel_values"].masked_fill(before.mask, value)}
        assert torch.equal(model(**changed).reconstruction, before.reconstruction)


def test_prediction_of_a_site_masked_site_depends_on_its_neighbours():
    model, batch = make_model("site"), make_batch(6, (1.1,))
    before = model(**batch)
    hidden = before.mask[0, 0]
    batch["pixel_values"] = torch.where(before.mask, batch["pixel_values"], batch["pixel_values"].flip(1))
    after = model(**batch)
    moved = (after.reconstruction - before.reconstruction)[0][:, hidden].abs().amax(0)
    assert (moved > 1e-4).all()


@pytest.mark.parametrize("mask_unit", MASK_UNITS)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shares", [(1.1, 1.1), (0.5, 0.0), (0.0, 0.0)])
def test_every_parameter_gets_a_gradient(mask_unit: str, mask_ratio: float, shares: tuple[float, ...]):
    """Whatever is masked: distributed training stops at a parameter without one."""
    model = make_model(mask_unit)
    output = model(**make_batch(7, shares), mask_ratio=mask_ratio)
    output.loss.backward()
    assert output.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("mask_unit", ["entry", "site"])
def test_gradient_checkpointing_changes_no_result(mask_unit: str):
    model, batch = make_model(mask_unit).train(), make_batch(8)
    plain = results(model, batch)
    model.gradient_checkpointing_enable()
    for name, value in results(model, batch).items():
        torch.testing.assert_close(value, plain[name])


@pytest.mark.parametrize("mask_unit", ["entry", "site"])
def test_half_precision_agrees(mask_unit: str):
    model, batch = make_model(mask_unit), make_batch(9)
    exact = results(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(**batch)
    rough.loss.backward()
    torch.testing.assert_close(rough.loss, exact["loss"], rtol=0.05, atol=0.05)
    half = model.to(torch.bfloat16)
    values = {k: v.bfloat16() if k == "pixel_values" else v for k, v in batch.items()}
    torch.testing.assert_close(half(**values).loss, exact["loss"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("mask_unit", ["entry", "site"])
def test_compiled_model_agrees(mask_unit: str):
    """Traced, not generated: the graph breaks where the number of tokens is chosen."""
    model = make_model(mask_unit)
    compiled = torch.compile(model, backend="aot_eager")
    for seed, shares in enumerate([(1.1, 1.1, 1.1), (0.5, 0.3, 0.0), (0.7, 0.8, 0.2)]):
        batch = make_batch(seed, shares)
        expected = results(model, batch)
        model.zero_grad()
        output = compiled(**batch)
        output.loss.backward()
        torch.testing.assert_close(output.reconstruction.detach(), expected["reconstruction"])
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


def test_exported_encoder_agrees():
    model, batch = make_model("entry").stimg.eval(), make_batch(10)
    del batch["noise"]
    program = torch.export.export(model, (), batch, strict=False)
    expected = model(**batch).last_hidden_state
    torch.testing.assert_close(program.module()(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("mask_unit", ["entry", "site"])
def test_recorded_layers_have_all_sites(mask_unit: str):
    model, batch = make_model(mask_unit), make_batch(11)
    model.set_attn_implementation("eager")
    plain = model(**batch)
    recorded = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in recorded.hidden_states] == [(3, SIZE**2, 32)] * 3
    assert [a.shape for a in recorded.attentions] == [(3, 4, SIZE**2, SIZE**2)] * 2
    torch.testing.assert_close(recorded.reconstruction, plain.reconstruction)
