"""Measurements that print a table, write JSON and state the machine. Nothing here is installed."""
