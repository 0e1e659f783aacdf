"""The HTML templates beside this file; every value put into one is escaped."""

from __future__ import annotations

from typing import Any


def render_template(template: str, /, **values: Any) -> str:
    """A page as text. Raises when a template asks for a value that it is not given."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from anychip import __version__

    environment = Environment(
        loader=PackageLoader("anychip.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=__version__, **values)
