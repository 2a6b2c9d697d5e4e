"""Studies: compare recipes over seeds and unseen domains or classes, and write the results as tables."""
