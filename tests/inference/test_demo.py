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


def test_a_picture_is_classified(page: Demo) -> None:
    status, body = ask(page, "POST", "/predict", encoded((0, 250, 0)))
    found = json.loads(body)
    assert status == 200
    assert (found["width"], found["height"]) == (30, 20)
    (answer,) = found["answers"]
    assert answer["classes"][0] == ["g", pytest.approx(1)]
    assert answer["ms"] >= 0


def test_it_listens_on_this_machine_alone(page: Demo) -> None:
    assert page.server.server_address[0] == "127.0.0.1"
    port = page.server.server_port
    picture = encoded((0, 250, 0))
    assert ask(page, "GET", "/")[0] == 200
    assert ask(page, "GET", "/", Host=f"localhost:{port}")[0] == 200
    assert ask(page, "GET", "/", Host="elsewhere.example")[0] == 403
    assert ask(page, "POST", "/predict", picture, Host=f"elsewhere.example:{port}")[0] == 403
    assert ask(page, "POST", "/predict", picture, Origin="http://elsewhere.example")[0] == 403


def test_only_images_of_bounded_size_are_taken(page: Demo) -> None:
    assert ask(page, "POST", "/predict", b"<svg/>")[0] == 415
    assert ask(page, "POST", "/predict", b"")[0] == 415
    assert ask(page, "POST", "/other", b"x")[0] == 404
    assert ask(page, "GET", "/../demo.py")[0] == 404
    large = {"Content-Length": str(MAX_BYTES + 1)}
    assert ask(page, "POST", "/predict", b"", **large)[0] == 413
    assert ask(page, "POST", "/predict", b"", **{"Content-Length": "many"})[0] == 411
    assert ask(page, "POST", "/predict", b"", **{"Content-Length": "1" * 5000})[0] == 413


def test_a_browser_that_leaves_is_no_failure(page: Demo, capfd: pytest.CaptureFixture[str]) -> None:
    port = page.server.server_port
    with socket.create_connection(("127.0.0.1", port)) as browser_tab:
        head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 99\r\n\r\nabc"
        browser_tab.sendall(head.encode())
        browser_tab.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(page, "GET", "/")[0] == 200
    time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err


def test_a_port_in_use_is_an_error(page: Demo, tmp_path: Path) -> None:
    with pytest.raises(EdgekdError):
        edgekd.demo(tmp_path / "onnxruntime-fp32", port=page.server.server_port)
    with pytest.raises(EdgekdError):
        edgekd.demo(tmp_path)


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
