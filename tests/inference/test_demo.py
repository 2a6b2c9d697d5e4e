from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from artifact_fakes import write_artifact
from PIL import Image

import edgekd
from edgekd.core.errors import EdgekdError
from edgekd.inference.demo import MAX_BYTES, Demo


def encoded(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Demo]:
    demo = edgekd.demo(write_artifact(tmp_path / "onnxruntime-fp32"), port=0)
    thread = threading.Thread(target=demo.serve)
    thread.start()
    yield demo
    demo.close()
    thread.join()


def ask(
    page: Demo, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server.server_port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_pictures_from_this_machine_are_classified(
    page: Demo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture, port = encoded((0, 250, 0)), page.server.server_port
    status, body = ask(page, "POST", "/predict", picture)
    found = json.loads(body)
    assert (status, found["width"], found["height"]) == (200, 30, 20)
    (answer,) = found["answers"]
    assert answer["classes"][0] == ["g", pytest.approx(1)]
    assert answer["ms"] >= 0
    assert page.server.server_address[0] == "127.0.0.1"
    here, large = {"Host": f"localhost:{port}"}, {"Content-Length": str(MAX_BYTES + 1)}
    for method, path, data, headers, status in (
        ("GET", "/", None, here, 200),
        ("GET", "/", None, {"Host": "elsewhere.example"}, 403),
        ("POST", "/predict", picture, {"Host": f"elsewhere.example:{port}"}, 403),
        ("POST", "/predict", picture, {"Origin": "http://elsewhere.example"}, 403),
        ("POST", "/predict", b"<svg/>", {}, 415),
        ("POST", "/predict", b"", {}, 415),
        ("POST", "/other", b"x", {}, 404),
        ("GET", "/../demo.py", None, {}, 404),
        ("POST", "/predict", b"", large, 413),
        ("POST", "/predict", b"", {"Content-Length": "many"}, 411),
        ("POST", "/predict", b"", {"Content-Length": "1" * 5000}, 413),
    ):
        assert ask(page, method, path, data, **headers)[0] == status, (path, headers)
    with pytest.raises(EdgekdError):  # the port is in use
        edgekd.demo(tmp_path / "onnxruntime-fp32", port=port)
    with pytest.raises(EdgekdError):
        edgekd.demo(tmp_path)
    # A browser that leaves is no failure.
    with socket.create_connection(("127.0.0.1", port)) as browser_tab:
        head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 99\r\n\r\nabc"
        browser_tab.sendall(head.encode())
        browser_tab.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(page, "GET", "/")[0] == 200
    time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif(not browser.CHROMIUM, reason="no Chromium here")
def test_dropping_a_picture_on_the_page_shows_the_answer(page: Demo, tmp_path: Path) -> None:
    data = base64.b64encode(encoded((0, 0, 250))).decode()
    script = f"""(async () => {{
      const bytes = Uint8Array.from(atob("{data}"), c => c.charCodeAt(0));
      const dropped = new DataTransfer();
      dropped.items.add(new File([bytes], "picture.png"));
      document.getElementById("drop").dispatchEvent(
        new DragEvent("drop", {{bubbles: true, cancelable: true, dataTransfer: dropped}}));
      for (let i = 0; i < 200 && !document.querySelector("section meter"); i++)
        await new Promise(r => setTimeout(r, 50));
      const picture = document.getElementById("picture");
      return {{cards: [...document.querySelectorAll("section")].map(e => e.innerText),
               picture: picture.naturalWidth}};
    }})()"""
    found = browser.run_script(page.url, script, tmp_path)
    (card,) = found["cards"]
    assert card.split("\n")[0] == "onnxruntime-fp32"
    assert " ms" in card
    assert card.index("b") < card.index("100.0 %")
    assert found["picture"] == 30
