"""transformers' own common tests of image processors, applied to STPatchProcessor. Run by
tests/test_transformers_image_processor.py inside an unpacked transformers source distribution; not collected from here.

Where the common tests hand over a list of pictures, a slide stands here, and windows of it are the batch. A processor
needs its gene vocabulary, which has a file of its own and is in no JSON: tests that make one from JSON alone, or from
nothing, give it besides.
"""

import functools
import inspect
import json
import os
import subprocess
import tempfile
import unittest
from copy import deepcopy
from unittest.mock import patch

import numpy as np
import pytest
import torch
from anndata import AnnData
from parameterized import parameterized
from transformers import AutoImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.processing_utils import ImagesKwargs

from data_processing.phantom import PhantomTissue
from modeling_stimg import GeneVocabulary, SlideImage, STImageMAEConfig, STPatchProcessor

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin, prepare_image_inputs

FROM_AUTO = "from transformers import AutoImageProcessor"


@functools.cache
def slide() -> AnnData:
    return PhantomTissue.create(num_genes=80, seed=1).slide(0, height=12, width=10)


@functools.cache
def vocabulary() -> GeneVocabulary:
    genes = GeneVocabulary.from_slides([slide()])
    return genes.with_statistics(np.linspace(0, 2, len(genes)), np.linspace(0.5, 1, len(genes)))


class STPatchProcessorTester(ImageProcessingTester):
    """Options that are not the defaults, so that one that gets lost shows."""

    def __init__(self, parent: unittest.TestCase):
        super().__init__(
            parent,
            batch_size=3,
            num_channels=16,
            window_size=6,
            compaction="rank",
            gene_selection="variable",
            normalization="standardized",
            target_sum=5e3,
            min_observed=0.4,
        )

    def _get_image_processing_classes(self):
        # The common version reads the names of transformers' own models; this one was registered by class.
        return IMAGE_PROCESSOR_MAPPING[STImageMAEConfig]

    def prepare_image_processor_dict(self):
        return {**super().prepare_image_processor_dict(), "vocabulary": vocabulary()}

    def prepare_image_inputs(self, counts=None, **kwargs) -> SlideImage:
        """The slide, with its counts in another form where `counts` is given; `kwargs` ask for kinds of pictures."""
        adata = slide().copy()
        if counts is not None:
            adata.X = counts
        return STPatchProcessor(**self.prepare_image_processor_dict()).slide_to_image(adata)

    def prepare_processor_inputs(self, **kwargs):
        return {"image": self.prepare_image_inputs(**kwargs), "num_windows": self.batch_size}

    def expected_output_image_shape(self, images):
        return self.num_channels, self.window_size, self.window_size


class STPatchProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = STPatchProcessorTester
    # Which type does not matter: the common test runs unless this is None.
    test_cast_dtype = True

    def processor(self) -> STPatchProcessor:
        return STPatchProcessor(**self.image_processor_dict)

    def vocabulary_given(self):
        """`from_dict` with the vocabulary that a dictionary does not hold."""
        return patch.object(
            STPatchProcessor, "from_dict", functools.partial(STPatchProcessor.from_dict, vocabulary=vocabulary())
        )

    def batches(self, image: SlideImage, processor: STPatchProcessor | None = None, **call):
        """One window as by default, then a batch of them, after a look at their number and shape."""
        tester, processor = self.image_processor_tester, processor or self.processor()
        for number in (None, tester.batch_size):
            batch = processor(image, num_windows=number, **call)
            assert all(len(value) == (number or 1) for value in batch.values())
            assert batch.pixel_values.shape[1:] == tester.expected_output_image_shape([image])
            yield batch

    def assert_same_batch(self, batch, expected):
        """The same keys, and under each the same values of the same type."""
        assert list(batch) == list(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key], value, strict=True)

    # ---------------------------------------------------------------- options and files

    def test_init_without_params(self):
        # A vocabulary is needed, and nothing else is.
        processor = STPatchProcessor(vocabulary())
        for name, parameter in inspect.signature(STPatchProcessor.__init__).parameters.items():
            if parameter.default is not parameter.empty:
                assert getattr(processor, name) == parameter.default
        with pytest.raises(TypeError, match="vocabulary"):
            STPatchProcessor()

    def test_image_processor_from_dict_has_attributes(self):
        with self.vocabulary_given():
            super().test_image_processor_from_dict_has_attributes()
        with pytest.raises(ValueError, match="pass vocabulary="):
            STPatchProcessor.from_dict(self.processor().to_dict())

    def test_image_processor_from_dict_with_kwargs_has_attributes(self):
        with self.vocabulary_given():
            super().test_image_processor_from_dict_with_kwargs_has_attributes()

    def test_image_processor_to_json_string(self):
        # The vocabulary stands there as its fingerprint.
        written = json.loads(self.processor().to_json_string())
        options = self.image_processor_dict
        assert options.pop("vocabulary").sha256 == written["genes_sha256"]
        assert "vocabulary" not in written
        assert {name: written[name] for name in options} == options

    def test_image_processor_to_json_file(self):
        # Read with from_dict: from_json_file takes a path alone, and the file holds no vocabulary.
        first = self.processor()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "image_processor.json")
            first.to_json_file(path)
            with open(path, encoding="utf-8") as file:
                second = STPatchProcessor.from_dict(json.load(file), vocabulary=vocabulary())
        assert second.to_dict() == first.to_dict()

    def test_from_pretrained_kwargs(self):
        # Not a common test: every option may be changed at loading, and what is none comes back if asked for.
        changed = {
            "window_size": 5,
            "num_channels": 7,
            "compaction": "lattice",
            "gene_selection": "random",
            "normalization": "log1p",
            "target_sum": 1e3,
            "min_observed": 0.1,
            "sample_unit": "slice",
        }
        own = STPatchProcessor.valid_kwargs.__annotations__.keys() - ImagesKwargs.__annotations__.keys()
        assert changed.keys() == own
        with tempfile.TemporaryDirectory() as folder:
            self.processor().save_pretrained(folder)
            for loader in (STPatchProcessor, AutoImageProcessor):
                processor, unused = loader.from_pretrained(folder, **changed, other=1, return_unused_kwargs=True)
                self._assert_has_attributes(processor, {**changed, "vocabulary": vocabulary()})
                assert unused["other"] == 1
                assert not hasattr(processor, "other")

    def test_override_instance_attributes_does_not_affect_other_instances(self):
        # The common test changes sizes and means of pictures; what is mutable here comes from the files.
        with tempfile.TemporaryDirectory() as folder:
            self.processor().save_pretrained(folder)
            first, second = (STPatchProcessor.from_pretrained(folder) for _ in range(2))
        before = deepcopy(second.to_dict())
        first.window_size = 3
        first.auto_map["AutoImageProcessor"] = "other"
        first.vocabulary.gene_ids[0] = "other"
        assert second.to_dict() == before
        assert all(first.to_dict()[key] != before[key] for key in ("window_size", "auto_map", "genes_sha256"))

    def test_pil_can_run_without_torchvision(self):
        # The common script meets the processor in a fresh process, which knows the class only by the package.
        run = subprocess.run

        def run_with_package(command, **kwargs):
            script = command[2].replace(FROM_AUTO, f"import modeling_stimg\n{FROM_AUTO}")
            return run([*command[:2], script, *command[3:]], **kwargs)

        with patch("subprocess.run", run_with_package):
            super().test_pil_can_run_without_torchvision()

    def test_new_models_require_torchvision_backend(self):
        self.skipTest("windows are cut out of sparse counts: there is no picture that torchvision could resize")

    # ---------------------------------------------------------------- calls

    def test_call_pil(self):
        # Pictures of every kind, and lists, are refused with the way to a SlideImage.
        kinds = ({}, {"numpify": True}, {"torchify": True})
        pictures = [prepare_image_inputs(1, 30, 40, 3, **kind)[0] for kind in kinds]
        for refused in (*pictures, pictures, [self.image_processor_tester.prepare_image_inputs()]):
            with pytest.raises(ValueError, match=f"Got a {type(refused).__name__}.*slide_to_image"):
                self.processor()(refused, return_tensors="pt")

    def test_call_numpy(self):
        # NumPy counts in place of sparse ones.
        image, same = (self.image_processor_tester.prepare_image_inputs(c) for c in (slide().X.toarray(), None))
        for batch, expected in zip(self.batches(image, return_tensors="np"), self.batches(same), strict=True):
            assert all(isinstance(value, np.ndarray) for value in batch.values())
            self.assert_same_batch(batch, expected)

    def test_call_pytorch(self):
        # Slides come without tensors: what has to hold is that a batch of tensors is the batch of arrays.
        image = self.image_processor_tester.prepare_image_inputs()
        for batch, expected in zip(self.batches(image, return_tensors="pt"), self.batches(image), strict=True):
            assert all(torch.is_tensor(value) for value in batch.values())
            self.assert_same_batch({key: value.numpy() for key, value in batch.items()}, expected)

    def test_call_numpy_4_channels(self):
        # Four channels are four genes, in the order in which they are asked for.
        processor, genes = self.processor(), [7, 3, 71, 40]
        image = self.image_processor_tester.prepare_image_inputs()
        # What the test expects, no longer what the processor was made with.
        self.image_processor_tester.num_channels = len(genes)
        for batch in self.batches(image, processor, genes=genes, return_tensors="pt"):
            assert (batch.gene_ids == torch.tensor(genes)).all()

    @parameterized.expand([1, 3, 4])
    def test_convert_to_rgb_mixed_input_batch(self, num_channels: int):
        # Counts have no colours to convert; they come in any layout and type, which must not show in the windows.
        tester, processor = self.image_processor_tester, self.processor()
        call = {"windows": [(0, 0), (3, 2), (5, 5)], "genes": range(num_channels)}
        expected = processor(tester.prepare_image_inputs(), **call)
        assert expected["pixel_values"].shape[:2] == (3, num_channels)
        sparse = slide().X.tocsr()
        for counts in (sparse, sparse.tocsc(), sparse.toarray(), np.asfortranarray(sparse.toarray())):
            for dtype in (np.float32, np.float64, np.int32, np.uint16):
                self.assert_same_batch(
                    processor(tester.prepare_image_inputs(counts=counts.astype(dtype)), **call), expected
                )

    def test_image_processor_preprocess_arguments(self):
        # The common test looks for a filter that warns; here the signature is fixed, and Python refuses the rest.
        with pytest.raises(TypeError, match="extra_argument"):
            self.processor()(self.image_processor_tester.prepare_image_inputs(), extra_argument=True)
