"""Text becomes a dataset that Megatron reads.

This writes Megatron's format and none of its own, without importing Megatron; it does not shuffle
or split, which Megatron does when it reads. docs/megatron.md is the page for users.
"""

from megatron_laer.tools.data.prepare import PreparedData, prepare_data
from megatron_laer.tools.data.sources import default_text_sources
from megatron_laer.tools.data.tokenizers import BYTES_TOKENIZER_FLAGS

__all__ = [
    "BYTES_TOKENIZER_FLAGS",
    "PreparedData",
    "default_text_sources",
    "prepare_data",
]
