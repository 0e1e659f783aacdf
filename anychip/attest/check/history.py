"""The chain: one line a link, each naming the SHA-256 of the line before it, and what the links tell together.

A *state* is the weights and optimizer at one step, known by the link that claimed it (or began the stage). Every claim
must go on from the state that training was at, over steps and batches without a gap; going back is a link of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anychip.attest.check.findings import Findings, Refused, need, parse, sha256
from anychip.attest.check.policy import judge

GENESIS = "0" * 64


@dataclass
class History:
    """What a chain tells. `states` are (stage, step) by link; `manifests` the state of each stored checkpoint."""

    objects: Mapping[str, bytes]
    findings: Findings
    links: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    states: dict[str, tuple[str, int]] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    starts: list[tuple[Any, Any, Any]] = field(default_factory=list)  # body, inputs, members
    export: dict[str, Any] | None = None
    _at: dict[str, str] = field(default_factory=dict)  # stage -> the state it is in
    _data: dict[str, Any] = field(default_factory=dict)  # stage -> what it was pinned to read
    _stored: dict[str, str] = field(default_factory=dict)  # state -> manifest
    _members: str = ""

    @property
    def head(self) -> str:
        return self.digests[-1] if self.digests else GENESIS

    def lookup(self, digest: str, what: str) -> Any:
        """A pinned object, by its digest."""
        self.used.add(digest)
        data = self.objects.get(digest)
        if data is None or sha256(data) != digest:
            raise Refused("inputs", f"{what} {digest[:12]} is not there, or is not what the chain names.")
        return parse(data, what)

    def lineage(self, state: str) -> list[str]:
        """A state and those it came from, newest first."""
        found = [state]
        while parent := self.parents.get(found[-1]):
            found.append(parent)
        return found


def read_history(text: bytes, objects: Mapping[str, bytes]) -> History:
    """Walk through a chain; problems are in `findings`. Each is judged where it stands, so that one hides no other."""
    history = History(objects, Findings())
    lines = text.split(b"\n")
    if lines.pop() != b"":
        history.findings.problem("truncated", "the last line of the chain is not whole.")
    places = {sha256(line): place for place, line in reversed(list(enumerate(lines)))}
    for place, line in enumerate(lines):
        try:
            link = parse(line, f"link {place}")
            _check_place(history, link, place, places, sha256(line))
            history.links.append(link)
            history.digests.append(sha256(line))
            reader = _READERS.get(need(link, "kind", str))
            if reader is None:
                raise Refused("form", f"link {place} is of an unknown kind.")
            reader(history, need(link, "body", dict), history.digests[-1])
        except Refused as refused:
            history.findings.problem(refused.problem.reason, f"link {place}: {refused.problem.what}")
    return history


def _check_place(history: History, link: Any, place: int, places: dict[str, int], digest: str) -> None:
    number, parent = need(link, "n", int), need(link, "parent", str)
    need(link, "time", str)
    if set(link) != {"n", "parent", "time", "kind", "body"}:
        raise Refused("form", "it has other fields than a link has.")
    if places[digest] != place:
        raise Refused("replayed link", f"it is link {places[digest]} once more.")
    if parent == history.head and number == place:
        return
    if parent in places:
        history.findings.problem("order", f"link {place} follows link {places[parent]}, not the one before it.")
    else:
        history.findings.problem("missing link", f"link {place} follows one that is not there (number {number}).")


def _start(history: History, body: dict[str, Any], me: str) -> None:
    stage, step, resumed = need(body, "stage", str), need(body, "step", int), need(body, "resumed", str, optional=True)
    history._members = need(body, "members", str)
    members, inputs = history.lookup(history._members, "members"), history.lookup(need(body, "inputs", str), "inputs")
    history.starts.append((body, inputs, members))
    ranks = [need(member, "rank", int) for member in need(members, "ranks", list)]
    if need(body, "processes", int) != len(ranks) or ranks != list(range(len(ranks))) or not ranks:
        history.findings.problem("chip", "the chips of some ranks are not recorded.")
    judge(need(inputs, "policy", dict), members["ranks"], history.findings)
    data = need(inputs, "data", dict)
    if history._data.setdefault(stage, data) != data:
        history.findings.problem("data", f"{stage} goes on with other data than it began with, at step {step}.")
    if resumed is not None:
        if history.states.get(resumed) != (stage, step):
            raise Refused("fork", f"{stage} goes on at step {step} from a state that this chain does not have.")
        history._at[stage] = resumed
        return
    if step != 0:
        raise Refused("steps", f"{stage} begins at step {step}.")
    history._at[stage] = me
    history.states[me] = (stage, 0)
    weights = need(body, "weights", str, optional=True)
    if weights is not None and weights not in history.manifests:
        raise Refused("fork", f"{stage} begins with weights that this chain does not have.")
    if weights is not None:
        history.parents[me] = history.manifests[weights]


def _claim(history: History, body: dict[str, Any], me: str) -> None:
    stage, first, last = need(body, "stage", str), need(body, "from_step", int), need(body, "step", int)
    parent, at = need(body, "parent", str), history._at.get(stage)
    history.states[me], history.parents[me], history._at[stage] = (stage, last), parent, me
    if parent != at:
        raise Refused("fork", f"step {last} of {stage} goes on from another state than the one that was reached.")
    trace = history.lookup(need(body, "trace", str), "trace")
    rows = [need(trace, name, list) for name in ("batches", "losses", "grad_norms")]
    if history.states[parent][1] != first or first >= last or any(len(row) != last - first for row in rows):
        raise Refused("steps", f"steps of {stage} are missing between {history.states[parent][1]} and {last}.")
    if need(body, "members", str) != history._members:
        raise Refused("chip", f"step {last} was made by others than those who started.")
    skipped = need(body, "skipped", list)
    if rows[0] != [_position(step, skipped) for step in range(first, last)]:
        raise Refused("steps", f"{stage} left out batches between steps {first} and {last}, and does not say so.")
    if len(need(body, "ledger", str)) != 64 or type(body.get("seconds")) not in (int, float):
        raise Refused("form", "a claim lacks its ledger or its time.")


def _position(step: int, skipped: list[Any]) -> int:
    """The batch that a step reads when these ranges of batches are left out."""
    for pair in skipped:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(edge) is int for edge in pair)):
            raise Refused("form", "a claim's skipped batches are not ranges.")
        if step < pair[0]:
            break
        step += pair[1] - pair[0]
    return step


def _saved(history: History, body: dict[str, Any], me: str) -> None:
    state, manifest = need(body, "claim", str), need(body, "manifest", str)
    if state not in history.states:
        raise Refused("missing link", "a checkpoint was stored whose state nobody claimed.")
    if history._stored.setdefault(state, manifest) != manifest:
        raise Refused("fork", "two different checkpoints are said to be of one state.")
    if history.manifests.setdefault(manifest, state) != state:
        raise Refused("fork", "one checkpoint is said to be of two states.")


def _rollback(history: History, body: dict[str, Any], me: str) -> None:
    stage, to = need(body, "stage", str), need(body, "to", str)
    if history.states.get(to, ("",))[0] != stage:
        raise Refused("fork", f"{stage} goes back to a state that this chain does not have.")
    history._at[stage] = to


def _derived(history: History, body: dict[str, Any], me: str) -> None:
    """A checkpoint that nobody trained: merged or grown from another one, or brought from elsewhere."""
    stage, step, parent, how = (
        need(body, "stage", str),
        need(body, "step", int),
        body.get("parent"),
        need(body, "how", str),
    )
    if parent is None:
        if stage in history._at:
            raise Refused("fork", f"weights of another origin take the place of {stage}.")
        history._at[stage] = me
    elif parent not in history.states:
        raise Refused("fork", f"{how} begins with a state that this chain does not have.")
    else:
        history.parents[me] = parent
    history.states[me] = (stage, step)
    history.manifests[need(body, "manifest", str)] = me


def _export(history: History, body: dict[str, Any], me: str) -> None:
    manifest = need(body, "manifest", str)
    state = history.manifests.get(manifest)
    if state is None or history.states[state] != (need(body, "stage", str), need(body, "step", int)):
        raise Refused("weights", "the exported weights are not those of a checkpoint of this chain.")
    need(body, "files", dict)
    history.export = {**body, "state": state}


def _gap(history: History, body: dict[str, Any], me: str) -> None:
    raise Refused("missing link", f"the chain says itself that something is missing: {need(body, 'why', str)}")


def _note(history: History, body: dict[str, Any], me: str) -> None:
    """Stages that ended, what the guard did, repairs: told, and nothing hangs on them."""


_READERS: dict[str, Callable[[History, dict[str, Any], str], None]] = {
    "start": _start, "claim": _claim, "saved": _saved, "rollback": _rollback, "derived": _derived, "export": _export,
    "gap": _gap, "guard": _note, "stage": _note, "repair": _note,
}  # fmt: skip
