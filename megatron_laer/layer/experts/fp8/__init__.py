"""Experts in fp8: quantised matrices of replicas, and the products with them."""
