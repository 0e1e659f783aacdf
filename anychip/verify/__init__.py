"""Is a chip fit to train, and does it compute what another does? `probe` asks the chip, `trace` and `compare` two runs.

probe/      operators, collectives, repetition and a short training, against fp64 on the CPU
sketch.py   a few numbers of a tensor that tell how far two tensors lie apart, whoever holds which part
record.py   what one step of training leaves in a trace
trace.py    the trace as a file
msprobe.py  statistics that msprobe dumped, read as a trace
compare.py  two traces: the first tensor that departs, and in which direction
curves.py   two loss curves: has the one left the other, with a stated rate of false alarms
"""
