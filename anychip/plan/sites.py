"""Site files: what a chip and its software make of the peaks, as fitted on measured runs.

The files beside this one ship with anychip; a team's own come from `anychip plan calibrate`.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from anychip.errors import InputError
from anychip.files import write_text
from anychip.plan.calibrate import BASES, SiteTree, base_site, chip_family
from anychip.plan.rows import Software
from anychip.plan.types import Site
from anychip.recipe.load import read_yaml

FOLDER = Path(__file__).parent / "sites"
# The software whose site stands for a family of chips when nobody says which one runs.
_USUAL_SOFTWARE: dict[str, Software] = {
    "ascend-910b": "mindformers",
    "a100": "fsdp",
    "h100": "megatron",
    "b200": "megatron",
    "tpu": "jax",
}
_NOT_NEGATIVE = {field.name for field in fields(Site) if field.type == "float"}


def load_site(name_or_path: str) -> Site:
    """A shipped site by name, or a site file by path. Raises InputError naming the field that is wrong."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".json"):
        return read_site(path)
    shipped = {site.name: site for site in shipped_sites().sites.values()} | dict(BASES)
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise InputError(f"{name_or_path!r} is no site.", do=f"Give a .yaml file, or one of {', '.join(sorted(shipped))}.")


def read_site(path: Path) -> Site:
    """Read one site file."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise InputError("is not a list of fields.", where=path, do="Write it with `anychip plan calibrate`.")
    known = {field.name: field for field in fields(Site)}
    if unknown := sorted(set(raw) - set(known)):
        raise InputError(f"has unknown fields {', '.join(map(str, unknown))}.", where=path, do="Remove them.")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        values[name] = _checked(name, value, getattr(Site(name=""), name), path)
    if "name" not in values:
        values["name"] = path.stem
    return Site(**values)


def _checked(name: str, value: Any, example: Any, path: Path) -> Any:
    wanted = bool if isinstance(example, bool) else str if isinstance(example, str) else float
    fits = isinstance(value, bool) if wanted is bool else isinstance(value, (str if wanted is str else (int, float)))
    if not fits or (wanted is float and isinstance(value, bool)):
        raise InputError(f"{name} is {value!r}, which is no {wanted.__name__}.", where=path, do="Correct the value.")
    if wanted is float:
        if value < 0 or value != value:
            raise InputError(f"{name} is {value}; it cannot be negative.", where=path, do="Correct the value.")
        if name.endswith(("efficiency", "overlap")) and value > 1:
            raise InputError(f"{name} is {value}; it is a share of the peak.", where=path, do="Give at most 1.")
        return type(example)(value)
    return value


def write_site(site: Site, path: Path) -> None:
    """Write a site file; scalars in five digits, so that it reads well."""
    values = {field.name: getattr(site, field.name) for field in fields(Site)}
    rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}
    write_text(path, yaml.safe_dump(rounded, sort_keys=False, allow_unicode=True))


@cache
def shipped_sites(folder: Path = FOLDER) -> SiteTree:
    """The sites that ship with anychip, by family of chips and software."""
    sites = [read_site(path) for path in sorted(folder.glob("*.yaml"))]
    families = {site.name: site.name.split("/")[0].removeprefix("all") for site in sites}
    return SiteTree({site.name: replace(site, chip_family=families[site.name]) for site in sites})


def foreign_site(site: Site, chip: str) -> str | None:
    """What to say of a site that was fitted on chips of another family; None where it was not."""
    if not site.chip_family or chip == "local" or chip_family(chip) == site.chip_family:
        return None
    return f"the site {site.name} is of {site.chip_family}, not of {chip}: what it says of efficiencies may not hold"


def default_site(chip: str, software: Software | None = None) -> Site:
    """The most particular shipped site for a chip; that of all chips where none was measured."""
    family = chip_family(chip)
    chosen = software or _USUAL_SOFTWARE.get(family, "megatron")
    tree = shipped_sites().sites
    for key in (f"{family}/{chosen}", f"{family}/modern/all", "all/modern/all"):
        if key in tree:
            return tree[key]
    return replace(base_site(chosen, family))


def trained_here(site: Site) -> Site:
    """The site's speeds with the memory of this software: fp32 gradients, Adam's two moments beside fp32 masters."""
    return replace(site, gradient_bytes=4, optimizer_bytes=12.0, trained_here=True)
