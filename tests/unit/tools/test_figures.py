# SPDX-License-Identifier: Apache-2.0
"""What the tables say: who is compared with whom, ratios, rounds in turn, exit statuses."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_spec_plugins.tools import bench, cli, doctor, identity, load, measurements, report, speed
from vllm_spec_plugins.tools.load import GREEDY, SAMPLED, Batch, Reply
from vllm_spec_plugins.tools.server import Counters

LOOKAHEAD = speed.plugin("lookahead")


class FakeServer:
    """Answers at a fixed rate; `wrong` prompts get another token."""

    def __init__(self, name: str, rate: float, tokens_per_step: int = 1, wrong: Sequence[str] = ()) -> None:
        self.name, self.rate, self.tokens_per_step, self.wrong = name, rate, tokens_per_step, wrong
        self.paused = False
        self.asked: list[int] = []

    def pause(self) -> None:
        assert not self.paused
        self.paused = True

    def resume(self) -> None:
        assert self.paused
        self.paused = False


def fake_send(order: list[str]) -> Any:
    def send(server: FakeServer, prompts: Sequence[str], *_: Any) -> Batch:
        assert not server.paused
        order.append(server.name)
        server.asked.append(len(prompts))
        replies = tuple(Reply((1, 2, 3 + (prompt in server.wrong), 4), "text", "length") for prompt in prompts)
        generated = 4 * len(prompts)
        return Batch(replies, generated / server.rate, Counters(generated, generated // server.tokens_per_step))

    return send


def run(monkeypatch: pytest.MonkeyPatch, *servers: FakeServer, rounds: int = 2) -> tuple[list[speed.Row], list[str]]:
    order: list[str] = []
    monkeypatch.setattr(speed, "send", fake_send(order))
    configurations = [*speed.plain(), LOOKAHEAD, speed.vllm_ngram()][: len(servers)]
    rows = speed.measure(
        configurations,
        servers,  # type: ignore[arg-type]
        ["a", "b", "c"],
        samplings=(GREEDY, SAMPLED),
        concurrencies=(1,),
        max_tokens=4,
        rounds=rounds,
        say=lambda _: None,
    )
    return rows, order


def test_the_ratio_is_to_the_faster_plain_runner_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = run(monkeypatch, FakeServer("v1", 100), FakeServer("none", 80), FakeServer("plugin", 150, 2))
    greedy = {row.configuration: row for row in rows if row.sampling == "greedy"}
    assert greedy[LOOKAHEAD.name].ratio == [pytest.approx(1.5)] * 2
    assert greedy[speed.NONE].ratio == [pytest.approx(0.8)] * 2
    assert greedy[LOOKAHEAD.name].counters.tokens_per_step == 2
    assert all(row.lossless for row in rows)


def test_a_warm_up_comes_first_and_every_second_round_runs_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = FakeServer("v1", 1), FakeServer("none", 1), FakeServer("plugin", 1)
    _, order = run(monkeypatch, *servers)
    assert order[:9] == ["v1", "none", "plugin", "v1", "none", "plugin", "plugin", "none", "v1"]
    assert servers[0].asked[:3] == [2, 3, 3]
    assert not any(server.paused for server in servers)


def test_sampled_output_is_compared_with_the_same_runners_only(monkeypatch: pytest.MonkeyPatch) -> None:
    v1 = FakeServer("v1", 1, wrong=("b",))
    rows, _ = run(monkeypatch, v1, FakeServer("none", 1), FakeServer("plugin", 1))
    plugin = {row.sampling: row for row in rows if row.configuration == LOOKAHEAD.name}
    assert plugin["greedy"].identical == {speed.PLAIN: 2, speed.NONE: 3}
    assert not plugin["greedy"].lossless
    assert plugin[SAMPLED.name].identical == {speed.NONE: 3}
    assert plugin[SAMPLED.name].lossless


def test_vllms_own_methods_have_no_sampled_rows_and_speculate_as_asked() -> None:
    asked = {
        "vLLM's ngram": speed.vllm_ngram(3, 5),
        "vLLM's medusa": speed.vllm_medusa("heads", 3),
        "vLLM's draft_model": speed.vllm_draft("small", 2),
    }
    assert [(c.name, c.sampled, c.plain, c.arguments[0]) for c in asked.values()] == [
        (name, False, False, "--speculative-config") for name in asked
    ]
    configs = [json.loads(c.arguments[1]) for c in asked.values()]
    assert configs == [
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 5},
        {"method": "medusa", "model": "heads", "num_speculative_tokens": 3},
        {"method": "draft_model", "model": "small", "num_speculative_tokens": 2},
    ]


def test_the_bench_starts_vllms_own_methods_when_it_is_told_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def servers(configurations: Sequence[speed.Configuration], *_: Any) -> Any:
        started.extend(c.name for c in configurations)
        raise ValueError("enough")

    monkeypatch.setattr(measurements, "_servers", servers)
    both = "lookahead & medusa:model=heads"
    argv = ["--plugin", both, "--vllm-medusa", "heads", "--vllm-draft", "small", "--no-ngram"]
    assert bench.main(argv) == 2
    assert started == [speed.PLAIN, speed.NONE, f"--plugin {both}", "vLLM's medusa", "vLLM's draft_model"]
    started.clear()
    assert bench.main([]) == 2
    assert started == [speed.PLAIN, speed.NONE, "--plugin lookahead", "vLLM's ngram"]


def test_vllms_ngram_has_no_sampled_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = run(monkeypatch, *(FakeServer(name, 1) for name in ("v1", "none", "plugin", "ngram")))
    assert [row.sampling for row in rows if row.configuration == "vLLM's ngram"] == ["greedy"]


def test_a_table_shows_median_and_spread_and_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = run(monkeypatch, FakeServer("v1", 100), FakeServer("none", 80), FakeServer("plugin", 150, 2, ["a"]))
    rows[2].tokens_per_second = [150.0, 140.0, 190.0]
    text = io.StringIO()
    Console(file=text, width=200).print(report.speed_table(rows, "title"))
    assert "150.0 (140.0 to 190.0)" in text.getvalue()
    assert "NO: 2 of 3" in text.getvalue()


def test_a_json_report_names_machine_versions_and_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, _ = run(monkeypatch, FakeServer("v1", 100), FakeServer("none", 80), FakeServer("plugin", 150, 2))
    report.write_json(tmp_path / "new" / "speed.json", {"rows": [row.as_dict() for row in rows]})
    found = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert {"date", "machine", "versions", "rows"} <= found.keys()
    assert {"processor", "cores", "memory_gib", "load_average"} <= found["machine"].keys()
    assert {"vllm-spec-plugins", "python", "torch"} <= found["versions"].keys()
    assert found["rows"][2]["tokens_per_step"] == 2
    assert found["rows"][2]["ratio_median"] == pytest.approx(1.5)


def test_the_first_difference_is_found() -> None:
    assert identity.first_difference((1, 2, 3), (1, 5, 3)) == 1
    assert identity.first_difference((1, 2), (1, 2, 3)) == 2
    theirs = Batch((Reply((1, 2), "x", "stop"), Reply((1,), "y", "stop")), 1.0, Counters(3, 3))
    mine = Batch((Reply((1, 2), "x", "stop"), Reply((2,), "y", "stop")), 1.0, Counters(3, 2))
    found = identity.compare("p", "none", GREEDY, mine, theirs)
    assert (found.identical, found.prompts, found.differing) == (1, 2, ((1, 0),))
    assert found.tokens_per_step == 1.5


def test_requests_get_their_seeds_in_order() -> None:
    assert GREEDY.parameters(3) == {"temperature": 0.0, "top_p": 1.0}
    assert SAMPLED.parameters(3)["seed"] == SAMPLED.parameters(0)["seed"] + 3


def test_too_few_prompts_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert load.load_prompts(tmp_path / "p.jsonl", 2) == ["a", "b"]
    with pytest.raises(ValueError, match="has 2 prompts, 3 were asked for"):
        load.load_prompts(tmp_path / "p.jsonl", 3)


def test_what_follows_two_dashes_is_for_the_servers() -> None:
    assert bench.split(["speed", "--rounds", "2", "--", "--dtype", "float32", "--"]) == (
        ["speed", "--rounds", "2"],
        ["--dtype", "float32", "--"],
    )
    assert bench.split(["identity"]) == (["identity"], [])


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_wrong_plugin_ends_before_any_server_starts(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--plugin", "lookahed"]) == 2
    assert "there is no plugin 'lookahed'" in " ".join(capsys.readouterr().out.split())


def test_a_configuration_given_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for twice in (["--plugin", "none"], ["--plugin", "lookahead", "--plugin", "lookahead"]):
        assert cli.main(["bench", "speed", "--prompts", "2", *twice]) == 2
        assert "would be measured twice; give it once" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["doctor", "--nonsense"], ["bench", "everything"]])
def test_wrong_usage_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    assert leaving.value.code == 2
    assert "vllm-spec" in capsys.readouterr().err


def test_the_doctor_ends_with_status_1_and_the_sentences_when_something_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        doctor.Finding("python", "3"),
        doctor.Finding("vllm", "does not fit", "vLLM 9 is too new; install 0.32"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "NOT vllm" in shown.out
    assert "ok  python" in shown.out
    assert shown.err.strip() == "vLLM 9 is too new; install 0.32"
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings[:1]))
    assert cli.main(["doctor"]) == 0


def test_the_doctor_reports_a_broken_installation_and_a_missing_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from vllm_spec_plugins.cpu import distribution

    monkeypatch.setattr(distribution, "problems", lambda: ["the vllm command cannot start"])
    monkeypatch.setitem(sys.modules, "vllm", None)
    problems = [finding.problem for finding in doctor.examine() if finding.problem]
    assert problems[0] == "the vllm command cannot start"
    assert "vLLM cannot be imported" in problems[1]
