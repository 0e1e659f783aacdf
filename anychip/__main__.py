"""`python -m anychip` and `torchrun -m anychip` are the `anychip` command."""

from anychip.cli import main

main()
