"""The MoE layer of FSEP, its token dispatchers and its experts."""
