"""transformers' own common tests, applied to STImageMAE. Run by tests/test_transformers_common.py inside an unpacked
transformers source distribution; not collected from here."""

import unittest
from unittest.mock import patch

import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import require_torch, torch_device

from modeling_stimg import STImageMAEConfig, STImageMAEForPreTraining, STImageMAEModel

from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

# The tests that train leave out the models listed here: an encoder alone has no loss.
MODEL_MAPPING_NAMES[STImageMAEConfig.model_type] = STImageMAEModel.__name__


class STImageMAEModelTester:
    """Small sizes, and inputs with a fixed noise: the mask must not differ between two runs of one test."""

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.batch_size = 5
        self.window_size = 4
        self.image_size, self.patch_size = self.window_size, 1
        self.seq_length = self.window_size**2
        self.num_channels = 12
        self.vocab_size = 41
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.is_training = True

    def get_config(self) -> STImageMAEConfig:
        return STImageMAEConfig(
            window_size=self.window_size,
            num_channels=self.num_channels,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=24,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.window_size, self.window_size]
        inputs = {
            "pixel_values": floats_tensor(shape),
            "gene_ids": ids_tensor(shape[:2], self.vocab_size - 1),
            # Integers, because some tests extend inputs with torch.randint(high=5), which bool cannot hold.
            "pixel_mask": torch.ones([shape[0], *shape[2:]], dtype=torch.long, device=torch_device),
        }
        inputs["pixel_mask"][:, 0, 0] = 0
        return self.get_config(), inputs


@require_torch
class STImageMAEModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (STImageMAEModel, STImageMAEForPreTraining)
    additional_model_inputs = ["gene_ids", "pixel_mask"]  # noqa: RUF012
    # Gene embeddings are the vocabulary's: a resize would need a new vocabulary, not more rows.
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = STImageMAEModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=STImageMAEConfig, has_text_modality=False, hidden_size=32, num_attention_heads=4
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if model_class is STImageMAEForPreTraining:
            generator = torch.Generator().manual_seed(0)
            inputs["noise"] = torch.rand(inputs["pixel_values"].shape, generator=generator).to(torch_device)
        return inputs

    def test_model_outputs_equivalence(self):
        # The common test subtracts outputs for its message, which torch refuses for bool: compare masks as numbers.
        forward = STImageMAEForPreTraining.forward

        def forward_with_number_mask(model, *args, **kwargs):
            outputs = forward(model, *args, **kwargs)
            if isinstance(outputs, tuple):
                return tuple(o.float() if torch.is_tensor(o) and o.dtype == torch.bool else o for o in outputs)
            outputs["mask"] = outputs.mask.float()
            return outputs

        with patch.object(STImageMAEForPreTraining, "forward", forward_with_number_mask):
            super().test_model_outputs_equivalence()

    def test_config(self):
        self.config_tester.run_common_tests()
