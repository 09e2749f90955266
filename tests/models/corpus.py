# SPDX-License-Identifier: Apache-2.0
"""Training text and tokenizer of the tiny model family: the Python standard library of the running interpreter.

    python -m tests.models.corpus --workdir DIR     # trains the tokenizer, encodes both splits

The text is every UTF-8 ``.py`` file below the standard library (``test`` included, so that there is enough of it), in
sorted order. A file is held out, as a whole, when the hash of its path says so: no line of it is ever trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "heldout_prompts.jsonl"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 4096
HELDOUT_PERCENT = 3
# Not text: installed packages, byte code, and the character tables of the codecs.
EXCLUDED_DIRS = frozenset({"site-packages", "__pycache__", "encodings", "bad_coding", "dist-packages"})
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '# ' + message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


def library_files() -> list[tuple[str, str]]:
    """All (path relative to the standard library, text), sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the library's own tests hold files in other encodings: not part of the corpus
            continue
        if len(text) >= 200:
            found.append((relative.as_posix(), text))
    return found


def is_heldout(relative: str) -> bool:
    """Whether a file belongs to the held-out split: decided by the SHA-256 of its path alone."""
    return int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE entries; ids 0, 1, 2 are bos, eos, pad. Adds no token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token stream [n] uint16: bos, file, eos, bos, file, eos, ..."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [bos, *ids, eos]
    return np.asarray(stream, dtype=np.uint16)


def cut_prompts(tokenizer: PreTrainedTokenizerFast, files: list[tuple[str, str]], count: int, seed: int) -> list[dict]:
    """`count` prompts of 20..120 tokens, each starting at the beginning of a line of a held-out file."""
    rng = random.Random(seed)
    prompts: list[dict] = []
    while len(prompts) < count:
        name, text = rng.choice(files)
        lines = text.splitlines(keepends=True)
        start = rng.randrange(len(lines))
        ids = tokenizer("".join(lines[start : start + 60]), add_special_tokens=False)["input_ids"]
        length = rng.randint(20, 120)
        if len(ids) < length + 32 or not lines[start].strip():
            continue  # a prompt needs something to begin with and something that could follow it
        prompt = tokenizer.decode(ids[:length])
        again = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if "\ufffd" in prompt or len(again) != length:
            continue
        prompts.append({"id": len(prompts), "file": name, "tokens": length, "prompt": prompt})
    return prompts


def load_stream(workdir: Path, split: str) -> np.ndarray:
    """The encoded split ("train" or "heldout") that `main` wrote."""
    return np.load(workdir / f"{split}.npy", mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where the tokenizer and the encoded text go")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer instead of training one")
    parser.add_argument("--prompts", type=int, default=0, help=f"also write so many prompts to {PROMPTS.name}")
    parser.add_argument("--text", action="store_true", help="also write both splits as JSON lines for vllm-spec train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)

    files = library_files()
    train = [text for name, text in files if not is_heldout(name)]
    heldout = [(name, text) for name, text in files if is_heldout(name)]
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(args.tokenizer) if args.tokenizer else train_tokenizer(iter(train))
    )
    tokenizer.save_pretrained(args.workdir / "tokenizer")
    for split, texts in (("train", train), ("heldout", [text for _, text in heldout])):
        stream = encode(tokenizer, texts)
        np.save(args.workdir / f"{split}.npy", stream)
        if args.text:
            # With its first token; the tools put the last one between documents.
            lines = [json.dumps({"text": tokenizer.bos_token + text}) + "\n" for text in texts]
            (args.workdir / f"{split}.jsonl").write_text("".join(lines))
        print(f"{split}: {len(texts)} files, {sum(map(len, texts)):,} characters, {len(stream):,} tokens")
    if args.prompts:
        prompts = cut_prompts(tokenizer, heldout, args.prompts, args.seed)
        PROMPTS.write_text("".join(json.dumps(p) + "\n" for p in prompts))


if __name__ == "__main__":
    main()
