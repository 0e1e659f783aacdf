"""What somebody could do to a release: a copy of it in memory, its chain taken apart and put together again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attested_run import Attested

from anychip.attest.check.findings import canonical, sha256
from anychip.attest.check.history import GENESIS
from anychip.attest.check.release import FILES, check_release
from anychip.attest.keys import SigningKey, load_key
from anychip.attest.sign import sign_files, sign_run

ROLES = tuple(FILES)
CHAIN, OBJECTS = "attestation/chain.jsonl", "attestation/objects"


@dataclass
class Forgery:
    """Files by path. `links` are the chain's; `relink` writes them back with numbers and hashes that fit."""

    files: dict[str, bytes]
    links: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, release: Path) -> Forgery:
        files = {p.relative_to(release).as_posix(): p.read_bytes() for p in release.rglob("*") if p.is_file()}
        return cls(files, [json.loads(line) for line in files[CHAIN].splitlines()])

    def lines(self) -> list[bytes]:
        return self.files[CHAIN].splitlines(keepends=True)

    def relink(self) -> None:
        """Whoever changes a link must change all behind it: also those that name states by the links' hashes."""
        head, renamed, lines = GENESIS, dict[str, str](), []
        old = [sha256(line.rstrip(b"\n")) for line in self.lines()]
        kept = {id(link): old[link["n"]] for link in self.links if link["n"] < len(old)}
        for number, link in enumerate(self.links):
            body = json.loads(_rename(canonical(link["body"]), renamed))
            line = canonical({**link, "n": number, "parent": head, "body": body})
            head = sha256(line)
            if id(link) in kept:
                renamed[kept[id(link)]] = head
            lines.append(line + b"\n")
        self.files[CHAIN] = b"".join(lines)

    def keep(self, value: Any) -> str:
        digest = sha256(canonical(value))
        self.files[f"{OBJECTS}/{digest}.json"] = canonical(value)
        return digest

    def lookup(self, digest: str) -> Any:
        return json.loads(self.files[f"{OBJECTS}/{digest}.json"])

    def replace_object(self, digest: str, change: Callable[[Any], None]) -> str:
        value = self.lookup(digest)
        change(value)
        return self.keep(value)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [link for link in self.links if link["kind"] == kind]

    def write(self, folder: Path) -> Path:
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder

    def drop_unused_objects(self) -> None:
        """A careful forger leaves no object behind that no link names."""
        text = self.files[CHAIN]
        for name in [name for name in self.files if name.startswith(OBJECTS)]:
            if Path(name).stem.encode() not in text:
                del self.files[name]


def sign_again(folder: Path, key: SigningKey, files: bool = True) -> None:
    """Sign a forged release as its operator would have."""
    root = sign_files(folder, "tiny", key) if files else ""
    if root:
        sign_run(folder, "tiny", root, key)


def reasons(folder: Path, attested: Attested, *roles: str) -> set[str]:
    """Why a folder is rejected by somebody who trusts these; empty when it is accepted."""
    findings, _ = check_release(folder, attested.public(*(roles or ROLES)))
    return {problem.reason for problem in findings.problems}


def key_of(attested: Attested, role: str) -> SigningKey:
    return load_key(attested.keys[role])


def _rename(text: bytes, renamed: dict[str, str]) -> bytes:
    for old, new in renamed.items():
        text = text.replace(old.encode(), new.encode())
    return text
