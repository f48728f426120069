"""The model-index of a card: every metric of the model's rows, in a form that the Hub reads."""

from huggingface_hub import EvalResult

from eval.aggregate import METRICS, Record, distinct, matching, seen_of, slide_mean, smoothing_name
from eval.domain_report import PROBE_TITLES
from model_cards.card_facts import ModelFolder

# Metrics of the Hub by name, where it has them.
METRIC_TYPES = {"accuracy": "accuracy", "macro_f1": "f1", "ari": "ari"}
METRIC_NAMES = {"accuracy": "accuracy", "macro_f1": "macro F1", "ari": "adjusted Rand index"}
REGION_METRICS = {"mse": "MSE", "mae": "MAE", "pearson": "Pearson correlation"}
DIGITS = 6


def eval_results(folder: ModelFolder) -> list[EvalResult]:
    """Every metric of the model's rows: a mean over the slides of a set, and over sizes first for regions."""
    return [*_domains(folder), *_regions(folder)]


def _domains(folder: ModelFolder) -> list[EvalResult]:
    records, found = folder.of_model, []
    for name in distinct(records, "set"):
        of_set = matching(records, set=name)
        places = dict.fromkeys((r["split"], r["features"], r["smoothing"], r["probe"]) for r in of_set)
        for split, features, radius, probe in places:
            cells = matching(of_set, split=split, features=features, smoothing=radius, probe=probe)
            about = f"{PROBE_TITLES.get(probe, probe)}, {features}"
            about += "" if radius == 0 else f", {smoothing_name(radius)} mean"
            for metric in METRICS:
                mean = slide_mean(cells, metric)
                if mean is not None:
                    found.append(
                        EvalResult(
                            task_type="tissue-domain-detection",
                            task_name="Tissue domain detection",
                            dataset_type=name,
                            dataset_name=f"{name}, {mean.num_slides} slides, split {split}",
                            dataset_config=split,
                            dataset_args=_slides(cells),
                            metric_type=METRIC_TYPES[metric],
                            metric_name=f"{METRIC_NAMES[metric]} ({about})",
                            metric_value=round(mean.value, DIGITS),
                        )
                    )
    return found


def _regions(folder: ModelFolder) -> list[EvalResult]:
    if folder.regions is None:
        return []
    # Every slide is a set of its own, for which the means of `aggregate` are those over its sizes.
    of_model = matching(folder.regions[0], predictor=folder.options.row)
    records, found = [{**record, "set": record["slide"]} for record in of_model], []
    for slide in distinct(records, "slide"):
        of_slide = matching(records, slide=slide)
        for metric, title in REGION_METRICS.items():
            mean = slide_mean(of_slide, metric)
            if mean is not None:
                found.append(
                    EvalResult(
                        task_type="masked-region-reconstruction",
                        task_name="Masked region reconstruction",
                        dataset_type=slide,
                        dataset_name=slide,
                        dataset_args=_slides(of_slide),
                        metric_type=metric,
                        metric_name=f"{title} (mean over sizes)",
                        metric_value=round(mean.value, DIGITS),
                    )
                )
    return found


def _slides(records: list[Record]) -> dict[str, object]:
    """What to tell of a data set: its slides, and what the model saw of them."""
    told = [{**record, "seen": record.get("seen") or "not told"} for record in records]
    return {"slides": distinct(records, "slide"), "seen": seen_of(told)}
