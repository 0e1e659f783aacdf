"""Statistics that msprobe (MindStudio, Ascend) dumped, read as a trace.

Read is what its documentation says of `dump.json` at level L0 or mix, for PyTorch: of each module's call
`Module.NAME.CLASS.forward.N` the outputs and of `backward.N` the inputs, which are the gradients of those outputs; of
`Module.NAME.CLASS.parameters_grad` the parameters' gradients; of each the shape, dtype, Max, Min, Mean and Norm. Calls
of one module in one step are added up. Not read: tensors (dump_tensor_data holds pickles), checksums, functions (level
L1, `Functional.*`, `Tensor.*`), call stacks, MindSpore's dumps, and several ranks at once.

    DIR/step0/rank0/dump.json        give DIR, DIR/step0 or DIR/step0/rank0
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anychip.errors import InputError
from anychip.verify.names import Kind
from anychip.verify.trace import Sketch, Trace, TracedStep

_CALL = re.compile(r"Module\.(?:\d+\.)?(?P<name>.+)\.(?P<kind>[A-Za-z_]\w*)\.(?P<way>forward|backward)\.\d+")
_GRADIENTS = re.compile(r"Module\.(?:\d+\.)?(?P<name>.+)\.(?P<kind>[A-Za-z_]\w*)\.parameters_grad")
_PREFIXES = re.compile(r"^(?:module\.)*(?:model\.|transformer\.)?")
_MOST_BYTES, _MOST_STEPS = 1 << 30, 100_000
Entries = dict[tuple[Kind, str], Sketch]


def is_msprobe_dump(path: Path) -> bool:
    return path.name == "dump.json" or (path.is_dir() and next(_dumps(path), None) is not None)


def read_msprobe(path: Path) -> Trace:
    """Read a dump of one rank. Raises InputError for what is none, or is of several ranks."""
    dumps = [(0, path)] if path.is_file() else list(_dumps(path))
    if not dumps:
        raise InputError("holds no dump.json of msprobe.", where=path, do="Give its dump folder, or a step of it.")
    steps = [step for step, _ in dumps]
    if len(set(steps)) != len(steps):
        raise InputError(
            "holds the dumps of several ranks.", where=path, do="Give the folder of one rank, such as step0/rank0."
        )
    trace = Trace(str(path), {"chip": "msprobe"})
    for step, file in sorted(dumps):
        raw = _json(file)
        try:
            entries, dtype = _entries(raw)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError) as error:
            raise InputError(
                f"is not a dump of msprobe as documented ({type(error).__name__}: {str(error)[:120]}).",
                where=file,
                do="Dump with task statistics or tensor, level L0 or mix, framework PyTorch.",
            ) from None
        if not entries:
            raise InputError(
                "holds no module's statistics.", where=file, do="Dump at level L0 or mix; L1 names functions only."
            )
        trace.header.setdefault("dtype", dtype)
        trace.steps[step + 1] = TracedStep(step + 1, entries)
    return trace


def _dumps(path: Path) -> Iterator[tuple[int, Path]]:
    """(step, dump.json) below a dump's folder, a step's or a rank's."""
    for file in sorted([*path.glob("dump.json"), *path.glob("rank*/dump.json"), *path.glob("step*/rank*/dump.json")]):
        named = [match for part in file.parts if (match := re.fullmatch(r"step(\d{1,6})", part))]
        yield int(named[-1][1]) if named else 0, file


def _json(file: Path) -> Any:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read as JSON ({str(error)[:120]}).", where=file, do="Dump again.") from None


def _entries(raw: Any) -> tuple[Entries, str]:
    """All tensors by kind and name, and the dtype of most outputs."""
    if raw.get("framework", "pytorch") != "pytorch":
        raise ValueError(f"framework {raw['framework']!r}")
    entries: Entries = {}
    dtypes: dict[str, int] = {}
    for key, value in raw["data"].items():
        if match := _CALL.fullmatch(key):
            forward = match["way"] == "forward"
            outputs = value["output" if forward else "input"]
            tensor = next((x for x in outputs if isinstance(x, dict) and "Norm" in x), None)
            if tensor is not None:
                kind: Kind = "activation" if forward else "gradient"
                _add(entries, (kind, _logical(match["name"], match["kind"])), _statistics(tensor))
                dtype = str(tensor["dtype"]).removeprefix("torch.")
                dtypes[dtype] = dtypes.get(dtype, 0) + 1
        elif match := _GRADIENTS.fullmatch(key):
            for parameter, tensors in value.items():
                for tensor in tensors if isinstance(tensors, list) else [tensors]:
                    if tensor is not None and "Norm" in tensor:
                        name = f"{_logical(match['name'], '')}.{parameter}"
                        _add(entries, ("parameter_gradient", name), _statistics(tensor))
    return entries, max(dtypes, key=lambda dtype: dtypes[dtype], default="float32")


def _logical(name: str, kind: str) -> str:
    """A module's name as our own traces have it: a whole layer's output is called `output` there."""
    name = _PREFIXES.sub("", name)
    return f"{name}.output" if re.fullmatch(r"layers\.\d+", name) else name


def _statistics(tensor: dict[str, Any]) -> Sketch:
    count = math.prod(int(size) for size in tensor["shape"])
    if not 0 <= count < 2**62:
        raise ValueError("a shape has no size")
    numbers = [tensor[key] for key in ("Mean", "Norm", "Max", "Min")]
    known = [float(number) if isinstance(number, int | float) else float("nan") for number in numbers]
    bad = not all(map(math.isfinite, known))
    mean, norm, largest, smallest = (0.0 if bad else number for number in known)
    return Sketch(count, mean * count, norm * norm, float(bad), None, largest, smallest)


def _add(entries: Entries, key: tuple[Kind, str], new: Sketch) -> None:
    old = entries.get(key)
    if old is None:
        entries[key] = new
        return
    assert old.largest is not None and old.smallest is not None
    assert new.largest is not None and new.smallest is not None
    entries[key] = Sketch(
        old.count + new.count,
        old.total + new.total,
        old.squares + new.squares,
        old.nonfinite + new.nonfinite,
        None,
        max(old.largest, new.largest),
        min(old.smallest, new.smallest),
    )
