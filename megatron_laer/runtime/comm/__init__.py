"""Exchanges between the ranks of one FSEP group: groups, streams, collectives, weights.

Neither Megatron nor the experts' computation is known here.
"""
