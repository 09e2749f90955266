# SPDX-License-Identifier: Apache-2.0
"""Semantic keys with embeddings that vLLM itself serves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import IN_CORE
from vllm_spec_plugins.cascade.cache import Answer, Cache, CacheError, CacheSettings, open_cache
from vllm_spec_plugins.tools.load import TARGET
from vllm_spec_plugins.tools.server import MODEL, Server

ARGUMENTS = [
    *("--runner", "pooling", "--convert", "embed", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
    *("--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 26)),
]
QUESTION = "How do I open a file for reading in Python?"
NEAR = "How can I open files for reading in Python?"
FAR = "What does the garbage collector do?"


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny target as an embedding model."""
    log = tmp_path_factory.mktemp("embeddings") / "server.log"
    with Server("embeddings", TARGET, ARGUMENTS, log, IN_CORE) as server:
        yield server


def opened(server: Server, folder: Path, **given: Any) -> Cache:
    settings = {"semantic": 0.9, "embedder": server.url, "embedder_model": MODEL, **given}
    return open_cache(CacheSettings.parse({"store": str(folder / "answers.sqlite"), **settings}))


def request(question: str) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": question}], "temperature": 0}


def test_a_question_gets_the_answer_of_a_near_one_of_its_own_tenant_alone(embeddings: Server, tmp_path: Path) -> None:
    cache = opened(embeddings, tmp_path)
    cache.put(cache.key(request(QUESTION), "a"), Answer({"text": "with open"}, {"completion_tokens": 2}, 1.0))
    near = cache.get(cache.key(request(NEAR), "a"))
    assert near is not None
    assert near.payload == {"text": "with open"}
    assert near.similarity is not None
    assert 0.9 <= near.similarity < 1
    assert cache.get(cache.key(request(FAR), "a")) is None
    assert cache.get(cache.key(request(NEAR), "b")) is None
    cache.close()

    again = opened(embeddings, tmp_path)
    assert again.get(again.key(request(NEAR), "a")) == near
    again.close()


def test_a_model_that_the_server_does_not_have_is_one_sentence(embeddings: Server, tmp_path: Path) -> None:
    cache = opened(embeddings, tmp_path, embedder_model="another")
    with pytest.raises(CacheError, match=r"^no embedding from http://.*/v1/embeddings: .*404") as failed:
        cache.get(cache.key(request(QUESTION), "a"))
    assert "\n" not in str(failed.value)
    cache.close()
