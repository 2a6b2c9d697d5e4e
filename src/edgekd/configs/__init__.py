"""What each verb can be given: one model per verb, from which command line, files, `--set` and Python calls follow."""
