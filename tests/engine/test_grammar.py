# SPDX-License-Identifier: Apache-2.0
"""Grammars on trees: every row masked as its own path leaves the grammar, and text that is plain decoding's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import vllm_spec_plugins
from tests.engine.conftest import TARGET
from tests.engine.oracle import Oracle
from vllm_spec_plugins import hook
from vllm_spec_plugins.engine import grammar

NODES = 20
END = 300  # of reasoning, where it has a token of its own
SCHEMA = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["tags", "size"],
    "additionalProperties": False,
}
CASES = {"schema": {"json": SCHEMA}, "pattern": {"regex": r"a(b|[0-9]{1,3}|b{2,5})c?"}}
FIRST = {"schema": "{", "pattern": "a"}


def vllms_own(method: str) -> Any:
    """What stands behind our hook on StructuredOutputManager."""
    return hook._applied[f"vllm.v1.structured_output:StructuredOutputManager.{method}"].raw


def reasoner(end: int, implicit: bool) -> type:
    """A reasoning parser: reasoning lasts until a token `end`, which is the last of it, or the answer's first."""
    from vllm.parser.engine.adapters import ParserEngineReasoningAdapter
    from vllm.parser.engine.parser_engine import ReasoningEnd

    class Told:
        def __init__(self, tokenizer: Any) -> None: ...

        def is_reasoning_end(self, tokens: list[int]) -> bool:
            return end in tokens

        def is_reasoning_end_streaming(self, tokens: list[int], delta: list[int]) -> bool:
            return end in delta

    class Implied(Told, ParserEngineReasoningAdapter):
        reasoning_end_token_ids = frozenset({end})

        def find_reasoning_end(self, tokens: list[int]) -> Any:
            return ReasoningEnd(tokens.index(end), True) if end in tokens else ReasoningEnd(len(tokens), False)

    return Implied if implicit else Told


@pytest.fixture(scope="module")
def config() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    plugin = vllm_spec_plugins.engine_args("oracle", nodes=NODES)
    return EngineArgs(str(TARGET), dtype="float32", max_model_len=256, max_num_seqs=4, **plugin).create_engine_config()


class Case:
    """Requests of one backend and one kind of grammar; each has a random text behind it that the grammar allows, or is
    still reasoning.
    """

    def __init__(self, config: Any, backend: str, asked: str, reasoning: str, rng: random.Random) -> None:
        from vllm.v1.structured_output import StructuredOutputManager

        self.manager = StructuredOutputManager(config)
        self.backend, self.asked, self.rng = backend, CASES[asked], rng
        self.reasoning, self.implicit = reasoning != "over", reasoning == "implicit"
        first = self.manager.tokenizer.convert_tokens_to_ids(FIRST[asked])
        self.end = first if self.implicit else END
        self.manager.reasoner_cls = reasoner(self.end, self.implicit) if self.reasoning else None
        self.vocab = config.model_config.get_vocab_size()

    def request(self, number: int) -> tuple[Any, list[int]]:
        """A request and what its grammar has taken."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.request import Request

        structured = StructuredOutputsParams(**self.asked)
        structured._backend = self.backend
        params = SamplingParams(structured_outputs=structured)
        params.update_from_generation_config({}, eos_token_id=self.manager.tokenizer.eos_token_id)
        request = Request(str(number), [5, 6], params, pooling_params=None)
        self.manager.grammar_init(request)
        while request.structured_output_request.grammar is None:
            pass
        taken: list[int] = []
        if not self.reasoning:
            for _ in range(self.rng.randrange(12)):
                if not (allowed := self.allowed(request, taken)):
                    break
                taken.append(self.rng.choice(allowed))
            assert self.manager.accept_tokens(request, taken)
        return request, taken

    def mask(self, request: Any, taken: list[int]) -> np.ndarray | None:
        """The mask behind `taken`, by a grammar of its own; None where the grammar does not allow them."""
        kind, spec = request.structured_output_request.structured_output_key
        stop = request.sampling_params.all_stop_token_ids
        own = self.manager.backend.compile_grammar(kind, spec, stop_token_ids=stop)
        line = self.manager.backend.allocate_token_bitmask(1)
        begun = not self.reasoning
        for token in taken:
            begins = not begun and token == self.end
            if (begun or (begins and self.implicit)) and not own.is_terminated():
                own.fill_bitmask(line, 0)
                if not int(line[0, token // 32]) >> (token % 32) & 1 or not own.accept_tokens("own", [token]):
                    return None
            begun |= begins
        if begun and not own.is_terminated():
            own.fill_bitmask(line, 0)
        else:
            line.fill_(-1)
        return line[0].numpy()

    def allowed(self, request: Any, taken: list[int]) -> list[int]:
        """Some of the tokens that may come next, the end of the text among them if it may."""
        mask = self.mask(request, taken)
        if mask is None or (mask == -1).all():
            return [self.end] if mask is not None and self.reasoning and self.end not in taken else []
        found = [t for t in range(self.vocab) if mask[t // 32] >> (t % 32) & 1]
        eos = self.manager.tokenizer.eos_token_id
        return [*self.rng.sample(found, min(4, len(found))), *([eos] if eos in found else [])]

    def tree(self, request: Any, taken: list[int]) -> tuple[list[int], list[int], list[list[int]]]:
        """Tokens, parents and the path of every row: three nodes in four are what the grammar allows."""
        tokens, parents, paths = [], [], [[]]
        for node in range(self.rng.randrange(1, NODES + 1)):
            parent = self.rng.randrange(node + 1) if self.rng.random() < 0.6 else node
            allowed = self.allowed(request, taken + paths[parent]) if self.rng.random() < 0.75 else []
            tokens.append(self.rng.choice(allowed or [self.rng.randrange(self.vocab)]))
            parents.append(parent)
            paths.append([*paths[parent], tokens[-1]])
        return tokens, parents, paths


@pytest.mark.parametrize("backend", ["xgrammar", "guidance", "outlines"])
@pytest.mark.parametrize("asked", CASES)
@pytest.mark.parametrize("reasoning", ["over", "told", "implicit"])
def test_every_row_is_masked_as_its_own_path_leaves_the_grammar(
    config: Any, backend: str, asked: str, reasoning: str, seed: int
) -> None:
    case = Case(config, backend, asked, reasoning, random.Random(seed))
    forbidden = ended = misled = 0
    told_apart = backend != "xgrammar" or case.reasoning  # whether masks in row order are told from right ones
    for round_number in range(40):
        if round_number >= 8 and (misled or told_apart):
            break
        requests, drafts, expected = {}, {}, []
        for number in range(4):
            request, taken = case.request(number)
            requests[request.request_id] = request
            if number == 1:
                expected.append(case.mask(request, taken))  # without drafts
                continue
            tokens, parents, paths = case.tree(request, taken)
            request._spec_parents = parents
            masks = [case.mask(request, taken + path) for path in paths]
            kept = grammar.without_invalid_end(case.manager, request, tokens)
            # What is cut off is forbidden, or stands behind the text's end; what is kept ends with a valid node.
            assert kept == tokens[: len(kept)]
            assert all(mask is None or (mask == -1).all() for mask in masks[len(kept) + 1 :])
            assert not kept or masks[len(kept)] is not None
            padding = [-1] * (number % 2)
            drafts[request.request_id] = kept + padding
            expected += masks[: len(kept) + 1] + [None] * len(padding)
        found = grammar.bitmask(case.manager, requests, list(requests), drafts).copy()
        assert len(found) == len(expected)
        for row, mask in zip(found, expected, strict=True):
            forbidden += mask is None
            ended += mask is not None and (mask == -1).all()
            assert (row == (-1 if mask is None else mask)).all()
        # The grammars stand where they stood.
        case.manager._grammar_bitmask.fill_(0)
        assert (grammar.bitmask(case.manager, requests, list(requests), drafts) == found).all()
        if backend == "xgrammar" and not case.reasoning:
            rows = vllms_own("grammar_bitmask")(case.manager, requests, list(requests), drafts)
            misled += sum(mask is not None and (row != mask).any() for row, mask in zip(rows, expected, strict=True))
    assert forbidden > 0
    assert ended > 0 or asked == "schema"
    assert misled > 0 or told_apart, "masks in row order would do"
    case.manager.clear_backend()


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Any]) -> Any:
    return engine(vllm_spec_plugins.engine_args("none"))


def sampling(index: int) -> Any:
    """Constrained but for every third request; greedy and sampled."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structured = None if index % 3 == 2 else StructuredOutputsParams(json=SCHEMA)
    temperature = {"temperature": 0.7, "seed": index} if index % 2 else {"temperature": 0.0}
    return SamplingParams(max_tokens=64, structured_outputs=structured, **temperature)


def generate(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    params = [sampling(index) for index in range(len(prompts))]
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


@pytest.fixture(scope="module")
def expected(plain: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Plain decoding's texts of 12 prompts, those that ended checked against the schema."""
    import jsonschema

    found = generate(plain, prompts[:12])
    tokenizer, ended = plain.get_tokenizer(), 0
    for index, ids in enumerate(found):
        if index % 3 != 2 and len(ids) < 64:
            jsonschema.validate(json.loads(tokenizer.decode(ids, skip_special_tokens=True)), SCHEMA)
            ended += 1
    assert ended >= 4
    return found


@pytest.fixture(scope="module")
def hiding(engine: Callable[..., Any], plain: Any) -> tuple[Any, Oracle]:
    return engine(vllm_spec_plugins.engine_args("oracle", nodes=12)), Oracle.instances[-1]


def test_constrained_requests_accept_more_of_a_tree_than_its_first_chain(
    hiding: tuple[Any, Oracle], expected: list[list[int]], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, oracle = hiding
    constrained = [index for index in range(12) if index % 3 != 2]
    oracle.prepare([prompts[index] + expected[index] for index in constrained])
    assert generate(llm, prompts[:12]) == expected
    trees = oracle.accepted

    def first_chain(context: Any) -> Any:
        tree = Oracle.propose(oracle, context)
        rows = torch.arange(oracle.num_nodes)
        return tree.truncate((tree.parents == rows).cumprod(1).sum(1))

    monkeypatch.setattr(oracle, "propose", first_chain)
    oracle.prepare(oracle.texts)
    assert generate(llm, prompts[:12]) == expected
    assert trees > 1.4 * oracle.accepted > 0


def test_trees_that_only_lie_change_nothing(
    hiding: tuple[Any, Oracle], expected: list[list[int]], prompts: list[list[int]]
) -> None:
    llm, oracle = hiding
    oracle.prepare([prompt + text for prompt, text in zip(prompts, expected, strict=False)], right=False)
    assert generate(llm, prompts[:12]) == expected
    assert oracle.accepted < 12


def test_with_masks_in_row_order_the_output_is_wrong(
    hiding: tuple[Any, Oracle], expected: list[list[int]], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    llm, oracle = hiding
    oracle.prepare([prompt + text for prompt, text in zip(prompts, expected, strict=False)])
    monkeypatch.setattr(StructuredOutputManager, "grammar_bitmask", vllms_own("grammar_bitmask"))
    found = generate(llm, prompts[:12])
    wrong = [index for index in range(12) if found[index] != expected[index]]
    assert len(wrong) >= 2
    assert all(index % 3 != 2 for index in wrong)


def test_lookahead_drafts_trees_for_constrained_requests_and_gives_plain_decodings_text(
    engine: Callable[..., Any], expected: list[list[int]], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(vllm_spec_plugins.engine_args("lookahead", guesses=4, min_chance=0.0, adapt=False))
    branched = 0
    masks = grammar.bitmask

    def bitmask(manager: Any, requests: Any, *rest: Any) -> Any:
        nonlocal branched
        for request in requests.values():
            parents = getattr(request, "_spec_parents", [])
            branched += parents != list(range(len(parents)))
        return masks(manager, requests, *rest)

    monkeypatch.setattr(grammar, "bitmask", bitmask)
    assert generate(llm, prompts[:12]) == expected
    assert branched > 20
