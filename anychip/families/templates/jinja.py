"""The same templates for `tokenizer_config.json`, as other runtimes read them."""

from __future__ import annotations

from pathlib import Path

from anychip.families.templates.styles import TEMPLATES, Template

JINJA: dict[Template, str] = {
    name: Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n") for name in TEMPLATES
}
