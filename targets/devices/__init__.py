"""Where an artifact can be measured: this machine, one behind ssh or adb, or one that nobody can reach (a bundle)."""
