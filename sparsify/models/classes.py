"""All families of sparse models. Importing this registers them with transformers' Auto classes."""

import pkgutil
from importlib import import_module

import sparsify.models as models
from sparsify.models.family import FAMILIES as FAMILIES
from sparsify.models.family import Family as Family
from sparsify.models.family import SparseCausalLM
from sparsify.models.family import SparseConfig as SparseConfig
from sparsify.models.ffn_activation import FfnActivation as FfnActivation
from sparsify.models.masking import SITES as SITES
from sparsify.models.masking import SiteMask as SiteMask
from sparsify.models.masking import SiteRule as SiteRule
from sparsify.models.masking import mask_tensors as mask_tensors
from sparsify.models.masking import site_rules as site_rules
from sparsify.models.sparse_mistral import SparseMistralConfig as SparseMistralConfig
from sparsify.models.sparse_mistral import SparseMistralForCausalLM as SparseMistralForCausalLM
from sparsify.models.sparse_mistral import SparseMistralModel as SparseMistralModel
from sparsify.models.sparse_mixtral import SparseMixtralConfig as SparseMixtralConfig
from sparsify.models.sparse_mixtral import SparseMixtralForCausalLM as SparseMixtralForCausalLM
from sparsify.models.sparse_mixtral import SparseMixtralModel as SparseMixtralModel

SparseModel = SparseCausalLM

# No list names them: a family is one file.
for _module in pkgutil.iter_modules(models.__path__):
    if _module.name.startswith("sparse_"):
        import_module(f"{models.__name__}.{_module.name}")


def family_of(config: SparseConfig) -> Family:
    """The family of a sparse model's configuration."""
    return FAMILIES[config.model_type]
