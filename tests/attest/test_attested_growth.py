"""A model that grows while it is trained: its states form one line from the first step to the release."""

from __future__ import annotations

from pathlib import Path

from attested_run import finish, train
from tiny_run import write_tiny_recipe

from anychip.attest.chain import Chain
from anychip.attest.place import Place

GROWS = "grow=[{at_tokens: 768, mode: immediate, layers: even, to: {num_hidden_layers: 3}}]"


def test_growth_is_a_link_and_no_gap(tmp_path: Path) -> None:
    recipe, runs = write_tiny_recipe(tmp_path), tmp_path / "runs"
    train(recipe, runs, GROWS, die_at=9)  # after growth, before its first checkpoint
    run = train(recipe, runs, GROWS)
    finish(recipe, runs, GROWS)
    with Chain(Place(run).chain) as chain:
        links = list(chain.links)
    kinds = [link.kind for link in links]
    assert "gap" not in kinds
    (grown,) = [link for link in links if link.kind == "derived" and link.body["how"] == "grown"]
    parent = next(link for link in links if link.digest == grown.body["parent"])
    assert parent.kind == "claim" and parent.body["step"] == grown.body["step"] == 6
    later = [link for link in links if link.kind == "claim" and link.body["from_step"] == 6]
    assert later and all(link.body["parent"] == grown.digest for link in later)
