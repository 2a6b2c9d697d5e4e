"""`edgekd demo`: one page on this machine that shows what each model of a run makes of a picture. No network."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.core.console import warn
from edgekd.core.errors import EdgekdError, first_line
from edgekd.data.images import UnreadableImage, decode
from edgekd.inference.model import Model, load

MAX_BYTES = 32 * 1024**2
"""Larger uploads are refused unread."""
_HOST = "127.0.0.1"
_TIMEOUT_S = 30
_LENGTH_DIGITS = 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, eq=False)
class Demo:
    """A page that is being served on this machine alone."""

    server: ThreadingHTTPServer
    url: str

    def serve(self) -> None:
        """Answer requests until Ctrl-C or `close`."""
        try:
            self.server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self.server.server_close()

    def close(self) -> None:
        """End `serve` from another thread."""
        self.server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Name a failed request in one line; a browser that left (`OSError`) is no failure."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            warn(f"a request failed ({first_line(error)}).")


def open_demo(path: Path, port: int) -> Demo:
    """Load the models at `path` and bind the page's port.

    Raises:
        EdgekdError: no run or artifact, or a port that is in use.
    """
    models = models_of(path)
    for model in models:  # the first call of a runtime takes longer than the others
        height, width = model.preprocess.shape
        model.logits(np.zeros((1, height, width, 3), dtype=np.uint8))
    page = (Path(__file__).parent / "demo.html").read_bytes()
    try:
        server = _Server((_HOST, port), _handler(models, page))
    except OSError as error:
        raise EdgekdError(
            f"The port {port} cannot be used ({error.strerror or error}).",
            "Choose another: --port 0 takes a free one.",
        ) from error
    return Demo(server, f"http://{_HOST}:{server.server_port}/")


def models_of(path: Path) -> list[Model]:
    """Load the teacher, the student and every artifact of a run that runs here; of an artifact folder, that one."""
    if (path / "artifact.json").is_file():
        return [load(path)]
    from edgekd.core.manifest import read_run

    read_run(path)
    from edgekd.distill.classification.load_run import load_run
    from edgekd.evaluation.subjects import run_of, subjects_of

    names = {"teacher": "teacher, zero-shot", "torch": "student, torch"}
    return [
        Model(names.get(one.kind, one.name), one.classes, one.preprocess, one.predict)
        for one in subjects_of(load_run(path), run_of(path)[1])
    ]


def classify(models: list[Model], data: bytes) -> dict[str, Any]:
    """Return each model's best classes for an encoded image, and the milliseconds of its call.

    Raises:
        UnreadableImage: bytes that are no image.
    """
    started = time.perf_counter()
    image = decode(data)
    decoded = time.perf_counter() - started
    answers = []
    for model in models:
        pixels = model.preprocess.pixels(image)
        started = time.perf_counter()
        (one,) = model.classify([("", pixels)])
        taken = 1e3 * (time.perf_counter() - started)
        answers.append({"model": model.name, "ms": round(taken, 2), "classes": one.top(5)})
    return {
        "width": image.width,
        "height": image.height,
        "decode_ms": round(1e3 * decoded, 2),
        "answers": answers,
    }


def _handler(models: list[Model], page: bytes) -> type[BaseHTTPRequestHandler]:
    turn = threading.Lock()  # one picture at a time, so that latencies do not disturb each other

    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            if not self._is_local():
                self._answer(HTTPStatus.FORBIDDEN, {"error": "This page is for this machine."})
            elif self.path == "/":
                self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
            else:
                self._answer(HTTPStatus.NOT_FOUND, {"error": "There is nothing here."})

        def do_POST(self) -> None:
            self.close_connection = True
            length = self.headers.get("Content-Length", "")
            if not self._is_local():
                self._answer(HTTPStatus.FORBIDDEN, {"error": "This page is for this machine."})
            elif self.path != "/predict":
                self._answer(HTTPStatus.NOT_FOUND, {"error": "There is nothing here."})
            elif not (length.isascii() and length.isdigit()):
                self._answer(HTTPStatus.LENGTH_REQUIRED, {"error": "The length is missing."})
            elif len(length) > _LENGTH_DIGITS or int(length) > MAX_BYTES:
                message = f"The file is larger than {MAX_BYTES // 1024**2} MB."
                self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": message})
            else:
                self._predict(self.rfile.read(int(length)))

        def _predict(self, data: bytes) -> None:
            try:
                with turn:
                    self._answer(HTTPStatus.OK, classify(models, data))
            except UnreadableImage as error:
                message = f"This file cannot be read as an image: {error.reason}."
                self._answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": message})
            except EdgekdError as error:
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})

        def _is_local(self) -> bool:
            """Refuse pages of other sites, also behind a name that was made to point here."""
            assert isinstance(self.server, ThreadingHTTPServer)
            port = self.server.server_port
            hosts = {f"{_HOST}:{port}", f"localhost:{port}"}
            origin = self.headers.get("Origin")
            return self.headers.get("Host") in hosts and (
                origin is None or origin.removeprefix("http://") in hosts
            )

        def _answer(self, status: HTTPStatus, value: Any) -> None:
            self._send(status, json.dumps(value).encode(), "application/json")

        def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Type": kind}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing: what is classified here is nobody else's business."""

    return Handler
