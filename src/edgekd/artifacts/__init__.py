"""Work on exported files: class banks, verification, the Hub, test kits, `edgekd vl`."""
