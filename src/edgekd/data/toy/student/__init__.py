"""First weights for a student of the toy suite, made by scripts/make_toy_student.py. Data only."""
