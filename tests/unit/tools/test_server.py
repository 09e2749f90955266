# SPDX-License-Identifier: Apache-2.0
"""Servers are started, waited for and stopped whatever happens; their counters mean what they say."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_spec_plugins.tools import server as module
from vllm_spec_plugins.tools.server import Counters, Server, ServerError, only, running

METRICS = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 40.0
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="m"} 1.79e+09
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 2.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 2.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 0.5
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 18.0
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 15.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 2.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 100.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 23.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 15.0
"""


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAUNCH", (sys.executable, str(Path(__file__).with_name("stub_server.py"))))
    monkeypatch.setattr(module, "STOP", 0.3)


def make(tmp_path: Path, what: str, name: str = "stub", **variables: str) -> Server:
    return Server(name, "model", ["--do", what], tmp_path / f"{name}.log", variables)


def processes(server: Server) -> list[int]:
    """The server's process and its child's, from the log."""
    line = next(line for line in server.log.read_text().splitlines() if line.startswith("processes"))
    return [int(word) for word in line.split()[1:3]]


def state(process: int) -> str:
    """A letter as in ps; "" when there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(process: int) -> bool:
    """Whether it has ended, reaped by its parent or not."""
    return state(process) in ("", "Z", "X")


def eventually(condition: bool | object, seconds: float = 5.0) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_counters_are_read_from_the_metrics() -> None:
    counters = Counters.parse(METRICS)
    assert counters == Counters(generated=40, steps=20, drafts=17, draft_tokens=100, accepted=23)
    assert counters.tokens_per_step == 2.0


def test_counters_subtract_and_add() -> None:
    earlier, later = Counters(10, 5, 4, 3, 2), Counters(40, 20, 17, 100, 23)
    assert later - earlier == Counters(30, 15, 13, 97, 21)
    assert later - earlier + earlier == later
    assert math.isnan(Counters().tokens_per_step)


def test_a_server_is_up_inside_the_context_and_gone_with_its_children_after_it(tmp_path: Path) -> None:
    with make(tmp_path, "serve", STUB="here") as server:
        log = server.log.read_text()
        assert f"serve model --do serve --host 127.0.0.1 --port {server.port} --served-model-name target" in log
        assert "variable here" in log
        both = processes(server)
        assert not any(gone(process) for process in both)
    assert eventually(lambda: all(gone(process) for process in both))


def test_an_error_in_the_context_stops_the_server(tmp_path: Path) -> None:
    server = make(tmp_path, "serve")

    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), server:
        work()
    both = processes(server)
    assert eventually(lambda: all(gone(process) for process in both))


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServerError) as raised, make(tmp_path, "die"):
        pass
    assert "server stub ended with status 3: vllm serve model --do die" in str(raised.value)
    assert str(raised.value).rstrip().endswith("the last words")
    assert "line 99" in str(raised.value)
    assert "line 10\n" not in str(raised.value)


def test_a_server_that_takes_too_long_is_reported_and_stopped(tmp_path: Path) -> None:
    server = make(tmp_path, "hang")
    with (
        pytest.raises(ServerError, match=r"did not answer within 1 s: vllm serve model"),
        running([server], timeout=1.0),
    ):
        pass
    assert server._process is None


def test_all_servers_stop_when_one_does_not_start(tmp_path: Path) -> None:
    good, bad = make(tmp_path, "serve", "good"), make(tmp_path, "die", "bad")
    with pytest.raises(ServerError, match="server bad ended"), running([good, bad]):
        pass
    assert eventually(lambda: all(gone(process) for process in processes(good)))


def test_only_one_server_runs_and_paused_ones_can_be_stopped(tmp_path: Path) -> None:
    first, second = make(tmp_path, "serve", "first"), make(tmp_path, "serve", "second")
    with running([first, second]):
        with only(first, [first, second]):
            assert eventually(lambda: [state(process) for process in processes(second)] == ["T", "T"])
            assert "T" not in [state(process) for process in processes(first)]
        assert eventually(lambda: "T" not in [state(process) for process in processes(second)])
        second.pause()
    assert eventually(lambda: all(gone(process) for process in (*processes(first), *processes(second))))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_servers_end_with_the_program_that_started_them(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import pathlib, time; from vllm_spec_plugins.tools import server as m\n"
        f"m.LAUNCH = {module.LAUNCH!r}; m.STOP = 0.3; m.stop_on_sigterm()\n"
        f"with m.Server('s', 'model', ['--do', 'serve'], pathlib.Path({str(tmp_path / 's.log')!r})) as server:\n"
        "    server.pause(); print('up', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "up\n"
        starter.send_signal(number)
        assert starter.wait(20) == (128 + number if number == signal.SIGTERM else -number)
    both = processes(Server("s", "model", [], tmp_path / "s.log"))
    assert eventually(lambda: all(gone(process) for process in both))


def test_a_free_port_can_be_bound() -> None:
    import socket

    with socket.socket() as mine:
        mine.bind(("127.0.0.1", module.free_port()))
