"""This package holds what ranks of one FSEP group exchange: groups, streams, collectives, weights.

It knows neither Megatron nor the experts' computation.
"""
