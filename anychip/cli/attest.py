"""Where a model comes from: keys, signatures, the check, the release."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RunArgument, one_of

ReleaseArgument = Annotated[Path, typer.Argument(metavar="RELEASE", help="A folder that `anychip release` made.")]
KeysOption = Annotated[list[Path] | None, typer.Option(help="A public key (PEM) whose signature must be there.")]


def keygen(
    path: Annotated[Path, typer.Argument(metavar="KEY.pem", help="Where to write it; KEY.pub.pem comes beside it.")],
    kind: Annotated[str, typer.Option(help="ecdsa (P-256), which signs weights too, or ed25519.")] = "ecdsa",
) -> None:
    """Make a key to sign with. $ANYCHIP_KEY_PASSPHRASE, if set, encrypts it."""
    from anychip.attest.keys import load_key, make_key

    public = make_key(path, one_of(kind, "kind", ("ecdsa", "ed25519")))
    typer.echo(f"wrote {path} (keep it) and {public} (publish it); key {load_key(path).public.id}")


def sign(
    folder: ReleaseArgument,
    key: Annotated[Path, typer.Option(help="Your private key.")],
    role: Annotated[str, typer.Option("--as", help="operator, data-owner or chip-vendor.")] = "operator",
) -> None:
    """Add a signature to a release: as a further operator, as the owner of its data, or as the vendor of its chips."""
    from anychip.attest.keys import load_key
    from anychip.attest.sign import ROLES, add_signature

    typer.echo(f"wrote {add_signature(folder, one_of(role, 'as', ROLES), load_key(key))}")


def check(
    folder: ReleaseArgument,
    operator: KeysOption = None,
    data_owner: KeysOption = None,
    chip_vendor: KeysOption = None,
    replay: Annotated[int, typer.Option(min=0, help="Compute so many random steps again.")] = 0,
    run: Annotated[Path | None, typer.Option(help="Replay: the run directory, with checkpoints and data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Replay: the same seed chooses the same steps.")] = None,
) -> None:
    """Check a release offline, and say what it shows and what it does not. Exit code 3 when it is rejected.

    torchrun starts it in several processes for a replay in the layout that the run had.
    """
    from anychip.attest.check.__main__ import describe
    from anychip.attest.check.release import check_release
    from anychip.attest.check.signatures import load_public_key
    from anychip.errors import EXIT_UNFIT, InputError

    try:
        named = {"operator": operator, "data-owner": data_owner, "chip-vendor": chip_vendor}
        keys = {role: [load_public_key(path) for path in paths] for role, paths in named.items() if paths}
    except ValueError as error:
        raise InputError(f"A public key cannot be read: {error}.", do="Give files that keygen wrote.") from None
    if replay and run is None:
        raise InputError("--replay needs --run.", do="Give the run directory that holds checkpoints and data.")
    findings, history = check_release(folder, keys)
    if replay and run is not None and history is not None and not findings.problems:
        from anychip.attest.replay import replay_steps
        from anychip.rundir import RunDirectory

        replay_steps(RunDirectory(run), history, replay, seed, findings)
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(describe(findings))
    if findings.problems:
        raise typer.Exit(EXIT_UNFIT)


def show(run_directory: RunArgument) -> None:
    """Say what a run or a release has pinned and linked, whoever signed it."""
    from anychip.attest.show import show as tell

    typer.echo(tell(run_directory))


def release(
    run_directory: RunArgument,
    key: Annotated[Path | None, typer.Option(help="The operator's private key.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; default RUN/release.")] = None,
    license_file: Annotated[Path | None, typer.Option("--license", help="The text of the licence.")] = None,
    verification: Annotated[
        list[Path] | None, typer.Option(help="Reports of probes and comparisons to include (RUN/verify/*.json are).")
    ] = None,
) -> None:
    """Gather export, model card, licence, bill of materials and attestation in one signed folder."""
    from anychip.attest.release import make_release
    from anychip.rundir import RunDirectory

    typer.echo(f"wrote {make_release(RunDirectory(run_directory), out, key, license_file, verification or ())}")
