"""What vendors' tools print, as their public samples show it, with invented numbers: one healthy device, one not."""

NPU_SMI = """
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 93.5        48                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3393 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | Alarm         | 101.0       91                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          26838/ 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""
NPU_SMI_DIES = """
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 3     Ascend910           | OK            | 178.5       36                0    / 0             |
| 0     6                   | 0000:9D:00.0  | 0           0    / 0          3416 / 65536         |
+------------------------------------------------------------------------------------------------+
| 3     Ascend910           | OK            | -           36                0    / 0             |
| 1     7                   | 0000:9F:00.0  | 0           0    / 0          3195 / 65536         |
"""
CNMON = """
CNMON v5.10.22
==============LOG==============
Card 0
    Product Name                 : MLU370-X8
    Driver                       : v5.10.22
    Physical Memory Usage        :
        Total                    : 24576 MiB
        Used                     : 1021 MiB
    Temperature                  :
        Board                    : 33 C
        Chip                     : 41 C
    Power                        :
        Usage                    : 72 W
    ECC                          :
        Uncorrectable errors     : 0
Card 1
    Product Name                 : MLU370-X8
    ECC                          :
        Uncorrectable errors     : 3
"""
MTHREADS_GMI = """{"Driver Version": "2.7.0", "GPU": [
  {"Index": 0, "Product Name": "MTT S4000", "FB Memory Usage": {"Total": "49152MiB", "Used": "512MiB"},
   "Temperature": {"GPU Current Temp": "44C"}, "Power Readings": {"Power Draw ": "98.11W"},
   "ECC Errors": {"Volatile": {"DRAM Uncorrectable": "0"}}},
  {"Index": 1, "Product Name": "MTT S4000", "ECC Errors": {"Volatile": {"DRAM Uncorrectable": "2"}}}]}"""
EFSMI = """
------------------- Enflame System Management Interface --------------------
DEV ID 0
    Driver Info
        Ver                     : 1.2.4.12
    Device Info
        Dev Name                : S60
    Device Mem Info
        Mem Size                : 42976 MiB
        Mem Usage               : 1129 MiB
    Temperature Info
        GCU Temp                : 34 C
    Power Info
        Cur Power               : 65.5 W
    Health Info
        GCU Health              : True
DEV ID 1
    Device Info
        Dev Name                : S60
    Health Info
        GCU Health              : False
"""
HY_SMI = (
    '{"card0": {"Card Series": "BW", "Average Graphics Package Power (W)": "91.0""Average Memory Power (W)": "38.0", '
    '"Temperature (Sensor junction) (C)": 57.0C "vram Total Memory (MiB)": "65520", '
    '"vram Total Used Memory (MiB)": "64169"}, "card1": {"Card Series": "BW"}}'
)
MX_SMI = """
mx-smi  version: 2.1.12
| MX-SMI 2.1.12                       Kernel Mode Driver Version: 2.12.13         |
| GPU         NAME                   | Bus-id              | GPU-Util             |
| Temp        Pwr:Usage/Cap          | Memory-Usage        |                      |
|====================================+=====================+======================|
| 0           MetaX C500             | 0000:08:00.0        | 0%                   |
| 36C         69W / 350W             | 858/65536 MiB       |                      |
+------------------------------------+---------------------+----------------------+
| 1           MetaX C500             | 0000:09:00.0        | 0%                   |
| 35C         54W / 350W             | 914/65536 MiB       |                      |
"""
IXSMI = "0, Iluvatar BI-V150, 46 C, 257 MiB, 32768 MiB, 4.3.0\n1, Iluvatar BI-V150, 44 C, 257 MiB, 32768 MiB, 4.3.0\n"
XPU_SMI = "\n".join(
    f'0000:0{n}:00.0 {n} 0x1234 0 4{n} x x x 8{n} x x x x x x x x 1{n}00 98304 0 0 "P800 OAM" x x x x x x x x x x'
    for n in range(2)
)
NVIDIA_SMI = """0, NVIDIA H100 80GB HBM3, 34, 71.20, 4, 81559, 0, 550.54.15
1, NVIDIA H100 80GB HBM3, 35, [N/A], 4, 81559, 2, 550.54.15
2, NVIDIA RTX 4090, 35, 70.0, 4, 24564, [N/A], 550.54.15
"""
AMD_SMI = """[{"gpu": 0, "power": {"socket_power": {"value": 138, "unit": "W"}},
  "temperature": {"hotspot": {"value": 41, "unit": "C"}},
  "mem_usage": {"total_vram": {"value": 196592, "unit": "MB"}, "used_vram": {"value": 283, "unit": "MB"}},
  "ecc": {"total_correctable_count": 3, "total_uncorrectable_count": 0}},
 {"gpu": 1, "power": "N/A", "ecc": {"total_uncorrectable_count": 7}}]"""

SAMPLES = {
    "ascend": NPU_SMI,
    "cambricon": CNMON,
    "mthreads": MTHREADS_GMI,
    "enflame": EFSMI,
    "hygon": HY_SMI,
    "metax": MX_SMI,
    "iluvatar": IXSMI,
    "kunlunxin": XPU_SMI,
    "nvidia": NVIDIA_SMI,
    "amd": AMD_SMI,
}
