"""The command line: one short function a verb. What a verb does lives in the room of its name."""

from __future__ import annotations

import sys

import typer

from anychip.cli import attest, chips, data, grow, interchange, launch, plan, stages, supervise, talk, verify
from anychip.cli.groups import DefaultCommandGroup
from anychip.errors import AnychipError

app = typer.Typer(
    name="anychip",
    help="Plan, train, grow, tune, prove and serve large language models on any chip.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(stages.run)
app.command()(stages.train)
app.command()(grow.grow)
app.command()(stages.sft)
app.command()(stages.dpo)
app.command()(stages.grpo)
app.command("eval")(stages.evaluate)
app.command()(stages.report)
app.command()(interchange.init)
app.command()(interchange.export)
app.command("import")(interchange.import_)
app.command()(interchange.merge)
app.command()(talk.chat)
app.command()(talk.generate)
app.command(context_settings={"allow_extra_args": True})(talk.serve)
app.command()(chips.chips)
app.command()(chips.doctor)
app.command()(verify.probe)
app.command()(launch.launch)
app.command()(supervise.supervise)
app.command()(supervise.explain)
app.command()(supervise.chaos)
app.command()(attest.release)

plan_app = typer.Typer(
    help="Which layout, how fast, how much memory, how many days: `anychip plan RECIPE --cluster CLUSTER`.",
    cls=DefaultCommandGroup.of("layouts"),
    no_args_is_help=True,
)
plan_app.command()(plan.layouts)
plan_app.command()(plan.explain)
plan_app.command()(plan.validate)
plan_app.command()(plan.calibrate)
plan_app.command("import")(plan.import_)
app.add_typer(plan_app, name="plan")

data_app = typer.Typer(help="Prepare a corpus, look into it, ask which documents fed a step.", no_args_is_help=True)
data_app.command()(data.prepare)
data_app.command()(data.inspect)
data_app.command()(data.ledger)
app.add_typer(data_app, name="data")

verify_app = typer.Typer(help="Do two runs, on other chips or layouts, compute the same?", no_args_is_help=True)
verify_app.command()(verify.trace)
verify_app.command()(verify.compare)
app.add_typer(verify_app, name="verify")
attest_app = typer.Typer(help="Check and sign where a model comes from.", no_args_is_help=True)
attest_app.command()(attest.check)
attest_app.command()(attest.show)
attest_app.command()(attest.keygen)
attest_app.command()(attest.sign)
app.add_typer(attest_app, name="attest")

bench_app = typer.Typer(help="Measure what is here.", no_args_is_help=True)
bench_app.command("chip")(chips.bench_chip)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command; a user's mistake ends with one paragraph and exit code 2, never with a traceback."""
    from anychip.chips.environment import set_thread_environment

    set_thread_environment()
    try:
        app(standalone_mode=True)
    except AnychipError as error:
        print(f"anychip: {error.paragraph}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except RuntimeError as error:  # `import torch` loads plug-ins, and a broken one breaks it
        if "Failed to load the backend extension" not in str(error):
            raise
        from anychip.errors import EXIT_UNFIT

        print(f"anychip: {error} `anychip doctor` says what is missing.", file=sys.stderr)
        sys.exit(EXIT_UNFIT)
    except OSError as error:  # a full or failing disk, a missing permission
        from anychip.errors import EXIT_DISK, is_of_disk

        place = f"{error.filename}: " if error.filename else ""
        print(f"anychip: {place}{error.strerror or error}. What was finished before is intact.", file=sys.stderr)
        sys.exit(EXIT_DISK if is_of_disk(error) else 1)
