"""Pretraining from the command line on phantom slides: what it writes, and that it is a function of its arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file
from transformers import default_data_collator

from data_processing.corpus import find_slides, load_pretraining, slide_images, slide_name
from data_processing.window_dataset import WindowDataset
from modeling_stimg import STImageMAEForPreTraining, STImageMAEModel, STPatchProcessor
from train.arguments import parse_arguments
from train.run_pretrain import start_gene_embeddings

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "train" / "configs").glob("*.yaml"))
SMALL = """
slides: [{slides}/*.h5ad]
window_size: 6
num_channels: 32
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
intermediate_size: 48
decoder_hidden_size: 16
decoder_num_hidden_layers: 1
decoder_num_attention_heads: 4
decoder_intermediate_size: 24
mask_unit: mixed
normalization: standardized
embedding_defaults: {{stride: 3}}
per_device_train_batch_size: 4
max_steps: 40
learning_rate: 2.0e-3
logging_steps: 1
save_strategy: "no"
use_cpu: true
"""


def pretrain(config: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train" / "run_pretrain.py"), "--config", str(config), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, slides: dict[str, AnnData]) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "slides").mkdir()
    for name, adata in slides.items():
        adata.write_h5ad(folder / "slides" / f"{name}.h5ad")
    (folder / "config.yaml").write_text(SMALL.format(slides=folder / "slides"))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def trained(config_file: Path) -> Path:
    output = config_file.parent / "model"
    run = pretrain(config_file, "--output_dir", str(output))
    assert run.returncode == 0, run.stderr[-3000:]
    return output


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_training_lowers_the_loss_and_writes_a_model_that_embeds(trained: Path, slides: dict[str, AnnData]):
    processor = STPatchProcessor.from_pretrained(trained)
    windows = WindowDataset(slide_images(slides, processor), processor, num_windows=64, seed=77)
    batch = default_data_collator([windows[i] for i in range(64)])
    with torch.no_grad():
        before, after = (
            STImageMAEForPreTraining.from_pretrained(folder)(**batch).loss
            for folder in (trained / "untrained", trained)
        )
    assert after < 0.996 * before, "on windows that were not trained on; counts are mostly noise"
    assert len(losses(trained)) == 40
    assert processor.normalization == "standardized"
    model = STImageMAEModel.from_pretrained(trained)
    assert model.config.embedding_defaults == {"stride": 3}
    embedding = model.embed(processor.slide_to_image(slides["square"]), processor)
    assert embedding.shape == (slides["square"].n_obs, 32)
    assert (trained / "loss.png").stat().st_size > 1000


def test_model_says_which_slides_it_saw(trained: Path, slides: dict[str, AnnData]):
    records, arguments = load_pretraining(trained)
    assert arguments["max_steps"] == 40
    assert arguments["num_windows"] == 160
    assert "output_dir" not in arguments
    assert "slides" not in arguments
    assert {r.name: (r.patient, r.num_spots) for r in records} == {
        name: (adata.uns["meta"]["patient"], adata.n_obs) for name, adata in slides.items()
    }
    assert load_pretraining(trained / "untrained") == ([], arguments)


def test_same_arguments_same_weights(trained: Path, config_file: Path):
    again = config_file.parent / "again"
    assert pretrain(config_file, "--output_dir", str(again)).returncode == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (trained, again))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_command_line_wins_over_the_file_and_the_start_is_kept(trained: Path, config_file: Path):
    other = config_file.parent / "other"
    run = pretrain(
        config_file,
        "--output_dir",
        str(other),
        "--max_steps",
        "2",
        "--singular_start",
        "false",
        "--exclude",
        "square",
        "--freeze_gene_embeddings",
        "true",
        "--target_sum",
        "500",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(losses(other)) == 2
    assert [r.name for r in load_pretraining(other)[0]] == ["staggered"]
    start, random = (load_file(f / "untrained" / "model.safetensors") for f in (trained, other))
    table = "stimg.embeddings.gene_embeddings.weight"
    assert not torch.allclose(start[table], random[table])
    weights = load_file(trained / "model.safetensors")
    assert not torch.equal(weights[table], start[table])
    assert torch.equal(load_file(other / "model.safetensors")[table], random[table]), "frozen"
    assert STPatchProcessor.from_pretrained(other).target_sum == 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slides", "nowhere/*.h5ad"], "No slide matches 'nowhere/*.h5ad'"),
        (["--exclude", "squares"], "Excluded slides ['squares'] are not among"),
        (["--mask_unit", "gene"], "mask_unit is 'gene'"),
        (["--embedding_defaults", '{"strid": 4}'], "Unknown embedding options ['strid']"),
        (["--mask_unit", "site", "--embedding_defaults", '{"readout": "both"}'], 'train with "mixed"'),
        (["--no_such_field", "1"], "no_such_field"),
    ],
)
def test_bad_arguments_end_in_one_sentence_and_write_nothing(config_file: Path, options: list[str], message: str):
    output = config_file.parent / "never"
    run = pretrain(config_file, "--output_dir", str(output), *options)
    assert run.returncode != 0
    assert message in run.stderr.splitlines()[-1], run.stderr[-2000:]
    assert "Traceback" not in run.stderr
    assert not output.exists()


def test_finished_model_is_not_overwritten(trained: Path, config_file: Path):
    before = (trained / "model.safetensors").read_bytes()
    run = pretrain(config_file, "--output_dir", str(trained), "--seed", "5")
    assert run.returncode != 0
    assert "holds a trained model already" in run.stderr.splitlines()[-1]
    assert (trained / "model.safetensors").read_bytes() == before


def test_single_slide_in_a_config_may_stand_without_brackets(tmp_path: Path):
    (tmp_path / "one.yaml").write_text("slides: data/*.h5ad\n")
    corpus, *_ = parse_arguments(["--config", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "out")])
    assert corpus.slides == ["data/*.h5ad"]


def test_unknown_field_in_a_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "bad.yaml").write_text("max_stepps: 3\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "bad.yaml")])
    assert "unknown fields ['max_stepps']" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_parses(path: Path, tmp_path: Path):
    corpus, model, _, training = parse_arguments(
        ["--config", str(path), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    )
    named = bool(corpus.slides or corpus.corpus)
    assert named or path.stem in ("laptop", "gpu", "paper"), "configs for other people's slides name none"
    assert model.window_size > 0
    assert training.max_steps > 0 or training.num_train_epochs > 0


def test_singular_start_keeps_padding_at_zero_and_gives_unit_rows(model: STImageMAEForPreTraining, config):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((config.vocab_size - 1, config.hidden_size)).astype(np.float32)
    vectors[7] = 0
    before = model.get_input_embeddings().weight.detach().clone()
    start_gene_embeddings(model, vectors)
    table = model.get_input_embeddings().weight.detach()
    assert not table[config.pad_token_id].any()
    assert torch.equal(table[7], before[7])
    moved = torch.cat([table[:7], table[8:-1]])
    assert moved.square().sum(-1).mean() == pytest.approx(1, rel=1e-4)
    cosine = torch.cosine_similarity(table[3], torch.from_numpy(vectors[3]), dim=0)
    assert cosine == pytest.approx(1, abs=1e-5)


def test_slides_are_found_by_glob_and_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b.h5ad", "a.h5ad", "c.tsv.gz"):
        (tmp_path / name).touch()
    monkeypatch.setenv("SOME_SLIDES", str(tmp_path))
    found = find_slides(["$SOME_SLIDES/*.h5ad", str(tmp_path / "c.tsv.gz")], exclude=["b"])
    assert [p.name for p in found] == ["a.h5ad", "c.tsv.gz"]
    names = ("x/outs", "sample 1.v2.h5ad", "G2.counts.tsv.gz", "run.1.2", "x.h5ad")
    assert [slide_name(Path(name)) for name in names] == ["x", "sample 1.v2", "G2", "run.1.2", "x"]
    (tmp_path / "a.tsv").touch()
    with pytest.raises(ValueError, match="Several slides are called 'a'"):
        find_slides([str(tmp_path / "*")])


def test_a_config_with_workers_runs_without():
    words = ["--config", str(CONFIGS[0].parent / "laptop.yaml"), "--use_cpu", "true"]
    assert parse_arguments(words)[3].dataloader_prefetch_factor == 4
    alone = parse_arguments([*words, "--dataloader_num_workers", "0"])[3]
    assert (alone.dataloader_prefetch_factor, alone.dataloader_persistent_workers) == (None, False)
