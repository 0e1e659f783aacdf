"""The chain: one line a link, each naming the SHA-256 of the line before it, and what the links tell together.

A *state* is the weights and optimizer at one step, known by the link that claimed it (or began the stage). Every claim
must go on from the state that training was at, over steps and batches without a gap; going back is a link of its own.
A *policy* is `{allow_vendors, deny_vendors, deny_country}`, names in lower case, about a `{vendor, maker, country}`:
which chips may train, and whose software may be there. Training enforces it, and the verifier judges it again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anychip.attest.check.findings import Findings, Problem, Reason, need, parse, sha256, take, take_all

GENESIS = "0" * 64
POLICY = ("allow_vendors", "deny_vendors", "deny_country")


@dataclass
class History:
    """What a chain tells. `states` are (stage, step) by link; `manifests` the state of each stored checkpoint."""

    objects: Mapping[str, bytes]
    findings: Findings = field(default_factory=Findings)
    links: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    head: str = GENESIS  # the last of them
    states: dict[str, tuple[str, int]] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)  # state -> the one it came from, or ""
    used: set[str] = field(default_factory=set)
    starts: list[tuple[Any, Any, Any]] = field(default_factory=list)  # body, inputs, members
    export: dict[str, Any] | None = None
    _at: dict[str, str] = field(default_factory=dict)  # stage -> the state it is in
    _data: dict[str, Any] = field(default_factory=dict)  # stage -> what it was pinned to read
    _stored: dict[str, str] = field(default_factory=dict)  # state -> manifest
    _members: str = ""

    def lookup(self, digest: str, what: str) -> Any:
        """A pinned object, by its digest."""
        self.used.add(digest)
        data = self.objects.get(digest)
        if data is None or sha256(data) != digest:
            raise Problem("inputs", f"{what} {digest[:12]} is not there, or is not what the chain names.")
        return parse(data, what)

    def lineage(self, state: str) -> list[str]:
        """A state and those it came from, newest first."""
        found = [state]
        while parent := self.parents.get(found[-1]):
            found.append(parent)
        return found

    def add(self, link: dict[str, Any], kind: str, body: dict[str, Any], me: str) -> None:
        """Take in a link whose digest is `me`."""
        self.links.append(link)
        self.digests.append(me)
        self.head = me
        readers = {"start": self._start, "claim": self._claim, "saved": self._saved, "rollback": self._rollback,
                   "derived": self._derived, "export": self._export}  # fmt: skip
        if kind in readers:
            readers[kind](body, me)
        elif kind == "gap":
            raise Problem("missing link", f"the chain says itself that something is missing: {need(body, 'why', str)}")
        elif kind not in ("guard", "stage", "repair"):  # those are told, and nothing hangs on them
            raise Problem("form", "it is of an unknown kind.")

    def _start(self, body: dict[str, Any], me: str) -> None:
        stage, step, resumed, weights = take(body, stage=str, step=int, resumed=str | None, weights=str | None)
        pinned, self._members, processes = take(body, inputs=str, members=str, processes=int)
        members, inputs = self.lookup(self._members, "members"), self.lookup(pinned, "inputs")
        self.starts.append((body, inputs, members))
        ranks = [need(member, "rank", int) for member in need(members, "ranks", list)]
        if processes != len(ranks) or ranks != list(range(len(ranks))) or not ranks:
            self.findings.problem("chip", "the chips of some ranks are not recorded.")
        judge(need(inputs, "policy", dict), members["ranks"], self.findings)
        if self._data.setdefault(stage, need(inputs, "data", dict)) != inputs["data"]:
            self.findings.problem("data", f"{stage} goes on with other data than it began with, at step {step}.")
        if resumed is not None:
            if self.states.get(resumed) != (stage, step):
                raise Problem("fork", f"{stage} goes on at step {step} from a state that this chain does not have.")
            self._at[stage] = resumed
            return
        if step != 0:
            raise Problem("steps", f"{stage} begins at step {step}.")
        self._at[stage], self.states[me] = me, (stage, 0)
        if weights is not None and weights not in self.manifests:
            raise Problem("fork", f"{stage} begins with weights that this chain does not have.")
        self.parents[me] = self.manifests.get(weights, "")

    def _claim(self, body: dict[str, Any], me: str) -> None:
        stage, first, last, parent = take(body, stage=str, from_step=int, step=int, parent=str)
        pinned, members, skipped = take(body, trace=str, members=str, skipped=list)
        ledger, _ = take(body, ledger=str, seconds=int | float)
        at = self._at.get(stage)
        self.states[me], self.parents[me], self._at[stage] = (stage, last), parent, me
        if parent != at:
            raise Problem("fork", f"step {last} of {stage} goes on from another state than the one that was reached.")
        rows = take(self.lookup(pinned, "trace"), batches=list, losses=list, grad_norms=list)
        if self.states[parent][1] != first or first >= last or any(len(row) != last - first for row in rows):
            raise Problem("steps", f"steps of {stage} are missing between {self.states[parent][1]} and {last}.")
        if members != self._members:
            raise Problem("chip", f"step {last} was made by others than those who started.")
        if rows[0] != [_position(step, skipped) for step in range(first, last)]:
            raise Problem("steps", f"{stage} left out batches between steps {first} and {last}, and does not say so.")
        if len(ledger) != 64:
            raise Problem("form", "a claim lacks its ledger.")

    def _saved(self, body: dict[str, Any], me: str) -> None:
        state, manifest = take(body, claim=str, manifest=str)
        if state not in self.states:
            raise Problem("missing link", "a checkpoint was stored whose state nobody claimed.")
        if self._stored.setdefault(state, manifest) != manifest:
            raise Problem("fork", "two different checkpoints are said to be of one state.")
        if self.manifests.setdefault(manifest, state) != state:
            raise Problem("fork", "one checkpoint is said to be of two states.")

    def _rollback(self, body: dict[str, Any], me: str) -> None:
        stage, to = take(body, stage=str, to=str)
        if self.states.get(to, ("",))[0] != stage:
            raise Problem("fork", f"{stage} goes back to a state that this chain does not have.")
        self._at[stage] = to

    def _derived(self, body: dict[str, Any], me: str) -> None:
        """A checkpoint that nobody trained: merged or grown from another one, or brought from elsewhere."""
        stage, step, parent = take(body, stage=str, step=int, parent=str | None)
        manifest, how = take(body, manifest=str, how=str)
        if parent is None:
            if stage in self._at:
                raise Problem("fork", f"weights of another origin take the place of {stage}.")
            self._at[stage] = me
        elif parent not in self.states:
            raise Problem("fork", f"{how} begins with a state that this chain does not have.")
        else:
            self.parents[me] = parent
        self.states[me], self.manifests[manifest] = (stage, step), me

    def _export(self, body: dict[str, Any], me: str) -> None:
        stage, step, manifest, _ = take(body, stage=str, step=int, manifest=str, files=dict)
        state = self.manifests.get(manifest)
        if state is None or self.states[state] != (stage, step):
            raise Problem("weights", "the exported weights are not those of a checkpoint of this chain.")
        self.export = {**body, "state": state}


def read_history(text: bytes, objects: Mapping[str, bytes]) -> History:
    """Walk through a chain; problems are in `findings`. Each is judged where it stands, so that one hides no other."""
    history = History(objects)
    lines = text.split(b"\n")
    if lines.pop() != b"":
        history.findings.problem("truncated", "the last line of the chain is not whole.")
    places = {sha256(line): place for place, line in reversed(list(enumerate(lines)))}
    for place, line in enumerate(lines):
        with history.findings.noting(f"link {place}: "):
            link, me = parse(line, "it"), sha256(line)
            number, parent, _, kind, body = take_all(link, n=int, parent=str, time=str, kind=str, body=dict)
            if places[me] != place:
                raise Problem("replayed link", f"it is link {places[me]} once more.")
            if (parent, number) != (history.head, place):
                reason: Reason = "order" if parent in places else "missing link"
                history.findings.problem(reason, f"link {place} follows {places.get(parent, 'one that is gone')}.")
            history.add(link, kind, body, me)
    return history


def _position(step: int, skipped: list[Any]) -> int:
    """The batch that a step reads when these ranges of batches are left out."""
    for pair in skipped:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(edge) is int for edge in pair)):
            raise Problem("form", "a claim's skipped batches are not ranges.")
        if step < pair[0]:
            break
        step += pair[1] - pair[0]
    return step


def objection(policy: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Why the policy forbids what is made by these, or ""."""
    names = {need(made_by, "vendor", str).lower(), *need(made_by, "maker", str).lower().split()}
    allowed, denied, countries = ([str(name) for name in need(policy, field, list)] for field in POLICY)
    country = made_by.get("country")
    if allowed and not names.intersection(allowed):
        return f"the policy allows only {', '.join(allowed)}"
    if names.intersection(denied):
        return f"the policy denies {', '.join(sorted(names.intersection(denied)))}"
    if countries and (country is None or str(country).lower() in countries):
        return f"the policy denies {', '.join(countries)}, and it comes from {country or 'a country that is not known'}"
    return ""


def judge(policy: dict[str, Any], members: list[Any], findings: Findings) -> None:
    """Say which chips and which software of the ranks the policy forbids."""
    for member in members:
        who = f"rank {need(member, 'rank', int)} on {need(member, 'host', str)}"
        if why := objection(policy, member):
            findings.problem("chip", f"{who} computes on {need(member, 'model', str)} by {member['maker']}: {why}.")
        for software in need(member, "software", list):
            if why := objection(policy, software):
                what = ", ".join(str(item) for item in need(software, "what", list)[:3])
                findings.problem("software", f"{who} has software of {software['maker']} ({what}): {why}.")
