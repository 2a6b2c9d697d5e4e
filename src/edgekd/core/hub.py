"""Model hubs: detect quickly that the network is missing, and give commands to work without it."""

from __future__ import annotations

import functools
import http.client
import urllib.error
import urllib.request

from edgekd.core.errors import EdgekdError


class NoNetwork(EdgekdError):
    """Raised for weights (`what`) that are missing and cannot be downloaded; the hint has the commands to use."""

    def __init__(self, what: str, teacher: str = "TEACHER", student: str = "STUDENT") -> None:
        students = "" if student == "teacher" else f" {student}"
        super().__init__(
            f"{what} is not in the local cache and the network cannot be reached.",
            f"With a network:  edgekd fetch {teacher}{students} --to weights\n"
            f"       Then here:       edgekd train --teacher {teacher} --student {student} … --weights-dir weights",
        )
        self.what = what


@functools.cache
def hub_reachable() -> bool:
    """Return whether the Hugging Face endpoint responds to a request within 5 s, through proxies if configured.

    The hub's own client retries for about a minute before it fails. Any HTTP response counts as reachable.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5)
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException, ValueError):  # no network, no HTTP, no address
        return False
    return True


def prefer_local_cache() -> None:
    """Set the hub client to use only its cache, without retries, if the hub cannot be reached."""
    if not hub_reachable():
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
