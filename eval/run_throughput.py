"""How fast are windows made, and how much memory does a large slide take?

    python eval/run_throughput.py windows '$STIMG_DATA/slides/her2st_A2.h5ad' --output-dir runs/throughput
    python eval/run_throughput.py memory --output-dir runs/memory
    python eval/run_throughput.py corpus --output-dir runs/corpus_throughput

`windows` times the sampler on one core, as a multiple of one weighted `np.bincount` over the same windows' non-zeros,
beside the textbook's dense way, and on a GPU where there is one. `memory` embeds a phantom slide of half a million bins
and tells the peak of anonymous memory. `corpus` builds a phantom corpus of a million spots and draws windows from it
as a loader worker does. All write `results.json` and `table.md`.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from data_processing.corpus import find_slides, read_slides, slide_images, vocabulary_of
from eval.results import markdown_table, run_metadata, write_results
from eval.throughput import measure_memory, measure_resident, measure_windows, one_core
from modeling_stimg import STPatchProcessor

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

OutputOption = Annotated[Path, typer.Option(help="Folder for results.json and table.md; made if missing.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the windows, or of the phantom and the model.", min=0)]


@app.command()
def windows(
    slides: Annotated[list[str], typer.Argument(help="Slides: files or globs; $VARIABLES are expanded.")],
    output_dir: OutputOption = Path("runs/throughput"),
    gene_table: Annotated[
        str | None, typer.Option(help="TSV with gene_id and gene_name: its genes are the vocabulary; else the slide's.")
    ] = None,
    window_size: Annotated[int, typer.Option(help="Side of a window, in sites.", min=1)] = 16,
    num_channels: Annotated[int, typer.Option(help="Genes of a window.", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows a call.", min=1)] = 32,
    num_batches: Annotated[int, typer.Option(help="Calls that are timed on the CPU; ten times that on a GPU.")] = 15,
    seed: SeedOption = 0,
) -> None:
    """Time to make a window, as a multiple of one np.bincount."""
    records, resident = [], []
    options = {"window_size": window_size, "num_channels": num_channels}
    for name, adata in read_slides(find_slides(slides)).items():
        processor = STPatchProcessor(vocabulary_of({name: adata}, gene_table), **options)
        (image,) = slide_images({name: adata}, processor)
        with one_core():
            records.append(measure_windows(image, processor, num_batches, batch_size, seed))
        if torch.cuda.is_available():
            resident.append(measure_resident(image, processor, "cuda", 10 * num_batches, batch_size, seed))
    table = [
        f"Windows of {window_size} x {window_size} x {num_channels} on one core; ratios to one weighted `np.bincount` "
        f"over the same windows' non-zeros, medians of {num_batches} batches of {batch_size}. Its input is what the "
        "slide holds (int32, float32); widened: int64 and float64, which spares it a copy.",
        "",
        *markdown_table(
            ["slide", "non-zeros", "bincount", "a window", "ratio", "widened", "one by one", "textbook"],
            [
                [
                    r["slide"],
                    f"{r['non_zeros']:,.0f}",
                    f"{r['bincount_ms']:.2f} ms",
                    f"{r['batch_ms']:.2f} ms",
                    *(f"{r[key]:.2f}" for key in ("batch_ratio", "wide_ratio", "single_ratio", "textbook_ratio")),
                ]
                for r in records
            ],
        ),
    ]
    if resident:
        rows = [
            [r["slide"], f"{r['windows_per_second']:,.0f}", f"{r['floor_windows_per_second']:,.0f}"] for r in resident
        ]
        header = ["slide", "windows/s", "windows/s at the memory's bandwidth"]
        table += ["", f"Resident on {resident[0]['device']}.", "", *markdown_table(header, rows)]
    text = "\n".join(table) + "\n"
    metadata = run_metadata(seed, slides=[r["slide"] for r in records], batch_size=batch_size, **options)
    write_results(output_dir, [*records, *resident], metadata, text)
    print(text)


@app.command()
def memory(
    output_dir: OutputOption = Path("runs/memory"),
    num_bins: Annotated[int, typer.Option(help="Bins of the phantom slide.", min=1)] = 500_000,
    num_genes: Annotated[int, typer.Option(help="Genes of the phantom slide.", min=1)] = 18_000,
    genes_per_bin: Annotated[int, typer.Option(help="Non-zeros of a bin.", min=1)] = 200,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.", min=4)] = 128,
    num_layers: Annotated[int, typer.Option(help="Layers of the encoder.", min=1)] = 2,
    stride: Annotated[int, typer.Option(help="Sites between neighbouring windows, at most 16.", min=1)] = 16,
    seed: SeedOption = 0,
) -> None:
    """Peak of anonymous memory from the CSR of a large slide to embeddings of all its bins."""
    record = measure_memory(num_bins, num_genes, genes_per_bin, hidden_size, num_layers, stride, seed)
    header = ["bins x genes", "non-zeros", "CSR", "peak, CSR included", "were it dense", "time"]
    row = [
        f"{num_bins:,} x {num_genes:,}",
        f"{record['non_zeros']:,}",
        *(f"{record[key]:.2f} GB" for key in ("csr_gb", "peak_gb", "dense_gb")),
        f"{record['seconds']:.0f} s",
    ]
    text = (
        "\n".join(["Anonymous memory (RssAnon), the libraries' included.", "", *markdown_table(header, [row])]) + "\n"
    )
    write_results(output_dir, [record], run_metadata(seed, hidden_size=hidden_size, stride=stride), text)
    print(text)


@app.command()
def corpus(
    output_dir: OutputOption = Path("runs/corpus_throughput"),
    num_spots: Annotated[int, typer.Option(help="Spots of the large phantom corpus.", min=1)] = 1_089_785,
    few_spots: Annotated[int, typer.Option(help="Spots of the small one.", min=1)] = 10_000,
    spots_per_slide: Annotated[int, typer.Option(help="Spots of a slide.", min=1)] = 3_400,
    num_genes: Annotated[int, typer.Option(help="Genes of a slide.", min=1)] = 18_000,
    genes_per_spot: Annotated[int, typer.Option(help="Non-zeros of a spot.", min=1)] = 500,
    num_windows: Annotated[int, typer.Option(help="Windows of a round.", min=1)] = 1_500,
    keep: Annotated[bool, typer.Option(help="Leave the phantom corpora in the output folder.")] = False,
    seed: SeedOption = 0,
) -> None:
    """Windows a second and memory of a loader worker, over a million spots on disk and over few."""
    import shutil

    from eval.corpus_throughput import build_phantom_corpus, measure_corpus

    records = []
    for name, spots in (("few", few_spots), ("many", num_spots)):
        folder = output_dir / f"{name}_spots"
        built = build_phantom_corpus(folder, spots, spots_per_slide, num_genes, genes_per_spot, seed)
        records.append({**built, **measure_corpus(folder, num_windows, seed)})
        if not keep:
            shutil.rmtree(folder)
    header = ["spots", "slides", "build", "published", "training form"]
    built_rows = [
        [
            f"{r['spots']:,}",
            f"{r['slides']:,}",
            f"{r['seconds_rows']:.0f} s + {r['seconds_assembling']:.0f} s",
            f"{r['bytes_published'] / 1e9:.2f} GB",
            f"{r['bytes_training'] / 1e9:.2f} GB",
        ]
        for r in records
    ]
    speed_header = ["spots", "page cache", "windows/s, first round", "second round", "RssAnon", "RssFile"]
    speed_rows = [
        [
            f"{r['spots']:,}",
            state,
            *(f"{r[f'{state}_{key}']:.0f}" for key in ("first_windows_per_second", "windows_per_second")),
            *(f"{r[f'{state}_{key}']:.2f} GB" for key in ("anonymous_gb", "mapped_gb")),
        ]
        for r in records
        for state in ("cold", "warm")
    ]
    ratio = records[1]["warm_windows_per_second"] / records[0]["warm_windows_per_second"]
    lines = [
        *markdown_table(header, built_rows),
        "",
        f"One loader worker on one core, windows over all slides; rounds of {num_windows:,} windows. Warm throughput "
        f"over many spots is {ratio:.2f} of that over few.",
        "",
        *markdown_table(speed_header, speed_rows),
    ]
    text = "\n".join(lines) + "\n"
    write_results(output_dir, records, run_metadata(seed, num_windows=num_windows, warm_ratio=ratio), text)
    print(text)


if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
