"""The offline verifier of an attested release. Needs Python and `cryptography`, nothing else of this package: no torch.

Read in this order: `findings.py` (what can be wrong), `signatures.py` (who signed what), `history.py` (the chain, and
which chips may be in it), `release.py` (all together). `python -m anychip.attest.check RELEASE --operator KEY.pub.pem`.
"""
