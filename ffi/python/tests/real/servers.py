"""SGLang's servers and kvrouter as processes: starting, freezing and killing whole process trees, and their logs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import aiohttp
import psutil

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
# A cold start imports torch and SGLang in three processes per server, several servers at a time.
BOOT_S = 300.0
# Models that the one under test needs; SGLang imports the files of all others at every start unless told not to.
MODEL_FILES = {"__init__", "registry", "utils", "qwen2", "qwen3"}
# Prompts longer than this are computed and sent in several chunks.
CHUNK = 128


class BootError(RuntimeError):
    """A server did not come up; its log's end is in the text."""


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now. SGLang opens more ports beside a server's own, so they lie far apart."""
    held = []
    for _ in range(count):
        listener = socket.socket()
        listener.bind((HOST, 0))
        held.append(listener)
    ports = [listener.getsockname()[1] for listener in held]
    for listener in held:
        listener.close()
    return ports


def environment(extra: dict[str, str]) -> dict[str, str]:
    """A CPU-only SGLang on the loopback interface, which fetches nothing. The backend is what is installed, as a user has it."""
    import importlib.util

    package = importlib.util.find_spec("sglang")
    assert package is not None and package.origin is not None
    models = Path(package.origin).parent / "srt" / "models"
    others = sorted(file.stem for file in models.glob("*.py") if file.stem not in MODEL_FILES)
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "TMPDIR")}
    return {
        **kept,
        "PYTHONPATH": str(HERE / "site"),
        "PYTHONUNBUFFERED": "1",
        # Several servers share a few cores, where threads that wait for each other by spinning cost more than they bring.
        "OMP_NUM_THREADS": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
        "SGLANG_HOST_IP": HOST,
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(others),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        **extra,
    }


@dataclass
class Server:
    """One process tree that listens on a port."""

    name: str
    port: int
    command: list[str]
    logs: Path
    extra: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    # How often it was started: every start has a log file of its own.
    starts: int = 0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> Path:
        return self.logs / f"{self.name}-{self.starts}.log"

    def start(self) -> None:
        self.starts += 1
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment(self.extra),
                start_new_session=True,
            )  # fmt: skip

    def tree(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int) -> None:
        """To the server and all of its schedulers."""
        for process in self.tree():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """A server that is needed now and then: an idle scheduler looks for requests with all of a core."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def kill(self) -> None:
        """Ends the tree at once, as a node that goes away does."""
        gone = self.tree()
        self.signal(signal.SIGKILL)
        psutil.wait_procs(gone, timeout=10)
        if self.process is not None:
            self.process.wait(10)
            self.process = None

    async def up(self, path: str = "/health", patience: float = BOOT_S) -> None:
        """Waits until it answers. Raises `BootError`."""
        deadline = time.monotonic() + patience
        quick = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=quick) as session:
            while time.monotonic() < deadline:
                if self.process is None or self.process.poll() is not None:
                    raise BootError(f"{self.name} ended while it started; its log:\n{self.tail()}")
                try:
                    async with session.get(self.url + path) as answer:
                        if answer.status == 200:
                            return
                except (aiohttp.ClientError, asyncio.TimeoutError):
                    pass
                await asyncio.sleep(0.25)
        raise BootError(f"{self.name} did not answer on {path} in {patience:.0f} s; its log:\n{self.tail()}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        return self.text()[-6000:]


def sglang(name: str, port: int, model: Path, logs: Path, flags: list[str], extra: dict[str, str]) -> Server:
    """A stock server on the CPU."""
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--device", "cpu", "--host", HOST, "--port", str(port),
        "--skip-tokenizer-init", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--attention-backend", "torch_native",
        # Larger pages are handed out by a Triton kernel, which a CPU does not have.
        "--page-size", "1", "--disable-cuda-graph", "--disable-radix-cache", "--max-total-tokens", "8192", "--mem-fraction-static", "0.85",
        "--max-running-requests", "32", "--chunked-prefill-size", str(CHUNK), "--enable-metrics", "--sleep-on-idle",
        # In bfloat16 the greedy token of a batch may be another than that of the request alone.
        "--dtype", "float32", *flags,
    ]  # fmt: skip
    return Server(name, port, command, logs, extra)


class Pair:
    """One prefill and one decode server with our backend, kvrouter in front, and a plain server to compare with."""

    def __init__(self, model: Path, logs: Path, router: Path, overlap: bool) -> None:
        plain, prefill, decode, front, self.bootstrap_port = free_ports(5)
        self.telemetry = free_ports(2)
        bounds = {
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "60",
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "60",
            "KVTRANSFER_PEER_SILENCE": "5",
            # With both, SGLang makes a CUDA event for the early send of a chunk, and ends for want of a GPU.
            "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0" if overlap else "1",
        }
        backend = ["--disaggregation-transfer-backend", "kvtransfer"]
        backend += [] if overlap else ["--disable-overlap-schedule"]
        self.plain = sglang("plain", plain, model, logs, [], {})
        self.prefill = sglang(
            "prefill", prefill, model, logs,
            ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(self.bootstrap_port), *backend],
            {**bounds, "KVTRANSFER_TELEMETRY_PORT": str(self.telemetry[0])},
        )  # fmt: skip
        self.decode = sglang(
            "decode", decode, model, logs, ["--disaggregation-mode", "decode", *backend],
            {**bounds, "KVTRANSFER_TELEMETRY_PORT": str(self.telemetry[1])},
        )  # fmt: skip
        command = [
            str(router), "--pd-disaggregation", "--prefill", self.prefill.url, str(self.bootstrap_port), "--decode", self.decode.url,
            "--host", HOST, "--port", str(front), "--probe-interval", "500ms", "--log-plain",
        ]  # fmt: skip
        self.router = Server("kvrouter", front, command, logs)
        self.all = [self.plain, self.prefill, self.decode, self.router]

    async def start(self) -> None:
        """Starts everything and waits for it."""
        for server in self.all:
            server.start()
        await asyncio.gather(*(server.up() for server in (self.plain, self.prefill, self.decode)))
        await self.router.up("/ready")
        self.plain.signal(signal.SIGSTOP)

    def stop(self) -> None:
        """Ends every tree, frozen or not."""
        for server in self.all:
            server.signal(signal.SIGCONT)
            server.kill()
