"""Shell scripts, read without being executed: words, variables, integer arithmetic, simple tests of `if` and `case`."""

from anychip.plan.importers.shell.script import Read, read_script

__all__ = ["Read", "read_script"]
