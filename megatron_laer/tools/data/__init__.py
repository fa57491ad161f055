"""Datasets of Megatron's format, made from text.

Megatron shuffles and splits when it reads. docs/megatron.md is the page for users.
"""

from megatron_laer.tools.data.dataset import PreparedData, prepare_data
from megatron_laer.tools.data.text_files import default_text_sources
from megatron_laer.tools.data.tokenizers import BYTES_TOKENIZER_FLAGS

__all__ = [
    "BYTES_TOKENIZER_FLAGS",
    "PreparedData",
    "default_text_sources",
    "prepare_data",
]
