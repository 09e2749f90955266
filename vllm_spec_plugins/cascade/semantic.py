# SPDX-License-Identifier: Apache-2.0
"""Semantic keys: the stored question nearest to a new one, by the cosine of their embeddings. Lossy, so off by default."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vllm_spec_plugins.cascade.cache_settings import SENTENCE_TRANSFORMERS, CacheSettings
from vllm_spec_plugins.cascade.store import CacheError, Store
from vllm_spec_plugins.config import SettingError

ANSWER = 10.0  # seconds that an embedding may take
RECENT = 1024  # embeddings kept between a question and its answer
REBUILD = 1024  # vectors added before those of evicted answers are dropped


class Embedder(Protocol):
    """Texts as vectors.

    Attributes:
        name: embeddings of embedders with different names are never compared.
    """

    name: str

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[n, d] float32, of any length. Callable from any thread. Raises CacheError."""
        ...


class EmbeddingServer:
    """``/v1/embeddings`` of an OpenAI-compatible server, such as ``vllm serve MODEL --runner pooling``.

    Args:
        url: http(s)://HOST:PORT, with or without /v1.
        model: the name that the server knows.
        api_key: sent to this server alone.
    """

    def __init__(self, url: str, model: str, api_key: str = "") -> None:
        try:
            import httpx
        except ImportError as error:
            raise CacheError("an embedding server needs httpx, which vLLM brings: pip install httpx") from error
        self.name, self._model = f"{url} {model}", model
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1/embeddings"
        self._error: Any = (httpx.HTTPError, ValueError, KeyError, TypeError)
        self._client = httpx.Client(timeout=ANSWER, headers={"Authorization": f"Bearer {api_key}"} if api_key else None)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        body = {"model": self._model, "input": list(texts), "encoding_format": "float"}
        try:
            reply = self._client.post(self._url, json=body)
            reply.raise_for_status()
            rows = sorted(reply.json()["data"], key=lambda row: row["index"])
            found = np.asarray([row["embedding"] for row in rows], np.float32)
        except self._error as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CacheError(f"no embedding from {self._url}: {reason}") from error
        return found


class SentenceTransformer:
    """A model of the sentence-transformers library, in this process.

    Args:
        model: folder or hub id.
    """

    def __init__(self, model: str) -> None:
        try:
            import sentence_transformers
        except ImportError as error:
            raise CacheError(
                f"embedder={SENTENCE_TRANSFORMERS}{model} needs its library: pip install sentence-transformers"
            ) from error
        self.name = f"{SENTENCE_TRANSFORMERS}{model}"
        self._lock = threading.Lock()
        self._model = sentence_transformers.SentenceTransformer(model)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        with self._lock:
            return np.asarray(self._model.encode(list(texts), show_progress_bar=False), np.float32)


def embedder(settings: CacheSettings) -> Embedder:
    """The one that `settings` name. Raises SettingError, CacheError."""
    if settings.embedder.startswith(SENTENCE_TRANSFORMERS):
        return SentenceTransformer(settings.embedder.removeprefix(SENTENCE_TRANSFORMERS))
    key = ""
    if settings.embedder_key_env:
        key = os.environ.get(settings.embedder_key_env, "")
        if not key:
            raise SettingError(
                f"cache: embedder_key_env={settings.embedder_key_env} names a variable that is not set; set it, or leave it out"
            )
    return EmbeddingServer(settings.embedder, settings.embedder_model, key)


class Rows:
    """Unit vectors of one group, by key."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._row: dict[str, int] = {}
        self._matrix = np.zeros((0, 0), np.float32)

    def set(self, key: str, vector: np.ndarray) -> None:
        """Add or replace [d] float32. Raises CacheError when others here have another d."""
        if self._keys:
            _check_width(self._matrix, vector)
        row = self._row.setdefault(key, len(self._keys))
        if row == len(self._matrix):
            more = np.zeros((max(8, 2 * row), len(vector)), np.float32)
            if row:
                more[:row] = self._matrix
            self._matrix = more
        if row == len(self._keys):
            self._keys.append(key)
        self._matrix[row] = vector

    def nearest(self, vector: np.ndarray, least: float) -> list[tuple[float, str]]:
        """(cosine, key) of those at least `least` near to [d] float32, nearest first."""
        if not self._keys:
            return []
        _check_width(self._matrix, vector)
        cosines = self._matrix[: len(self._keys)] @ vector
        near = np.flatnonzero(cosines >= least)
        return sorted(((float(cosines[row]), self._keys[row]) for row in near), reverse=True)


def _check_width(matrix: np.ndarray, vector: np.ndarray) -> None:
    if matrix.shape[1] != len(vector):
        raise CacheError(
            f"the embedder gives {len(vector)} numbers for a text, and gave {matrix.shape[1]} for those in the cache; "
            f"give the new model another name"
        )


class Semantic:
    """Near questions among those in a store. The vectors are in memory, 4 * d bytes per answer, and follow the store: what
    another process puts there is found here by the next look-up.

    Args:
        embedder: of the questions.
        least: cosine from which two questions have the same answer.
        store: where the answers are.
    """

    def __init__(self, embedder: Embedder, least: float, store: Store) -> None:
        self.embedder, self.least, self.store = embedder, least, store
        self._lock = threading.Lock()
        self._groups: dict[str, Rows] = {}
        self._recent: OrderedDict[str, np.ndarray] = OrderedDict()
        self._revision = self._added = self._kept = 0

    def vector(self, text: str) -> np.ndarray:
        """The unit vector of a question, [d] float32. Raises CacheError."""
        with self._lock:
            known = self._recent.get(text)
        if known is not None:
            return known
        found = self.embedder.embed([text])
        if (
            found.ndim != 2
            or len(found) != 1
            or not (length := float(np.linalg.norm(found)))
            or not np.isfinite(length)
        ):
            raise CacheError(f"the embedder {self.embedder.name} gave no direction for a text: shape {found.shape}")
        known = found[0] / np.float32(length)
        with self._lock:
            self._recent[text] = known
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return known

    def near(self, group: str, text: str) -> list[tuple[float, str]]:
        """(cosine, key) of the group's questions that are near enough, nearest first; some may be evicted by now."""
        vector = self.vector(text)
        with self._lock:
            self._follow()
            rows = self._groups.get(group)
            return rows.nearest(vector, self.least) if rows else []

    def _follow(self) -> None:
        """Read what is new in the store; after many additions everything, which leaves out what was evicted."""
        if self._added > max(REBUILD, self._kept):
            self._groups, self._revision, self._added, self._kept = {}, 0, 0, 0
        fresh = self._revision == 0
        for row in self.store.vectors(self._revision):
            self._groups.setdefault(row.group, Rows()).set(row.key, np.frombuffer(row.data, np.float32))
            self._revision = row.revision
            self._added += not fresh
            self._kept += fresh
