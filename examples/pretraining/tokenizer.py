"""Text to token numbers: a byte-pair tokenizer trained on the spot, or a named one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import PretrainError

END = "<|end|>"


@dataclass(frozen=True)
class Coder:
    """`encode` maps a list of texts to lists of token numbers; `end` closes a document."""

    encode: Callable[[list[str]], list[list[int]]]
    end: int
    vocab: int
    digest: str


def train(texts: Iterable[str], vocab: int, path: Path) -> None:
    """Byte-level byte-pair encoding: no text is unknown to it, and it trains in seconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    tokenizer.save(str(part))
    os.replace(part, path)


def load(path: Path) -> Coder:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    end = tokenizer.token_to_id(END)
    assert end is not None, f"{path} was not written by train()"
    return Coder(
        encode=lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)],
        end=end,
        vocab=tokenizer.get_vocab_size(),
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def named(name: str) -> Coder:
    """A tokenizer of the Hugging Face hub, or a folder with one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PretrainError(f"cannot load the tokenizer {name!r}: {error}") from error
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise PretrainError(f"the tokenizer {name!r} has no end-of-text token, which is needed to separate documents")
    table = repr(sorted(tokenizer.get_vocab().items())).encode()
    return Coder(
        encode=lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"],
        end=end,
        vocab=len(tokenizer),
        digest=hashlib.sha256(name.encode() + table).hexdigest(),
    )
