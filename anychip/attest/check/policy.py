"""Which chips may train, and whose software may be there. Training enforces it, and the verifier judges it again.

A policy is `{allow_vendors, deny_vendors, deny_country}`, names in lower case, about a `{vendor, maker, country}`.
"""

from __future__ import annotations

from typing import Any

from anychip.attest.check.findings import Findings, need, need_texts


def objection(policy: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Why the policy forbids what is made by these, or ""."""
    names = {need(made_by, "vendor", str).lower(), *need(made_by, "maker", str).lower().split()}
    allowed, denied = need_texts(policy, "allow_vendors"), names.intersection(need_texts(policy, "deny_vendors"))
    countries, country = need_texts(policy, "deny_country"), made_by.get("country")
    if allowed and not names.intersection(allowed):
        return f"the policy allows only {', '.join(allowed)}"
    if denied:
        return f"the policy denies {', '.join(sorted(denied))}"
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
                what = ", ".join(need_texts(software, "what")[:3])
                findings.problem("software", f"{who} has software of {software['maker']} ({what}): {why}.")
