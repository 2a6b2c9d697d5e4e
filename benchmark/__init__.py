"""Benchmark: latency, in-domain and out-of-distribution accuracy, and the report. Never imports torch.

`measure` times, `evaluate` scores. Nothing is imported here, so that a process that times starts with what it needs.
"""

from edgekd import make_callable

make_callable(__name__)
