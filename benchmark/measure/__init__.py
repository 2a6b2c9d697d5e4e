"""Time, throughput, energy and state of a machine. Imports nothing, since the device agent carries parts of it."""
