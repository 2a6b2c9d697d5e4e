"""The contents of a report: every number with its definition, and the stored folder."""
