"""Phantom slides, a small processor and a small model for all tests; real slides where STIMG_DATA names them."""

import copy
import os
from pathlib import Path

import pytest
import torch
from anndata import AnnData
from hypothesis import settings

from data_processing.phantom import PhantomTissue
from modeling_stimg import GeneVocabulary, SlideImage, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor

# The same examples in every run; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session")
def tissue() -> PhantomTissue:
    return PhantomTissue.create(num_genes=120, seed=1)


@pytest.fixture(scope="session")
def slides(tissue: PhantomTissue) -> dict[str, AnnData]:
    """A staggered and a square slide of one tissue."""
    return {
        "staggered": tissue.slide(0, array="visium", height=14, width=12, median_counts=200),
        "square": tissue.slide(1, array="square", height=12, width=13, median_counts=200),
    }


@pytest.fixture(scope="session")
def vocabulary(slides: dict[str, AnnData]) -> GeneVocabulary:
    return GeneVocabulary.from_slides(slides.values())


@pytest.fixture(scope="session")
def processor(vocabulary: GeneVocabulary) -> STPatchProcessor:
    return STPatchProcessor(vocabulary, window_size=6, num_channels=32)


@pytest.fixture(scope="session")
def images(slides: dict[str, AnnData], processor: STPatchProcessor) -> dict[str, SlideImage]:
    return {name: processor.slide_to_image(adata, name=name) for name, adata in slides.items()}


@pytest.fixture(scope="session")
def config(vocabulary: GeneVocabulary) -> STImageMAEConfig:
    return STImageMAEConfig(
        window_size=6,
        num_channels=32,
        vocab_size=len(vocabulary) + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=24,
    )


@pytest.fixture
def model(config: STImageMAEConfig) -> STImageMAEForPreTraining:
    """A fresh model with seeded random weights, larger than usual, so that differences show."""
    torch.manual_seed(0)
    model = STImageMAEForPreTraining(copy.deepcopy(config))  # tests change its embedding defaults
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_input_embeddings().weight[config.pad_token_id] = 0
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, config: STImageMAEConfig, processor: STPatchProcessor) -> Path:
    """A saved pretraining model with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    STImageMAEForPreTraining(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real slides; tests that use it carry `@pytest.mark.real_data`."""
    folder = os.environ.get("STIMG_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("STIMG_DATA names no folder with real slides")
    return Path(folder)


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory, slides: dict[str, AnnData]) -> Path:
    """`config.yaml` of a small pretraining on the two slides."""
    from small_pretraining import write_config  # it imports the Trainer, which takes seconds

    return write_config(tmp_path_factory.mktemp("small_pretraining"), slides)


@pytest.fixture(scope="session")
def small_model(small_config: Path) -> Path:
    """What that pretraining gives, uninterrupted and in one process."""
    from small_pretraining import train_here

    return train_here(small_config, small_config.parent / "model")


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory, tissue: PhantomTissue) -> Path:
    """A corpus of three slides, s0 to s2, with gene vectors."""
    from data_processing.build_corpus import main

    folder = tmp_path_factory.mktemp("small_corpus")
    (folder / "slides").mkdir()
    for number in range(3):
        adata = tissue.slide(number, array="square", height=12, width=12, median_counts=300)
        adata.write_h5ad(folder / "slides" / f"s{number}.h5ad")
    genes = "".join(f"{gene}\t{gene}\n" for gene in adata.var_names)
    (folder / "genes.tsv").write_text(f"gene_id\tgene_name\n{genes}")
    arguments = ["--slides", str(folder / "slides"), "--output", str(folder / "corpus")]
    arguments += ["--gene_table", str(folder / "genes.tsv"), "--min_counts", "60", "--min_genes", "60", "--rank", "32"]
    assert main(arguments) == 0
    return folder / "corpus"
