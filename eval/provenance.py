"""What a model saw of a slide that it is evaluated on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_processing.corpus import SlideRecord, slide_patient
from data_processing.fingerprints import known_patient

if TYPE_CHECKING:
    from anndata import AnnData


def seen(name: str, adata: AnnData, corpus: list[SlideRecord] | None, patient: str = "") -> str:
    """What the model saw of this slide in pretraining, by the `pretraining.json` beside its weights.

    Args:
        patient: of the slide, where it does not say itself.
    """
    if corpus is None:
        return "not told"
    if any(record.name == name for record in corpus):
        return "transductive"
    patient = known_patient(slide_patient(adata)) or known_patient(patient)
    if patient and any(record.patient == patient for record in corpus):
        return "same patient"
    return "unseen patient" if patient and all(record.patient for record in corpus) else "patient not told"
