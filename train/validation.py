"""Which slides are held out of training."""

from collections.abc import Sequence

import numpy as np

from data_processing.corpus import SlideRecord


def choose_validation(
    records: Sequence[SlideRecord], wanted: Sequence[str], seed: int, seen_before: Sequence[str] = ()
) -> list[str]:
    """Names of the slides to hold out, in the order of `records`.

    Args:
        records: all slides. seed: of the draw.
        wanted: names, or one share of the slides in (0, 1). A share is drawn by patient, so that no patient is on both
            sides; a slide that names none counts as a patient of its own.
        seen_before: names of slides that the model was trained on earlier; they cannot be held out any more.

    Raises:
        ValueError: an unknown name, nothing left on either side, or a slide that was seen before.
    """
    if not wanted:
        return []
    share = _share(wanted)
    names = list(wanted) if share is None else _draw_by_patient(records, share, seed, set(seen_before))
    unknown = sorted(set(names) - {record.name for record in records})
    if unknown:
        raise ValueError(f"Validation slides {unknown} are not among the {len(records)} slides given: check the names.")
    seen = sorted(set(names) & set(seen_before))
    if seen:
        raise ValueError(f"Validation slides {seen} were seen by the model that is gone on from: hold out others.")
    if len(set(names)) == len(records):
        raise ValueError(f"All {len(records)} slides would be held out: nothing is left to train on.")
    return [record.name for record in records if record.name in set(names)]


def _share(wanted: Sequence[str]) -> float | None:
    """The share that was asked for, None for names."""
    try:
        share = float(wanted[0]) if len(wanted) == 1 else None
    except ValueError:
        return None
    if share is not None and not 0 < share < 1:
        raise ValueError(f"validation_slides is {wanted[0]}: expected names of slides, or a share between 0 and 1.")
    return share


def _draw_by_patient(records: Sequence[SlideRecord], share: float, seed: int, seen_before: set[str]) -> list[str]:
    """Whole patients in a random order, as many as come closest to the share, at least one."""
    patients: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda r: r.name):
        patients.setdefault(f"patient {record.patient}" if record.patient else record.name, []).append(record.name)
    free = [names for names in patients.values() if not seen_before & set(names)]
    if not free or len(patients) < 2:
        raise ValueError(
            f"A share of {share:g} cannot be held out: the {len(records)} slides are of {len(patients)} patients, "
            f"{len(patients) - len(free)} of them seen before; name validation slides instead."
        )
    order = [free[i] for i in np.random.default_rng([seed, len(free)]).permutation(len(free))]
    sizes = np.cumsum([len(names) for names in order])
    most = len(order) if len(free) < len(patients) else len(order) - 1  # somebody is left to train on
    count = 1 + int(np.abs(sizes[:most] - share * len(records)).argmin())
    return [name for names in order[:count] for name in names]
