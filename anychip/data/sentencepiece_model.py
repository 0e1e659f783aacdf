"""TeleChat's tokenizers: SentencePiece BPE with byte fallback, dummy prefix, digits one by one, control pieces.

One choice is made here. The dummy prefix means that the text between two control pieces begins with `▁`, so a lone
"\\n" after `<_end>` is two ids (`▁`, line feed), as the published Hugging Face code encodes it; a runtime that drops
the `▁` there gives one id. Decoding hides the difference; training and serving must agree, and here both do this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anychip.data.tokenizer import Tokenizer, roles_of
from anychip.errors import InputError
from anychip.files import atomic_writer


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`. Its control and unknown pieces are the special tokens.

    SentencePiece never produces a control piece from text. A *user-defined* piece it does produce, so a model that
    declares its chat markers that way is refused: text could forge turns.
    """

    file_name = "tokenizer.model"

    def __init__(self, serialized: bytes, config: dict[str, Any], where: object = "") -> None:
        import sentencepiece

        self.serialized = serialized
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
            self.vocab_size = int(self._processor.get_piece_size())
            pieces = [self._processor.id_to_piece(index) for index in range(self.vocab_size)]
        except (RuntimeError, TypeError, ValueError):
            raise InputError("is not a SentencePiece model.", where=where, do="Give another file.") from None
        self.special_tokens = {
            piece: index
            for index, piece in enumerate(pieces)
            if self._processor.is_control(index) or self._processor.is_unknown(index)
        }
        super().__init__(roles_of(list(self.special_tokens), config))
        self._control_ids = frozenset(self.special_tokens.values())
        self.digest = hashlib.sha256(serialized).hexdigest()
        self._check(where)

    @classmethod
    def load(cls, path: Path, config: dict[str, Any]) -> SentencePieceTokenizer:
        try:
            serialized = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror}).", where=path, do="Give another file.") from None
        if not serialized:
            raise InputError("is empty.", where=path, do="Give a SentencePiece model.")
        return cls(serialized, config, where=path)

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self._processor.encode(list(texts), num_threads=-1))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        pieces: list[str] = []
        ordinary: list[int] = []
        for index in ids:
            if index in self._control_ids:
                pieces.append(self._processor.decode(ordinary))
                ordinary = []
                if not skip_special:
                    pieces.append(self._processor.id_to_piece(index))
            elif 0 <= index < self.vocab_size:
                ordinary.append(int(index))
        pieces.append(self._processor.decode(ordinary))
        return "".join(pieces)

    def _write_model(self, path: Path) -> None:
        with atomic_writer(path) as handle:
            handle.write(self.serialized)

    def _check(self, where: object) -> None:
        if "eos" not in self._roles:
            raise InputError(
                "has no control piece that ends a document.",
                where=where,
                do="Put a tokenizer_config.json with eos_token beside it.",
            )
        for marker in ("<_start>", "<_end>", "<_user>", "<_bot>", "<_system>"):
            index = int(self._processor.piece_to_id(marker))
            if index not in self._control_ids and self._processor.id_to_piece(index) == marker:
                raise InputError(
                    f"declares {marker} as an ordinary piece, so that text could forge it.",
                    where=where,
                    do="Train the model with --control_symbols instead of --user_defined_symbols.",
                )
