"""Every way in which a release may be other than what was signed, and each rejected for what it is.

Four kinds: files changed as they lie there; a chain put together again with hashes that fit; the same signed by a
stranger; and chains that the operator's own key signed although they make no sense.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attested_run import Attested
from forging import CHAIN, OBJECTS, ROLES, Forgery, key_of, reasons, sign_again

from anychip.attest.check.findings import ATTESTATION, canonical
from anychip.attest.keys import load_key, make_key
from anychip.attest.sign import add_signature, sign_files

SIGNATURES = ("model.sig", "run.dsse.json", "data.dsse.json", "chips.dsse.json")
BROKEN_SIGNATURE = {"form", "signature", "key"}
BROKEN_CHAIN = {"form", "order", "missing link", "truncated", "fork", "steps", "inputs", "weights"}
FLIPS_A_FILE = 5


@dataclass(frozen=True)
class Mutation:
    """`reasons`: at least one of them must be given. `signer` signs it again, if anybody does."""

    name: str
    apply: Callable[[Forgery], None]
    reasons: set[str]
    signer: str = ""
    rehashed: bool = False


def flip(name: str, at: int, bit: int) -> Callable[[Forgery], None]:
    def apply(forgery: Forgery) -> None:
        data = bytearray(forgery.files[name])
        data[at] ^= 1 << bit
        forgery.files[name] = bytes(data)

    return apply


def expected_for(name: str, *, gone: bool = False) -> set[str]:
    """Why a change of this file's bytes is noticed."""
    if not name.startswith(ATTESTATION):
        return {"missing file" if gone else "bytes"}
    if Path(name).name in SIGNATURES:
        return {"missing file"} if gone else BROKEN_SIGNATURE
    if name == CHAIN:
        return {"missing file"} if gone else BROKEN_CHAIN
    return {"inputs"}


def changed_bytes(forgery: Forgery) -> Iterator[Mutation]:
    chance = random.Random(8)
    for name, data in sorted(forgery.files.items()):
        for _ in range(FLIPS_A_FILE):
            at, bit = chance.randrange(len(data)), chance.randrange(8)
            yield Mutation(f"{name}: byte {at}, bit {bit}", flip(name, at, bit), expected_for(name))
        cut = chance.randrange(len(data))
        yield Mutation(f"{name}: cut at {cut}", lambda f, n=name, c=cut: f.files.update({n: f.files[n][:c]}),
                       expected_for(name))  # fmt: skip
        yield Mutation(f"{name}: gone", lambda f, n=name: f.files.pop(n), expected_for(name, gone=True))  # type: ignore[misc]
        yield Mutation(f"{name}: longer", lambda f, n=name: f.files.update({n: f.files[n] + b" "}), expected_for(name))
    for name in ("extra.txt", "code/modeling.py", f"{ATTESTATION}/extra", f"{OBJECTS}/{'0' * 64}.json",
                 ".git/config", "model-00002-of-00002.safetensors"):  # fmt: skip
        yield Mutation(f"{name}: added", lambda f, n=name: f.files.update({n: b"{}"}), {"extra file"})
    weights, config = "model.safetensors", "config.json"
    yield Mutation("files exchanged", lambda f: f.files.update({weights: f.files[config], config: f.files[weights]}),
                   {"bytes"})  # fmt: skip


def changed_lines(forgery: Forgery) -> Iterator[Mutation]:
    """The chain's lines moved about, as they are."""
    count = len(forgery.links)

    def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Forgery], None]:
        return lambda f: f.files.update({CHAIN: b"".join(change(f.lines()))})

    for n in range(count):
        last = n == count - 1
        yield Mutation(f"link {n} left out", lines(lambda rows, n=n: rows[:n] + rows[n + 1 :]),
                       {"truncated"} if last else {"missing link"})  # fmt: skip
        yield Mutation(f"link {n} twice", lines(lambda rows, n=n: rows[: n + 1] + rows[n:]), {"replayed link"})
        yield Mutation(f"link {n} again at the end", lines(lambda rows, n=n: [*rows, rows[n]]), {"replayed link"})
        yield Mutation(f"cut behind link {n - 1}", lines(lambda rows, n=n: rows[:n]), {"truncated"})
        if n:
            yield Mutation(f"links {n - 1} and {n} exchanged",
                           lines(lambda rows, n=n: [*rows[: n - 1], rows[n], rows[n - 1], *rows[n + 1 :]]),
                           {"order"} if n > 1 else {"order", "missing link"})  # fmt: skip
    yield Mutation("backwards", lines(lambda rows: rows[::-1]), {"order"})
    yield Mutation("half a line at the end", lines(lambda rows: [*rows, rows[0][:20]]), {"truncated"})


# Changes of what the chain tells, each with the reason for which its meaning is refused.


def set_in(kind: str, number: int, reason: str, **fields: Any) -> Mutation:
    def apply(forgery: Forgery) -> None:
        body = forgery.of_kind(kind)[number]["body"]
        assert all(body.get(name, None) != value for name, value in fields.items())
        body.update(fields)

    return Mutation(f"{kind} {number}: {str(fields)[:40]}", apply, {reason})


def without(kind: str, number: int, *reasons: str) -> Mutation:
    def apply(forgery: Forgery) -> None:
        forgery.links.remove(forgery.of_kind(kind)[number])

    return Mutation(f"{kind} {number} never was", apply, set(reasons))


def twice(kind: str, number: int, reason: str) -> Mutation:
    """Not the same line again, which anybody sees, but its content in a new link."""

    def apply(forgery: Forgery) -> None:
        link = copy.deepcopy(forgery.of_kind(kind)[number])
        forgery.links.append({**link, "n": 10**6})

    return Mutation(f"{kind} {number} once more", apply, {reason})


def added(name: str, kind: str, body: dict[str, Any], reason: str, before: str = "export") -> Mutation:
    def apply(forgery: Forgery) -> None:
        at = forgery.links.index(forgery.of_kind(before)[0])
        link = {"n": 10**6, "parent": "", "time": "2026-01-01T00:00:00", "kind": kind, "body": body}
        forgery.links.insert(at, link)

    return Mutation(name, apply, {reason})


def in_object(field: str, kind: str, number: int, name: str, reason: str, change: Callable[[Any], None]) -> Mutation:
    def apply(forgery: Forgery) -> None:
        body = forgery.of_kind(kind)[number]["body"]
        old = body[field]
        new = forgery.replace_object(old, change)
        for link in forgery.links:  # what names the old object names the new one, from here on
            if link["n"] >= forgery.of_kind(kind)[number]["n"] and link["body"].get(field) == old:
                link["body"][field] = new

    return Mutation(f"{kind} {number}: {name}", apply, {reason})


def other_chip(ranks: Any) -> None:
    ranks["ranks"][0].update(vendor="nvidia", maker="NVIDIA", model="NVIDIA H100 80GB HBM3", country="US")


def other_software(ranks: Any) -> None:
    found = {"vendor": "nvidia", "maker": "NVIDIA", "country": "US", "what": ["libcudart.so.12"]}
    ranks["ranks"][0]["software"].append(found)


def meanings() -> list[Mutation]:
    far = "f" * 64
    return [
        *(in_object("members", "start", n, "another chip", "chip", other_chip) for n in (0, 1)),
        *(in_object("members", "start", n, "CUDA loaded", "software", other_software) for n in (0, 1)),
        *(in_object("members", "start", n, "no ranks", "chip", lambda o: o.update(ranks=[])) for n in (0, 1)),
        *(set_in("start", n, "chip", processes=2) for n in (0, 1)),
        *(in_object("inputs", "start", 0, f"policy denies {word}", "chip",
                    lambda o, w=word: o["policy"].update(deny_vendors=[w])) for word in ("cpu",)),
        in_object("inputs", "start", 0, "policy allows others", "chip",
                  lambda o: o["policy"].update(allow_vendors=["huawei"])),
        in_object("inputs", "start", 1, "other data", "data", lambda o: o["data"].update({"corpus words": far})),
        in_object("inputs", "start", 1, "more data", "data", lambda o: o["data"].update({"corpus more": far})),
        in_object("inputs", "start", 1, "other tokenizer", "data", lambda o: o["data"].update(tokenizer=far)),
        *(set_in("start", n, "inputs", inputs=far) for n in (0, 1)),
        *(set_in("start", n, "inputs", members=far) for n in (0, 1)),
        set_in("start", 0, "steps", step=3),
        set_in("start", 1, "fork", step=3),
        set_in("start", 1, "fork", resumed=far),
        set_in("start", 0, "fork", weights=far),
        *(set_in("claim", n, "fork", parent=far) for n in range(4)),
        *(set_in("claim", n, "steps", step=100 + n) for n in range(4)),
        *(set_in("claim", n, "steps", from_step=1 + 3 * n) for n in range(4)),
        *(set_in("claim", n, "steps", skipped=[[0, 2]]) for n in range(4)),
        *(set_in("claim", n, "form", skipped=[["a"]]) for n in range(4)),
        *(set_in("claim", n, "chip", members=far) for n in range(4)),
        *(set_in("claim", n, "inputs", trace=far) for n in range(4)),
        *(set_in("claim", n, "form", ledger="") for n in range(4)),
        *(without("claim", n, "fork", "missing link") for n in range(4)),
        *(twice("claim", n, "fork") for n in range(4)),
        *(in_object("trace", "claim", n, "a loss fewer", "steps", lambda o: o["losses"].pop()) for n in range(4)),
        *(in_object("trace", "claim", n, "another batch", "steps",
                    lambda o: o["batches"].__setitem__(1, 99)) for n in range(4)),
        *(in_object("trace", "claim", n, "no batches", "form", lambda o: o.pop("batches")) for n in range(4)),
        *(set_in("saved", n, "missing link", claim=far) for n in range(4)),
        set_in("saved", 3, "weights", manifest=far),
        without("saved", 3, "weights"),
        added("two checkpoints of a state", "saved", {"claim": "LAST", "manifest": far}, "fork"),
        added("a gap", "gap", {"why": "somebody lost something"}, "missing link"),
        added("back to nowhere", "rollback", {"stage": "pretrain", "to": far, "dropped": 0}, "fork"),
        added("brought from elsewhere", "derived",
              {"stage": "pretrain", "step": 12, "manifest": far, "how": "brought", "parent": None}, "fork"),
        added("merged with nothing", "derived",
              {"stage": "sft", "step": 12, "manifest": far, "how": "merged", "parent": far}, "fork"),
        added("an unknown kind", "blessing", {}, "form"),
        set_in("export", 0, "weights", manifest=far),
        set_in("export", 0, "weights", step=9),
        set_in("export", 0, "weights", stage="sft"),
        set_in("export", 0, "weights", files={"model.safetensors": far}),
        without("export", 0, "weights"),
        twice("stage", 0, "weights"),
    ]  # fmt: skip


def all_meanings(attested: Attested) -> Iterator[Mutation]:
    for mutation in meanings():
        yield Mutation(f"{mutation.name}, signed by the operator", mutation.apply, mutation.reasons, "operator", True)
        yield Mutation(f"{mutation.name}, not signed again", mutation.apply, {"truncated"}, "", True)
    for mutation in meanings()[::6]:
        yield Mutation(f"{mutation.name}, signed by a stranger", mutation.apply, {"key"}, "stranger", True)


def changed_signatures(attested: Attested) -> Iterator[Mutation]:
    def put(name: str, change: Callable[[Any, Forgery], Any]) -> Callable[[Forgery], None]:
        def apply(forgery: Forgery) -> None:
            envelope = json.loads(forgery.files[f"{ATTESTATION}/{name}"])
            forgery.files[f"{ATTESTATION}/{name}"] = canonical(change(envelope, forgery))

        return apply

    def statement(forgery: Forgery, name: str) -> Any:
        envelope = json.loads(forgery.files[f"{ATTESTATION}/{name}"])
        return envelope.get("dsseEnvelope", envelope)

    for name in SIGNATURES[1:]:
        for other in SIGNATURES:
            if other != name:
                yield Mutation(f"{name} with the statement of {other}",
                               put(name, lambda e, f, o=other: {**e, "payload": statement(f, o)["payload"]}),
                               {"signature"})  # fmt: skip
                yield Mutation(f"{name} with the signature of {other}",
                               put(name, lambda e, f, o=other: {**e, "signatures": statement(f, o)["signatures"]}),
                               {"key", "form", "signature"})  # fmt: skip
                yield Mutation(f"{other} in the place of {name}",
                               lambda f, n=name, o=other: f.files.update(
                                   {f"{ATTESTATION}/{n}": f.files[f"{ATTESTATION}/{o}"]}),
                               {"key", "form", "signature"})  # fmt: skip
        yield Mutation(f"{name} without signatures", put(name, lambda e, f: {**e, "signatures": []}), {"signature"})
        yield Mutation(f"{name} by an unknown key",
                       put(name, lambda e, f: {**e, "signatures": [{**e["signatures"][0], "keyid": "0" * 64}]}),
                       {"key"})  # fmt: skip
    yield Mutation("model.sig names another key",
                   put("model.sig", lambda e, f: {**e, "verificationMaterial": {
                       "publicKey": {"hint": "0" * 64}, "tlogEntries": []}}), {"key"})  # fmt: skip
    yield Mutation("everything by a stranger", lambda f: None, {"key"}, "stranger")


def apply_to_copy(mutation: Mutation, attested: Attested, pristine: Forgery, folder: Path) -> Path:
    forgery = Forgery(dict(pristine.files), copy.deepcopy(pristine.links))
    mutation.apply(forgery)
    if mutation.rehashed:
        last = list(forgery.lines())
        state = json.loads([line for line in last if b'"kind":"saved"' in line][-1])["body"]["claim"]
        for link in forgery.links:
            if link["body"].get("claim") == "LAST":
                link["body"]["claim"] = state
        forgery.relink()
        forgery.drop_unused_objects()
    forgery.write(folder)
    if mutation.signer:
        sign_again(folder, key_of(attested, mutation.signer))
    return folder


def test_each_of_many_mutations_is_rejected_for_the_right_reason(attested: Attested, tmp_path: Path) -> None:
    pristine = Forgery.of(attested.release)
    mutations = [
        *changed_bytes(pristine),
        *changed_lines(pristine),
        *all_meanings(attested),
        *changed_signatures(attested),
    ]
    assert len({mutation.name for mutation in mutations}) == len(mutations) >= 200
    wrong = []
    for number, mutation in enumerate(mutations):
        roles = ("operator",) if mutation.signer else ROLES
        found = reasons(apply_to_copy(mutation, attested, pristine, tmp_path / str(number)), attested, *roles)
        if not found & mutation.reasons:
            wrong.append(f"{mutation.name}: {found or 'ACCEPTED'} instead of {mutation.reasons}")
    assert wrong == [], f"{len(wrong)} of {len(mutations)}"
    print(f"{len(mutations)} mutations, each rejected for the right reason")


def test_a_copy_that_nobody_changed_is_accepted(attested: Attested, tmp_path: Path) -> None:
    """Also when it is taken apart and put together again, and signed once more by the same operator."""
    pristine = Forgery.of(attested.release)
    assert reasons(pristine.write(tmp_path / "copy"), attested) == set()
    pristine.relink()
    assert reasons(pristine.write(tmp_path / "again"), attested) == set()
    sign_again(tmp_path / "again", key_of(attested, "operator"))
    assert reasons(tmp_path / "again", attested) == set()


def test_links_to_files_elsewhere_are_not_followed(attested: Attested, tmp_path: Path) -> None:
    folder = Forgery.of(attested.release).write(tmp_path / "copy")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(attested.release / "config.json")
    assert reasons(folder, attested) == {"extra file"}
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes((attested.release / "config.json").read_bytes())
    (folder / CHAIN).unlink()
    (folder / CHAIN).symlink_to(attested.release / CHAIN)
    assert reasons(folder, attested) == {"form"}


def test_files_signed_anew_are_not_those_of_the_signed_run(attested: Attested, tmp_path: Path) -> None:
    """Genuine signatures of one operator, each good in itself, on two different things."""
    folder = Forgery.of(attested.release).write(tmp_path / "copy")
    (folder / "README.md").write_text("another card", encoding="utf-8")
    sign_files(folder, "tiny", key_of(attested, "operator"))
    assert reasons(folder, attested) == {"signature"}


def test_several_operators_may_sign_and_each_that_is_asked_for_must(attested: Attested, tmp_path: Path) -> None:
    folder = Forgery.of(attested.release).write(tmp_path / "copy")
    make_key(tmp_path / "second.pem", "ed25519")
    second = load_key(tmp_path / "second.pem")
    from anychip.attest.check.release import check_release

    keys = {"operator": [*attested.public("operator")["operator"], second.public]}
    assert {p.reason for p in check_release(folder, keys)[0].problems} == {"key"}
    add_signature(folder, "operator", second)
    assert check_release(folder, keys)[0].problems == []
    assert reasons(folder, attested, "operator") == set()


def test_a_data_owner_vouches_for_the_data_named_here_only(attested: Attested, tmp_path: Path) -> None:
    """A statement about other data, genuinely signed, is none about this."""
    forgery = Forgery.of(attested.release)
    in_object("inputs", "start", 0, "", "", lambda o: o["data"].update({"corpus more": "f" * 64})).apply(forgery)
    forgery.relink()
    forgery.drop_unused_objects()
    folder = forgery.write(tmp_path / "copy")
    sign_again(folder, key_of(attested, "operator"))
    assert reasons(folder, attested, "operator") == set()
    assert reasons(folder, attested, "operator", "data-owner") == {"data"}


@pytest.mark.parametrize("role", ["data-owner", "chip-vendor"])
def test_who_is_asked_for_must_have_signed(attested: Attested, tmp_path: Path, role: str) -> None:
    forgery = Forgery.of(attested.release)
    del forgery.files[f"{ATTESTATION}/{ {'data-owner': 'data', 'chip-vendor': 'chips'}[role] }.dsse.json"]
    folder = forgery.write(tmp_path / "copy")
    assert reasons(folder, attested, "operator") == set()
    assert reasons(folder, attested, "operator", role) == {"missing file"}
