"""An accelerator that is not there: a PyTorch device of its own, in host memory, computing the CPU's numbers.

What trains on it trains without naming a vendor, and every habit of a vendor's chip that can be imitated can be turned
on (quirks.py). It says nothing about how a real chip computes.

    quirks.py       what the chip lacks, from the variable ANYCHIP_EMULATED
    csrc/           the device in C++: memory, streams and events, generators, operators, collectives
    build.py        compiles it once per machine
    device.py       makes it known to PyTorch as "emulated" and its collectives as "emulated_ccl"
    namespace.py    `torch.emulated`
    autocast.py     what `torch.autocast("emulated")` casts
    faults/         what it computes wrong, from the variable ANYCHIP_EMULATED_FAULTS
    watch.py        finds tensors that stayed on the CPU
    backend.py      the chip as training sees it
"""
