"""A page in headless Chromium: its layout at several widths, without scripts, and every address it asks for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
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


def run_script(address: str, script: str, folder: Path) -> Any:
    """Open `address` and return what an asynchronous JavaScript expression evaluates to in it.

    Chromium is driven over a pipe (`--remote-debugging-pipe`): JSON messages that end in a zero byte.
    """
    to_browser, from_browser = os.pipe(), os.pipe()

    def connect() -> None:  # Chromium reads from 3 and writes to 4
        ends = [os.dup(to_browser[0]), os.dup(from_browser[1])]
        for number, end in zip((3, 4), [os.dup(end) for end in ends], strict=True):
            os.dup2(end, number)

    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *_QUIET, "--remote-debugging-pipe", profile]
    process = subprocess.Popen(command, close_fds=False, preexec_fn=connect,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        with open(to_browser[1], "wb") as out, open(from_browser[0], "rb") as answers:
            os.close(to_browser[0])
            os.close(from_browser[1])
            pending, count = b"", 0

            def call(method: str, session: str = "", **params: Any) -> Any:
                nonlocal pending, count
                count += 1
                message = {"id": count, "method": method, "params": params}
                message |= {"sessionId": session} if session else {}
                out.write(json.dumps(message).encode() + b"\0")
                out.flush()
                while True:
                    while b"\0" not in pending:
                        data = os.read(answers.fileno(), 1 << 16)
                        assert data, "the browser has ended"
                        pending += data
                    text, _, pending = pending.partition(b"\0")
                    answer = json.loads(text)
                    if answer.get("id") == count:
                        assert "error" not in answer, answer
                        return answer["result"]

            target = call("Target.createTarget", url=address)["targetId"]
            session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

            def evaluate(expression: str) -> Any:
                options = {"awaitPromise": True, "returnByValue": True}
                return call("Runtime.evaluate", session, expression=expression, **options)

            here = f"location.href === {json.dumps(address)}"
            loaded = f"{here} && document.readyState === 'complete'"
            while not evaluate(loaded)["result"].get("value"):
                time.sleep(0.05)
            found = evaluate(script)
            assert "exceptionDetails" not in found, found
            return found["result"]["value"]
    finally:
        process.kill()
        process.wait()
