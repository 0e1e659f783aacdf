"""The variables that every process of a job starts with, and why."""

from __future__ import annotations

from anychip.chips.facts import Setting, VendorFacts
from anychip.launch.job import Job
from anychip.recipe.cluster import LaunchConfig


def variables(job: Job) -> list[Setting]:
    """The vendor's, ours, the network interface's, the cluster file's; a later one replaces an earlier one."""
    found = [*job.facts.environment(job.world_size), *_ours(job), *_interface(job.launch, job.facts)]
    found += [Setting(name, value, "From the cluster file.") for name, value in job.launch.environment.items()]
    return list({setting.name: setting for setting in found}.values())


def _ours(job: Job) -> list[Setting]:
    found = [Setting("ANYCHIP_CHIP", job.facts.vendor, "No guessing which chip this is.")]
    if any(group.processes > 1 for group in job.groups):
        found.append(Setting("OMP_NUM_THREADS", "1", "Processes of a node do not crowd out each other's cores."))
    if job.nodes > 1:
        why = "Groups over host memory connect two processes when they first talk; all at once is quadratic."
        found.append(Setting("TORCH_GLOO_LAZY_INIT", "1", why))
    return found


def _interface(launch: LaunchConfig, facts: VendorFacts) -> list[Setting]:
    """Where a node has several networks, libraries otherwise take the first one they find."""
    if launch.network_interface is None:
        return []
    why = "Processes find each other on this interface, not on the first one that a library sees."
    names = ("GLOO_SOCKET_IFNAME", *facts.scheduling.interface_variables)
    return [Setting(name, launch.network_interface, why) for name in names]
