r"""Masked loss on slides: how far is a model ahead of predicting means?

    python eval/run_masked_loss.py --models runs/patch runs/spot --output_dir runs/masked_loss \
        --slides '$STIMG_DATA/slides/her2st_F2.h5ad' '$STIMG_DATA/slides/her2st_F3.h5ad'

Every model predicts the masked entries of samples of its own unit. Beside it stand, on the same entries, each gene's
mean over the sample's visible entries and over the corpus, and a low-rank completion of the sample. Writes
`results.json` and `table.md` into the output folder.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from data_processing.corpus import find_slides, load_pretraining, read_slides, slide_images
from eval.masked_loss import PREDICTORS, masked_losses
from eval.provenance import seen
from eval.results import markdown_table, run_metadata, write_results
from modeling_stimg import STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.hub import find_model

BUDGET = {"max_steps": "steps", "num_windows": "samples", "num_spots_seen": "spots seen"}


@dataclass
class MaskedLossArguments:
    """What to evaluate, and how."""

    models: list[str] = field(
        metadata={
            "help": "Model folders, as train/run_pretrain.py writes them, or Hub ids (ORG/NAME, ORG/NAME@REVISION)."
        }
    )
    slides: list[str] = field(metadata={"help": "Slides, best unseen ones: files or globs; $VARIABLES are expanded."})
    output_dir: str = field(metadata={"help": "Folder for results.json and table.md; made if missing."})
    coverage: float = field(default=2.0, metadata={"help": "How often the samples cover every spot on average."})
    seed: int = field(default=0, metadata={"help": "Seed of samples, their genes and their masks."})


def table(records: Sequence[dict[str, Any]], budgets: dict[str, dict[str, Any]]) -> str:
    """Markdown: the mean over slides by model, then every slide.

    Args:
        budgets: by model, the arguments of its training as `pretraining.json` tells them, as far as it does.
    """
    lines = ["Masked loss, mean over slides; lower is better. All columns predict the very same entries."]
    rows = []
    for name, told in budgets.items():
        of_model = [record for record in records if record["trained_model"] == name]
        budget = [f"{told[key]:,}" if key in told else "not told" for key in BUDGET]
        means = {key: float(np.mean([r[key] for r in of_model])) for key in PREDICTORS}
        rows.append([name, of_model[0]["sample_unit"], *budget, *_cells(means)])
    header = [*PREDICTORS, "below window mean", "below corpus mean"]
    lines += ["", *markdown_table(["trained model", "sample unit", *BUDGET.values(), *header], rows)]
    rows = [[r["trained_model"], r["slide"], r["seen"], f"{r['samples']:,}", *_cells(r)] for r in records]
    lines += ["", "## By slide", "", *markdown_table(["trained model", "slide", "seen", "samples", *header], rows)]
    return "\n".join(lines) + "\n"


def _cells(losses: dict[str, Any]) -> list[str]:
    below = [f"{1 - losses['model'] / losses[mean]:.1%}" for mean in ("window mean", "corpus mean")]
    return [*(f"{losses[name]:.4f}" for name in PREDICTORS), *below]


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(MaskedLossArguments).parse_args_into_dataclasses(argv)
    names = [Path(given).name for given in arguments.models]  # of a Hub id with its revision
    if len(set(names)) < len(names):
        raise ValueError(f"Two models are called the same: {names}; their folders' names tell them apart.")
    models = [find_model(given) for given in arguments.models]
    slides = read_slides(find_slides(arguments.slides))
    records: list[dict[str, Any]] = []
    runs: dict[str, Any] = {}
    for name, found in zip(names, models, strict=True):
        processor = STPatchProcessor.from_pretrained(found.folder)
        model = STImageMAEForPreTraining.from_pretrained(found.folder)
        told = load_pretraining(found.folder)
        runs[name] = {"hub": found.hub, "slides": None, "arguments": {}}
        if told is not None:
            runs[name] |= {"slides": [r.name for r in told[0]], "arguments": told[1]}
        for slide, adata in tqdm(slides.items(), desc=f"masked loss of {name}"):
            (image,) = slide_images({slide: adata}, processor)
            losses = masked_losses(model, processor, image, arguments.coverage, arguments.seed)
            saw = seen(slide, adata, None if told is None else told[0])
            row = {"trained_model": name, "sample_unit": model.config.sample_unit, "slide": slide, "seen": saw}
            records.append({**row, **losses})
    budgets = {name: run["arguments"] for name, run in runs.items()}
    text = table(records, budgets)
    metadata = run_metadata(arguments.seed, coverage=arguments.coverage, slides=list(slides), models=runs)
    write_results(arguments.output_dir, records, metadata, text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
