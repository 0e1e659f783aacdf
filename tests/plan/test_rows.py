"""Reading tables that people made: one bad cell costs one row, and nothing is silently wrong."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan.published import TELECHAT2_115B, b200, table_1, write_runs, write_vtrain

from anychip.errors import InputError
from anychip.plan.calibrate import calibrate
from anychip.plan.rows import RUN_COLUMNS, VTRAIN_MULTI_COLUMNS, read_files, read_rows
from anychip.plan.rows.chips import catalogue_chip
from anychip.plan.rows.run import Incomplete
from anychip.plan.sites import load_site
from anychip.plan.validate import validate

FIRST = table_1()[0]


def with_cell(tmp_path: Path, **changes: str) -> Path:
    """Table 1 with other cells in its second row."""
    rows = table_1()
    rows[1] |= changes
    return write_runs(tmp_path / "changed.csv", rows)


@pytest.mark.parametrize(
    ("column", "text", "reason"),
    [
        ("layers", "thirty", "row 2, layers: 'thirty' is no number"),
        ("layers", "~30", "'~30' is no number"),
        ("layers", "30.5", "'30.5' is no whole number"),
        ("layers", "-30", "'-30' is not above 0"),
        ("tp", "0", "row 2, tp: '0' is not above 0"),
        ("hidden", "1e400", "row 2, hidden: '1e400' is not finite"),
        ("hidden", "1e300", "is above 1e+15"),
        ("hidden", "30,72", "'30,72' is no number"),
        ("hidden", "3_0_7_2", "is no number"),
        ("hidden", "nan", "hidden is not printed"),
        ("tflops_per_device", "-138", "'-138' is not above 0"),
        ("tflops_per_device", "inf", "'inf' is not finite"),
        ("tflops_per_device", "138 TFLOP/s", "is no number"),
        ("tflops_per_device", "1,138", "a thousand or a decimal comma"),
        ("tflops_per_device", "1138", "times the peak of a100-80g"),
        ("tflops_per_device", "0.05", "in another unit?"),
        ("mfu", "41", None),  # not read where TFLOP/s are printed
        ("gated_mlp", "perhaps", "row 2, gated_mlp: 'perhaps' is neither 1 nor 0"),
        ("sequence_parallel", "2", "is neither 1 nor 0"),
        ("recompute", "some", "row 2, recompute: 'some' is none of"),
        ("precision", "fp32", "row 2, precision: 'fp32' is none of"),
        ("kv_heads", "7", "32 heads are not whole groups of 7"),
        ("chip", "Foo-9000", "chip 'Foo-9000' is not in the catalogue"),
        ("chip", "A100", "chip 'A100' may be a100-40g or a100-80g"),
    ],
)
def test_one_bad_cell_costs_one_row(tmp_path: Path, column: str, text: str, reason: str | None) -> None:
    runs, skipped = read_rows(with_cell(tmp_path, **{column: text}))
    if reason is None:
        assert len(runs) == 10
        return
    assert [run.id for run in runs] == [row["id"] for row in table_1() if row["id"] != "mlm-sc21-t1-3.6B"]
    assert skipped[0].id == "mlm-sc21-t1-3.6B"
    assert reason in skipped[0].reason


@pytest.mark.parametrize("text", ["3,072", "3_072", "3072.0", " 3072 ", "3 072", "3'072", "3.072e3"])
def test_whole_numbers_may_be_written_in_several_ways(tmp_path: Path, text: str) -> None:
    runs, skipped = read_rows(with_cell(tmp_path, hidden=text))
    assert not skipped
    assert runs[1].workload.hidden == 3072


def test_thousands_of_rates_are_read_and_words_for_nothing_are_blank(tmp_path: Path) -> None:
    row = {**FIRST, "tflops_per_device": "n/a", "vpp": "-", "tokens_per_s_per_device": "11,234"}
    (run,), _ = read_rows(write_runs(tmp_path / "one.csv", [row]))
    assert run.seconds == pytest.approx(512 * 2048 / (11_234 * 32))


def test_a_blank_or_damaged_time_of_vtrain_costs_one_row(tmp_path: Path) -> None:
    path = write_vtrain(tmp_path / "v.csv")
    for text, reason in (
        ("", "is not printed"),
        ("-5", "is not above 0"),
        ("inf", "is not finite"),
        ("~9", "no number"),
    ):
        changed = tmp_path / "changed.csv"
        changed.write_text(path.read_text("utf-8-sig").replace("9927.6", text), "utf-8")
        runs, skipped = read_rows(changed)
        assert len(runs) == 8
        assert reason in skipped[0].reason and "iteration time (ms)" in skipped[0].reason


def test_a_file_without_any_usable_row_says_the_first_reason(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "none.csv", [{**FIRST, "layers": "many"}])
    with pytest.raises(InputError, match=r"no row is complete enough.*row 1, layers: 'many' is no number"):
        read_files([path])


def test_a_shifted_row_is_not_read(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "t1.csv", table_1())
    path.write_text(path.read_text().replace(",3072,", ",3,072,", 1))
    runs, skipped = read_rows(path)
    assert len(runs) == 9
    assert "44 cells for 43 columns" in skipped[0].reason


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([[*RUN_COLUMNS, "Layers "], ["x"] * (len(RUN_COLUMNS) + 1)])
    with pytest.raises(InputError, match="has the columns layers more than once"):
        read_rows(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings_of_spreadsheets(tmp_path: Path, delimiter: str, encoding: str) -> None:
    path = tmp_path / "table.csv"
    with path.open("w", newline="", encoding=encoding) as handle:
        writer = csv.DictWriter(handle, RUN_COLUMNS, restval="", delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table_1())
    assert read_rows(path)[0] == read_rows(write_runs(tmp_path / "plain.csv", table_1()))[0]


def test_files_that_are_no_tables_are_told_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "empty.csv").write_bytes(b"")
    for name, complaint in (
        ("nowhere.csv", "there is no such file"), (".", "is a folder"), ("binary.csv", "is no text in UTF-8"),
        ("empty.csv", "is empty"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=complaint) as raised:
            read_rows(tmp_path / name)
        assert "Errno" not in str(raised.value)


@pytest.mark.parametrize(
    ("printed", "chip"),
    [
        ("ASCEND-910B", "ascend-910b3"), ("ascend-910b4", "ascend-910b4"), ("Ascend 910B2", "ascend-910b2"),
        ("a100-80g", "a100-80g"), ("A100-SXM4-80GB", "a100-80g"), ("H200", "h200-sxm"), ("H200-141G-SXM", "h200-sxm"),
        ("h20", "h20-96g"), ("A800-80G-SXM", "a800-80g"), ("MLU590", "mlu590"), ("MI300X", "mi300x"),
        ("Gaudi2", "gaudi2"), ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("TPU v4", "tpu-v4"),
    ],
)  # fmt: skip
def test_chips_go_by_the_catalogues_names_too(printed: str, chip: str) -> None:
    assert catalogue_chip(printed)[0] == chip


@pytest.mark.parametrize("printed", ["H20-141G", "H100-80G-PCIe", "Ascend-910B-32G", "gaudi", "A100", "80G", ""])
def test_a_chip_that_may_be_another_is_not_taken(printed: str) -> None:
    with pytest.raises(Incomplete):
        catalogue_chip(printed)


def test_a_chip_whose_peak_only_its_site_knows(tmp_path: Path) -> None:
    """No maker's peak of the MLU590 is public; the shipped site states one, other sites do not."""
    rows = [{**FIRST, "chip": "MLU590", "framework": "Megatron-Bridge", "tflops_per_device": "100"}]
    path = write_runs(tmp_path / "mlu.csv", rows)
    (row,) = validate(path).rows
    assert row.predicted_seconds is not None and math.isfinite(row.predicted_seconds)
    assert row.baseline_seconds is not None and math.isfinite(row.baseline_seconds)
    with pytest.raises(InputError, match="neither the catalogue nor the site a100/fsdp knows the peak of mlu590"):
        validate(path, load_site("a100/fsdp"))


# --- damaged at random ------------------------------------------------------------------------------------------

_DAMAGE = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1e400", "1e300", "1e-300", "nan", "inf", "-inf", "1", "2", "3", "7", "1024", "99999999999",
         "4,096", "4_096", "~4096", "0x10", "\u0661\u0662", "1.5", "none", "full", "\x00", '"', "1e9", "1000000"]
    ),
    st.integers(-10, 10**7).map(str),
    st.floats().map(repr),
    st.text(max_size=6),
    st.sampled_from(
        ["--noop-layers 1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9", "kv_lora 0)", "MLA q_lora 0",
         "step_time_s=1.2.3", "global_batch_sequences=0", "--num-layer-list 0,30", "inferred gbs=" + "9" * 5000,
         "ffn_dim_multiplier=1.2.3", "vocab inferred 0", "--kv-channels 99999999999999999999"]
    ),
)  # fmt: skip
_ROWS = [*table_1()[:4], *b200()[:2], TELECHAT2_115B]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 6), st.sampled_from(RUN_COLUMNS), _DAMAGE), min_size=1, max_size=8))
def test_damaged_tables_never_give_a_traceback_or_a_wild_figure(
    tmp_path: Path, damage: list[tuple[int, str, str]]
) -> None:
    rows = [dict(row) for row in _ROWS]
    for index, column, text in damage:
        rows[index][column] = text
    path = tmp_path / "damaged.csv"
    with path.open("w", newline="", encoding="utf-8", errors="replace") as handle:
        writer = csv.DictWriter(handle, RUN_COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    check_finite(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.lists(st.tuples(st.integers(1, 9), st.integers(0, len(VTRAIN_MULTI_COLUMNS) - 1), _DAMAGE), max_size=8)
)
def test_damaged_tables_of_vtrain_too(tmp_path: Path, damage: list[tuple[int, int, str]]) -> None:
    with write_vtrain(tmp_path / "v.csv", bom=False).open(newline="") as handle:
        lines = list(csv.reader(handle))
    for index, column, text in damage:
        lines[index][column] = text
    path = tmp_path / "damaged.csv"
    with path.open("w", newline="", encoding="utf-8", errors="replace") as handle:
        csv.writer(handle).writerows(lines)
    check_finite(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 3000), put=st.binary(max_size=8))
def test_bytes_in_the_middle_of_a_table(tmp_path: Path, cut: int, put: bytes) -> None:
    data = write_runs(tmp_path / "t1.csv", table_1()).read_bytes()
    path = tmp_path / "damaged.csv"
    path.write_bytes(data[:cut] + put + data[cut + len(put) // 2 :])
    check_finite(path)


def check_finite(path: Path) -> None:
    """Either plain words, or figures that are finite, each row accounted for."""
    try:
        report = validate(path)
    except InputError as error:
        assert "Traceback" not in str(error)
        return
    json.dumps(report.as_json(), allow_nan=False)
    assert all(metrics.p90 < 1e3 for metrics in report.time.values())
    timed = [row.run for row in report.rows if row.run.seconds]
    if timed and len({run.chip for run in timed}) == 1:
        calibration = calibrate(timed[:2], load_site(report.rows[0].site), "fuzz")
        assert math.isfinite(calibration.fitted)
