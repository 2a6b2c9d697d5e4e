"""A page in headless Chromium: its layout at several widths, without scripts, and every address it asks for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    "",
)
_CONTROL = "http://127.0.0.1:9/seen.png"
"""Asked for by the frames' parent: a log without it would prove nothing."""
_QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
          "--disable-background-networking", "--disable-component-update", "--hide-scrollbars")  # fmt: skip
# The sandbox of the frame forbids scripts; the frame's parent measures it.
_FRAMES = """<!doctype html><body>{frames}<img src="{control}"><script>
addEventListener("load", () => {{
  const told = [...document.querySelectorAll("iframe[sandbox]")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const wide = [...page.querySelectorAll("body *")].filter(e => {{
      if (e.closest(".scroll, .skip, .unseen, svg")) return false;
      return e.getBoundingClientRect().right > root.clientWidth + 1;
    }}).map(e => e.tagName + "." + e.className);
    return {{width: root.clientWidth, scroll: root.scrollWidth, text: page.body.innerText, wide: wide,
             drawings: [...page.querySelectorAll("svg[role=img]")].filter(e => e.clientWidth).length}};
  }});
  const out = document.createElement("pre"); out.id = "told"; out.textContent = JSON.stringify(told);
  document.body.replaceChildren(out);
}});
</script></body>"""


@dataclass(frozen=True)
class Seen:
    """Of each width `width`, `scroll`, `text`, `wide` and `drawings`; and the network addresses asked for."""

    frames: list[dict[str, Any]]
    requests: list[str]


def open_page(page: Path, folder: Path, widths: tuple[int, ...]) -> Seen:
    """Open `page` once for each width in one browser; `folder` takes its files."""
    frames = "".join(
        f'<iframe sandbox="allow-same-origin" src="{page.as_uri()}" width="{w}" height="800" style="border:0"></iframe>'
        for w in widths
    )
    wrapper, log = folder / "frames.html", folder / "net.json"
    wrapper.write_text(_FRAMES.format(frames=frames, control=_CONTROL), encoding="utf-8")
    command = [CHROMIUM, *_QUIET, "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
               f"--log-net-log={log}", "--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told is not None, done.stderr[-2000:]
    found = set()
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        # What the browser asks for on its own behalf has no origin.
        if '"initiator":' in line and '"initiator":"not an origin"' not in line:
            found |= set(re.findall(r'"url":"((?:https?|wss?)://[^"]+)"', line))
    assert _CONTROL in found
    return Seen(json.loads(unescape(told.group(1))), sorted(found - {_CONTROL}))
