"""Devices for measurements: this machine, machines behind ssh or adb, and bundles for machines without a connection."""
