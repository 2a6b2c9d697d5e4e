"""`--device SPEC` → a device."""

from __future__ import annotations

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import printable
from edgekd.targets.devices.adb import adb_device
from edgekd.targets.devices.drive import Device
from edgekd.targets.devices.local import local_device
from edgekd.targets.devices.ssh import ssh_device

FORMS = "local, local:PYTHON, ssh://[USER@]HOST[:PORT], adb:SERIAL or bundle:DIR"


def find_device(spec: str) -> Device:
    """The device that `spec` names; nothing is contacted yet.

    Raises:
        EdgekdError: not one of the forms.
    """
    if spec == "local" or spec.startswith("local:"):
        return local_device(spec.removeprefix("local"))
    if spec.startswith("ssh://"):
        return ssh_device(spec.removeprefix("ssh://"))
    if spec.startswith("adb:"):
        return adb_device(spec.removeprefix("adb:"))
    raise EdgekdError(f'"{printable(spec)}" is not a device.', f"Write {FORMS}.")
