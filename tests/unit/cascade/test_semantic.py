# SPDX-License-Identifier: Apache-2.0
"""Semantic keys: near questions, and the walls that they never cross."""

from __future__ import annotations

import builtins
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_spec_plugins.cascade import semantic
from vllm_spec_plugins.cascade.cache import Answer, Cache, CacheError, CacheSettings, open_cache
from vllm_spec_plugins.cascade.semantic import EmbeddingServer, Rows, SentenceTransformer, embedder
from vllm_spec_plugins.config import SettingError


class Letters:
    """Counts letters: anagrams have one direction, texts without a common letter are orthogonal."""

    def __init__(self, name: str = "letters") -> None:
        self.name, self.asked = name, 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += len(texts)
        return np.array([[text.count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)


def request(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def answer(text: str) -> Answer:
    return Answer({"text": text}, {}, 1.0)


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("redis_url") if request.param == "redis" else str(tmp_path / "answers")


@pytest.fixture
def opened(place: str) -> Iterator[Any]:
    made: list[Cache] = []

    def make(embed: Letters | None = None, **given: Any) -> Cache:
        settings = {"store": place, "semantic": 0.9, "embedder": "http://unused", "embedder_model": "m", **given}
        made.append(open_cache(CacheSettings.parse(settings), embed=embed or Letters()))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def test_a_near_question_gets_the_answer_with_its_similarity_and_a_far_one_none(opened: Any) -> None:
    cache = opened()
    cache.put(cache.key(request("listen"), "a"), answer("hears"))
    found = cache.get(cache.key(request("silent"), "a"))
    assert found is not None
    assert found.payload == {"text": "hears"}
    assert found.similarity == pytest.approx(1.0)
    assert cache.get(cache.key(request("zoo"), "a")) is None
    stats = cache.stats()
    assert (stats.hits, stats.semantic_hits, stats.misses) == (0, 1, 1)


def test_the_exact_key_comes_first_and_asks_no_embedder(opened: Any) -> None:
    letters = Letters()
    cache = opened(letters)
    for text in ("listen", "silent"):
        cache.put(cache.key(request(text), "a"), answer(text))
    asked = letters.asked
    found = cache.get(cache.key(request("silent"), "a"))
    assert found is not None
    assert (found.payload, found.similarity) == ({"text": "silent"}, None)
    assert letters.asked == asked


def test_the_nearest_question_wins(opened: Any) -> None:
    cache = opened(semantic=0.1)
    for text in ("abz", "abc", "xyz"):
        cache.put(cache.key(request(text), "a"), answer(text))
    found = cache.get(cache.key(request("abcc"), "a"))
    assert found is not None
    assert found.payload == {"text": "abc"}


@pytest.mark.parametrize(
    ("api_key", "changed"),
    [
        ("b", {}),
        (None, {}),
        ("a", {"model": "n"}),
        ("a", {"temperature": 0.5, "seed": 1}),
        ("a", {"max_tokens": 3}),
        ("a", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "silent"}]}),
    ],
)
def test_a_near_question_of_another_tenant_model_setting_or_conversation_is_no_hit(
    opened: Any, api_key: str | None, changed: dict[str, Any]
) -> None:
    cache = opened(semantic=0.0)
    cache.put(cache.key(request("listen"), "a"), answer("hears"))
    assert cache.get(cache.key(request("silent", **changed), api_key)) is None
    assert cache.get(cache.key(request("silent"), "a")) is not None


def test_vectors_of_two_embedders_are_never_compared(opened: Any) -> None:
    one, other = opened(Letters("one")), opened(Letters("other"))
    one.put(one.key(request("listen"), "a"), answer("hears"))
    assert other.get(other.key(request("silent"), "a")) is None


def test_what_another_process_put_is_found_and_survives_a_restart(opened: Any) -> None:
    one, other = opened(), opened()
    assert other.get(other.key(request("silent"), "a")) is None
    one.put(one.key(request("listen"), "a"), answer("hears"))
    assert other.get(other.key(request("silent"), "a")) is not None
    again = opened()
    assert again.get(again.key(request("silent"), "a")) is not None


def test_the_answer_to_a_question_that_was_evicted_is_not_given(opened: Any) -> None:
    cache = opened(max_entries=1)
    cache.put(cache.key(request("listen"), "a"), answer("hears"))
    assert cache.get(cache.key(request("silent"), "a")) is not None
    cache.put(cache.key(request("zoo"), "a"), answer("animals"), cost=100.0)
    assert cache.get(cache.key(request("silent"), "a")) is None
    assert cache.get(cache.key(request("ooz"), "a")) is not None


def test_a_near_answer_that_is_too_old_is_not_given(place: str) -> None:
    now = [1_000_000.0]
    given = {"store": place, "semantic": 0.9, "embedder": "http://unused", "embedder_model": "m", "max_age": 100}
    cache = open_cache(CacheSettings.parse(given), clock=lambda: now[0], embed=Letters())
    cache.put(cache.key(request("listen"), "a"), answer("hears"))
    now[0] += 90
    silent = cache.key(request("silent"), "a")
    assert cache.get(silent) is not None
    assert cache.get(silent, max_age=80) is None
    now[0] += 20
    assert cache.get(silent) is None
    cache.close()


def test_vectors_of_evicted_answers_leave_the_memory(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "REBUILD", 10)
    cache = opened(max_entries=5, eviction="lru")
    for number in range(60):
        key = cache.key(request(f"listen {chr(97 + number % 26)} {number}"), "a")
        cache.get(key)
        cache.put(key, answer(str(number)))
    rows = next(iter(cache._semantic._groups.values()))
    assert len(rows._keys) <= 5 + 10 + 2


def test_a_semantic_hit_counts_as_a_request_for_the_answer_that_it_gave(opened: Any) -> None:
    cache = opened(max_entries=2)
    listen, zoo, new = (cache.key(request(text), "a") for text in ("listen", "zoo", "buffy"))
    cache.put(zoo, answer("animals"))
    cache.put(listen, answer("hears"))
    for _ in range(3):
        cache.get(cache.key(request("silent"), "a"))
    cache.get(new)
    cache.put(new, answer("slays"), cost=2.0)
    assert cache.get(listen) is not None
    assert cache.get(zoo) is None


@pytest.mark.parametrize("vector", [np.zeros((1, 26)), np.full((1, 26), np.nan), np.ones((2, 26)), np.ones(26)])
def test_an_embedding_without_a_direction_is_refused(
    opened: Any, monkeypatch: pytest.MonkeyPatch, vector: np.ndarray
) -> None:
    cache = opened()
    monkeypatch.setattr(Letters, "embed", lambda self, texts: vector.astype(np.float32))
    with pytest.raises(CacheError, match=r"letters gave no direction"):
        cache.get(cache.key(request("silent"), "a"))


def test_an_embedder_that_changes_its_width_is_refused(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened()
    cache.put(cache.key(request("listen"), "a"), answer("hears"))
    monkeypatch.setattr(Letters, "embed", lambda self, texts: np.ones((1, 3), np.float32))
    with pytest.raises(CacheError, match=r"gives 3 numbers for a text, and gave 26"):
        cache.get(cache.key(request("silent"), "a"))


def test_rows_find_what_a_search_through_all_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, wanted = Rows(), {}
    for _ in range(200):
        vector = rng.standard_normal(8).astype(np.float32)
        key = str(rng.integers(60))
        wanted[key] = vector / np.linalg.norm(vector)
        rows.set(key, wanted[key])
    query = wanted[next(iter(wanted))]
    near = rows.nearest(query, 0.2)
    everything = sorted(((float(vector @ query), key) for key, vector in wanted.items()), reverse=True)
    assert [key for _, key in near] == [key for cosine, key in everything if cosine >= 0.2]
    assert near[0][0] == pytest.approx(1.0)


class Embeddings(BaseHTTPRequestHandler):
    """An embedding server: [len, 1] per text, in reverse order, as its indices say."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        rows = [{"index": i, "embedding": [len(text), 1]} for i, text in enumerate(body["input"])]
        reply = self.server.reply or (200, json.dumps({"data": rows[::-1]}))  # type: ignore[attr-defined]
        self.send_response(reply[0])
        self.end_headers()
        self.wfile.write(reply[1].encode())

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def embeddings() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Embeddings) as server:
        server.seen, server.reply = [], None  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_embedding_server_is_asked_as_openai_has_it(embeddings: Any, suffix: str) -> None:
    found = EmbeddingServer(f"http://127.0.0.1:{embeddings.server_port}{suffix}", "m", "secret").embed(["a", "bcd"])
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 1], [3, 1]]
    path, authorization, body = embeddings.seen[0]
    assert (path, authorization) == ("/v1/embeddings", "Bearer secret")
    assert body == {"model": "m", "input": ["a", "bcd"], "encoding_format": "float"}


@pytest.mark.parametrize("reply", [(500, "{}"), (200, "no JSON"), (200, "{}"), (200, '{"data": [{"index": 0}]}')])
def test_an_embedding_server_that_fails_is_one_sentence(embeddings: Any, reply: tuple[int, str]) -> None:
    embeddings.reply = reply
    with pytest.raises(CacheError, match=r"no embedding from http://127.0.0.1:\d+/v1/embeddings: .") as failed:
        EmbeddingServer(f"http://127.0.0.1:{embeddings.server_port}", "m").embed(["a"])
    assert "\n" not in str(failed.value)


def test_an_embedding_server_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(CacheError, match=r"no embedding from http://127.0.0.1:1/v1/embeddings: "):
        EmbeddingServer("http://127.0.0.1:1", "m").embed(["a"])


def test_the_embedding_servers_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, embeddings: Any) -> None:
    url = f"http://127.0.0.1:{embeddings.server_port}"
    given = {"semantic": 0.9, "embedder": url, "embedder_model": "m", "embedder_key_env": "EMBEDDING_KEY"}
    settings = CacheSettings.parse(given)
    monkeypatch.delenv("EMBEDDING_KEY", raising=False)
    with pytest.raises(SettingError, match=r"embedder_key_env=EMBEDDING_KEY names a variable that is not set"):
        embedder(settings)
    monkeypatch.setenv("EMBEDDING_KEY", "from the environment")
    embedder(settings).embed(["a"])
    assert embeddings.seen[0][1] == "Bearer from the environment"


def test_a_sentence_transformers_model_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def encode(self, texts: list[str], show_progress_bar: bool) -> np.ndarray:
            assert not show_progress_bar
            return np.array([[len(self.name), len(text)] for text in texts], np.float64)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    made = embedder(CacheSettings.parse({"semantic": 0.9, "embedder": "sentence-transformers:org/model"}))
    assert made.name == "sentence-transformers:org/model"
    found = made.embed(["ab"])
    assert (found.dtype, found.tolist()) == (np.float32, [[9, 2]])


def test_without_the_sentence_transformers_library_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **others: Any) -> Any:
        if name == "sentence_transformers":
            raise ImportError(name)
        return real(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CacheError, match=r"sentence-transformers:m needs its library: pip install"):
        SentenceTransformer("m")
