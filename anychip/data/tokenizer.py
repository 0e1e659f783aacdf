"""Text to token ids and back. One interface; byte-level BPE and `tokenizer.json` here, SentencePiece beside.

Two promises hold for every implementation. Ordinary text never becomes a control id, even where it spells one out
(`<_end>` in a question is six characters of text, not the end of the answer): control ids are inserted by number,
see `encode_parts`. And text comes out of a stream decoder only when its UTF-8 is complete.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from anychip.errors import InputError
from anychip.files import sha256_file, write_json, write_text

TELECHAT_SPECIAL_TOKENS = ("<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>")
# As in TeleChat2-115B: room for tools and for what is thought of later, so that ids never move.
_RESERVED_TOKENS = ("<_observation>", "<_sep>", *(f"<_control{n}>" for n in range(1, 8)))
_BPE_SPECIAL_TOKENS = (*TELECHAT_SPECIAL_TOKENS, *_RESERVED_TOKENS)
_MIN_BPE_VOCABULARY = len(_BPE_SPECIAL_TOKENS) + 256

# Words with the sign or space before them, single digits, runs of symbols, line ends, and indentation as a whole.
_PRE_TOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_MAX_TOKENIZER_BYTES = 256 << 20
_REPLACEMENT = "\ufffd"
_ROLE_NAMES = {
    "unk": ("<_unk>", "<unk>"),
    "bos": ("<_start>", "<s>", "<|begin_of_text|>"),
    "eos": ("<_end>", "</s>", "<|endoftext|>", "<|end_of_text|>"),
    "pad": ("<_pad>", "<pad>", "<|pad|>"),
}


class Tokenizer(ABC):
    """What the rest of the program asks of a tokenizer. `special_tokens` maps control pieces to their ids."""

    file_name: str
    special_tokens: dict[str, int]
    vocab_size: int
    digest: str
    """SHA-256 of the tokenizer's file."""

    def __init__(self, roles: dict[str, str]) -> None:
        self._roles = roles

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; never a control id."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`. Incomplete UTF-8 becomes U+FFFD; ids outside the vocabulary become nothing."""

    @abstractmethod
    def _write_model(self, path: Path) -> None: ...

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Text and control ids, mixed. Each text between control ids is encoded by itself."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.encode(part)
        return ids

    def stream_decoder(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self, skip_special)

    def save(self, folder: Path) -> None:
        """Write the model and a `tokenizer_config.json` with the roles of the special tokens, as Hugging Face does."""
        self._write_model(folder / self.file_name)
        config: dict[str, Any] = {f"{role}_token": token for role, token in self._roles.items()}
        config |= {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        config["tokenizer_class"] = (
            "PreTrainedTokenizerFast" if self.file_name == "tokenizer.json" else "LlamaTokenizer"
        )
        write_json(folder / "tokenizer_config.json", config)

    def _role_id(self, role: str) -> int | None:
        return self.special_tokens.get(self._roles.get(role, ""))

    @property
    def unk_id(self) -> int | None:
        return self._role_id("unk")

    @property
    def bos_id(self) -> int | None:
        return self._role_id("bos")

    @property
    def eos_id(self) -> int:
        """The id that ends a document and an answer; every tokenizer has one."""
        return self.special_tokens[self._roles["eos"]]

    @property
    def pad_id(self) -> int | None:
        return self._role_id("pad")


class StreamDecoder:
    """Turns ids into text as they come: `feed` returns what has become certain, `finish` the rest."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        self._context = 0  # the last emitted ids stay as context: a piece may decode differently at the very start
        self._emitted = 0

    def feed(self, token: int) -> str:
        self._ids.append(token)
        before, now = self._texts()
        if now.endswith(_REPLACEMENT):
            return ""
        self._context, self._emitted = self._emitted, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        before, now = self._texts()
        self._ids, self._context, self._emitted = [], 0, 0
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[self._context : self._emitted], self._skip_special)
        return before, self._tokenizer.decode(self._ids[self._context :], self._skip_special)


class JsonTokenizer(Tokenizer):
    """Any Hugging Face `tokenizer.json`, ours included. Its tokens marked special are the control tokens."""

    file_name = "tokenizer.json"

    def __init__(self, serialized: str, roles: dict[str, str], where: object = "") -> None:
        super().__init__(roles)
        import hashlib

        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(serialized)
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"is not a tokenizer.json ({error}).", where=where, do="Give another file.") from None
        self.serialized = serialized
        self._backend.no_truncation()
        self._backend.no_padding()
        # Without this the library would turn special tokens spelled out in a text into their ids.
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in sorted(added.items()) if token.special}
        self._control_ids = frozenset(self.special_tokens.values())
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.digest = hashlib.sha256(serialized.encode()).hexdigest()
        self._leaks = _may_spell_control_tokens(json.loads(serialized), self.special_tokens)
        if self._roles.get("eos") not in self.special_tokens:
            raise InputError(
                "names no token that ends a document.",
                where=where,
                do="Put a tokenizer_config.json with eos_token beside it; the token must be special.",
            )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return self._without_control(text, ids) if self._leaks else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [encoding.ids for encoding in encodings]
        if self._leaks:
            return [self._without_control(text, ids) for text, ids in zip(texts, batch, strict=True)]
        return batch

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        known = [index for index in ids if 0 <= index < self.vocab_size]
        return str(self._backend.decode(known, skip_special_tokens=skip_special))

    def _without_control(self, text: str, ids: list[int]) -> list[int]:
        """Where the model itself holds a control token as an ordinary piece, encode it as its first character and
        the rest, so that the whole never stands together."""
        if self._control_ids.isdisjoint(ids):
            return ids
        parts = list(_split_control_tokens(text, self.special_tokens))
        if len(parts) < 2:
            return [index for index in ids if index not in self._control_ids or index == self.unk_id]
        return [index for part in parts for index in self.encode(part)]

    def _write_model(self, path: Path) -> None:
        write_text(path, self.serialized)


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Learn a byte-level BPE of `vocab_size` pieces, special tokens included.

    Every text can be encoded and decodes to itself; digits stand alone. The special tokens take the ids of
    TeleChat2 (0 `<_unk>` ... 6 `<_system>`), followed by nine reserved ones.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size < _MIN_BPE_VOCABULARY:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small for a byte-level BPE.",
            do=f"Set data.tokenizer.vocab_size to {_MIN_BPE_VOCABULARY} (bytes and special tokens) or more.",
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_BPE_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Without this a special token spelled out in the training text would be cut out of it.
    backend.encode_special_tokens = True
    backend.train_from_iterator(texts, trainer=trainer)
    return JsonTokenizer(backend.to_str(pretty=True), roles_of(_BPE_SPECIAL_TOKENS, {}))


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a folder (or file): `tokenizer.json`, or a SentencePiece `tokenizer.model`.

    Roles come from a `tokenizer_config.json` beside it, or from the usual names of the special tokens.
    """
    file = _tokenizer_file(path)
    if file.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise InputError("is larger than 256 MiB and so not a tokenizer.", where=file, do="Give another file.")
    config = _read_config(file.parent / "tokenizer_config.json")
    if file.suffix == ".model":
        from anychip.data.sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer.load(file, config)
    try:
        serialized = file.read_text(encoding="utf-8")
        added = [token["content"] for token in json.loads(serialized).get("added_tokens", []) if token["special"]]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"is not a tokenizer.json ({type(error).__name__}).", where=file, do="Give another file."
        ) from None
    return JsonTokenizer(serialized, roles_of(added, config), where=file)


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of the file that `load_tokenizer` would read."""
    return sha256_file(_tokenizer_file(path))


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    raise InputError(
        "holds no tokenizer.", where=path, do="Give a tokenizer.json, a SentencePiece .model, or a folder with one."
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not valid JSON ({error}).", where=path, do="Repair or remove the file.") from None
    if not isinstance(config, dict):
        raise InputError("is not a JSON object.", where=path, do="Repair or remove the file.")
    return config


def roles_of(special: Sequence[str], config: dict[str, Any]) -> dict[str, str]:
    """Which special token has which role. A name in the configuration that the model lacks is passed over."""
    roles = {}
    for role, usual in _ROLE_NAMES.items():
        named = config.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        # TeleChat2-115B's own configuration calls <_end> its unk_token; the model's first piece is the true one.
        candidates = usual if role == "unk" else (named, *usual)
        found = next((token for token in candidates if token in special), None)
        if found is not None:
            roles[role] = found
    return roles


def _may_spell_control_tokens(model_file: dict[str, Any], special: dict[str, int]) -> bool:
    """Whether ordinary encoding can reach a control id: never by merges that do not lead to it."""
    model = model_file.get("model", {})
    if model.get("type", "BPE") != "BPE" or model.get("ignore_merges"):
        return True
    merges = model.get("merges", [])
    merged = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges}
    return not merged.isdisjoint(special) or any(len(token) == 1 for token in special)


def _split_control_tokens(text: str, special: Iterable[str]) -> Iterator[str]:
    import re

    start = 0
    for match in re.finditer("|".join(map(re.escape, sorted(special, key=len, reverse=True))), text):
        cut = match.start() + 1
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
