"""The processes that a benchmark of many samples draws them in."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

__all__ = ["processes"]


def processes(quick: bool) -> ProcessPoolExecutor:
    """One for each core, so that none waits for another's threads. A quick run has one, as they take long to start."""
    count = 1 if quick else min(os.cpu_count() or 1, 8)
    return ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,))
