"""Export: from a torch student to the file a device runs. Called, it is `edgekd.api.export`."""

from edgekd import make_callable

make_callable(__name__)
