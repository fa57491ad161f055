"""Datasets that tests make and read, and a tokenizer that needs no package."""

import argparse
import sys

import numpy as np

from megatron_laer.tools import data


def prepare_data(inputs, prefix, **kwargs):
    return data.prepare_data(inputs, prefix, progress=False, **kwargs)


def read_documents(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [np.array(dataset[i]) for i in range(len(dataset))]


def install_fake_transformers(monkeypatch, eos_token_id):
    class LengthOfWords:
        def __init__(self):
            self.eos_token_id = eos_token_id

        def __len__(self):
            return 100

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [len(word) for word in text.split()]

        @classmethod
        def from_pretrained(cls, name, **kwargs):
            # As transformers does for a tokenizer with code: asks, or refuses.
            assert kwargs == {"local_files_only": True, "trust_remote_code": False}
            return cls()

    fake = argparse.Namespace(AutoTokenizer=LengthOfWords)
    monkeypatch.setitem(sys.modules, "transformers", fake)
