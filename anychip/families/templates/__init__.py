"""The chat templates of TeleChat's generations, A to E: as ids and text (`render`), and as Jinja for other runtimes."""

from anychip.families.templates.jinja import JINJA
from anychip.families.templates.render import Part, prompt_parts, render
from anychip.families.templates.styles import STYLES, TEMPLATES, Style, Template

__all__ = ["JINJA", "STYLES", "TEMPLATES", "Part", "Style", "Template", "prompt_parts", "render"]
