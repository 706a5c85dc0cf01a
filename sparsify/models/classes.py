"""The two sparse models, by their model types. Importing this registers them with transformers' Auto classes."""

from sparsify.models.configuration_sparse_mistral import SparseMistralConfig
from sparsify.models.configuration_sparse_mixtral import SparseMixtralConfig
from sparsify.models.ffn_activation import FfnActivation as FfnActivation
from sparsify.models.masking import SITES as SITES
from sparsify.models.masking import SiteMask as SiteMask
from sparsify.models.masking import SiteRule as SiteRule
from sparsify.models.masking import mask_tensors as mask_tensors
from sparsify.models.masking import site_rules as site_rules
from sparsify.models.modeling_sparse_mistral import SparseMistralForCausalLM, SparseMistralModel
from sparsify.models.modeling_sparse_mixtral import SparseMixtralForCausalLM, SparseMixtralModel

SparseConfig = SparseMistralConfig | SparseMixtralConfig
SparseModel = SparseMistralForCausalLM | SparseMixtralForCausalLM

CONFIG_CLASSES = {config.model_type: config for config in (SparseMistralConfig, SparseMixtralConfig)}
MODEL_CLASSES = {
    SparseMistralConfig.model_type: SparseMistralForCausalLM,
    SparseMixtralConfig.model_type: SparseMixtralForCausalLM,
}
BASE_CLASSES = {
    SparseMistralConfig.model_type: SparseMistralModel,
    SparseMixtralConfig.model_type: SparseMixtralModel,
}
"""The models without their heads, which inference engines build their own on."""
