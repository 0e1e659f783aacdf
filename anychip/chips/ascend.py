"""Huawei Ascend through torch_npu. Sources: torch_npu 2.13's wheel and repository, CANN and MindSpeed documents,
npu-smi's output in public issues. Nothing here has run on the vendor's device."""

from __future__ import annotations

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import (
    FIRST_RANK,
    OUT_OF_SERVICE,
    Collectives,
    DeviceHealth,
    DeviceName,
    ErrorMeaning,
    HealthCommand,
    PlugIn,
    Scheduling,
    Setting,
    TimeoutVariable,
    VendorFacts,
)
from anychip.chips.readings import cells, number, pair

_OPERATOR = "Repeat with ASCEND_LAUNCH_BLOCKING=1 to find the operator before suspecting the device."


def parse_npu_smi(text: str) -> list[DeviceHealth]:
    """`npu-smi info`: two rows a chip. | card name | health | power temperature pages |, then
    | chip [id] | bus | AI core, memory, HBM |. A chip is named card/chip; a package's second die shows no power."""
    found = []
    upper: list[str] = []
    for line in text.splitlines():
        row = cells(line)
        if len(row) != 3:
            upper = []
        elif not upper:
            upper = row if row[0][:1].isdigit() and ":" not in row[1] else []
        else:
            found.append(_chip(upper, row))
            upper = []
    return found


def _chip(upper: list[str], lower: list[str]) -> DeviceHealth:
    card, _, name = upper[0].partition(" ")
    readings = upper[2].split()
    used, total = pair(lower[2])
    status = upper[1]
    healthy = status.upper() == "OK"
    return DeviceHealth(
        device=f"{card}/{lower[0].split()[0] if lower[0] else '?'}",
        name=name.strip(),
        healthy=healthy,
        problems=() if healthy else (f"health is {status or 'not shown'}",),
        power_watts=number(readings[0]) if readings else None,
        temperature_c=number(readings[1]) if len(readings) > 1 else None,
        memory_used_mib=used,
        memory_total_mib=total,
    )


COLLECTIVES = Collectives(
    "hccl",
    library="HCCL",
    refused_ops=frozenset({"BAND", "BOR", "BXOR"}),
    emulated_ops={"AVG": "a sum, then a division", "PREMUL_SUM": "a scaling, then a sum; floating point only"},
    refused_dtypes=frozenset({"float64", "uint64", "uint8"}),
    altered_dtypes={"bool": "a sum is computed as a maximum"},
    notes="float64 and uint64 only from Ascend950. gather is an all-gather. Tensors in an internal format must have "
    "storage offset 0. Older releases crash on AVG and PREMUL_SUM.",
)

SETTINGS = (
    Setting("INF_NAN_MODE_ENABLE", "1", "With 0 arithmetic saturates: Inf becomes a number and NaN 0, which hides a "
            "diverging run. The 910A knows only saturation."),
    Setting("TASK_QUEUE_ENABLE", "1", "Two-stage launch. 2 launches faster but can raise peak memory."),
    Setting("CPU_AFFINITY_CONF", "1", "Binds threads to the cores near their device."),
    Setting("HCCL_BUFFSIZE", "200", "MiB a communicator, outside PyTorch's allocator: the memory plan counts on it."),
    Setting("TORCH_HCCL_ASYNC_ERROR_HANDLING", "1", "A broken link ends the process instead of hanging it."),
    Setting("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "Less fragmentation when tensor sizes vary."),
    Setting("HCCL_DETERMINISTIC", "true", "Reductions add in one order.", "deterministic"),
    Setting("TORCH_NPU_FALLBACK_CPU_DISABLE", "1", "An operator without a kernel fails instead of running on the CPU.",
            "canary"),
    Setting("ASCEND_LAUNCH_BLOCKING", "1", "The trace shows the operator that failed; slow.", "debug"),
    Setting("TORCH_HCCL_DESYNC_DEBUG", "1", "Says which ranks entered which collective.", "debug"),
    Setting("NPU_ASD_CONFIG", "enable:true,with_checksum:true", "Watches gradients for values that broken hardware "
            "makes.", "tune"),
    Setting("P2P_HCCL_BUFFSIZE", "0", "No separate point-to-point communicators, which cost twice 20 MiB a group.",
            "tune"),
)  # fmt: skip

TIMEOUTS = (
    TimeoutVariable("HCCL_CONNECT_TIMEOUT", "connect", "Default 120 s; torch_npu itself advises 300 s or more, and a "
                    "communicator of many ranks needs longer."),
    TimeoutVariable("HCCL_EXEC_TIMEOUT", "execute", "One collective; 0 would wait for ever."),
    TimeoutVariable("HCCL_EVENT_TIMEOUT", "event", "Must exceed HCCL_EXEC_TIMEOUT, which is checked at start-up."),
    TimeoutVariable("ACL_DEVICE_SYNC_TIMEOUT", "group", "No default: turns a device that hangs into an error."),
)  # fmt: skip

ERRORS = (
    ErrorMeaning("HBM MULTI BIT ECC ERROR", "memory of the device is damaged", True, OUT_OF_SERVICE),
    ErrorMeaning("UCE ERROR", "a page of the device's memory is damaged", True,
                 "Restart the process on a spare; torch.npu.restart_device may recover the page."),
    ErrorMeaning("SUSPECT MEM ERROR", "memory of the device is suspected", True, OUT_OF_SERVICE),
    ErrorMeaning("(HCCS|UB) LINK ERROR", "a link inside the node is broken", True, OUT_OF_SERVICE),
    ErrorMeaning("HCCL OP RETRY FAILED", "a collective failed after retries: network between nodes", False,
                 "Check the node's network ports (hccn_tool -i N -link -g) and the switch."),
    ErrorMeaning("SUSPECT REMOTE ERROR", "another device failed", False, FIRST_RANK),
    ErrorMeaning("FORCE STOP", "this process was stopped from outside", False, FIRST_RANK),
    ErrorMeaning(r"\b507010\b", "the device's scheduler stopped answering", True, OUT_OF_SERVICE),
    ErrorMeaning(r"\b507013\b", "a hardware error while copying memory", True, OUT_OF_SERVICE),
    ErrorMeaning(r"\b507033\b", "the device cannot be started", True, OUT_OF_SERVICE),
    ErrorMeaning(r"\b507899\b", "an internal error of the driver", True, OUT_OF_SERVICE),
    ErrorMeaning(r"\b507014\b", "a matrix operator did not end in time", False, _OPERATOR),
    ErrorMeaning(r"\b507034\b", "a vector operator did not end in time", False, _OPERATOR),
    ErrorMeaning(r"\b(507015|507035)\b", "an operator raised an exception on the device", False, _OPERATOR),
    ErrorMeaning(r"\b507018\b", "a kernel on the device's CPU raised an exception", False, _OPERATOR),
    ErrorMeaning(r"\b(207018|207001)\b", "the device has not enough memory", False,
                 "Lower training.micro_batch_size or split the model further."),
    ErrorMeaning(r"\b207003\b", "a value overflowed", False, "Look at the loss and the gradient norm before it."),
    ErrorMeaning(r"\bEI0002\b", "waiting for another rank in a collective timed out", False,
                 FIRST_RANK),
    ErrorMeaning(r"\bEI0006\b", "connecting to another rank timed out", False,
                 "Raise HCCL_CONNECT_TIMEOUT with the number of ranks, and check the network."),
    ErrorMeaning("libhccl.so|libascendcl.so", "CANN's libraries are not found", False,
                 "Source CANN's set_env.sh before starting."),
    ErrorMeaning(r"\b(ERR04008|ERR99999)\b", "says nothing by itself: printed at the exit of any failing run", False,
                 "Read the message above it."),
)  # fmt: skip

# MindCluster's operator, device plug-in and samples of 2026. Its name for the 950 was not found.
SCHEDULING = Scheduling(
    devices=(
        DeviceName(r"910a$", "huawei.com/Ascend910", "ascend-910"),
        DeviceName(r"910", "huawei.com/Ascend910", "ascend-910b"),
    ),
    interface_variables=("HCCL_SOCKET_IFNAME",),
    pod_fields={
        "ASCEND_VISIBLE_DEVICES": "metadata.annotations['huawei.com/Ascend910']",
        "XDL_IP": "status.hostIP",
    },
    host_paths=("/usr/local/Ascend/driver",),
)

FACTS = VendorFacts(
    vendor="ascend",
    maker="Huawei Ascend",
    device_type="npu",
    collectives=COLLECTIVES,
    plug_in=PlugIn(
        "torch_npu", "torch-npu", autoload=True, where="pip install torch-npu of torch's version; CANN apart"
    ),
    visible_devices="ASCEND_RT_VISIBLE_DEVICES",
    device_name=r"ascend|^910|^950",
    tools=("npu-smi",),
    settings=SETTINGS,
    timeouts=TIMEOUTS,
    health=HealthCommand(("npu-smi", "info"), parse_npu_smi, version=r"npu-smi\s+(\S+)"),
    errors=ERRORS,
    scheduling=SCHEDULING,
    deterministic_notes="Takes effect once a thread, from the first operator on; later changes are ignored.",
    notes="TORCH_TRANSFER_TO_NPU is refused: it rewrites calls and lowers double precision to single.",
)


class AscendBackend(AcceleratorBackend):
    facts = FACTS
