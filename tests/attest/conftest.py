"""The tiny attested release, made once."""

from __future__ import annotations

import pytest
from attested_run import Attested, make_attested


@pytest.fixture(scope="session")
def attested(tmp_path_factory: pytest.TempPathFactory) -> Attested:
    return make_attested(tmp_path_factory.mktemp("attested"))
