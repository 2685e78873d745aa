"""Measurements in processes of their own: what ends one ends no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from bench.moe_jobs import READY, Job, Row, run_jobs


def crashing(job: Job) -> Iterator[Row]:
    """Ends its process at M 4 while it gets ready, and at M 64 while it measures."""
    for m in job.ms:
        yield {"at": m}
        if m == 4 and job.kernel == "bad":
            print("RuntimeError: an illegal access", flush=True)
            os._exit(3)
    yield READY
    for m in job.ms:
        yield {"at": m}
        if m == 64:
            raise ValueError("it ended")
        yield {"shape": job.shape, "kernel": job.kernel, "M": m, "us": 1.0}


def test_what_crashes_is_left_out_with_its_reason(tmp_path: Path) -> None:
    jobs = [Job("s", "bad", (1, 4, 16)), Job("s", "good", (1, 4)), Job("s", "late", (1, 64, 256))]
    rows = list(run_jobs(jobs, crashing, tmp_path, set_up_s=60, timing_s=60))
    measured = [(r["kernel"], r["M"]) for r in rows if "us" in r]
    assert measured == [("bad", 1), ("bad", 16), ("good", 1), ("good", 4), ("late", 1)]
    missing = {(r["kernel"], r["M"]): r["why"] for r in rows if "why" in r}
    assert set(missing) == {("bad", 4), ("late", 64)}
    assert missing["bad", 4] == "the process ended with 3: RuntimeError: an illegal access"
    assert missing["late", 64].endswith("ValueError: it ended")
