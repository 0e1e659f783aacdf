"""The offline verifier of an attested release. Needs Python and `cryptography`, nothing else of this package: no torch.

Read in this order: `findings.py` (what can be wrong), `envelope.py` (signatures), `files.py` (the folder), `policy.py`
(which chips), `history.py` (the chain), `release.py` (all together), `words.py` (what it means).

    python -m anychip.attest.check RELEASE --operator KEY.pub.pem
"""
