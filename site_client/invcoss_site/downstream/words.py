"""Text as token numbers: a tokeniser that is trained on the training split, or BERT's from its vocab.txt.

Needs the library `tokenizers`, of the extra `downstream`. B = batch, L = tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PAD, UNKNOWN, START, END, "[MASK]")


def train_tokeniser(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A lower-case tokeniser (byte pairs) of at most `vocabulary` tokens for `texts`; equal texts give an equal one.

    The library's own WordPiece trainer numbers its tokens by chance. No text is unknown to this one; it has 261 tokens
    at least.
    """
    tokenizers = _library()
    tokeniser: Tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokeniser.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokeniser.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokeniser.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokeniser.train_from_iterator(texts, trainer)
    return tokeniser


def read_tokeniser(path: Path) -> Tokenizer:
    """A tokeniser from its JSON file, or from a BERT vocab.txt (a token a line). Raises DataError."""
    tokenizers = _library()
    try:
        if path.suffix == ".json":
            stored: Tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            return stored
        tokens = path.read_text(encoding="utf-8").splitlines()
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokeniser ({error}); give its JSON file, or a vocab.txt") from None
    numbers = {token: number for number, token in enumerate(tokens)}
    if missing := [token for token in (PAD, UNKNOWN, START, END) if token not in numbers]:
        raise DataError(f"{path}: has no {', '.join(missing)}, so it is no BERT vocabulary; give its vocab.txt")
    plain = (token for token in tokens if token not in SPECIAL)
    return _empty(numbers, lowercase=not any(token != token.lower() for token in plain))


def write_tokeniser(path: Path, tokeniser: Tokenizer) -> None:
    """Keep it as JSON, beside the model that was trained with it."""
    write_atomic(path, tokeniser.to_str().encode())


def token_numbers(tokeniser: Tokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Numbers (B, `length`) int64 of texts, cut or filled up with [PAD], between [CLS] and [SEP]."""
    ends = [_number(tokeniser, token) for token in (START, END, PAD)]
    rows = []
    for encoded in tokeniser.encode_batch(list(texts), add_special_tokens=False):
        row = [ends[0], *encoded.ids[: length - 2], ends[1]]
        rows.append(row + [ends[2]] * (length - len(row)))
    return torch.tensor(rows, dtype=torch.int64)


def _number(tokeniser: Tokenizer, token: str) -> int:
    number = tokeniser.token_to_id(token)
    if number is None:
        raise DataError(f"the tokeniser has no token {token}; give another one, or let it be trained")
    return int(number)


def _empty(numbers: dict[str, int], *, lowercase: bool) -> Tokenizer:
    tokenizers = _library()
    tokeniser: Tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(numbers, unk_token=UNKNOWN))
    tokeniser.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokeniser.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokeniser.decoder = tokenizers.decoders.WordPiece()
    return tokeniser


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise DataError("text needs the library tokenizers; pip install 'invcoss[downstream]'") from None
    return tokenizers
