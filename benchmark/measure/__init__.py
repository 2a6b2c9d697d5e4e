"""Latency, throughput and energy on this machine, and the size of models."""
