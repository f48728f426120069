r"""What `target_sum="panel"` mends: a slide cut to few genes, beside the same slide with all of them.

    python eval/run_panel.py --slide '$STIMG_DATA/slides/dlpfc_151673_g8513.h5ad' --output_dir runs/panel \
        --corpus '$STIMG_DATA/slides/dlpfc_*.h5ad' '$STIMG_DATA/slides/her2st_*.h5ad' \
        '$STIMG_DATA/slides/stahl*.h5ad' '$STIMG_DATA/slides/aspheart*.h5ad' \
        --gene_table '$STIMG_DATA/genes/ensembl_symbol.tsv' --num_genes 500

Counts per 10,000 over a few chosen genes are inflated against a whole transcriptome. Shares of genes are fitted to a
corpus without the slide; the slide is cut to its most variable, its most counted and random genes, and the log1p values
of each cut are compared with those of the same genes on the whole slide, normalised the same way.
Writes `results.json` and `table.md`.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from transformers import HfArgumentParser

from data_processing.corpus import find_slides, read_slides, slide_images, slide_name, slide_patient, vocabulary_of
from data_processing.gene_statistics import gene_shares
from eval.results import markdown_table, run_metadata, write_results
from modeling_stimg import SlideImage, STPatchProcessor


@dataclass
class PanelArguments:
    """What to cut, and where shares come from."""

    slide: str = field(metadata={"help": "The slide that is cut; $VARIABLES are expanded."})
    corpus: list[str] = field(metadata={"help": "Slides or globs that shares are fitted to; the slide is left out."})
    output_dir: str = field(metadata={"help": "Folder for results.json and table.md; made if missing."})
    num_genes: int = field(default=500, metadata={"help": "Genes that the cuts keep."})
    gene_table: str | None = field(
        default=None, metadata={"help": "TSV with gene_id and gene_name; needed when slides mix ids and symbols."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random genes."})


def expression(image: SlideImage) -> sp.csr_matrix:
    """log1p values, float32 (num_spots, vocabulary)."""
    return sp.csr_matrix((image.values, image.indices, image.indptr), (image.num_spots, image.pad_id))


def choose_genes(adata: AnnData, num_genes: int, seed: int) -> dict[str, np.ndarray]:
    """Columns of a slide that panels keep, by how they were chosen: int64 (num_genes,)."""
    counts = np.asarray(adata.X.sum(axis=1))
    values = sp.csr_matrix(adata.X.multiply(1e4 / np.maximum(counts, 1))).log1p()
    variance = np.asarray(values.power(2).mean(axis=0) - np.square(values.mean(axis=0))).ravel()
    total = np.asarray(adata.X.sum(axis=0)).ravel()
    random = np.random.default_rng(seed).permutation(adata.n_vars)
    orders = {"most variable": np.argsort(-variance), "most counted": np.argsort(-total), "random": random}
    return {how: np.sort(order[:num_genes]) for how, order in orders.items()}


def compare(whole: SlideImage, panel: SlideImage) -> dict[str, float]:
    """How a panel's log1p values differ from the whole slide's, over the panel's non-zeros."""
    same = np.intersect1d(whole.obs_index, panel.obs_index, return_indices=True)
    values = expression(panel)[same[2]].tocoo()
    expected = np.asarray(expression(whole)[same[1]][values.row, values.col]).ravel()
    return {
        "error": float(np.abs(values.data - expected).mean()),
        "inflation": float(np.median(np.expm1(values.data) / np.expm1(expected))),
    }


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(PanelArguments).parse_args_into_dataclasses(argv)
    (path,) = find_slides([arguments.slide])
    name = slide_name(path)
    corpus = read_slides([p for p in find_slides(arguments.corpus) if slide_name(p) != name])
    adata = read_slides([path])[name]
    if arguments.num_genes >= adata.n_vars:
        raise ValueError(f"num_genes is {arguments.num_genes}: expected fewer than the slide's {adata.n_vars} genes.")
    vocabulary = vocabulary_of({**corpus, name: adata}, arguments.gene_table)
    plain = STPatchProcessor(vocabulary)
    vocabulary = vocabulary.with_statistics(share=gene_shares(slide_images(corpus, plain)))
    by_panel = STPatchProcessor(vocabulary, target_sum="panel")
    processors = {"10,000": plain, "panel": by_panel}
    whole = {option: slide_images({name: adata}, processor)[0] for option, processor in processors.items()}
    expected = float(vocabulary.share[whole["panel"].measured].sum())
    records: list[dict[str, Any]] = []
    for how, columns in choose_genes(adata, arguments.num_genes, arguments.seed).items():
        cut = {name: adata[:, columns].copy()}
        record = {"genes": how, "share_here": float(cut[name].X.sum() / adata.X.sum())}
        for option, processor in processors.items():
            (image,) = slide_images(cut, processor)
            record["share_expected"] = float(vocabulary.share[image.measured].sum()) / expected
            record |= {f"{option}: {key}": value for key, value in compare(whole[option], image).items()}
        records.append(record)
    header = ["genes kept", "their share of the slide's counts", "expected by the corpus"]
    header += [f"target_sum {option}: {what}" for option in ("10,000", "panel") for what in ("inflation", "error")]
    rows = [
        [
            r["genes"],
            f"{r['share_here']:.3f}",
            f"{r['share_expected']:.3f}",
            *(f"{r[f'{o}: {k}']:.2f}" for o in ("10,000", "panel") for k in ("inflation", "error")),
        ]
        for r in records
    ]
    same_patient = [n for n, a in corpus.items() if slide_patient(a) and slide_patient(a) == slide_patient(adata)]
    lines = [
        f"{name} cut to {arguments.num_genes} of {adata.n_vars:,} genes, against itself with all of them and the same "
        "target_sum: median factor between depth-normalised values, and mean absolute difference of log1p values, over "
        f"non-zeros. Shares from {len(corpus)} other slides, {len(same_patient)} of them of the same patient; all "
        f"genes of the slide together are expected to hold {expected:.3f} of the counts.",
        "",
        *markdown_table(header, rows),
    ]
    metadata = run_metadata(arguments.seed, slide=name, corpus=list(corpus), num_genes=arguments.num_genes)
    write_results(arguments.output_dir, records, metadata, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
