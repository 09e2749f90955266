# SPDX-License-Identifier: Apache-2.0
"""What a user meets when a server starts: where the flag may stand, what it says when it cannot work, silence without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.tools.load import GREEDY, TARGET, send
from vllm_spec_plugins.tools.server import Server

MODEL = str(TARGET)
NGRAM = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}'
SLIDING_WINDOW = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "sliding_window": 64,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}

# name: (arguments, environment, what the one sentence must say)
REFUSED: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "name": (
        [MODEL, "--plugin", "lookahed"],
        {},
        ["'lookahed'", "did you mean 'lookahead'?", "valid are none, lookahead"],
    ),
    "key": (
        [MODEL, "--plugin", "lookahead:windw=3"],
        {},
        ["'windw'", "did you mean 'window'?", "valid are adapt, accept, eps, delta, window, ngram"],
    ),
    "type": ([MODEL, "--plugin", "lookahead:window=wide"], {}, ["window=wide", "whole number"]),
    "range": ([MODEL, "--plugin", "lookahead:guesses=99"], {}, ["guesses=99", "valid are 1 to 32"]),
    "json": ([MODEL, "--plugin", '{"name": "lookahead", '], {}, ["not valid JSON", '{"name": "lookahead"']),
    "twice": ([MODEL, "--plugin", "lookahead", "--plugin", "none"], {}, ["none", "nothing to mix", "lookahead, none"]),
    "mixture": (
        [MODEL, "--plugin", "lookahead", "--plugin", "jacobi"],
        {},
        ["jacobi", "its own tree", "serve it alone"],
    ),
    "conflict": (
        [MODEL, "--plugin", "lookahead", "--speculative-config", NGRAM],
        {},
        ["--speculative-config", "only one"],
    ),
    "yaml": ([MODEL, "--config", "plugin.yaml"], {}, ["guesses=0", "valid are 1 to 32"]),
    "environment": ([MODEL], {"VLLM_SPEC_PLUGIN": "lookahed"}, ["'lookahed'", "valid are none, lookahead"]),
    "model": (
        ["sliding", "--tokenizer", MODEL, "--plugin", "lookahead"],
        {},
        ["a sliding window of 64 tokens", "--plugin none"],
    ),
    "deployment": ([MODEL, "--plugin", "lookahead", "--kv-cache-dtype", "fp8"], {}, ["--kv-cache-dtype fp8", "auto"]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every command line of this module's tests, run in one go."""
    folder = tmp_path_factory.mktemp("command-lines")
    (folder / "plugin.yaml").write_text("plugin: lookahead:guesses=0\n")
    (folder / "sliding").mkdir()
    (folder / "sliding" / "config.json").write_text(json.dumps(SLIDING_WINDOW))
    serve = ["vllm", "serve"]
    cases = [{"argv": [*serve, *argv], "environment": environment} for argv, environment, _ in REFUSED.values()]
    cases.append({"argv": [*serve, "--help=plugin"]})
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("cli_run.py"))],
        cwd=folder,
        input=json.dumps(cases),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    # Importing vLLM may print too; the result is the last line.
    return dict(zip([*REFUSED, "help"], json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_a_start_that_cannot_work_ends_with_one_sentence(outcomes: dict[str, dict[str, Any]], case: str) -> None:
    outcome = outcomes[case]
    last = outcome["errors"].rstrip().splitlines()[-1]
    assert outcome["status"] not in (0, None)
    assert last.startswith("vllm serve: error: ")
    assert "--plugin" in last or "VLLM_SPEC_PLUGIN" in last
    for words in REFUSED[case][2]:
        assert words in last
    assert "Traceback" not in outcome["errors"] + outcome["output"]
    assert outcome["errors"].count("error: ") == 1


def test_the_help_shows_the_flag(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["help"]["status"] == 0
    text = " ".join(outcomes["help"]["output"].split())
    assert "--plugin NAME[:KEY=VALUE,...]" in text
    assert "lookahead" in text
    assert "VLLM_SPEC_PLUGIN" in text


def test_the_installed_command_refuses_a_wrong_name_too(tmp_path: Path) -> None:
    """The same through the `vllm` script, nothing of this test suite in between."""
    done = subprocess.run(
        [str(Path(sysconfig.get_path("scripts")) / "vllm"), "serve", MODEL, "--plugin", "lookahed"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.rstrip().splitlines()[-1].startswith("vllm serve: error: argument --plugin: lookahed: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["none", "lookahead", "windowed"])
def test_flag_yaml_file_and_environment_all_switch_the_plugin_on(
    servers: dict[str, Server], prompts: list[str], name: str
) -> None:
    log = servers[name].log.read_text(errors="replace")
    assert "Using V2 Model Runner" in log
    drafted = send(servers[name], prompts[:2], GREEDY, max_tokens=32, concurrency=2).counters.draft_tokens
    assert (drafted > 0) is (name != "none")


def test_without_the_flag_nothing_of_the_package_shows(plain: Server) -> None:
    log = plain.log.read_text(errors="replace")
    assert "Application startup complete" in log
    for trace in ("spec_plugins", "spec-plugins", "SPEC_PLUGIN", "--plugin", "Using V2 Model Runner"):
        assert trace not in log


@pytest.mark.parametrize("name", ["none", "lookahead", "windowed"])
def test_a_plugin_adds_no_warning_of_vllms_about_itself(servers: dict[str, Server], name: str) -> None:
    warnings = [line for line in servers[name].log.read_text(errors="replace").splitlines() if " WARNING " in line]
    assert not [line for line in warnings if "SPEC_PLUGIN" in line]
