"""What a report holds: every number with its definition, and the folder that is read again."""
