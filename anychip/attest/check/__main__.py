"""`python -m anychip.attest.check RELEASE --operator KEY`: exit code 0 when accepted, 3 when not."""

import argparse
from pathlib import Path

from anychip.attest.check.findings import Findings
from anychip.attest.check.release import ROLES, check_release
from anychip.attest.check.signatures import load_public_key


def describe(findings: Findings) -> str:
    if findings.problems:
        return "\n".join(["REJECTED", *(f"- {problem.reason}: {problem.what}" for problem in findings.problems)])
    shown, not_shown = ([f"- {text}" for text in texts] for texts in (findings.shown, findings.not_shown))
    return "\n".join(["ACCEPTED", "", "Shown:", *shown, "", "Not shown:", *not_shown])


def main() -> int:
    parser = argparse.ArgumentParser(prog="check", description="Check an attested release, offline.")
    parser.add_argument("release", type=Path)
    for role in ROLES:
        parser.add_argument(f"--{role}", dest=role, type=load_public_key, action="append", help="a public key (PEM)")
    given = vars(parser.parse_args())
    findings, _ = check_release(given.pop("release"), {role: keys for role, keys in given.items() if keys})
    print(describe(findings))
    return 3 if findings.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
