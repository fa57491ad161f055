"""Tests: `unit` in milliseconds, `distributed` on gloo ranks in Megatron's loop, `convergence`, `gpu`."""
