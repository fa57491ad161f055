"""The parity harness: stock Megatron and FSEP from the same weights, compared."""
