"""Label a data set with all machines of a Ray cluster; without a cluster, with this machine.

    python recipes/label_ray.py --shards 256 --cpus 4 --data /disk/av2/train --labels /disk/labels

Needs `pip install ray`, here and on the cluster, whose Python must have requirements.txt. --data
and --labels are folders that all machines share, or addresses. Other options go to `zeroflow.py
label`. Labels that are there are kept: after a failure, start the same command again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parent.parent


def label(shard: str, cpus: int, options: list[str]) -> tuple[int, str, str]:
    """One shard, on some machine of the cluster: exit status, last line printed, errors."""
    command = [sys.executable, "zeroflow.py", "label", "--shard", shard, "--workers", str(cpus)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    return done.returncode, done.stdout.strip().rpartition("\n")[2], done.stderr[-2000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shards", type=int, default=64, help="parts (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=2, help="cores per part, 2 or more")
    parser.add_argument("--data", required=True)
    parser.add_argument("--labels", required=True)
    arguments, others = parser.parse_known_args()
    # With a single worker, `label` works in its own process, which a bad pair may take with it.
    if arguments.cpus < 2:
        parser.error("--cpus: give 2 or more, so that a pair whose process dies costs only itself")
    # On the cluster, the working folder is a copy of this project.
    for path in (arguments.data, arguments.labels):
        if not path.startswith(("/", "s3://")):
            parser.error(f"{path}: give an absolute path, the same on all machines")

    # Every machine gets the modules from here, but no folders, in which labels may lie.
    ray.init(runtime_env={"working_dir": str(ROOT), "excludes": ["/*/"]})
    task = ray.remote(label).options(num_cpus=arguments.cpus)
    options = ["--data", arguments.data, "--labels", arguments.labels, *others]
    shards = [f"{i}/{arguments.shards}" for i in range(arguments.shards)]
    waiting = {task.remote(shard, arguments.cpus, options): shard for shard in shards}

    # Results are printed as they come. A shard that fails does not cost the others.
    failed = []
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        shard = waiting.pop(done)
        try:
            status, line, errors = ray.get(done)
        except ray.exceptions.RayError as error:  # its machine is gone, for instance
            status, line, errors = 1, "", str(error)
        print(line or f"shard {shard}: ended with status {status}", flush=True)
        if status != 0:
            failed.append(shard)
            print(errors, file=sys.stderr, flush=True)
    if failed:
        print(f"start again for: {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
