"""What watches a pretraining, and what it tells afterwards: held-out slides, probe, finite losses, model card."""

import dataclasses
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from huggingface_hub import ModelCard
from small_pretraining import ROOT, logged_values, same_weights, train_corpus, train_here
from transformers import TrainingArguments, default_data_collator

from data_processing.corpus import SlideRecord, find_slides, load_pretraining, read_slides, slide_images
from data_processing.image_views import ImageView
from data_processing.open_corpus import Corpus
from data_processing.window_dataset import WindowDataset
from modeling_stimg import STImageMAEForPreTraining, STPatchProcessor
from train import callbacks
from train.arguments import (
    CorpusArguments,
    ModelArguments,
    PretrainingArguments,
    ProbeArguments,
    parse_arguments,
)
from train.run_pretrain import VALIDATION_SEED
from train.validation import choose_validation


def slide_files(config: Path) -> str:
    return str(config.parent / "slides" / "*.h5ad")


# ---------------------------------------------------------------- held-out slides


@pytest.fixture(scope="module")
def held_out(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on one slide; evaluated on the other, and probed on both."""
    return train_here(
        small_config,
        tmp_path_factory.mktemp("held_out") / "model",
        validation_slides=["square"],
        validation_windows=20,
        eval_steps=5,
        probe_slides=[slide_files(small_config)],
        probe_steps=8,
    )


@pytest.fixture(scope="module")
def without(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the same slide alone, watched by nothing."""
    return train_here(small_config, tmp_path_factory.mktemp("without") / "model", exclude=["square"])


def test_held_out_slide_and_probe_leave_no_trace_in_the_model(held_out: Path, without: Path):
    assert same_weights(held_out, without)
    assert logged_values(held_out, "loss") == logged_values(without, "loss"), "at every step, probed or not"
    assert len(logged_values(held_out, "loss")) == 12
    assert (held_out / "genes.json").read_bytes() == (without / "genes.json").read_bytes()


def test_watching_disturbs_no_dropout(small_config: Path, tmp_path: Path):
    fields = {"exclude": ["square"], "hidden_dropout_prob": 0.1, "max_steps": 6}
    plain = train_here(small_config, tmp_path / "plain", **fields)
    fields |= {"probe_slides": [slide_files(small_config)], "probe_steps": 2, "eval_steps": 2}
    del fields["exclude"]
    watched = train_here(small_config, tmp_path / "watched", validation_slides=["square"], **fields)
    assert same_weights(watched, plain)
    other = train_here(small_config, tmp_path / "other", exclude=["square"], max_steps=6)
    assert not same_weights(other, plain), "dropout was on"


def test_evaluation_loss_is_that_of_fixed_windows_of_the_held_out_slide(held_out: Path, small_config: Path):
    assert len(logged_values(held_out, "eval_loss")) == 3, "at steps 5 and 10, and at the end"
    processor = STPatchProcessor.from_pretrained(held_out)
    slide = read_slides(find_slides([slide_files(small_config)], exclude=["staggered"]))
    windows = WindowDataset(slide_images(slide, processor), processor, 20, seed=VALIDATION_SEED)
    model = STImageMAEForPreTraining.from_pretrained(held_out)
    with torch.no_grad():
        loss = model(**default_data_collator([windows[i] for i in range(20)])).loss
    assert logged_values(held_out, "eval_loss")[-1] == pytest.approx(float(loss), rel=1e-5)


def test_pretraining_tells_held_out_slides_apart(held_out: Path, slides):
    told = json.loads((held_out / "pretraining.json").read_text())
    assert [slide["name"] for slide in told["slides"]] == ["staggered"]
    assert [(slide["name"], slide["num_spots"]) for slide in told["validation_slides"]] == [
        ("square", slides["square"].n_obs)
    ]
    assert [record.name for record in load_pretraining(held_out)[0]] == ["staggered"]


def test_share_is_drawn_by_patient_and_by_seed():
    records = [SlideRecord(f"s{i:02}", f"p{i // 3}", 10) for i in range(18)] + [SlideRecord("lone", "", 5)]
    drawn = {seed: choose_validation(records, ["0.3"], seed) for seed in range(6)}
    for names in drawn.values():
        assert names in (sorted(names), [*sorted(set(names) - {"lone"}), "lone"])
        assert 5 <= len(names) <= 7, "30 % of 19"
        patients = Counter(record.patient for record in records if record.name in names and record.patient)
        assert set(patients.values()) == {3}, "whole patients"
    assert drawn[0] == choose_validation(records[::-1], ["0.3"], 0)[::-1], "whatever the order of the slides"
    assert len(set(map(tuple, drawn.values()))) > 1
    assert not {"s00", "s05"} & set(choose_validation(records, ["0.5"], 0, seen_before=["s00", "s05"]))


@pytest.mark.parametrize(
    ("wanted", "seen", "message"),
    [
        (["s7"], [], r"Validation slides \['s7'\] are not among the 3 slides"),
        (["s0", "s1", "s2"], [], "All 3 slides would be held out"),
        (["1.5"], [], "expected names of slides, or a share between 0 and 1"),
        (["s1"], ["s1"], r"\['s1'\] were seen by the model that is gone on from"),
        (["0.3"], ["s0", "s1", "s2"], "2 of them seen before"),
    ],
)
def test_slides_that_cannot_be_held_out_are_named(wanted: list[str], seen: list[str], message: str):
    records = [SlideRecord("s0", "a", 1), SlideRecord("s1", "b", 1), SlideRecord("s2", "b", 1)]
    with pytest.raises(ValueError, match=message):
        choose_validation(records, wanted, 0, seen)


# ---------------------------------------------------------------- probe


def test_probe_is_that_of_the_evaluation(held_out: Path, small_config: Path):
    """Before the first step, at step 8 and at the end: mean over slides, by the functions of eval/ on the model."""
    from data_processing.splits import encode_labels, slide_labels, spot_splits
    from eval.probes import knn_probe, score

    history = json.loads((held_out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "probe_ari" in entry] == [0, 8, 12]
    for folder, told in ((held_out / "untrained", 0), (held_out, -1)):
        processor = STPatchProcessor.from_pretrained(folder)
        model = STImageMAEForPreTraining.from_pretrained(folder)
        values = []
        for name, adata in read_slides(find_slides([slide_files(small_config)])).items():
            (image,) = slide_images({name: adata}, processor)
            labels, _ = encode_labels(slide_labels(adata))
            splits = spot_splits(labels)
            predicted = knn_probe(model.embed(image, processor)[image.spot_of_obs], labels, splits, 0)
            values.append(score(labels, predicted, splits)["ari"][0])
        assert len(values) == 2
        assert logged_values(held_out, "probe_ari")[told] == pytest.approx(np.mean(values), abs=1e-6)
    assert (held_out / "probe.png").stat().st_size > 1000


def test_probe_without_labels_is_an_error_before_anything_is_written(small_config: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="The probe slide square: obs has no column 'domain'"):
        train_here(small_config, tmp_path / "m", probe_slides=[slide_files(small_config)], probe_label_key="domain")
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------- finite


def spoil(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have the windows of one slide hold a value that is not finite."""
    original = WindowDataset.__getitem__

    def getitem(self, index: int) -> dict[str, torch.Tensor]:
        item = original(self, index)
        if self.slide_of(index).name == name:
            item["pixel_values"][:, 0] = float("nan")
        return item

    monkeypatch.setattr(WindowDataset, "__getitem__", getitem)


def test_slide_that_spoils_the_loss_is_named_and_not_saved(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, "square")
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "seed": 4}
    fields |= {"logging_steps": 100, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(callbacks.NotFiniteError) as caught:
        train_here(small_config, tmp_path / "m", **fields)
    monkeypatch.undo()
    processor = STPatchProcessor.from_pretrained(tmp_path / "m" / "untrained")
    slides = read_slides(find_slides([slide_files(small_config)]))
    windows = WindowDataset(slide_images(slides, processor), processor, 24, seed=4)
    names = [windows.slide_of(i).name for i in range(24)]
    step = names.index("square") // 2 + 1
    listed = ", ".join(sorted({names[2 * step - 2], names[2 * step - 1]}))
    assert str(caught.value).startswith(f"The loss is not finite at step {step}, with windows of {listed}: ")
    saved = [path.name for path in (tmp_path / "m").iterdir() if path.name.startswith("checkpoint")]
    assert step > 1, "else nothing was saved"
    assert f"checkpoint-{step - 1}" in saved
    assert f"checkpoint-{step}" not in saved


def test_losses_between_log_entries_are_remembered_by_step(small_config: Path, tmp_path: Path, monkeypatch):
    """The step is that of the loss, not the one at which all losses are looked at."""
    original = callbacks.FiniteWatch.on_loss

    def on_loss(self, loss: torch.Tensor) -> None:
        self.count = getattr(self, "count", 0) + 1
        original(self, loss * float("inf") if self.count in (10, 13) else loss)

    monkeypatch.setattr(callbacks.FiniteWatch, "on_loss", on_loss)
    with pytest.raises(callbacks.NotFiniteError, match="The loss is not finite at step 5, with"):
        train_here(
            small_config,
            tmp_path / "m",
            logging_steps=100,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
        )


def test_weights_that_are_not_finite_are_not_saved(small_config: Path, tmp_path: Path, monkeypatch):
    """The loss of a step is that before its update: a bad update is seen in the weights alone."""
    original = callbacks.FiniteWatch.on_step_end

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            with torch.no_grad():
                next(model.decoder.parameters()).view(-1)[3] = float("nan")
        return original(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(callbacks.FiniteWatch, "on_step_end", on_step_end)
    with pytest.raises(callbacks.NotFiniteError, match="The weights are not finite after step 4") as caught:
        train_here(small_config, tmp_path / "m", save_strategy="steps", save_steps=2)
    assert str(caught.value).endswith(f"the last checkpoint with finite weights is {tmp_path / 'm' / 'checkpoint-2'}.")


# ---------------------------------------------------------------- what a run can be told to do


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"dataloader_num_workers": 2}, 0.0),
        ({"gradient_checkpointing": "true"}, 1e-6),
        ({"torch_compile": "true", "torch_compile_backend": "eager"}, 1e-6),
        ({"bf16": "true"}, 1e-2),
    ],
    ids=["workers", "gradient_checkpointing", "torch_compile", "bf16"],
)
def test_means_change_no_result(small_config: Path, small_model: Path, tmp_path: Path, fields, tolerance, monkeypatch):
    from small_pretraining import largest_difference

    layers = count_calls(monkeypatch) if "gradient_checkpointing" in fields else None
    monkeypatch.setattr(
        "train.arguments.multiplies_bfloat16", lambda: True
    )  # slow where it is not so, and no different
    model = train_here(small_config, tmp_path / "m", **fields)
    assert largest_difference(model, small_model) <= tolerance
    if "bf16" in fields:
        assert largest_difference(model, small_model) > 0, "it was on"
    if layers is not None:
        assert layers[0] == 2 * 12 * 3, "every layer runs twice a step, once more for the backward pass"


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the attention of a layer runs."""
    from modeling_stimg.layers_stimg import STImageMAEAttention

    calls, original = [0], STImageMAEAttention.forward

    def forward(self, *args, **kwargs):
        calls[0] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(STImageMAEAttention, "forward", forward)
    return calls


# ---------------------------------------------------------------- a corpus


def test_slides_of_a_corpus_are_held_out(small_corpus: Path, small_config: Path, tmp_path: Path):
    fields = {"corpus": small_corpus, "eval_steps": 6, "validation_windows": 16}
    model = train_corpus(small_config, tmp_path / "m", **fields, validation_slides=["s1"])
    told = json.loads((model / "pretraining.json").read_text())
    assert [slide["name"] for slide in told["slides"]] == ["s0", "s2"]
    assert [slide["name"] for slide in told["validation_slides"]] == ["s1"]
    assert len(logged_values(model, "eval_loss")) == 2
    assert STPatchProcessor.from_pretrained(model).vocabulary == Corpus(small_corpus).vocabulary, "the corpus' own"
    every = train_corpus(small_config, tmp_path / "every", corpus=small_corpus)
    assert not same_weights(model, every)


def test_view_of_a_corpus_opens_what_it_shows(small_corpus: Path):
    corpus = Corpus(small_corpus)
    images = corpus.images(STPatchProcessor(corpus.vocabulary))
    view = pickle.loads(pickle.dumps(ImageView(images, [2, 0])))
    assert [image.name for image in view] == ["s2", "s0"]
    assert [image.name for image in view[:1]] == ["s2"]
    assert view.num_spots.tolist() == [images[2].num_spots, images[0].num_spots]
    assert len(view.corpus) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gene_table": "genes.tsv"}, "A corpus and a gene table were given"),
        ({"exclude": "s0"}, "A corpus is trained on as a whole"),
        ({"validation_slides": ["s9"]}, "are not among the 3 slides"),
        ({"resume_from_checkpoint": "elsewhere"}, "a run goes on from its own output_dir"),
        ({"logging_nan_inf_filter": "true"}, "would hide a loss that is not finite"),
        ({"probe_steps": 0}, "probe_steps is 0"),
        ({"report_to": "nonsuch"}, "nonsuch is not supported, only"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    small_corpus: Path, small_config: Path, tmp_path: Path, fields: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        train_corpus(small_config, tmp_path / "m", corpus=small_corpus, **fields)
    assert not (tmp_path / "m").exists()


def test_reporting_to_what_is_not_installed_is_one_sentence(small_config: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(ImportError, match=r"report_to is .*tensorboard.* requires tensorboard to be installed"):
        train_here(small_config, tmp_path / "m", report_to="tensorboard")
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------- what is told


def test_model_card_tells_of_this_run_alone(held_out: Path, slides):
    card = ModelCard.load(held_out / "README.md")
    assert card.data.library_name == "transformers"
    assert "spatial-transcriptomics" in card.data.tags
    text = card.text
    assert f"Trained on 1 slides, {slides['staggered'].n_obs:,} spots: staggered" in text
    assert f"Held out, for the evaluation loss alone: 1 slides, {slides['square'].n_obs:,} spots: square" in text
    assert "Probed with their labels: square, staggered (of these, staggered were trained on, without labels)" in text
    for key in ("loss", "eval_loss", "probe_ari"):
        assert f"| 12 | {logged_values(held_out, key)[-1]:.4f} |" in text
    parameters = sum(p.numel() for p in STImageMAEForPreTraining.from_pretrained(held_out).parameters())
    assert f"{parameters:,} parameters; encoder 2 layers x 32, 4 heads; decoder 1 layers x 16" in text
    assert "| mask_unit | mixed |" in text
    assert str(held_out.parent) not in text, "paths mean nothing elsewhere"


def test_code_of_the_model_card_runs(held_out: Path, small_config: Path, monkeypatch: pytest.MonkeyPatch):
    text = ModelCard.load(held_out / "README.md").text
    alone, with_package = (block.split("```")[0] for block in text.split("```python")[1:])
    monkeypatch.chdir(held_out.parent)
    scope: dict = {}
    exec(with_package.replace("slide.h5ad", f"{small_config.parent}/slides/square.h5ad"), scope)
    assert scope["adata"].obsm["X_stimg"].shape == (scope["adata"].n_obs, 32)
    exec(alone, scope)
    np.testing.assert_array_equal(scope["embedding"], scope["adata"].obsm["X_stimg"])


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_takes_every_launch_config(path: Path):
    config = load_config_from_file(str(path))
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(path), "train/run_pretrain.py"])
    arguments, *_ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes
    assert arguments.mixed_precision == "no", "precision is the run's own field"
    assert path.read_text().count(f"--config_file train/accelerate/{path.name}") >= 1
    expected = {"one_gpu": (1, 1), "eight_gpus": (8, 1), "two_nodes": (16, 2), "fsdp": (8, 1)}
    assert (config.num_processes, config.num_machines) == expected[path.stem]
    if path.stem == "fsdp":
        assert arguments.use_fsdp
        assert int(arguments.fsdp_version) == 2
        assert arguments.fsdp_transformer_layer_cls_to_wrap == "STImageMAELayer"


def test_paper_config_is_the_papers(tmp_path: Path):
    path = ROOT / "train" / "configs" / "paper.yaml"
    corpus, model, _, training = parse_arguments(["--config", str(path), "--output_dir", str(tmp_path)])
    assert (model.window_size, model.num_channels, model.mask_ratio, model.mask_unit) == (16, 512, 0.3, "entry")
    assert (corpus.normalization, corpus.target_sum, model.singular_start) == ("log1p", 1e4, False)
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (40, 32)
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.999, 0.01)
    assert training.lr_scheduler_type == "cosine"


def test_every_field_of_ours_has_a_help_text():
    for kind in (CorpusArguments, ModelArguments, ProbeArguments, PretrainingArguments):
        inherited = {f.name for f in dataclasses.fields(TrainingArguments)} if kind is PretrainingArguments else set()
        for field in dataclasses.fields(kind):
            assert field.name in inherited or field.metadata.get("help"), field.name
