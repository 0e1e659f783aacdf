"""What a run took, from its chain: chips, hours, and an estimate of their energy."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from anychip.attest.check.history import History
from anychip.chips.catalog.load import recognize_chip


@dataclass
class Costs:
    """`device_hours` by chip, of all that was trained, also what was given up later. Time that was lost when a process
    died is not in it: nobody wrote it down."""

    device_hours: Counter[tuple[str, str]] = field(default_factory=Counter)  # (vendor, model)
    most: Counter[tuple[str, str]] = field(default_factory=Counter)  # chips at one time
    arithmetic: list[str] = field(default_factory=list)  # layouts, in the order in which they were used

    @property
    def energy_kwh(self) -> float | None:
        """Hours times the chips' rated power, an upper estimate of the chips alone; None when a rating is not known."""
        total = 0.0
        for (vendor, model), hours in self.device_hours.items():
            chip = recognize_chip(vendor, model)
            if chip is None or chip.tdp_watts is None:
                return None
            total += hours * chip.tdp_watts.value / 1000
        return total

    def lines(self) -> list[str]:
        """As items of a list in the model card."""
        found = [
            f"- {self.most[chip]} x {chip[1]} ({chip[0]}): {hours:.3g} device-hours"
            for chip, hours in self.device_hours.items()
        ]
        energy = self.energy_kwh
        if energy is None:
            found.append("- energy: not estimated, since the chips' rated power is not known")
        else:
            found.append(f"- energy: at most about {energy:.3g} kWh for the chips alone (hours times rated power)")
        return [*found, *(f"- layout: {words}" for words in self.arithmetic)]


def count_costs(history: History) -> Costs:
    costs = Costs()
    chips: Counter[tuple[str, str]] = Counter()
    for link in history.links:
        body: dict[str, Any] = link["body"]
        if link["kind"] == "start":
            ranks = history.lookup(body["members"], "members")["ranks"]
            chips = Counter((rank["vendor"], rank["model"]) for rank in ranks)
            for chip, count in chips.items():
                costs.most[chip] = max(costs.most[chip], count)
            if body["arithmetic"] not in costs.arithmetic:
                costs.arithmetic.append(body["arithmetic"])
        elif link["kind"] == "claim":
            for chip, count in chips.items():
                costs.device_hours[chip] += count * body["seconds"] / 3600
    return costs
