"""Benchmark: latency, in-domain and out-of-distribution accuracy, and the report. Never imports torch.

`measure` times and `evaluate` scores. Nothing is imported here, so that timing processes import only what they need.
"""

from edgekd import make_callable

make_callable(__name__)
