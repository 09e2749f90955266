# SPDX-License-Identifier: Apache-2.0
"""Text to train on: files, documents, tokens, windows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

JSON_LINES = (".jsonl", ".ndjson", ".json")
PIECE = 1 << 18  # characters that are tokenized at a time


class DataError(ValueError):
    """A file that cannot be trained on; the message is the sentence a user reads."""


def documents(file: Path) -> Iterator[str]:
    """The documents of `file`: each line's "text" or else "prompt" of JSON lines, all of any other UTF-8 text.

    Raises DataError.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            if file.suffix not in JSON_LINES:
                yield lines.read()
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(line, f"{file}, line {number}")
    except OSError as error:
        raise DataError(f"--data {file}: cannot be read ({error.strerror}); give a text file or JSON lines") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--data {file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _document(line: str, where: str) -> str:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"--data {where}: is not JSON ({error.msg}); each line must be an object") from error
    found = [item[key] for key in ("text", "prompt") if key in item] if isinstance(item, dict) else []
    if not found or not isinstance(found[0], str):
        raise DataError(f'--data {where}: has no text under "text" or "prompt"')
    return found[0]


def tokens(file: Path, tokenizer: Any) -> Tensor:
    """[n] int64: all documents, the tokenizer's end-of-sequence token between them. Raises DataError."""
    found: list[int] = []
    for document in documents(file):
        if found and tokenizer.eos_token_id is not None:
            found.append(tokenizer.eos_token_id)
        for piece in _pieces(document):
            found += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.int64)


def _pieces(text: str) -> Iterator[str]:
    """`text` in parts that end with a line where there is one."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


class Windows:
    """A stream of tokens in windows; the last ones (a fiftieth, at most 64) are held out.

    Args:
        stream: [n] int64.
        length: tokens per window.
        seed: of the order, a new one for every pass over the stream.

    Raises DataError where there are too few tokens for a window to train on and one to hold out.
    """

    HELD_OUT, MOST_HELD_OUT = 50, 64

    def __init__(self, stream: Tensor, length: int, seed: int) -> None:
        count = len(stream) // length
        if count < 2:
            raise DataError(
                f"--data: has {len(stream)} tokens, too few for two windows of {length}; give more text or a shorter --length"
            )
        windows = stream[: count * length].view(count, length)
        held_out = min(max(1, count // self.HELD_OUT), self.MOST_HELD_OUT)
        self.train, self.held_out = windows[:-held_out], windows[-held_out:]
        self.seed = seed
        self._pass, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int, size: int) -> Tensor:
        """[size, length]: what step `step` of a run trains on."""
        return torch.stack([self.train[self._at(step * size + i)] for i in range(size)])

    def _at(self, number: int) -> int:
        turn, place = divmod(number, len(self.train))
        if turn != self._pass:
            generator = torch.Generator().manual_seed(self.seed + turn)
            self._pass, self._order = turn, torch.randperm(len(self.train), generator=generator)
        return int(self._order[place])


def spread(stream: Tensor, length: int, count: int) -> Tensor:
    """[count, length]: windows at even distances over `stream` [n], fewer where they would overlap.

    Raises DataError where there are too few tokens for one.
    """
    if len(stream) < length:
        raise DataError(
            f"--data: has {len(stream)} tokens, too few for a window of {length}; give more text or a shorter --length"
        )
    count = min(count, len(stream) // length)
    starts = [i * (len(stream) - length) // max(1, count - 1) for i in range(count)]
    return torch.stack([stream[start : start + length] for start in starts])
