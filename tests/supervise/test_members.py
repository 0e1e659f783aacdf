"""Who takes part, who waits, who is left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from anychip.supervise.members import Members


def members(least: int = 1, most: int = 3, hosts: int = 4, slots: int = 2) -> Members:
    found = Members(least, most, lambda count: count != 5)
    for number in range(hosts):
        found.came(f"host{number}", f"10.0.0.{number}", slots)
    return found


def names(members: Members) -> list[str]:
    return [share.name for share in members.choose()]


def test_the_first_ones_take_part_and_the_others_wait() -> None:
    shares = members().choose()
    assert [(share.name, share.first_rank, share.slots) for share in shares] == [
        ("host0", 0, 2),
        ("host1", 2, 2),
        ("host2", 4, 2),
    ]


def test_a_spare_takes_the_place_of_one_that_went_and_gives_it_back() -> None:
    found = members()
    found.went("host1")
    assert names(found) == ["host0", "host2", "host3"]
    found.came("host1", "10.0.0.9", 2)
    assert names(found) == ["host0", "host1", "host2"]
    assert found.choose()[1].address == "10.0.0.9"


def test_one_left_out_is_replaced_while_there_is_a_spare_then_done_without_then_kept() -> None:
    found = members(least=2)
    assert found.leave_out("host0", "crash", names(found)) == "replace"
    assert names(found) == ["host1", "host2", "host3"]
    assert found.leave_out("host1", "crash", names(found)) == "shrink"
    assert found.leave_out("host2", "crash", names(found)) is None
    assert found.quarantined == {"host0": "crash", "host1": "crash"}
    found.came("host0", "10.0.0.0", 2)
    assert names(found) == ["host2", "host3"]


def test_numbers_that_the_layout_does_not_work_with_are_passed_over() -> None:
    found = Members(1, 9, lambda count: count in (2, 4))
    for number in range(3):
        found.came(f"host{number}", "", 1)
    assert len(found.choose()) == 2


def test_growth_is_more_processes_than_now() -> None:
    found = members(hosts=2)
    now = found.choose()
    assert not found.would_grow(now)
    found.came("host9", "", 2)
    assert found.would_grow(now)
    assert not found.would_grow(found.choose())


class History(RuleBasedStateMachine):
    """Whatever comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.members = Members(2, 4, lambda count: count % 3 != 1)
        self.away: set[str] = set()

    @rule(name=st.sampled_from("abcdefg"), slots=st.integers(1, 4))
    def come(self, name: str, slots: int) -> None:
        self.members.came(name, "", slots)
        self.away.discard(name)

    @rule(name=st.sampled_from("abcdefg"))
    def go(self, name: str) -> None:
        self.members.went(name)
        self.away.add(name)

    @rule(at=st.integers(0, 3))
    def leave_out(self, at: int) -> None:
        if shares := self.members.choose():
            share = shares[at % len(shares)]
            could = self.members.choose(without=share.name)
            action = self.members.leave_out(share.name, "why", [share.name for share in shares])
            assert (action is not None) == bool(could)
            assert (share.name in self.members.quarantined) == (action is not None)

    @invariant()
    def a_choice_is_one_that_works(self) -> None:
        shares = self.members.choose()
        if not shares:
            return
        assert 2 <= len(shares) <= 4
        total = sum(share.slots for share in shares)
        assert total % 3 != 1
        assert [rank for share in shares for rank in share.ranks] == list(range(total))
        chosen = {share.name for share in shares}
        assert len(chosen) == len(shares)
        assert not chosen & (self.away | self.members.quarantined.keys())


TestHistory = History.TestCase


@given(st.integers(0, 6))
def test_fewer_than_the_least_never_start(hosts: int) -> None:
    assert bool(members(least=3, hosts=hosts).choose()) == (hosts >= 3)
