"""Settings of the whole process that CPU speed depends on; a program calls `tune_process` once, a library never."""

import ctypes
import os
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt, from malloc.h."""


def tune_process() -> None:
    """Keep freed memory, and give every OpenMP thread a core of its own. Does nothing where the system has neither."""
    keep_memory()
    bind_threads()


def keep_memory() -> None:
    """Have glibc reuse large blocks instead of giving them back to the kernel.

    By default each tensor over 32 MiB is a fresh mapping whose pages fault in one by one: training the nano model
    measured 13% slower so (2 cores, medians of alternating runs).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
                mallopt(parameter, value)


def bind_threads() -> None:
    """Bind the calling thread and torch's worker threads to one allowed core each, unless OpenMP was told how.

    Left alone, the two threads of a two-core machine can end up on one core and stay there. Workers are recognised as
    the threads that the first parallel operation starts, so this must come before any other.
    """
    told = any(name in os.environ for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"))
    if told or not hasattr(os, "sched_setaffinity") or not os.path.isdir("/proc/self/task"):
        return
    cores = sorted(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    if not 1 < threads <= len(cores):
        return
    before = set(os.listdir("/proc/self/task"))
    torch.ones(1 << 20).add_(1)
    workers = sorted(set(os.listdir("/proc/self/task")) - before, key=int)
    if len(workers) != threads - 1:
        return
    for thread, core in zip([0, *map(int, workers)], cores, strict=False):
        os.sched_setaffinity(thread, {core})
