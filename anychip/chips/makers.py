"""Who makes a chip or a library, and in which country the maker has its seat.

The country is that of the company's seat (ISO 3166-1 alpha-2), not of the plant: where a die was made, nobody can read
from a chip. All from the companies' own pages, from memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Maker:
    """`country` is None where it is not known."""

    vendor: str
    name: str
    country: str | None

    def as_json(self) -> dict[str, str | None]:
        return {"vendor": self.vendor, "maker": self.name, "country": self.country}


_SEATS = {
    "ascend": ("Huawei Ascend", "CN"),  # Shenzhen
    "biren": ("Biren", "CN"),  # Shanghai
    "cambricon": ("Cambricon", "CN"),  # Beijing
    "enflame": ("Enflame", "CN"),  # Shanghai
    "hygon": ("Hygon", "CN"),  # Tianjin
    "iluvatar": ("Iluvatar CoreX", "CN"),  # Shanghai
    "kunlunxin": ("Kunlunxin", "CN"),  # Beijing
    "metax": ("MetaX", "CN"),  # Shanghai
    "mthreads": ("Moore Threads", "CN"),  # Beijing
    "amd": ("AMD", "US"),  # Santa Clara, California
    "google": ("Google", "US"),  # Mountain View, California
    "intel": ("Intel", "US"),  # Santa Clara, California
    "nvidia": ("NVIDIA", "US"),  # Santa Clara, California
}
# What a processor says of its maker (CPUID leaf 0 on x86; MIDR implementer on Arm).
_PROCESSORS = {
    "GenuineIntel": ("Intel", "US"),
    "AuthenticAMD": ("AMD", "US"),
    "HygonGenuine": ("Hygon", "CN"),
    "CentaurHauls": ("Zhaoxin or Centaur", None),
    "  Shanghai  ": ("Zhaoxin", "CN"),
    "0x48": ("HiSilicon", "CN"),
    "0x70": ("Phytium", "CN"),
    "0x41": ("Arm", "GB"),
    "0x61": ("Apple", "US"),
    "0xc0": ("Ampere", "US"),
}
# Libraries that drive an accelerator, by path: the first that fits counts, since some makers ship another's names.
_LIBRARIES = tuple(
    (vendor, re.compile(pattern))
    for vendor, pattern in (
        ("iluvatar", r"/corex[^/]*/"),
        ("hygon", r"/dtk[^/]*/"),
        ("metax", r"/maca[^/]*/|/libmc(runtime|blas|dnn|cl)\w*\.so"),
        ("kunlunxin", r"/(xre|xpu)[^/]*/lib|/lib(xpurt|bkcl)\w*\.so"),
        ("ascend", r"/lib(ascendcl|ascend_\w+|hccl|opapi|nnopbase|torch_npu)\w*\.so"),
        ("cambricon", r"/lib(cnrt|cndrv|cnnl\w*|cncl|torch_mlu)\.so"),
        ("mthreads", r"/lib(musa|musart|mudnn|mccl|mublas|torch_musa)\w*\.so"),
        ("enflame", r"/lib(topsrt|topsaten|eccl|efrt|torch_gcu)\w*\.so"),
        ("amd", r"/lib(amdhip64|rccl|rocblas|hipblas\w*|MIOpen|hsa-runtime64)\.so"),
        ("intel", r"/lib(ze_intel_gpu|sycl)\.so"),
        ("nvidia", r"/lib(cuda|cudart|cublas|cublasLt|cudnn\w*|nccl|nvrtc\S*|cufft|cusolver|cusparse|nvJitLink)(-\w+)?"
                   r"\.so"),
    )
)  # fmt: skip
_DISTRIBUTIONS = tuple(
    (vendor, re.compile(pattern))
    for vendor, pattern in (
        ("ascend", r"torch[-_]npu=="),
        ("cambricon", r"torch[-_]mlu=="),
        ("mthreads", r"torch[-_]musa=="),
        ("enflame", r"torch[-_]gcu=="),
        ("amd", r"(pytorch[-_]triton[-_]rocm|torch)==\S*rocm"),
        ("nvidia", r"(nvidia[-_](cublas|cuda|cudnn|cufft|cusolver|cusparse|nccl|nvjitlink)\S*==|torch==\S*\+cu\d)"),
    )
)


def maker_of(vendor: str, name: str = "") -> Maker:
    """The maker of a vendor's chips; `name` is what a back end says where this table knows none."""
    known = _SEATS.get(vendor)
    return Maker(vendor, *known) if known else Maker(vendor, name or vendor, None)


def maker_of_processor(identifier: str) -> Maker:
    """The maker of a CPU, by what the CPU says of it."""
    name, country = _PROCESSORS.get(identifier, (identifier.strip() or "unknown", None))
    return Maker("cpu", name, country)


def drivers_among(libraries: Iterable[str], distributions: Iterable[str]) -> dict[str, list[str]]:
    """Vendors whose accelerators are driven by one of these shared libraries (paths) or Python distributions
    (`name==version`), with what gives them away."""
    found: dict[str, list[str]] = {}
    for things, marks in ((libraries, _LIBRARIES), (distributions, _DISTRIBUTIONS)):
        for thing in things:
            vendor = next((vendor for vendor, mark in marks if mark.search(thing)), None)
            if vendor is not None:
                found.setdefault(vendor, []).append(thing.rsplit("/", 1)[-1])
    return {vendor: sorted(set(things)) for vendor, things in sorted(found.items())}
