r"""Write the card of a published model from what was measured of it.

    python model_cards/card.py model_cards/NAME --repo ORG/NAME --results runs/domains/results.json \
        --regions runs/regions/results.json

Copies the results into the folder and writes `README.md`: metadata with a model-index, use and limits, the slides it
saw, the tables with the features that cost nothing, cost, and how to make it again. Every number comes from a file of
the folder. The same command without --results writes the card anew from what is there.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from data_processing.writing import write_whole
from eval.aggregate import distinct, matching, seen_of
from eval.domain_report import results_table
from eval.results import markdown_table
from model_cards.card_facts import (
    OPTIONS_FILE,
    REGIONS_FILE,
    RESULTS_FILE,
    THROUGHPUT_FILE,
    CardOptions,
    ModelFolder,
    write_options,
)
from model_cards.card_results import region_lines, throughput_lines, where_simple_wins
from model_cards.model_index import eval_results
from model_cards.training_slides import describe_training_slides
from train.model_card import TAGS, CardFacts, describe_model, describe_pipeline

# Of `pretraining.json`, but no field of the training script.
_FIELDS = ("repo", "licence", "row", "datasets", "watts", "corpus_command")
COUNTED = ("num_windows", "num_spots_seen", "steps_done")


def write_card(folder: ModelFolder) -> ModelCard:
    """The card of a model, from the files of its folder.

    Raises:
        ValueError, OSError: a file that the card needs is missing or does not hold what it should.
    """
    options = folder.options
    data = ModelCardData(
        library_name="transformers",
        license=options.licence,
        tags=list(TAGS),
        pipeline_tag="feature-extraction",
        datasets=list(options.datasets) or _corpora(folder),
        model_name=options.repo.split("/")[-1],
        eval_results=eval_results(folder),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {options.repo.split('/')[-1]}\n",
        describe_model(_run_facts(folder)),
        _usage(options),
        _uses_and_limits(),
        describe_training_slides(folder),
        _what_it_saw(folder),
        _results(folder),
        _cost(folder),
        _again(folder),
    ]
    return ModelCard("\n".join(parts))


def _run_facts(folder: ModelFolder) -> CardFacts:
    return CardFacts(
        name=folder.options.repo,
        config=folder.config,
        processor=folder.processor,
        num_parameters=folder.num_parameters,
        records=folder.slides,
        held_out=(),
        probed=(),
        parent=None,
        arguments=folder.pretraining["arguments"],
    )


def _corpora(folder: ModelFolder) -> list[str] | None:
    """The corpus of the Hub that the model was trained on, where `pretraining.json` tells one."""
    corpus = folder.pretraining.get("corpus")
    return None if corpus is None else [corpus.partition("@")[0]]


def _usage(options: CardOptions) -> str:
    return (
        f"## Use\n\n{describe_pipeline(options.repo)}\n"
        "With the package `stimg`, which reads all common files and writes into the AnnData:\n\n```bash\n"
        f"stimg embed slide.h5ad --model {options.repo} --output embedded.h5ad\n```\n"
    )


def _uses_and_limits() -> str:
    return (
        "## Intended use and limits\n\n"
        "- For research: domains of tissue sections, and whatever else takes an embedding of every spot. Not for "
        "clinical use: no decision about a patient may rest on it.\n"
        "- Human spot-based spatial transcriptomics with raw counts. Other species, single-cell resolution without an "
        "array, and values that are not counts are not what it was trained on.\n"
        "- It knows the genes of `genes.json`; others do not enter.\n"
        "- It has learnt from the slides below and no others: tissues, diseases, ancestries and technologies that are "
        "missing there may be embedded badly. What the donors were is not balanced.\n"
        "- Neighbouring spots have similar embeddings by construction. A good score where test spots lie beside "
        "training spots says little; the tables therefore stand beside features that cost nothing.\n"
    )


def _what_it_saw(folder: ModelFolder) -> str:
    records = folder.of_model
    rows = []
    for name in distinct(records, "set"):
        of_set = matching(records, set=name)
        rows.append([name, str(len(distinct(of_set, "slide"))), seen_of(of_set) or "not told"])
    if folder.regions is not None:
        of_model = matching(folder.regions[0], predictor=folder.options.row)
        seen = sorted({str(record.get("seen") or "not told") for record in of_model})
        rows.append(["region reconstruction", str(len(distinct(of_model, "slide"))), ", ".join(seen)])
    text = (
        "In pretraining, without labels. `unseen patient`: no slide of the donor; `same patient`: other sections of "
        "the donor, never this one; `transductive`: the very slide.\n\n"
    )
    return f"## What it saw of the evaluation slides\n\n{text}" + _joined(
        markdown_table(["evaluation", "slides", "seen"], rows)
    )


def _results(folder: ModelFolder) -> str:
    records, metadata = folder.results
    protocol = metadata.get("protocol", {})
    repetitions = f" {protocol['num_splits']} repetitions of every split." if "num_splits" in protocol else ""
    table = results_table(records, metadata).split("\n", 2)[2]  # without its title
    parts = [
        f"## Domain detection\n\nThe model's row is `{folder.options.row}`.{repetitions} Features that cost nothing "
        "stand in the same tables, also where they win.\n",
        _joined(where_simple_wins(folder)),
        "\n".join(f"#{line}" if line.startswith("#") else line for line in table.splitlines()) + "\n",
    ]
    if folder.regions is not None:
        parts.append(_joined(region_lines(folder)))
    if folder.throughput is not None:
        parts.append(_joined(throughput_lines(folder)))
    return "\n".join(parts)


def _cost(folder: ModelFolder) -> str:
    cost, watts = folder.pretraining.get("cost") or {}, folder.options.watts
    title = "## Environmental cost\n\n"
    if not cost.get("seconds"):
        return f"{title}Training time and hardware are unknown: `pretraining.json` does not tell them.\n"
    steps = folder.pretraining["arguments"]["max_steps"]
    told = (
        f"{cost['steps']:,} of {steps:,} training steps took {cost['seconds']:,.0f} s on {cost['processes']} x "
        f"{cost['device']}."
    )
    if watts is None:
        return f"{title}{told} The energy is unknown: how much power that took was not told.\n"
    formula = "energy = seconds x steps of the training / steps that were timed x watts / seconds of an hour"
    return (
        f"{title}{told} An estimate: {formula} = {energy_kwh(cost, steps, watts):.3g} kWh, with {watts:g} W for "
        "everything that it ran on, as was told for this card, not measured.\n"
    )


def energy_kwh(cost: dict[str, Any], steps: int, watts: float) -> float:
    """seconds x steps / timed steps x watts, in kWh."""
    return cost["seconds"] * steps / cost["steps"] * watts / 3.6e6


def _again(folder: ModelFolder) -> str:
    metadata, arguments = folder.results[1], folder.pretraining["arguments"]
    fields = {k: v for k, v in arguments.items() if k not in COUNTED}
    if arguments.get("num_windows") and arguments.get("max_steps", 0) > 0:
        # In one process: how a step's windows are spread over processes does not matter.
        fields["per_device_train_batch_size"] = arguments["num_windows"] // arguments["max_steps"]
    name = folder.options.repo.split("/")[-1]
    before = [] if folder.options.corpus_command is None else [folder.options.corpus_command]
    corpus = _option(shlex.split(" ".join(before)), "--output") or "corpus"
    training = f"accelerate launch train/run_pretrain.py --config config.yaml --corpus {corpus} --output_dir runs/model"
    half = " --half" if folder.is_halved else ""
    commands = [*before, training, f"python model_cards/gather.py runs/model model_cards/{name}{half}"]
    measured = {"--results": folder.results, "--regions": folder.regions, "--throughput": folder.throughput}
    written = []
    for option, results in measured.items():
        command = [] if results is None else results[1].get("command", [])
        commands += [shlex.join(["python", *command])] if command else []
        if results is not None:
            place = _option(command, "--output_dir") or _option(command, "--output-dir") or f"runs/{option[2:]}"
            written += [option, f"{place}/results.json"]
    commands.append(shlex.join(["python", "model_cards/card.py", f"model_cards/{name}", *written, *_told(folder)]))
    curve = ""
    if (folder.path / "loss.png").exists():
        curve = "\n![Training loss by step](loss.png)\n"
    commit = metadata.get("commit")
    at = f" at commit `{commit}`" if commit else ""
    return (
        f"## Making it again\n\nWith the package `stimg`{at}; the training slides in a corpus or as files, and "
        f"`config.yaml`:\n\n```yaml\n{yaml.safe_dump(fields, sort_keys=False)}```\n\n```bash\n"
        + "".join(f"{command}\n" for command in commands)
        + f"```\n{curve}\nEvery number of this card is from `{RESULTS_FILE}`, `pretraining.json` and the other files "
        "beside it.\n"
    )


def _told(folder: ModelFolder) -> list[str]:
    """The options of this script that `card.json` keeps, where they are not the default ones."""
    options, words = folder.options, []
    for field in dataclass_fields(CardOptions):
        value = getattr(options, field.name)
        if value != field.default:
            words += [f"--{field.name}", *([str(v) for v in value] if isinstance(value, tuple) else [str(value)])]
    return words


def _option(command: Sequence[str], name: str) -> str | None:
    """The value of an option in the words of a command, `--name value` or `--name=value`; the last one, if any."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith(f"{name}=") else [word])]
    found = [value for word, value in pairwise(words) if word == name]
    return found[-1] if found else None


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="Folder of the model, from model_cards/gather.py.")
    parser.add_argument("--results", type=Path, help="results.json of eval/run_domain_detection.py.")
    parser.add_argument("--regions", type=Path, help="results.json of eval/run_region_reconstruction.py.")
    parser.add_argument("--throughput", type=Path, help="results.json of eval/run_throughput.py.")
    parser.add_argument("--repo", help="ORG/NAME that it will have on the Hub.")
    parser.add_argument("--licence", help="Of the weights, an identifier of the Hub; default: apache-2.0.")
    parser.add_argument("--row", help="Of the model in the results; default: stimg.")
    parser.add_argument("--datasets", nargs="*", help="Ids on the Hub of the corpora; default: the one trained on.")
    parser.add_argument("--corpus_command", help="That made the corpus, to be told in the card.")
    parser.add_argument("--watts", type=float, help="Power of everything that the training ran on, in W.")
    arguments = parser.parse_args(argv)
    make_card(arguments.folder, vars(arguments))
    print(f"{arguments.folder / 'README.md'} is written; next: python model_cards/publish.py --dry-run")


def make_card(path: Path, given: dict[str, Any]) -> None:
    """Write `README.md`, and what it is made of beside it; nothing where the card cannot be made.

    Args:
        given: files by `results`, `regions`, `throughput`, and the fields of `CardOptions`; what is None stays.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}: python model_cards/gather.py makes it.")
    before: dict[Path, bytes | None] = {}

    def put(name: str, content: bytes) -> None:
        target = path / name
        before.setdefault(target, target.read_bytes() if target.exists() else None)
        write_whole(target, content)

    for key, name in (("results", RESULTS_FILE), ("regions", REGIONS_FILE), ("throughput", THROUGHPUT_FILE)):
        if given.get(key) is not None:
            put(name, Path(given[key]).read_bytes())
    fields = {k: given[k] for k in _FIELDS if given.get(k) is not None}
    try:
        target = path / OPTIONS_FILE
        before.setdefault(target, target.read_bytes() if target.exists() else None)
        if before[target] is None and "repo" not in fields:
            raise ValueError("Name the model's place on the Hub: --repo ORG/NAME.")
        options = CardOptions(fields["repo"]) if before[target] is None else ModelFolder(path).options
        if "datasets" in fields:
            fields["datasets"] = tuple(fields["datasets"])
        write_options(path, replace(options, **fields))
        put("README.md", str(write_card(ModelFolder(path))).encode())
    except (ValueError, OSError, KeyError, TypeError):
        for target, content in before.items():
            if content is None:
                target.unlink(missing_ok=True)
            else:
                write_whole(target, content)
        raise


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
