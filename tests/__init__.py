"""Tests: `unit` in milliseconds, `distributed` on gloo ranks, `convergence`, and `gpu`."""
