# SPDX-License-Identifier: Apache-2.0
"""Answers in a Redis server, shared between routers on any machines.

Each operation is one Lua script, so it is atomic and one exchange. Everything lies under a fixed handful of names with a common
hash tag, declared to each script. How much survives a crash of the server is the server's own setting (`appendonly`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_spec_plugins.cascade.eviction import Policy
from vllm_spec_plugins.cascade.store import CacheError, Limits, Vector
from vllm_spec_plugins.cascade.store_sqlite import check_policy

PREFIX = "{vllm-spec-cache:1}:"
ANSWER = 10.0  # seconds that an exchange with the server may take
PAGE = 1000  # vectors per exchange: while a script runs, the server does nothing else
GROUP = 64  # characters of a group's name, which stands before its vector

# data, cost, weight, vector: key -> value; score, seen, revision: sorted by it; total: entries' bytes, last revision; policy.
NAMES = ("data", "cost", "weight", "score", "seen", "vector", "revision", "total", "policy")

# The arithmetic of eviction.py. Numbers cross as text of 17 digits, which is all of a double.
COMMON = """
local data, cost, weight, score, seen, vector, revision, total = unpack(KEYS, 1, 8)
local key, now, policy, half_life, remembered = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local function text(number)
    if number == math.huge then return 'inf' elseif number == -math.huge then return '-inf' end
    return string.format('%.17g', number)
end
local function log2(number) return math.log(number) / math.log(2) end
local function weigh(old)
    local request = now / half_life
    if not old then return request end
    local high, low = math.max(old, request), math.min(old, request)
    return high + log2(1 + 2 ^ (low - high))
end
local function worth(counted, price)
    if policy == 'lru' then return now end
    if policy == 'lfu' then return counted end
    return price > 0 and counted + log2(price) or -math.huge
end
local function remember(one, counted)
    redis.call('ZADD', seen, counted, one)
    local excess = redis.call('ZCARD', seen) - remembered
    if excess > 0 then redis.call('ZREMRANGEBYRANK', seen, 0, excess - 1) end
end
"""

GET = """
local found = redis.call('HGET', data, key)
if not found then
    local known = redis.call('ZSCORE', seen, key)
    remember(key, text(weigh(known and tonumber(known))))
    return false
end
local counted = weigh(tonumber(redis.call('HGET', weight, key)))
redis.call('HSET', weight, key, text(counted))
redis.call('ZADD', score, text(worth(counted, tonumber(redis.call('HGET', cost, key)))), key)
return found
"""

PUT = """
local most, room, answer, price, embedding = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]
local function size(one) return redis.call('HSTRLEN', data, one) + math.max(0, redis.call('HSTRLEN', vector, one) - 64) end
local counted = redis.call('HGET', weight, key) or redis.call('ZSCORE', seen, key)
counted = counted and tonumber(counted) or weigh(nil)
redis.call('ZREM', seen, key)
redis.call('HINCRBY', total, 'bytes', 0 - size(key))
redis.call('HSET', data, key, answer)
redis.call('HSET', cost, key, price)
redis.call('HSET', weight, key, text(counted))
redis.call('HDEL', vector, key)
redis.call('ZREM', revision, key)
if embedding ~= '' then
    redis.call('HSET', vector, key, embedding)
    redis.call('ZADD', revision, redis.call('HINCRBY', total, 'revision', 1), key)
end
redis.call('ZADD', score, text(worth(counted, tonumber(price))), key)
local held = redis.call('HINCRBY', total, 'bytes', size(key))
while redis.call('ZCARD', score) > most or held > room do
    local least = redis.call('ZRANGE', score, 0, 0)[1]
    held = redis.call('HINCRBY', total, 'bytes', 0 - size(least))
    local old = redis.call('HGET', weight, least)
    for _, name in ipairs({data, cost, weight, vector}) do redis.call('HDEL', name, least) end
    redis.call('ZREM', score, least)
    redis.call('ZREM', revision, least)
    remember(least, old)
end
return redis.call('HEXISTS', data, key)
"""

VECTORS = """
local flat = redis.call('ZRANGEBYSCORE', revision, '(' .. ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local found = {}
for i = 1, #flat, 2 do
    found[#found + 1] = {flat[i], flat[i + 1], redis.call('HGET', vector, flat[i])}
end
return found
"""

SIZE = "return {redis.call('ZCARD', score), tonumber(redis.call('HGET', total, 'bytes') or 0)}"

OPEN = """
redis.call('HSETNX', KEYS[9], 'name', ARGV[3])
redis.call('HSETNX', KEYS[9], 'half_life', ARGV[4])
return redis.call('HMGET', KEYS[9], 'name', 'half_life')
"""


class RedisStore:
    """See `Store`. Threads share a pool of connections.

    Args:
        url: redis://, rediss:// or unix://, with the password in it if there is one.
        prefix: what the names in the server start with; caches with different prefixes do not meet.

    Raises CacheError when the client library is missing, the server does not answer, or the cache there was made with another
    policy.
    """

    def __init__(self, url: str, policy: Policy, limits: Limits, prefix: str = PREFIX) -> None:
        try:
            import redis
        except ImportError as error:
            raise CacheError(
                "an answer cache in Redis needs its client library: pip install 'vllm-spec-plugins[redis]'"
            ) from error
        self.policy, self.limits = policy, limits
        self._error: type[Exception] = redis.RedisError
        try:
            self._client: Any = redis.Redis.from_url(url, socket_timeout=ANSWER, socket_connect_timeout=ANSWER)
        except ValueError as error:
            raise CacheError(f"the answer cache's store is not a URL that the Redis client reads: {error}") from error
        self.where = _without_password(self._client)
        self._names = [prefix + name for name in NAMES]
        self._get = self._script(COMMON + GET)
        self._put = self._script(COMMON + PUT)
        self._vectors = self._script("local vector, revision = KEYS[6], KEYS[7]" + VECTORS)
        self._size = self._script("local score, total = KEYS[4], KEYS[8]\n" + SIZE)
        name, half_life = self._script(OPEN)(self._arguments("", 0))
        check_policy(self.where, policy, name.decode(), float(half_life))

    def _script(self, text: str) -> Callable[[Sequence[Any]], Any]:
        """The script as a function of its arguments; the client sends its text again where the server lost it."""
        script = self._client.register_script(text)

        def call(arguments: Sequence[Any]) -> Any:
            try:
                return script(keys=self._names, args=arguments)
            except self._error as error:
                raise CacheError(f"the answer cache {self.where} does not answer: {error}") from error

        return call

    def _arguments(self, key: str, now: float) -> list[Any]:
        return [key, repr(now), self.policy.name, repr(self.policy.half_life), self.limits.remembered]

    def get(self, key: str, now: float) -> bytes | None:
        return self._get(self._arguments(key, now))

    def put(self, key: str, data: bytes, cost: float, now: float, group: str = "", vector: bytes = b"") -> bool:
        if len(data) + len(vector) > self.limits.bytes:
            return False
        embedding = group.ljust(GROUP)[:GROUP].encode() + vector if vector else b""
        limits = [self.limits.entries, self.limits.bytes]
        return bool(self._put([*self._arguments(key, now), *limits, data, repr(cost), embedding]))

    def vectors(self, after: int) -> list[Vector]:
        found: list[Vector] = []
        while page := self._vectors([after, PAGE]):
            for key, revision, vector in page:
                found.append(Vector(int(revision), key.decode(), vector[:GROUP].decode().rstrip(), vector[GROUP:]))
            after = found[-1].revision
        return found

    def size(self) -> tuple[int, int]:
        entries, size = self._size([])
        return int(entries), int(size)

    def close(self) -> None:
        self._client.close()


def _without_password(client: Any) -> str:
    """The server's address for messages."""
    known = client.connection_pool.connection_kwargs
    return known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}/{known.get('db', 0)}"
