"""What spawned ranks need, imported once in the server they are forked from."""

import anychip.train.dry_run
import anychip.train.loop
import anychip.train.optimizer  # noqa: F401
