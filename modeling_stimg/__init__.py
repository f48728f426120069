"""stimg: spatial transcriptomics as images.

Importing the package makes the model known to transformers' Auto classes and pipelines; everything that needs AnnData,
SciPy or Matplotlib is imported when it is first used (PEP 562).
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

# What torch and transformers make on import stays for good: looking through it for garbage takes a tenth of the time.
_collecting = gc.isenabled()
gc.disable()

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_stimg import STImageMAEConfig
from .genes_stimg import GeneVocabulary
from .modeling_stimg import STImageMAEForPreTraining, STImageMAEModel
from .pipeline_stimg import TASK, STFeatureExtractionPipeline
from .processing_stimg import STPatchProcessor
from .slide_image_stimg import SlideImage

if TYPE_CHECKING:
    from . import pl
    from .binning import bin_cells
    from .domains import find_domains
    from .embedding import embed_slide, reconstruct_region
    from .plotting import plot_domains
    from .slides import read_cells, read_slide

__version__ = "0.1.0"

_LAZY = {
    "read_slide": "slides",
    "read_cells": "slides",
    "bin_cells": "binning",
    "embed_slide": "embedding",
    "find_domains": "domains",
    "reconstruct_region": "embedding",
    "plot_domains": "plotting",
}

AutoConfig.register(STImageMAEConfig.model_type, STImageMAEConfig)
AutoModel.register(STImageMAEConfig, STImageMAEModel)
AutoModelForPreTraining.register(STImageMAEConfig, STImageMAEForPreTraining)
# By way of AutoImageProcessor it would hide why a processor cannot be loaded.
AutoProcessor.register(STImageMAEConfig, STPatchProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=STFeatureExtractionPipeline, pt_model=AutoModel)
try:
    # From its own module: of `transformers` itself, 5.17 gives out a stand-in that asks for torchvision, because the
    # word TorchvisionBackend stands in that file. AutoProcessor goes by what is registered here in every version.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    AutoImageProcessor.register(STImageMAEConfig, image_processor_classes={"pil": STPatchProcessor})
except ImportError as error:  # no Pillow
    from transformers.utils import logging

    logging.get_logger(__name__).info(f"AutoImageProcessor is not to be had: {error}")


if _collecting:
    gc.enable()


def __getattr__(name: str) -> Any:
    if name == "pl":
        return import_module(".pl", __name__)
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "pl"})


__all__ = [
    "GeneVocabulary",
    "STFeatureExtractionPipeline",
    "STImageMAEConfig",
    "STImageMAEForPreTraining",
    "STImageMAEModel",
    "STPatchProcessor",
    "SlideImage",
    "bin_cells",
    "embed_slide",
    "find_domains",
    "pl",
    "plot_domains",
    "read_cells",
    "read_slide",
    "reconstruct_region",
]
