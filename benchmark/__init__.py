"""The benchmark room: latency, in-domain and out-of-distribution accuracy, and the report. Never imports torch.

Nothing is imported here, so that the latency process (`python -m edgekd.benchmark.worker`) starts with what it needs.
"""

from edgekd.callable_module import make_callable

make_callable(__name__)
