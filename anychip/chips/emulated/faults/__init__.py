"""What the emulated chip gets wrong, on demand: faults of the kinds that vendors' chips were seen to have.

catalogue.py    their names, from the variable ANYCHIP_EMULATED_FAULTS
operators.py    wrong versions of the operators that vendors write kernels for
kernels.py      wrong kernels of PyTorch's own operators
collectives.py  wrong collectives
"""
