"""One configuration per command, from which command line, files, `--set` and Python functions are derived."""
