"""How fast are windows made, and how much memory does a large slide take?

    python eval/run_throughput.py windows '$STIMG_DATA/slides/her2st_A2.h5ad' --output-dir runs/throughput
    python eval/run_throughput.py memory --output-dir runs/memory
    python eval/run_throughput.py corpus --output-dir runs/corpus_throughput
    python eval/run_throughput.py training --output-dir runs/training_throughput
    python eval/run_throughput.py training-memory --output-dir runs/training_memory
    python eval/run_throughput.py embedding '$STIMG_DATA/slides/*.h5ad' --output-dir runs/embedding_throughput

`windows` times the sampler on one core, as a multiple of one weighted `np.bincount` over the same windows' non-zeros,
beside the textbook's dense way, and on a GPU where there is one. `memory` embeds a phantom slide of half a million bins
and tells the peak of anonymous memory. `corpus` builds a phantom corpus of a million spots and draws windows from it
as a loader worker does. `training` times a step beside ViTMAE's and the wait for windows, `training-memory` tells what
a step takes. `embedding` times slides from file to file with a model's own defaults. All write `results.json` and
`table.md`.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from data_processing.corpus import find_slides, read_slides, slide_images, vocabulary_of
from eval.embedding_throughput import measure_embedding
from eval.results import markdown_table, run_metadata, write_results
from eval.throughput import measure_memory, measure_resident, measure_windows, one_core, random_model
from modeling_stimg import STImageMAEModel, STPatchProcessor
from modeling_stimg.configuration_stimg import MASK_UNITS
from modeling_stimg.host import keep_freed_memory, multiplies_bfloat16
from modeling_stimg.hub import find_model

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

OutputOption = Annotated[Path, typer.Option(help="Folder for results.json and table.md; made if missing.")]
BatchOption = Annotated[int, typer.Option(help="Windows of a batch.", min=1)]
WindowOption = Annotated[int, typer.Option(help="Side of a window, in sites.", min=1)]
ChannelsOption = Annotated[int, typer.Option(help="Genes of a window.", min=1)]
GenesOption = Annotated[int, typer.Option(help="Genes of the vocabulary.", min=1)]
WidthOption = Annotated[int, typer.Option(help="Width of the encoder, a multiple of 64.", min=64)]
LayersOption = Annotated[int, typer.Option(help="Layers of the encoder.", min=1)]
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
def embedding(
    slides: Annotated[list[str], typer.Argument(help="Slides: files or globs; $VARIABLES are expanded.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; default: the model of this checkout.")] = None,
    output_dir: OutputOption = Path("runs/embedding_throughput"),
    threads: Annotated[int, typer.Option(help="Threads of a CPU.", min=1)] = 2,
    device: Annotated[str | None, typer.Option(help="Where to embed, e.g. cuda.")] = None,
) -> None:
    """Spots a second from a slide's file to a file with its embedding, as the model embeds by default."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    found = find_model(model)
    network, processor = (cls.from_pretrained(found.folder) for cls in (STImageMAEModel, STPatchProcessor))
    records = measure_embedding(find_slides(slides), network, processor, device)
    spots, parts = sum(r["spots"] for r in records), ("read_seconds", "embed_seconds", "write_seconds")
    seconds = [sum(r[part] for r in records) for part in parts]
    summary = {"slide": "all", "spots": spots, "genes": "", **dict(zip(parts, seconds, strict=True))}
    summary["spots_per_second"] = spots / sum(seconds)
    rows = [
        [r["slide"], f"{r['spots']:,}", *(f"{r[part]:.2f} s" for part in parts), f"{r['spots_per_second']:,.0f}"]
        for r in (*records, summary)
    ]
    bfloat16 = "has" if multiplies_bfloat16() else "has no"
    text = "\n".join(
        [
            f"{found.name}, as it embeds by default, in {str(network.dtype).split('.')[-1]} with {threads} threads; "
            f"this CPU {bfloat16} instructions for bfloat16. Imports and loading of the model are not counted.",
            "",
            *markdown_table(["slide", "spots", "read", "embed", "write", "spots/s"], rows),
        ]
    )
    metadata = run_metadata(0, model=found.name, threads=threads, slides=[r["slide"] for r in records])
    write_results(output_dir, [*records, summary], metadata, text + "\n")
    print(text)


@app.command()
def memory(
    output_dir: OutputOption = Path("runs/memory"),
    num_bins: Annotated[int, typer.Option(help="Bins of the phantom slide.", min=1)] = 500_000,
    num_genes: Annotated[int, typer.Option(help="Genes of the phantom slide.", min=1)] = 18_000,
    genes_per_bin: Annotated[int, typer.Option(help="Non-zeros of a bin.", min=1)] = 200,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id: embed as it does by default; else an untrained model.")
    ] = None,
    hidden_size: Annotated[int, typer.Option(help="Width of the untrained model.", min=4)] = 128,
    num_layers: Annotated[int, typer.Option(help="Layers of its encoder.", min=1)] = 2,
    stride: Annotated[
        int | None, typer.Option(help="Sites between neighbouring windows; default: the model's, 16 untrained.", min=1)
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Peak of anonymous memory from the CSR of a large slide to embeddings of all its bins."""
    keep_freed_memory()
    if model is None:
        pair = random_model(num_genes, hidden_size, num_layers, seed)
        stride = 16 if stride is None else stride
    else:
        found = find_model(model)
        pair = tuple(cls.from_pretrained(found.folder) for cls in (STImageMAEModel, STPatchProcessor))
    record = measure_memory(*pair, num_bins, num_genes, genes_per_bin, stride, seed)
    header = ["bins x genes", "non-zeros", "CSR", "peak, CSR included", "were it dense", "time"]
    row = [
        f"{num_bins:,} x {record['genes']:,}",
        f"{record['non_zeros']:,}",
        *(f"{record[key]:.2f} GB" for key in ("csr_gb", "peak_gb", "dense_gb")),
        f"{record['seconds']:.0f} s",
    ]
    text = (
        "\n".join(["Anonymous memory (RssAnon), the libraries' included.", "", *markdown_table(header, [row])]) + "\n"
    )
    metadata = run_metadata(seed, model=model, width=record["embedding"][1], stride=stride)
    write_results(output_dir, [record], metadata, text)
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


@app.command()
def training(
    output_dir: OutputOption = Path("runs/training_throughput"),
    mask_unit: Annotated[
        list[str],
        typer.Option(help="Mask units to time, +residual: so reconstructed; the first also on a slide; repeatable."),
    ] = [*MASK_UNITS, "mixed+residual"],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast.")] = "float32",
    attention: Annotated[str, typer.Option(help="Attention implementation of all models.")] = "sdpa",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile all models.")] = False,
    fused: Annotated[bool, typer.Option(help="The fused AdamW, which is the Trainer's default.")] = True,
    keep_memory: Annotated[bool, typer.Option(help="Reuse freed memory, as train/run_pretrain.py does.")] = True,
    batch_size: BatchOption = 32,
    window_size: WindowOption = 16,
    num_channels: ChannelsOption = 512,
    num_genes: GenesOption = 20_000,
    hidden_size: WidthOption = 256,
    num_layers: LayersOption = 6,
    num_rounds: Annotated[int, typer.Option(help="Rounds that are timed; in each every model has a step.")] = 9,
    num_batches: Annotated[int, typer.Option(help="Steps on windows that are made meanwhile.", min=1)] = 8,
    num_workers: Annotated[list[int], typer.Option(help="Loader workers to try; give it several times.")] = [0, 1],  # noqa: B006
    peak_tflops: Annotated[float, typer.Option(help="Of the GPU, for its utilisation; an H200's in bfloat16.")] = 989.0,
    seed: SeedOption = 0,
) -> None:
    """Time of a training step, as a multiple of ViTMAE's, and the share of it that waits for windows."""
    from eval.training_throughput import StepSetting, StepSizes, measure_loading, measure_steps

    sizes = StepSizes(batch_size, window_size, num_channels, num_genes, hidden_size, num_layers)
    setting = StepSetting(dtype, attention, compiled, "cuda" if torch.cuda.is_available() else "cpu")
    keep_memory = keep_memory and setting.device == "cpu" and keep_freed_memory()
    steps = measure_steps(mask_unit, sizes, setting, fused, num_rounds, seed)
    loading = measure_loading(mask_unit[0], sizes, setting, fused, num_batches, num_workers, peak_tflops, seed)
    header = ["model", "parameters", "forward + backward", "ratio", "CPU time's", "optimiser", "step", "ratio"]
    rows = [
        [
            r["model"],
            f"{r['parameters'] / 1e6:.1f} M",
            f"{r['forward_backward_ms']:.2f} ms",
            f"{r['forward_backward_ratio']:.2f}",
            f"{r['forward_backward_cpu_ratio']:.2f}",
            f"{r['optimizer_ms']:.2f} ms",
            f"{r['step_ms']:.2f} ms",
            f"{r['step_ratio']:.2f}",
        ]
        for r in steps
    ]
    where = torch.cuda.get_device_name() if setting.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    lines = [
        f"A training step on full windows of {window_size} x {window_size} x {num_channels}, {dtype}, {attention}"
        f"{', compiled' if compiled else ''}, batches of {batch_size}, {where}: time a window, medians of {num_rounds} "
        "rounds; ratios to ViTMAE's step of the same round. `vit_mae` sees 70 % of the sites, the others are ours by "
        "mask unit. The optimiser is AdamW, clipping included.",
        "",
        *markdown_table(header, rows),
        "",
        "Steps on windows of a phantom slide that are made meanwhile.",
        "",
        *_loading_table(loading),
    ]
    text = "\n".join(lines) + "\n"
    options = {**asdict(sizes), **asdict(setting), "fused": fused, "keep_memory": keep_memory, "where": where}
    write_results(output_dir, [*steps, *loading], run_metadata(seed, **options), text)
    print(text)


def _loading_table(records: list[dict[str, Any]]) -> list[str]:
    header = ["mask unit", "windows from", "wait for data", "windows/s", "of ready-made", "FLOP utilisation"]
    rows = [
        [
            r["mask_unit"],
            r["source"],
            f"{r['wait_share']:.1%}",
            f"{r['windows_per_second']:.1f}",
            f"{r['of_ready_made']:.2f}",
            "-" if r["utilisation"] is None else f"{r['utilisation']:.1%}",
        ]
        for r in records
    ]
    return markdown_table(header, rows)


@app.command()
def training_memory(
    output_dir: OutputOption = Path("runs/training_memory"),
    mask_unit: Annotated[str, typer.Option(help="What is hidden: entry, site or mixed.")] = "entry",
    attention: Annotated[str, typer.Option(help="Attention implementation.")] = "sdpa",
    batch_size: Annotated[list[int], typer.Option(help="Batch sizes to try.")] = [4, 8, 16, 32],  # noqa: B006
    window_size: WindowOption = 16,
    large_window: Annotated[int, typer.Option(help="Side of one large window, at batch size 1.", min=1)] = 64,
    num_channels: ChannelsOption = 512,
    num_genes: GenesOption = 20_000,
    hidden_size: WidthOption = 256,
    num_layers: LayersOption = 6,
    seed: SeedOption = 0,
) -> None:
    """Peak of anonymous memory of training steps, each size in a fresh process."""
    from eval.training_throughput import StepSizes, in_fresh_process, measure_step_memory

    sizes = [
        StepSizes(batch, window, num_channels, num_genes, hidden_size, num_layers)
        for batch, window in (*((batch, window_size) for batch in batch_size), (1, large_window))
    ]
    records = [in_fresh_process(measure_step_memory, mask_unit, size, attention, seed) for size in sizes]
    rows = [
        [
            str(r["batch_size"]),
            f"{r['window_size']} x {r['window_size']} x {num_channels}",
            f"{r['growth_gb']:.2f} GB",
            f"{r['peak_gb']:.2f} GB",
        ]
        for r in records
    ]
    lines = [
        f"Anonymous memory (RssAnon) of training steps in float32 on the CPU, {attention}, mask unit {mask_unit}; "
        "growth counts from after the libraries were loaded: model, optimiser, batch and step.",
        "",
        *markdown_table(["batch size", "window", "growth", "peak"], rows),
    ]
    text = "\n".join(lines) + "\n"
    write_results(output_dir, records, run_metadata(seed, attention=attention, hidden_size=hidden_size), text)
    print(text)


if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
