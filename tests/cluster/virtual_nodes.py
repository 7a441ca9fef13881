"""Virtual nodes on one machine: namespaces with their own address, processes, home, /tmp, /opt and /dev/shm.

    node 10.0.0.1 ─eth0─┐
    node 10.0.0.2 ─eth0─┴─ Switch: forwards frames, with a delay and packet loss

A node cannot reach the network and processes of the machine. It ends with all its processes when its first process is
killed. `/opt/bsq_ray` is this repository, and `/tmp/shared` is one folder for all nodes.
"""

import ctypes
import fcntl
import os
import pwd
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Every cluster needs a token.
TOKEN = "a-token-for-servers-of-tests-" + "0" * 32
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
_UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork"]
_SET_TAP, _TAP, _NO_HEADER, _NET_NAMESPACE = 0x400454CA, 0x0002, 0x1000, 0x40000000
# Mounted folders belong to the node; Python and this repository are shared.
_BOOT = """
set -e
mount --make-rprivate /
for folder in {folders}; do mkdir -p {own}/$folder; done
for kept in {kept}; do
  for folder in {folders}; do
    case $kept in $folder/*) mkdir -p {own}/$kept; mount --rbind $kept {own}/$kept ;; esac
  done
done
mkdir -p {own}/opt/bsq_ray {own}/tmp/shared
mount --rbind {repository} {own}/opt/bsq_ray
mount --bind {shared} {own}/tmp/shared
for folder in {folders}; do mkdir -p $folder; mount --rbind {own}/$folder $folder; done
mount -t tmpfs -o size=2g tmpfs /dev/shm
ip link set lo up
echo ready
# Waits for all child processes, as an init process does.
sleep infinity & wait
"""


class Switch(threading.Thread):
    """Connect nodes as a hub does.

    Attributes:
        delay: seconds a frame takes.
        loss: share of frames that never arrive, 0 to 1.
    """

    def __init__(self, delay=0.0, loss=0.0):
        super().__init__(daemon=True)
        self.delay, self.loss = delay, loss
        self._ports, self._delayed_frames, self._stopped = [], deque(), False
        self._random = random.Random(0)

    def plug(self, pid):
        """Give the node whose first process is `pid` an interface eth0 on this switch."""

        def enter():
            namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            # Moves only this thread.
            assert ctypes.CDLL(None).setns(namespace, _NET_NAMESPACE) == 0
            os.close(namespace)
            port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(port, _SET_TAP, struct.pack("16sH22x", b"eth0", _TAP | _NO_HEADER))
            self._ports.append(port)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    def run(self):
        while not self._stopped:
            wait = (
                0.05 if not self._delayed_frames else min(0.05, max(0.0, self._delayed_frames[0][0] - time.monotonic()))
            )
            ready, _, _ = select.select(list(self._ports), [], [], wait)
            for port in ready:
                self._receive(port)
            while self._delayed_frames and self._delayed_frames[0][0] <= time.monotonic():
                self._deliver(*self._delayed_frames.popleft()[1:])

    def stop(self):
        self._stopped = True
        self.join()
        for port in self._ports:
            os.close(port)

    def _receive(self, port):
        try:
            frame = os.read(port, 65536)
        except BlockingIOError:
            return
        except OSError:
            # The node and its interface have ended.
            self._ports.remove(port)
            os.close(port)
            return
        if self._random.random() >= self.loss:
            self._delayed_frames.append((time.monotonic() + self.delay, port, frame))

    def _deliver(self, source, frame):
        for port in self._ports:
            if port != source:
                # A full or missing interface loses the packet.
                with suppress(OSError):
                    os.write(port, frame)


class VirtualNode:
    """A virtual node; `boot` starts it, `cut_power` ends it and its processes at once."""

    def __init__(self, folder, shared, switch, number):
        self.address = f"10.0.0.{number}"
        self.own, self.shared, self.switch = folder / str(number), shared, switch
        self.home = Path(pwd.getpwuid(os.geteuid()).pw_dir)

    def boot(self):
        kept_paths = " ".join(dict.fromkeys(map(str, (Path(sys.base_prefix).resolve(), sys.prefix, REPOSITORY))))
        boot_paths = {"folders": f"{self.home} /opt /tmp", "kept": kept_paths, "repository": REPOSITORY}
        script = _BOOT.format(own=self.own, shared=self.shared, **boot_paths)
        # A killed test run ends its nodes, too.
        command = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "--kill-child", "--mount-proc", "bash", "-c", script]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n", self._process.stderr.read()
        [first] = psutil.Process(self._process.pid).children()
        self._first = first.pid
        self.switch.plug(self._first)
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0", check=True)
        self.run("ip", "link", "set", "eth0", "up", check=True)
        # No host responds there; programs find their own address by the default route.
        self.run("ip", "route", "add", "default", "via", "10.0.0.254", check=True)

    def cut_power(self):
        self._process.kill()
        self._process.wait()

    def processes(self):
        """Return the processes of the node, with the ids of the machine."""
        own_namespace = os.readlink(f"/proc/{self._first}/ns/pid")
        own_processes = []
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == own_namespace:
                    own_processes.append(process)
        return own_processes

    def run(self, *command, timeout=400, check=False, **environment):
        """Run a command on the node in the folder of the repository, and wait for it."""
        completed = subprocess.run(
            self._command_inside(command),
            env=self._environment(environment),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or completed.returncode == 0, completed.stdout + completed.stderr
        return completed

    def start(self, *command, log, **environment):
        """Start a command on the node; it ends with the node at the latest."""
        with log.open("w") as log_file:
            return subprocess.Popen(
                self._command_inside(command),
                env=self._environment(environment),
                stdout=log_file,
                stderr=subprocess.STDOUT,
            )

    def start_counting_nodes(self):
        """Start counting the nodes of this cluster; the file gets a line for each change."""
        counts_file = self.shared / f"nodes-{time.time()}"
        counts_file.touch()
        command = ["python", "tests/cluster/count_nodes.py", f"/tmp/shared/{counts_file.name}"]
        self.start(*command, log=self.shared / f"{counts_file.name}.log")
        return counts_file

    def _command_inside(self, command):
        enter = ["nsenter", f"--target={self._first}", "--mount", "--net", "--pid"]
        return [*enter, "bash", "-c", 'cd /opt/bsq_ray && exec "$@"', "bash", *map(str, command)]

    def _environment(self, extra):
        inherited = {name: os.environ[name] for name in ("LANG", "TERM", "USER") if name in os.environ}
        path = f"/opt/bsq_ray/.venv/bin:{os.environ['PATH']}"
        return inherited | {"HOME": str(self.home), "PATH": path, **RAY} | extra


def wait_until(condition, log):
    """Wait until the call is true; fail after four minutes with the log."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


@contextmanager
def virtual_nodes(count, delay=0.0, loss=0.0):
    """Yield (nodes, folder that is their /tmp/shared); skip the test if the machine has no namespaces."""
    has_tools = all(map(shutil.which, ("unshare", "nsenter", "setpriv", "ip"))) and Path("/dev/net/tun").exists()
    if not has_tools or subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("servers are made of namespaces, which needs root, unshare, ip (iproute2) and /dev/net/tun")
    if Path(sys.prefix) != REPOSITORY / ".venv":
        pytest.skip("servers find the package in .venv of this repository, and it is installed elsewhere")
    folder = Path(tempfile.mkdtemp(prefix="servers"))
    switch, booted_nodes = Switch(delay, loss), []
    (folder / "shared").mkdir()
    switch.start()
    try:
        for number in range(1, count + 1):
            node = VirtualNode(folder, folder / "shared", switch, number)
            node.boot()
            booted_nodes.append(node)
        yield booted_nodes, folder / "shared"
    finally:
        for node in booted_nodes:
            node.cut_power()
        switch.stop()
        shutil.rmtree(folder, ignore_errors=True)
