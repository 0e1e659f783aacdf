"""Starting what was written, where the scheduler's client is installed."""

from __future__ import annotations

import shlex
import shutil
import subprocess

from anychip.errors import AnychipError, InputError
from anychip.launch.torchrun import is_local
from anychip.launch.write import Written


def submit(written: Written) -> None:
    """Hand the job to its scheduler; without one, run its nodes here and wait for them.

    Raises InputError where that cannot be done from here, AnychipError with the client's words where it refuses.
    """
    launch, command = written.job.launch, shlex.join(written.command)
    if launch.kind == "torchrun":
        remote = [host for host in launch.hosts if not is_local(host)]
        if remote:
            raise InputError(
                f"--submit starts hosts of this machine only, and {remote[0]} is another one.",
                where="launch.hosts",
                do=f"Run `{command}` where ssh reaches every host, in a terminal that stays open.",
            )
        code = subprocess.run(written.command, check=False).returncode
        if code:
            raise AnychipError(f"the job ended with exit code {code}.", do="The first error above is its cause.")
        return
    client = written.command[0]
    if shutil.which(client) is None:
        raise InputError(
            f"{client} is not installed on this machine.",
            where="--submit",
            do=f"Copy {written.folder} to a machine that has it, and run `{command}` there.",
        )
    done = subprocess.run(written.command, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise AnychipError(f"{client} refused: {said[:600]}", do=f"The files stay in {written.folder}.")
