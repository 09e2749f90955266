# SPDX-License-Identifier: Apache-2.0
"""Five real servers on the trained tiny target, started together, once: plain vLLM and each way to ask for a plugin."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_spec_plugins.tools.load import PROMPTS, TARGET, Reply, Sampling, load_prompts, send
from vllm_spec_plugins.tools.server import Server, running

# Not all servers on the machine's first core, where vLLM would bind each of them.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

ARGUMENTS = [
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"),
    *("--kv-cache-memory-bytes", str(1 << 26)),
]
# One process less per server: the worker runs in the engine core's. Importing vLLM is most of what a start takes.
IN_CORE: dict[str, str | None] = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for all servers: that takes minutes where other programs want the processor too."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """By name: plain; none, from a YAML file; lookahead and adapting, from the flag; windowed, from the environment.

    adapt=false: every draft is verified, whatever it costs on the machine that runs the tests. Adapting has the defaults.
    """
    folder = tmp_path_factory.mktemp("servers")
    (folder / "none.yaml").write_text("plugin: none\n")
    windowed = json.dumps({"name": "lookahead", "window": 3, "ngram": 4, "guesses": 2, "adapt": False})
    made = {
        "plain": Server("plain", TARGET, ARGUMENTS, folder / "plain.log"),
        "none": Server(
            "none", TARGET, ["--config", str(folder / "none.yaml"), *ARGUMENTS], folder / "none.log", IN_CORE
        ),
        "lookahead": Server(
            "lookahead", TARGET, ["--plugin", "lookahead:adapt=false", *ARGUMENTS], folder / "lookahead.log"
        ),
        "windowed": Server(
            "windowed", TARGET, ARGUMENTS, folder / "windowed.log", {"VLLM_SPEC_PLUGIN": windowed, **IN_CORE}
        ),
        "adapting": Server("adapting", TARGET, ["--plugin", "lookahead", *ARGUMENTS], folder / "adapting.log"),
    }
    with running(list(made.values())):
        yield made


@pytest.fixture(scope="session")
def plain(servers: dict[str, Server]) -> Server:
    """vLLM as it comes, on the runner that it chooses."""
    return servers["plain"]


@pytest.fixture(scope="session")
def none(servers: dict[str, Server]) -> Server:
    """The plugins' runner without speculation."""
    return servers["none"]


@pytest.fixture(scope="session")
def lookahead(servers: dict[str, Server]) -> Server:
    """The plugin with its default settings, but every draft verified."""
    return servers["lookahead"]


@pytest.fixture(scope="session")
def adapting(servers: dict[str, Server]) -> Server:
    """The plugin with its default settings."""
    return servers["adapting"]


@pytest.fixture(scope="session", params=["lookahead", "windowed"])
def speculating(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Server:
    """Each server with a plugin that drafts."""
    return servers[request.param]


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """A dozen prompts from held-out text."""
    return load_prompts(PROMPTS, 12)


@pytest.fixture(scope="session")
def wanted(prompts: list[str]) -> Callable[..., tuple[Reply, ...]]:
    """A reference server's completions of the first prompts, asked for once per server and request."""
    known: dict[str, tuple[Reply, ...]] = {}

    def ask(
        server: Server, count: int, sampling: Sampling, max_tokens: int, extra: dict[str, Any] | None = None
    ) -> tuple[Reply, ...]:
        key = f"{server.name} {count} {sampling} {max_tokens} {extra}"
        if key not in known:
            known[key] = send(server, prompts[:count], sampling, max_tokens, concurrency=4, extra=extra).replies
        return known[key]

    return ask
