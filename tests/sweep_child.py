"""A sweep in a process of its own, for tests that kill it: python sweep_child.py STORE JOBS RUNS [SCHEDULER].

With a scheduler's address it runs on that Dask cluster. With SWEEP_CHILD_LOG set, every computed run appends its seed
and process there, and waits until as many processes have done so as SWEEP_CHILD_WORKERS says.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.sweep import sweep

LOG = os.environ.get("SWEEP_CHILD_LOG")


def specs(count):
    return [RunSpec("toy", 1, {"dataset": "none", "target_seed": seed}) for seed in range(count)]


def processes(log):
    """Which processes have computed runs, in the order of their first ones."""
    return list(dict.fromkeys(int(line.split()[1]) for line in Path(log).read_text().splitlines()))


def compute(spec):
    seed = spec.settings["target_seed"]
    time.sleep(float(os.environ.get("SWEEP_CHILD_SECONDS", "0.01")))
    if LOG:
        with Path(LOG).open("a") as stream:  # one short write in append mode is atomic
            stream.write(f"{seed} {os.getpid()}\n")
        while len(processes(LOG)) < int(os.environ.get("SWEEP_CHILD_WORKERS", "1")):
            time.sleep(0.05)
    return Outcome({"accuracy": seed / 1000}, {"curve": np.full(500, seed)})


if __name__ == "__main__":
    print("ready", flush=True)
    cluster = {"backend": "dask", "scheduler": sys.argv[4]} if len(sys.argv) > 4 else {}
    sweep(specs(int(sys.argv[3])), compute, RunStore(sys.argv[1]), jobs=int(sys.argv[2]), progress=False, **cluster)
    print("done", flush=True)
