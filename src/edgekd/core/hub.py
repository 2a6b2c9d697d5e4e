"""Model hubs: find out quickly that one cannot be reached, and name what to do instead."""

from __future__ import annotations

import functools
import http.client
import urllib.error
import urllib.request

from edgekd.core.errors import EdgekdError


class NoNetwork(EdgekdError):
    """Weights (`what`) that are not here and cannot be fetched; the hint is the two commands to give."""

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
    """Return whether the Hugging Face endpoint in use answers one short request (5 s at most, proxies honoured).

    The hub's own client retries for about a minute before it gives up; a user without a network should not wait for
    that. Any HTTP answer counts as reachable.
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
    """Let the hub client answer from its cache at once or fail at once where the hub is out of reach."""
    if not hub_reachable():
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
