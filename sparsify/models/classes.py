"""The two sparse models, by their model types. Importing this registers them with transformers' Auto classes."""

from sparsify.models.configuration_sparse_mistral import SparseMistralConfig
from sparsify.models.configuration_sparse_mixtral import SparseMixtralConfig
from sparsify.models.ffn_activation import FfnActivation
from sparsify.models.masking import SITES, SiteRule, ThresholdMask, mask_tensors, site_rules
from sparsify.models.modeling_sparse_mistral import SparseMistralForCausalLM
from sparsify.models.modeling_sparse_mixtral import SparseMixtralForCausalLM

SparseConfig = SparseMistralConfig | SparseMixtralConfig
SparseModel = SparseMistralForCausalLM | SparseMixtralForCausalLM

CONFIG_CLASSES = {config.model_type: config for config in (SparseMistralConfig, SparseMixtralConfig)}
MODEL_CLASSES = {
    SparseMistralConfig.model_type: SparseMistralForCausalLM,
    SparseMixtralConfig.model_type: SparseMixtralForCausalLM,
}

__all__ = [
    "CONFIG_CLASSES",
    "MODEL_CLASSES",
    "SITES",
    "FfnActivation",
    "SiteRule",
    "SparseConfig",
    "SparseMistralConfig",
    "SparseMistralForCausalLM",
    "SparseMixtralConfig",
    "SparseMixtralForCausalLM",
    "SparseModel",
    "ThresholdMask",
    "mask_tensors",
    "site_rules",
]
