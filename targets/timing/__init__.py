"""The stopwatch: latency and energy of a model, their intervals, and claims about them; numpy only."""
