"""A device behind a real sshd on this machine, with keys and a configuration of the test's own."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from artifact_fakes import write_artifact
from benchmark_fakes import ONE_THREAD, SHORT
from device_fakes import BRIEF, Setting, artifact_subject, check_measured, two_suites, write_images

from edgekd.benchmark import device as devices
from edgekd.core.errors import EdgekdError
from edgekd.targets.devices import drive

SSHD = shutil.which("sshd") or next(
    (p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), None
)
SSH, KEYGEN = shutil.which("ssh"), shutil.which("ssh-keygen")
pytestmark = pytest.mark.skipif(
    None in (SSHD, SSH, KEYGEN),
    reason="no sshd, ssh or ssh-keygen: install openssh-server and openssh-client",
)


@dataclass
class Server:
    """A running sshd; `cache` is where its sessions keep the agent."""

    process: subprocess.Popen[bytes]
    cache: Path

    @property
    def spec(self) -> str:
        return f"ssh://testdevice?python={sys.executable}"

    def cut(self) -> None:
        """End every connection from the server's side at once."""

        def below(parent: int) -> list[tuple[int, str]]:
            listed = ["ps", "-o", "pid=,comm=", "--ppid", str(parent)]
            done = subprocess.run(listed, capture_output=True, text=True)
            return [(int(pid), name) for pid, name in map(str.split, done.stdout.splitlines())]

        for parent, _ in below(self.process.pid):
            for pid, name in below(parent):
                if name.startswith("sshd"):
                    os.kill(pid, signal.SIGKILL)
            os.kill(parent, signal.SIGKILL)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("host", "user"):
        new_key = [str(KEYGEN), "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(new_key, check=True)
    (tmp_path / "authorized").write_bytes((tmp_path / "user.pub").read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cache = tmp_path / "device cache"
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
        f'PermitRootLogin prohibit-password\nSetEnv "XDG_CACHE_HOME={cache}" OMP_NUM_THREADS=1\n'
    )
    (tmp_path / "ssh_config").write_text(
        f"Host testdevice\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {tmp_path}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {tmp_path}/known\n"
        "  StrictHostKeyChecking accept-new\n  BatchMode yes\n"
    )
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{SSH}" -F "{tmp_path}/ssh_config" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # a root sshd refuses to start without it
    with open(tmp_path / "log", "wb") as log:
        start = [str(SSHD), "-D", "-e", "-f", str(tmp_path / "sshd_config")]
        process = subprocess.Popen(start, stderr=log)
    for _ in range(200):
        if process.poll() is not None:
            pytest.skip(f"sshd does not start here: {(tmp_path / 'log').read_text()[-200:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield Server(process, cache)
    process.terminate()
    process.wait()


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    images = write_images(tmp_path / "images")
    return [artifact_subject(write_artifact(tmp_path / "artifacts" / "fp32"))], two_suites(images)


def test_a_cut_connection_is_one_sentence_and_the_work_goes_on(
    server: Server, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "QUICK", replace(BRIEF, seconds=1.0, limit_s=3.0))
    told: list[str] = []
    monkeypatch.setattr(drive, "say", told.append)
    caught: list[EdgekdError] = []

    def measure() -> None:
        try:
            devices.on_devices(*setting, [server.spec], ONE_THREAD)
        except EdgekdError as error:
            caught.append(error)

    thread = threading.Thread(target=measure)
    thread.start()
    answers = "edgekd-agent/job-*/done/predict-0-0.npz"
    deadline = time.monotonic() + 120
    while not list(server.cache.glob(answers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    server.cut()
    thread.join()
    assert any("logits of r/fp32" in line for line in told)
    [error] = caught
    assert "The connection to testdevice failed or broke" in error.message
    assert "goes on where it stopped" in error.hint
    [answered] = server.cache.glob(answers)
    written = answered.stat().st_mtime_ns
    # The same command again: nothing is sent or computed twice.
    told.clear()
    fetch = drive._fetch
    seen: list[int] = []

    def watching(*arguments: object) -> None:
        seen.append(answered.stat().st_mtime_ns)
        fetch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(drive, "_fetch", watching)
    found = devices.on_devices(*setting, [server.spec], ONE_THREAD)
    check_measured(found, setting, "testdevice")
    assert not any("copying" in line for line in told)
    assert seen == [written]
    assert not (server.cache / "edgekd-agent").exists(), "nothing is left behind"


def test_what_cannot_be_reached_is_one_sentence(server: Server, setting: Setting) -> None:
    with pytest.raises(EdgekdError, match="testdevice cannot start Python") as caught:
        devices.on_devices(*setting, ["ssh://testdevice?python=python9"], SHORT)
    assert "ssh://HOST?python=PATH" in caught.value.hint
    server.process.terminate()
    server.process.wait()
    with pytest.raises(EdgekdError, match=r"testdevice cannot be reached .*Connection refused"):
        devices.on_devices(*setting, [server.spec], SHORT)
