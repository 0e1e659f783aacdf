"""`anychip probe`: the chip at hand against fp64 on the CPU, operator by operator, and a verdict.

shapes.py      the recipe's sizes, cut down to what takes minutes
cases.py       what is computed: each operator with ordinary inputs
awkward.py     and with inputs that break careless kernels
judge.py       how far a result may be off, and what is wrong with one that is farther
measure.py     one case on the chip and in fp64
worker.py      one of several processes: collectives, and the same bits in each
canary.py      a short training inside bands recorded on the CPU
verdict.py     fit, fit with fall-backs, or unfit and why
run.py         all of it, resumable
"""
