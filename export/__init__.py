"""Export a torch student to the file that a device runs. Calling the package calls `edgekd.api.export`."""

from edgekd import make_callable

make_callable(__name__)
