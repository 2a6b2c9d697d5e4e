"""A page in headless Chromium: its layout at several widths, the addresses that it requests, what a script returns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
_QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
          "--disable-background-networking", "--disable-component-update", "--hide-scrollbars")  # fmt: skip
_LAYOUT = """(() => {
  const root = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter(e => {
    if (e.closest(".scroll, .skip, .unseen, svg")) return false;
    return e.getBoundingClientRect().right > root.clientWidth + 1;
  }).map(e => e.tagName + "." + e.className);
  return {width: root.clientWidth, scroll: root.scrollWidth, text: document.body.innerText, wide: wide,
          drawings: [...document.querySelectorAll("svg[role=img]")].filter(e => e.clientWidth).length};
})()"""


@dataclass(frozen=True)
class Seen:
    """Of each width `width`, `scroll`, `text`, `wide` and `drawings`; and the network addresses requested."""

    frames: list[dict[str, Any]]
    requests: list[str]


def open_page(page: Path, folder: Path, widths: tuple[int, ...]) -> Seen:
    """Open `page` without scripts and lay it out at each width; `folder` takes the browser's files."""
    frames, requests = _visit(page.as_uri(), folder, _LAYOUT, widths, scripts=False)
    assert page.as_uri() in requests, "a record without the page itself would prove nothing"
    return Seen(frames, sorted(one for one in requests if one.startswith(("http", "ws"))))


def run_script(address: str, script: str, folder: Path) -> Any:
    """Open `address` and return what an asynchronous JavaScript expression evaluates to in it."""
    [found], _ = _visit(address, folder, script, (1280,), scripts=True)
    return found


def _visit(
    address: str, folder: Path, script: str, widths: tuple[int, ...], *, scripts: bool
) -> tuple[list[Any], set[str]]:
    """Drive Chromium over a pipe (`--remote-debugging-pipe`): JSON messages that end in a zero byte."""
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
            pending, count, session, requests = b"", 0, "", set()

            def call(method: str, **params: Any) -> Any:
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
                    if answer.get("method") == "Network.requestWillBeSent":
                        requests.add(answer["params"]["request"]["url"])
                    if answer.get("id") == count:
                        assert "error" not in answer, answer
                        return answer["result"]

            def evaluate(expression: str) -> Any:
                options = {"awaitPromise": scripts, "returnByValue": True}
                found = call("Runtime.evaluate", expression=expression, **options)
                assert "exceptionDetails" not in found, found
                return found["result"].get("value")

            target = call("Target.createTarget", url="about:blank")["targetId"]
            session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            call("Network.enable")
            call("Emulation.setScriptExecutionDisabled", value=not scripts)
            call("Page.navigate", url=address)
            here = f"location.href === {json.dumps(address)}"
            while not evaluate(f"{here} && document.readyState === 'complete'"):
                time.sleep(0.05)
            results = []
            for width in widths:
                size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
                call("Emulation.setDeviceMetricsOverride", **size)
                results.append(evaluate(script))
            return results, requests
    finally:
        process.kill()
        process.wait()
