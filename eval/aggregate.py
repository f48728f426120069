"""Records of single slides -> means over a set's slides -> means over sets.

A record is a dict with the keys set, slide, split, features, probe (str), smoothing (int, radius in sites), ari (float)
and, but for clusterings, accuracy and macro_f1; each with its deviation over splits as accuracy_sd and so on; and,
where it matters, seen (str): what the model saw of the slide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = Mapping[str, Any]
METRICS = ("accuracy", "ari", "macro_f1")
PLACE = ("set", "slide", "split", "features", "smoothing", "probe")


@dataclass(frozen=True)
class Mean:
    """A mean of one metric.

    Attributes:
        value: of the mean. deviation: of what was averaged, ddof = 0. number: of what was averaged.
        num_slides: below it. seen: what models saw of these slides, "" where it does not matter.
    """

    value: float
    deviation: float
    number: int
    num_slides: int
    seen: str = ""


def check_records(records: Sequence[Record]) -> None:
    """ValueError unless there are records, complete and each of a place of its own."""
    if not records:
        raise ValueError("no records: nothing to report")
    met = set()
    for record in records:
        missing = [key for key in (*PLACE, "ari") if key not in record]
        if missing:
            raise ValueError(f"a record lacks {', '.join(missing)}: {dict(record)}")
        place = tuple(record[key] for key in PLACE)
        if place in met:
            named = ", ".join(f"{key} {value!r}" for key, value in zip(PLACE, place, strict=True))
            raise ValueError(f"two records of {named}: keep one")
        met.add(place)


def distinct(records: Iterable[Record], key: str) -> list[Any]:
    """The values of a key in the order of their first appearance."""
    return list(dict.fromkeys(record[key] for record in records))


def num_slides(records: Iterable[Record]) -> int:
    """How many slides there are; one that is in two sets counts in both."""
    return len({(record["set"], record["slide"]) for record in records})


def matching(records: Iterable[Record], **values: Any) -> list[Record]:
    """The records that have these values."""
    return [record for record in records if all(record.get(key) == value for key, value in values.items())]


def slide_mean(records: Sequence[Record], metric: str) -> Mean | None:
    """Over the slides of one set, None where no record has the metric."""
    having = [record for record in records if record.get(metric) is not None]
    if not having:
        return None
    values = [record[metric] for record in having]
    return Mean(float(np.mean(values)), float(np.std(values)), len(values), len(values), seen_of(having))


def set_mean(records: Sequence[Record], metric: str) -> Mean | None:
    """Over the sets' means over their slides, so that many small slides do not outweigh one large."""
    within = [slide_mean(matching(records, set=name), metric) for name in distinct(records, "set")]
    means = [mean for mean in within if mean is not None]
    if not means:
        return None
    values, num_slides = [mean.value for mean in means], sum(mean.num_slides for mean in means)
    return Mean(float(np.mean(values)), float(np.std(values)), len(values), num_slides, seen_of(records))


MeanOf = Callable[[Sequence[Record], str], Mean | None]


def seen_of(records: Sequence[Record]) -> str:
    """What models saw of the slides: one word for all, or how many slides each."""
    by_slide = {(record["set"], record["slide"]): record["seen"] for record in records if "seen" in record}
    counts = Counter(by_slide.values())
    if len(counts) < 2:
        return "".join(counts)
    return ", ".join(f"{number} {seen}" for seen, number in sorted(counts.items()))


def smoothing_name(radius: int) -> str:
    """Of a column."""
    return "none" if radius == 0 else f"{2 * radius + 1}x{2 * radius + 1}"
