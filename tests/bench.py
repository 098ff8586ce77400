"""Speed: python tests/bench.py [street] [data] [teacher] [student]; without a name, all of them.

Machines are shared and noisy: believe the ratios, and run it twice.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import data
import fastflow3d
import nsfp
import synthetic
import zeroflow


def seconds(run: Callable, repeats: int = 5) -> float:
    """Median time of a call, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def a_full_pair(folder: str) -> data.Argoverse2Pairs:
    """The real pair of AV2_SAMPLE, else a synthetic one of the same size."""
    if "AV2_SAMPLE" in os.environ:
        return data.open_dataset(os.environ["AV2_SAMPLE"])
    synthetic.write_logs(folder, 1, dataclasses.replace(synthetic.PRESETS["full"], sweeps=2))
    return data.open_dataset(folder)


def street(folder: str) -> None:
    for name, preset in synthetic.PRESETS.items():
        start = time.perf_counter()
        synthetic.write_logs(Path(folder) / name, 2, preset)
        each = (time.perf_counter() - start) / (2 * preset.sweeps)
        points = sum(len(pair.pc0) for pair in data.open_dataset(Path(folder) / name)) / (2 * (preset.sweeps - 1))
        print(f"street, {name}: {each:.3f} s a sweep of {points:.0f} points, files written")


def reading(folder: str) -> None:
    pairs = a_full_pair(folder)
    without = data.Argoverse2Pairs(list(pairs._folders.values()), true_flow=False)
    read, read_without = seconds(lambda: pairs[0]), seconds(lambda: without[0])
    print(f"reading a pair of {len(pairs[0].pc0)} points: {read:.3f} s, without true flow {read_without:.3f} s")


def teacher(folder: str) -> None:
    """Time an iteration of either teacher; 346 is what the published one takes on the real pair with seed 0."""
    torch.set_num_threads(1)
    pair = a_full_pair(folder)[0]
    has_flow, is_target = zeroflow.input_masks(pair)
    pc0, pc1 = pair.pc0[has_flow], pair.pc1[is_target]
    iteration = {}
    for name, few, many in (("fast", 50, 350), ("published", 2, 8)):
        times = []
        for count in (1, few, many):  # the first only warms up
            settings = dataclasses.replace(nsfp.TEACHERS[name], iterations=count)
            start = time.process_time()
            nsfp.estimate_flow(pc0, pc1, settings)
            times.append(time.process_time() - start)
        iteration[name] = (times[2] - times[1]) / (many - few)
    steps = nsfp.TEACHERS["fast"].iterations
    ratio = 346 * iteration["published"] / (steps * iteration["fast"])
    print(f"teacher, {len(pc0)} points, CPU time, one thread: published {iteration['published']:.2f} s an iteration,")
    print(f"  fast {1e3 * iteration['fast']:.1f} ms; a pair, 346 iterations against {steps}: {ratio:.0f} times cheaper")


def student(folder: str) -> None:
    pair = a_full_pair(folder)[0]
    pc0, pc1 = pair.pc0[~pair.is_ground0], pair.pc1[~pair.is_ground1]
    for name in ("narrow", "normal"):
        model = fastflow3d.FastFlow3D(fastflow3d.MODELS[name]).eval()
        with torch.no_grad():
            whole = seconds(lambda model=model: model([pc0], [pc1]), 3)
            pillars = seconds(lambda model=model: (model.embedder([pc0]), model.embedder([pc1])), 3)
        print(f"student {name}, {len(pc0)} points: {whole:.3f} s a pair, of which pillars {pillars / whole:.0%}")


if __name__ == "__main__":
    benches = {"street": street, "data": reading, "teacher": teacher, "student": student}
    for name in sys.argv[1:] or benches:
        with tempfile.TemporaryDirectory() as folder:
            benches[name](folder)
