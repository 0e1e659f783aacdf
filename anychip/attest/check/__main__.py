"""`python -m anychip.attest.check RELEASE --operator KEY`: exit code 0 when accepted, 3 when not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anychip.attest.check.envelope import load_public_key
from anychip.attest.check.findings import Findings
from anychip.attest.check.release import FILES, Keys, check_release


def load_keys(paths: dict[str, list[Path]]) -> Keys:
    """Public keys by role. Raises OSError or ValueError."""
    return {role: [load_public_key(path.read_bytes()) for path in them] for role, them in paths.items()}


def describe(findings: Findings) -> str:
    if findings.problems:
        return "\n".join(["REJECTED", *(f"- {problem.reason}: {problem.what}" for problem in findings.problems)])
    shown, rest = ("\n".join(f"- {text}" for text in texts) for texts in (findings.shown, findings.not_shown))
    return f"ACCEPTED\n\nShown:\n{shown}\n\nNot shown:\n{rest}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="check", description="Check an attested release, offline.")
    parser.add_argument("release", type=Path)
    for role in FILES:
        parser.add_argument(f"--{role}", type=Path, action="append", default=[], help="a public key (PEM)")
    given = parser.parse_args()
    try:
        keys = load_keys({role: getattr(given, role.replace("-", "_")) for role in FILES})
    except (OSError, ValueError) as error:
        parser.error(f"a key cannot be read: {error}")
    findings, _ = check_release(given.release, keys)
    print(describe(findings))
    return 3 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main())
