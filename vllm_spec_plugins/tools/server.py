# SPDX-License-Identifier: Apache-2.0
"""Real ``vllm serve`` processes on loopback: started, waited for, paused, measured, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Self

import httpx
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

# The name that requests use, whatever the checkpoint is called.
MODEL = "target"

# Seconds: until a server serves (imports, compilation, a busy machine), until it has stopped, for a health check.
START, STOP, ANSWER = 600.0, 20.0, 5.0

TAIL_LINES = 25

# This interpreter's vLLM, without the working directory on its path.
LAUNCH = (sys.executable, "-P", "-m", "vllm.entrypoints.cli.main")


class ServerError(RuntimeError):
    """A server that did not start, died, or cannot be measured; the message ends with its log's last lines."""


@dataclass(frozen=True)
class Counters:
    """What a server's /metrics say, as totals since its start; subtract two readings.

    Attributes:
        generated: tokens that requests received.
        steps: target-model passes that gave a request tokens, summed over requests: the pass that ends its prompt and
            every decoding pass. Eight requests in one batch make eight.
        drafts: steps that verified drafts.
        draft_tokens, accepted: drafts verified and accepted. At a request's end tokens are accepted that it no longer
            receives, so generated - accepted would be fewer than the steps.
    """

    generated: int = 0
    steps: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read Prometheus' text format."""
        # One output per request and engine step: the first is timed as time to first token, the others as inter-token
        # latency. The two counts together are the steps, with and without speculation.
        names = {
            "vllm:generation_tokens_total": "generated",
            "vllm:time_to_first_token_seconds_count": "steps",
            "vllm:inter_token_latency_seconds_count": "steps",
            "vllm:spec_decode_num_drafts_total": "drafts",
            "vllm:spec_decode_num_draft_tokens_total": "draft_tokens",
            "vllm:spec_decode_num_accepted_tokens_total": "accepted",
        }
        totals = dict.fromkeys((field.name for field in fields(cls)), 0)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in names:
                    totals[names[sample.name]] += int(sample.value)
        return cls(**totals)

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def tokens_per_step(self) -> float:
        """Tokens per pass of the target model over one request; 1 without speculation."""
        return self.generated / self.steps if self.steps else float("nan")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One ``vllm serve`` and its worker processes, a process group of their own.

    Args:
        name: what messages and tables call it.
        model: checkpoint.
        arguments: what follows ``vllm serve MODEL``.
        log: file for everything that the server prints.
        environment: variables set beside this process's own; None removes one.
    """

    def __init__(
        self,
        name: str,
        model: str | Path,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.name, self.log = name, log
        self.port = free_port()
        self.command = ["vllm", "serve", str(model), *arguments]
        self._environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=START, max_retries=0)

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=START, max_retries=0)

    def start(self) -> None:
        """Launch the processes; `wait` says when they serve."""
        assert self._process is None, f"server {self.name} was started before"
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", MODEL]
        command = [*LAUNCH, *self.command[1:], *where]
        environment = {key: value for key, value in {**os.environ, **self._environment}.items() if value is not None}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        # Should this program be killed, the pipe closes and the whole group ends, paused or not.
        guard = f"read nothing; kill -KILL -{self._process.pid}"
        self._watchdog = subprocess.Popen(["/bin/sh", "-c", guard], stdin=subprocess.PIPE, start_new_session=True)

    def wait(self, timeout: float = START) -> None:
        """Return when the server answers. Raises ServerError when it dies or takes longer than `timeout` seconds."""
        assert self._process is not None
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if self._process.poll() is not None:
                raise ServerError(f"server {self.name} ended with status {self._process.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"server {self.name} did not answer within {timeout:.0f} s: {self.tail()}")
            time.sleep(0.25)

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=ANSWER).status_code == 200
        except httpx.TransportError:  # not listening yet
            return False

    def tail(self) -> str:
        """Command and last lines of the log, for messages."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([" ".join(self.command), *(f"    {line}" for line in lines)])

    def counters(self) -> Counters:
        """The metrics now."""
        reply = httpx.get(f"{self.url}/metrics", timeout=START)
        reply.raise_for_status()
        return Counters.parse(reply.text)

    def pause(self) -> None:
        """Freeze every process of an idle server, so that it takes nothing from the one under measurement."""
        self._signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self._paused = False

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End every process of the server at once, as a crash would; it can be started again, at the same port."""
        self._signal(signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """End the server in an orderly way, and whatever of it is left after `STOP` seconds by force."""
        if self._process is None:
            return
        if self._paused:
            self.resume()
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP)
        finally:  # also when an impatient user interrupts the wait
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
            if self._watchdog is not None:
                with self._watchdog as watchdog:
                    watchdog.kill()
                self._watchdog = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


@contextlib.contextmanager
def running(servers: Sequence[Server], timeout: float = START) -> Iterator[None]:
    """All of `servers` at once: started together, each waited for, all stopped at the end or on any error."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start()
        for server in servers:
            server.wait(timeout)
        yield


@contextlib.contextmanager
def only(active: Server, servers: Sequence[Server]) -> Iterator[None]:
    """`active` runs, the other servers stand still."""
    for server in servers:
        if server is not active:
            server.pause()
    try:
        yield
    finally:
        for server in servers:
            if server is not active:
                server.resume()


def stop_on_sigterm() -> None:
    """Let SIGTERM end this program as Ctrl-C does, through every ``finally``: servers must not outlive it."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
