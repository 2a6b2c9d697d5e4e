"""The stopwatch: latency and energy of a model, their intervals, and what may be claimed of them; numpy only."""
