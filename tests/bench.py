"""Benchmarks: how long each part takes, and how large the teachers' errors are.

    python tests/bench.py             all of the first list below
    python tests/bench.py NAME ...    only these; see below

  street      making and writing synthetic sweeps
  data        reading a pair, by where its ground comes from; opening a large split
  labels      writing and reading a label
  metrics     adding a sweep to all metrics
  teacher     CPU time and errors of `fast`, beside the time of `nsfp`
  student     time, error and memory of each form of the student
  train       loading, training steps and their memory
  at_once     pillars of a micro-batch and RANSAC of several candidates, at once and one by one

These run only if they are named, because they take long or need a GPU:

  remote      reading three logs of 21 sweeps from a bucket, served by this machine
  scale       what 300,000 labeled pairs cost before the first fit or step, about 5 minutes
  departures  `fast` without each of its departures from the published teacher
  nsfp        errors of the two slow teachers, about 25 minutes
  student_xl  `student` for the XL model, about 15 minutes
  gpu         students, training and teachers on a GPU, about 4 minutes

If AV2_SAMPLE names a folder with an Argoverse 2 split, most of them use its first pair; otherwise
they use a synthetic pair of the same size. Machines are shared and noisy: trust ratios more than
times, and run a benchmark twice. Points are (N, 3) float32 in meters; errors are in meters.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from plain_student import pillars_cloud_by_cloud, seeded_model
from torch import Tensor

import challenge
import clouds
import data
import fastflow3d
import labels
import metrics
import nsfp
import synthetic
import train
import zeroflow

# How many iterations a fit of `nsfp` takes, as counted on the real pair with seed 0.
NSFP_ITERATIONS = 346

# The forms of the student. "plain" is the readable network. "as published" is the same with images
# in torch's default memory layout. "fast" is what `prepare_inference` returns.
FORMS = ("as published", "plain", "fast float32", "fast bfloat16")

# `fast` without each of its departures from the published teacher: name -> changed settings.
DEPARTURES = {
    "fast": {},
    "one prior": {"priors": 1},
    "one prior, batches of 1,024": {"priors": 1, "batch_points": 1024},
    "points drawn evenly": {"draw_min": 1.0, "draw_max": 1.0},
    "input in meters, not scaled": {"input_scale": 1.0},
    "constant rate": {"cosine": False},
    "150 steps": {"iterations": 150},
    "no evidence required": {"evidence": 1.0},
    "no ICP": {"icp_steps": 0, "final_icp_steps": 0},
    "no second ICP": {"final_icp_steps": 0},
    "all points of a cluster": {"cluster_sample": None},
    "clusters of 0.4 m, as published": {"cluster_reach": 0.4},
    "clusters in true height": {"height_scale": 1.0},
    "motions may tilt and rise": {"upright": False},
    "points in no cluster stay": {"join_reach": 1e-3},
    "one prior, clusters follow the flow": {"priors": 1, "batch_points": 1024, "refine": "flow"},
    "one prior, not refined": {"priors": 1, "batch_points": 1024, "refine": "none"},
}


# --- Measuring ------------------------------------------------------------------------------------


def median_seconds(run: Callable, repeats: int = 5) -> float:
    """Median seconds of a call, after a first one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def median_seconds_in_turn(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each of several calls; the first round is not counted if repeats > 2."""
    # In turn, and not one after the other: if the machine is busy for a while, all calls suffer.
    times = {name: [] for name in runs}
    rounds = repeats + 1 if repeats > 2 else repeats
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[-repeats:]) for name, each in times.items()}


def process_peak_gb() -> float:
    """The most memory in GB that this process has had so far, torch's code included."""
    # Not getrusage, whose maximum a process inherits from its parent.
    status = Path("/proc/self/status").read_text()
    peak_kb = int(status.split("VmHWM:")[1].split()[0])
    return peak_kb / 1e6


def wait_for_gpu(result: object) -> object:
    """Return the result once the GPU has computed it: calls return before the GPU is done."""
    torch.cuda.synchronize()
    return result


# --- Pairs to measure on --------------------------------------------------------------------------


def full_size_pairs(folder: Path) -> data.Argoverse2Pairs:
    """The real pairs of AV2_SAMPLE, otherwise one synthetic pair of the same size."""
    if "AV2_SAMPLE" in os.environ:
        return data.open_dataset(os.environ["AV2_SAMPLE"])
    synthetic.write_logs(folder, 1, dataclasses.replace(synthetic.PRESETS["full"], sweeps=2))
    return data.open_dataset(folder)


def ten_streets(folder: Path) -> data.Argoverse2Pairs:
    """Ten pairs at full density, each of another street, from a seed on which nothing was tuned."""
    settings = dataclasses.replace(synthetic.PRESETS["full"], sweeps=2, seed=51)
    synthetic.write_logs(folder / "streets", 10, settings)
    return data.open_dataset(folder / "streets")


def standing_streets(folder: Path) -> data.Argoverse2Pairs:
    """Five pairs at full density in which nothing moves but the ego."""
    make_street = synthetic.make_street

    def standing(settings: synthetic.StreetSettings, number: int) -> synthetic.Street:
        street = make_street(settings, number)
        still = {"s_mps": 0.0, "left_mps": 0.0}
        things = [dataclasses.replace(thing, **still) for thing in street.things]
        return dataclasses.replace(street, things=things)

    settings = dataclasses.replace(synthetic.PRESETS["full"], sweeps=2, seed=52)
    synthetic.make_street = standing
    try:
        synthetic.write_logs(folder / "standing", 5, settings)
    finally:
        synthetic.make_street = make_street
    return data.open_dataset(folder / "standing")


def input_points(pair: data.SweepPair) -> tuple[Tensor, Tensor]:
    """The points (N, 3) and (M, 3) of both sweeps that teacher and student see."""
    is_input0, is_input1 = data.input_masks(pair)
    return pair.pc0[is_input0], pair.pc1[is_input1]


# --- Data, labels, metrics ------------------------------------------------------------------------


def street(folder: Path) -> None:
    """Making and writing sweeps, for each preset of the synthetic street."""
    for name, preset in synthetic.PRESETS.items():
        start = time.perf_counter()
        synthetic.write_logs(folder / name, 2, preset)
        each = (time.perf_counter() - start) / (2 * preset.sweeps)

        # Every sweep but the last one of a log is sweep 0 of a pair.
        total = sum(len(pair.pc0) for pair in data.open_dataset(folder / name))
        points = total / (2 * (preset.sweeps - 1))
        print(f"street, {name}: {each:.3f} seconds per sweep of {points:.0f} points, files written")


def reading(folder: Path) -> None:
    """Reading a pair, by where its ground comes from; how good that ground is; opening a split."""
    torch.set_num_threads(1)
    logs = list(full_size_pairs(folder)._folders.values())
    by_ground = {}
    for name in data.GROUNDS:
        if name != "auto":
            by_ground[name] = data.Argoverse2Pairs(logs, true_flow=False, ground=name)

    # What belongs to a log and not to a sweep stays in memory after the first, uncounted reading.
    runs = {name: lambda pairs=pairs: pairs[0] for name, pairs in by_ground.items()}
    times = median_seconds_in_turn(runs, 15)
    pair = by_ground["raster"][0]
    print(f"reading a pair of {len(pair.pc0)} points, one thread, its log in memory, ", end="")
    found = ", ".join(f"{name} {1e3 * each:.0f}" for name, each in times.items())
    print(f"ms by ground: {found}")

    with_truth = data.Argoverse2Pairs(logs)
    each = median_seconds(lambda: with_truth[0], 15)
    print(f"  with true flow and the raster: {1e3 * each:.0f} ms")

    points = pair.pc0.double().numpy()  # (N0, 3), as the reader has them
    each = median_seconds(lambda: clouds.is_ground_without_map(points), 15)
    print(f"  ground without a map: {1e3 * each:.0f} ms per sweep")
    for name in ("vector", "points"):
        compare_ground(name, by_ground[name][0], pair)
    opening_a_split(folder / "split")


def compare_ground(name: str, pair: data.SweepPair, raster_pair: data.SweepPair) -> None:
    """Print how well one kind of ground agrees with the raster's, inside the grid."""
    for sweep in ("0", "1"):
        is_inside = data.is_in_grid(getattr(raster_pair, f"pc{sweep}"))
        is_ground = getattr(pair, f"is_ground{sweep}")[is_inside]
        is_true_ground = getattr(raster_pair, f"is_ground{sweep}")[is_inside]

        # F1 is the harmonic mean of precision and recall.
        hits = (is_ground & is_true_ground).sum()
        precision, recall = hits / is_ground.sum(), hits / is_true_ground.sum()
        f1 = 2 * precision * recall / (precision + recall)
        print(f"  {name} against the raster in the grid, sweep {sweep}: F1 {f1:.4f}, ", end="")
        print(f"precision {precision:.4f}, recall {recall:.4f}")


def opening_a_split(split: Path) -> None:
    """Opening a split as large as Argoverse 2's Sensor data set."""
    # The files can be empty, because opening only lists their names.
    for log in range(1000):
        lidar = split / f"{log:04d}" / "sensors" / "lidar"
        lidar.mkdir(parents=True)
        for sweep in range(157):
            (lidar / f"{sweep * 10**8}.feather").touch()
    opening = median_seconds(lambda: data.open_dataset(split))
    print(f"  opening a split of 1,000 logs of 157 sweeps: {opening:.2f} s")


def from_a_bucket(folder: Path) -> None:
    """Reading pairs from a bucket the first and the second time, beside the same from a folder."""
    from test_remote import Server

    settings = dataclasses.replace(synthetic.PRESETS["full"], sweeps=21)
    synthetic.write_logs(folder / "bucket" / "street", 3, settings)
    server = Server(folder / "bucket")
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    address, cache = "s3://bucket/street", folder / "cache"
    for name, path in (
        ("first", address),
        ("second", address),
        ("folder", folder / "bucket/street"),
    ):
        before = len(server.requests)
        options = {"cache": cache} if path == address else {}
        start = time.perf_counter()
        pairs = data.open_dataset(path, true_flow=False, **options)
        points = sum(len(pair.pc0) for pair in pairs)
        rate = len(pairs) / (time.perf_counter() - start)
        requests = len(server.requests) - before
        print(
            f"{name}: {len(pairs)} pairs, {points} points, {requests} requests, {rate:.1f} pairs/s"
        )


def scale(folder: Path) -> None:
    """Time and memory of what comes before the first fit or step, with 300,000 labeled pairs."""
    write_many(folder, logs=1000)
    # Each in a process of its own, since the peak of a process's memory never sinks again.
    for step in (open_many, status_of_many, label_many, train_on_many):
        process = multiprocessing.get_context("spawn").Process(target=step, args=(folder,))
        process.start()
        process.join()


def write_many(folder: Path, logs: int) -> None:
    """Logs of 301 empty sweeps each, and a label of a hundred points for every pair."""
    grid = data.GRID_HALF_EXTENT_M
    settings = zeroflow.label_settings(nsfp.TEACHERS["fast"], grid)
    labels.claim_folder(folder / "labels", settings)
    key = data.PairKey("log-0000", 1_111_111_111_111_111_111, 2_222_222_222_222_222_222)
    flow = torch.zeros(100, 3)
    about = (settings, 0.0, 2.0, 16 * "0", flow[:, 0])
    label = zeroflow.Label(key, flow, flow[:, 0] == 0, *about)
    template = labels.write_label(folder, label).read_bytes()
    checksum = re.search(rb'"checksum": "([0-9a-f]{64})"', template)[1]
    template = template.replace(checksum, 64 * b"0")

    # In one label after the other, the names are replaced by others of the same length.
    for log_id in (f"log-{log:04d}" for log in range(logs)):
        sweeps, made = folder / "split" / log_id / "sensors" / "lidar", folder / "labels" / log_id
        sweeps.mkdir(parents=True)
        made.mkdir()
        stamps = [f"{10**18 + sweep * 10**8}" for sweep in range(301)]
        for stamp in stamps:
            (sweeps / f"{stamp}.feather").touch()
        for stamp0, stamp1 in itertools.pairwise(stamps):
            content = template.replace(b"log-0000", log_id.encode())
            content = content.replace(19 * b"1", stamp0.encode())
            content = content.replace(19 * b"2", stamp1.encode())
            checksum = hashlib.sha256(content).hexdigest().encode()
            (made / f"{stamp0}.feather").write_bytes(content.replace(64 * b"0", checksum))


def open_many(folder: Path) -> data.Pairs:
    call = functools.partial(data.open_dataset, folder / "split", true_flow=False)
    dataset, cost = with_cost(call)
    print(f"opening {len(dataset)} pairs: {cost}")
    return dataset


def status_of_many(folder: Path) -> None:
    dataset = open_many(folder)
    status, cost = with_cost(lambda: labels.label_status(dataset, folder / "labels", sample=0))
    print(f"status, {len(status.states['made'])} labels made: {cost}")


def label_many(folder: Path) -> None:
    """How long one shard of 64 looks for what is missing, which is nothing."""
    dataset = open_many(folder)
    label = functools.partial(labels.label_dataset, shard=(0, 64), workers=1)
    settings = nsfp.TEACHERS["fast"]
    count, cost = with_cost(lambda: label(dataset, folder / "labels", settings))
    assert (count.made, count.failed) == (0, [])
    print(f"label --shard 0/64, {count.found} labels found: {cost}")


def train_on_many(folder: Path) -> None:
    """The samples of a rank, and what each loader worker adds to it."""
    dataset = open_many(folder)
    make = functools.partial(train.LabeledPairs, dataset, folder / "labels")
    samples, cost = with_cost(lambda: train.Samples([make()]))
    print(f"{len(samples)} samples: {cost}")

    # A forked worker shares memory with its parent until it touches an object: that writes to the
    # object's count of references. Here it touches all samples, without reading sweeps.
    train.LabeledPairs._read = touch
    process = multiprocessing.get_context("fork").Process(target=touch_all, args=(samples,))
    process.start()
    process.join()


def touch(part: train.LabeledPairs, index: int) -> train.Sample:
    return train.Sample(*5 * [part.dataset.pair_keys[part.indices[index]]])


def touch_all(samples: train.Samples) -> None:
    before = memory_mb("smaps_rollup", "Private_Dirty")
    for i in range(len(samples)):
        samples[i]
    copied = memory_mb("smaps_rollup", "Private_Dirty") - before
    print(f"a loader worker copies {copied:.0f} MB of it")


def with_cost(call: Callable) -> tuple[object, str]:
    """What a call returns, and its time and memory: what it leaves behind, and its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory_mb("status", "VmRSS"), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    left, peak = (memory_mb("status", name) - before for name in ("VmRSS", "VmHWM"))
    return result, f"{seconds:.1f} s, {left:.0f} MB more, at most {peak:.0f} MB"


def memory_mb(file: str, name: str) -> float:
    """A line of what Linux knows about the memory of this process."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self", file).read_text())[1]) / 1e3


def label_files(folder: Path) -> None:
    """What a label costs besides the fit: its size, and the time to write, read and check it."""
    pair = full_size_pairs(folder)[0]
    label = zeroflow.make_labels([pair], nsfp.TEACHERS["fast"])[0]
    path = labels.write_label(folder, label)
    write = median_seconds(lambda: labels.write_label(folder, label))
    read = median_seconds(lambda: labels.read_label(folder, pair.key))
    end = median_seconds(lambda: labels._read_end(path, pair.key))

    # Flow is stored as float16, which rounds it.
    rounding = (labels.read_label(folder, pair.key).flow - label.flow).abs().max()
    size_kb = path.stat().st_size / 1e3
    print(
        f"label of {len(label.flow)} rows: {size_kb:.0f} kB, {1e3 * write:.0f} ms to write, ",
        end="",
    )
    print(f"{1e3 * read:.1f} ms to read and check, {1e6 * end:.0f} us to read its end;")
    print(f"  float16 changed a coordinate by {1e3 * rounding:.2f} mm at most")


def all_metrics(folder: Path) -> None:
    """Every metric on a sweep of some 80,000 points that is already in memory, one thread."""
    pairs = full_size_pairs(folder)
    pair = pairs[0]
    estimate = pair.flow + 0.05  # any estimate takes equally long
    raw_estimate = data.total_flow(estimate, pair)
    raw_flow = data.total_flow(pair.flow, pair)

    # `Scores.add` with every optional argument, for the points that are not ground.
    sweep = {
        "estimate": estimate,
        "flow": pair.flow,
        "points": pair.pc0,
        "category": pair.category,
        "is_dynamic": pair.is_dynamic,
        "is_valid": pair.is_valid,
        "is_ground": pair.is_ground0,
        "is_input": data.input_masks(pair)[0],
        "is_in_mask": challenge.mask_of(pairs, pair),
    }
    keep = ~pair.is_ground0
    sweep = {name: values[keep] for name, values in sweep.items()}
    sweep["raw"] = (raw_estimate[keep], raw_flow[keep])

    scores = metrics.Scores(data.CATEGORIES)
    with zeroflow.one_thread():
        each = median_seconds(lambda: scores.add(**sweep), 100)
    points = len(sweep["flow"])
    print(f"metrics: {1e3 * each:.1f} ms per sweep of {points} points, ", end="")
    print(f"{1000 * each:.0f} seconds per thousand sweeps")


# --- Teachers -------------------------------------------------------------------------------------


def teacher(folder: Path) -> None:
    """CPU time and errors of `fast`, by seed, on one pair and on ten streets; time of `nsfp`."""
    torch.set_num_threads(1)
    pairs = full_size_pairs(folder)
    pc0, pc1 = input_points(pairs[0])
    slow = nsfp_seconds(pc0, pc1)

    # Five seeds, because a fit depends on the start of its networks.
    times, epes, three_ways, fs = [], [], [], []
    for seed in range(5):
        fast = zeroflow.from_teacher(nsfp.NSFPSettings(seed=seed))
        numbers = zeroflow.evaluate(pairs, with_cpu_time(fast)).numbers
        times.append(numbers["seconds_per_pair"])
        epes.append(numbers["grid_epe"])
        three_ways.append(numbers["grid_three_way"])
        fs.append(numbers["grid_three_way_fs"])

    mean_s, three_way = statistics.mean(times), statistics.mean(three_ways)
    print(f"teacher, {len(pc0)} points, CPU time, one thread:")
    print(f"  nsfp, {NSFP_ITERATIONS} iterations: {slow:.0f} s")
    print(f"  fast: {mean_s:.2f} s, {slow / mean_s:.0f} times cheaper")
    print(
        f"  fast, seeds 0 to 4: mean EPE {statistics.mean(epes):.4f}, FS {statistics.mean(fs):.4f}"
    )
    print(f"  grid 3-way mean {three_way:.4f}, worst {max(three_ways):.4f}, ", end="")
    print(f"standard deviation {statistics.stdev(three_ways):.4f}")
    print_fast_errors(ten_streets(folder))
    print_false_motions(standing_streets(folder))


def with_cpu_time(estimator: zeroflow.Estimator) -> zeroflow.Estimator:
    """The same estimator; its `seconds` are CPU time, which other processes disturb less."""

    def in_cpu_time(pair: data.SweepPair) -> zeroflow.Estimate:
        start = time.process_time()
        return estimator(pair)._replace(seconds=time.process_time() - start)

    return in_cpu_time


def nsfp_seconds(pc0: Tensor, pc1: Tensor, clock: Callable = time.process_time) -> float:
    """Seconds of a whole fit of `nsfp`, from a few iterations. clock: CPU time, or another one."""
    # The first fit only warms up. The difference of the other two is six iterations, without the
    # time that any fit takes to begin.
    times = {}
    for count in (1, 2, 8):
        settings = dataclasses.replace(nsfp.TEACHERS["nsfp"], iterations=count)
        start = clock()
        nsfp.estimate_flow(pc0, pc1, settings)
        times[count] = clock() - start
    per_iteration = (times[8] - times[2]) / 6
    return NSFP_ITERATIONS * per_iteration


def print_fast_errors(streets: data.Argoverse2Pairs, device: str = "cpu") -> None:
    """Errors of `fast` for three seeds, beside no-motion."""
    rows = {"no-motion": zeroflow.evaluate(streets, zeroflow.from_baseline("no-motion")).numbers}
    # With the same seed, a GPU draws other points than a CPU, so its errors differ.
    for seed in range(3):
        fast = zeroflow.from_teacher(nsfp.NSFPSettings(seed=seed), device=device)
        rows[f"fast, seed {seed}"] = zeroflow.evaluate(streets, fast).numbers
    print(zeroflow.table(rows))
    for name, numbers in rows.items():
        walking = numbers["grid_epe_pedestrian_0.5_to_2_mps"]
        print(f"  {name}: error {walking:.4f} on pedestrians who walk, 0.5 to 2 m/s")


def print_false_motions(streets: data.Argoverse2Pairs) -> None:
    """Where nothing moves: the share of points to which `fast` gives 5 cm or more."""
    fast, false, total = zeroflow.from_teacher(nsfp.TEACHERS["fast"]), 0, 0
    for pair in streets:
        is_input, _ = data.input_masks(pair)
        moves = fast(pair).flow[is_input].norm(dim=1) >= data.DYNAMIC_THRESHOLD_M
        false, total = false + int(moves.sum()), total + len(moves)
    print(
        f"  {len(streets)} streets in which nothing moves: {100 * false / total:.3f} % of the",
        end="",
    )
    print(f" {total} points move by 5 cm or more")


def slow_teachers(folder: Path) -> None:
    """Errors of `nsfp` and `chodosh` on two of the ten streets, beside `fast`: 25 minutes."""
    torch.set_num_threads(1)
    streets = ten_streets(folder)
    pairs = [streets[0], streets[3]]
    flow_of_nsfp = {}

    def fit_nsfp(pair: data.SweepPair) -> zeroflow.Estimate:
        estimate = zeroflow.from_teacher(nsfp.TEACHERS["nsfp"])(pair)
        flow_of_nsfp[pair.key] = estimate.flow
        return estimate

    # The teacher `chodosh` is `nsfp` and then a refinement. Starting from the flow that `nsfp` has
    # just found saves a second fit; this row's time covers only the refinement.
    def refine_as_chodosh(pair: data.SweepPair) -> zeroflow.Estimate:
        is_input, _ = data.input_masks(pair)
        flow = torch.zeros_like(pair.pc0)
        points, found = pair.pc0[is_input], flow_of_nsfp[pair.key][is_input]
        start = time.perf_counter()
        flow[is_input] = nsfp.refine_flow(points, found, settings=nsfp.TEACHERS["chodosh"]).flow
        return zeroflow.Estimate(flow, time.perf_counter() - start)

    # In this order: the last estimator needs what the one before it has found.
    estimators = {
        "no-motion": zeroflow.from_baseline("no-motion"),
        "fast": zeroflow.from_teacher(nsfp.TEACHERS["fast"]),
        "nsfp": fit_nsfp,
        "chodosh, after nsfp": refine_as_chodosh,
    }
    rows = {}
    for name, estimator in estimators.items():
        rows[name] = zeroflow.evaluate(pairs, estimator).numbers
    print(zeroflow.table(rows))


def departures(folder: Path) -> None:
    """What each departure from the published teacher is worth: `fast` without it, ten streets."""
    torch.set_num_threads(1)
    streets, rows = ten_streets(folder), {}
    for name, change in DEPARTURES.items():
        settings = dataclasses.replace(nsfp.TEACHERS["fast"], **change)
        rows[name] = zeroflow.evaluate(streets, zeroflow.from_teacher(settings)).numbers

    def with_unknown_lidar(pair: data.SweepPair) -> zeroflow.Estimate:
        return zeroflow.from_teacher(nsfp.TEACHERS["fast"])(dataclasses.replace(pair, lidar1=None))

    rows["hidden points count"] = zeroflow.evaluate(streets, with_unknown_lidar).numbers
    print(zeroflow.table(rows))


# --- The student ----------------------------------------------------------------------------------


def student(folder: Path, name: str = "normal", repeats: int = 5) -> None:
    """Each form of the student on one pair: time, error, memory.

    The normal student is also compared with the teachers, and its training step and its front end
    are measured. The weights are the random ones of the tests.
    """
    pair = full_size_pairs(folder)[0]
    pc0, pc1 = pair.pc0[~pair.is_ground0], pair.pc1[~pair.is_ground1]
    model = seeded_model(fastflow3d.MODELS[name], pc0, pc1)
    forms = {form: prepare_form(model, form) for form in FORMS}
    runs = {form: functools.partial(run, [pc0], [pc1]) for form, run in forms.items()}
    times = median_seconds_in_turn(runs, repeats)

    # Errors mean little without knowing how long the flows are.
    (expected,), (is_inside,) = runs["plain"]()  # (N0, 3), (N0,)
    speed = expected[is_inside].norm(dim=1).median()
    print(f"student {name}, {len(pc0)} points, {torch.get_num_threads()} threads, ", end="")
    print(f"flows of {speed:.2f} m")

    # Each form runs in a new process, so that its peak memory is its own.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for form in FORMS:
            error = torch.zeros(1)  # the other forms compute the same as plain
            if form.startswith("fast"):
                flow = runs[form]()[0][0]
                error = (flow - expected)[is_inside].norm(dim=1)
            peak = pool.apply(form_peak_gb, (name, form, pc0, pc1))
            by_published = times["as published"] / times[form]
            by_plain = times["plain"] / times[form]
            print(f"  {form:13} {times[form]:7.3f} s, ", end="")
            print(f"{by_published:4.2f} x as published, {by_plain:4.2f} x plain; ", end="")
            print(f"error median {error.median():.1e}, maximum {error.max():.1e} m; ", end="")
            print(f"peak {peak:.2f} GB")

    if name == "normal":
        training_step(pc0, pc1)
        front_end(model, pc0)
        student_against_teachers(forms, pair)


def student_xl(folder: Path) -> None:
    """The same for the XL student, each form twice: about 15 minutes."""
    student(folder, "xl", repeats=2)


def prepare_form(model: fastflow3d.FastFlow3D, form: str) -> Callable:
    """One of FORMS of a model, as a function of clouds."""
    if form.startswith("fast"):
        dtype = getattr(torch, form.split()[1])
        return model.prepare_inference(dtype)

    # A copy, because the hook would stay with the model.
    model = copy.deepcopy(model)
    if form == "as published":
        model.backbone.register_forward_pre_hook(use_default_layout)
    return torch.no_grad()(model)


def use_default_layout(_, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook: give the U-Net its images (B, C, Y, X) in torch's default layout."""
    # Our embedder keeps the channels of a pixel side by side in memory; the published one does not.
    return tuple(image.contiguous() for image in images)


def form_peak_gb(name: str, form: str, pc0: Tensor, pc1: Tensor) -> float:
    """The most memory in GB that a process has which runs nothing but this form."""
    model = fastflow3d.FastFlow3D(fastflow3d.MODELS[name]).eval()
    prepare_form(model, form)([pc0], [pc1])
    return process_peak_gb()


def training_step(pc0: Tensor, pc1: Tensor) -> None:
    """Forward and backward pass of one pair, by memory layout and number format."""

    def prepare_step(layout: torch.memory_format, is_bfloat16: bool = False) -> Callable:
        model = fastflow3d.FastFlow3D().to(memory_format=layout).train()
        # The embedder's images are channels_last, whatever the weights are: convert them, too.
        if layout == torch.contiguous_format:
            model.backbone.register_forward_pre_hook(use_default_layout)

        # Any loss takes equally long, so the flow itself is the loss.
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
                flows, _ = model([pc0], [pc1])
            flows[0].square().sum().backward()

        return run

    steps = {
        "default layout": prepare_step(torch.contiguous_format),
        "channels_last": prepare_step(torch.channels_last),
        "channels_last, bfloat16": prepare_step(torch.channels_last, is_bfloat16=True),
    }
    times = median_seconds_in_turn(steps, 5)
    for name, each in times.items():
        ratio = times["default layout"] / each
        print(f"  training step, {name:23} {each:6.2f} s, {ratio:.2f} times as fast")


@torch.no_grad()
def front_end(model: fastflow3d.FastFlow3D, points: Tensor) -> None:
    """The way from points to pillars to an image, against the obvious way: torch.unique of rows."""
    embedder = model.embedder

    def by_unique_rows(points: Tensor) -> Tensor:
        rows, columns = embedder.settings.cells
        cell, center = fastflow3d.assign_cells(points, embedder.settings)
        is_inside = cell >= 0
        offset = (points - center)[is_inside]

        # The obvious way numbers the pillars by pairs (row, column), which torch has to sort.
        row, column = cell[is_inside] // columns, cell[is_inside] % columns
        used, pillar = torch.stack([row, column], dim=1).unique(dim=0, return_inverse=True)
        features = embedder.feature_net(
            points[None, is_inside], offset[None], pillar[None], len(used)
        )
        image = features.new_zeros(features.shape[1], rows, columns)
        image[:, used[:, 0], used[:, 1]] = features.T
        return image[None]  # (1, C, Y, X)

    # Only ways with the same result can be compared.
    assert torch.allclose(by_unique_rows(points), embedder([points])[0], atol=1e-5)
    fast = model.prepare_inference()
    runs = {
        "by unique rows": lambda: by_unique_rows(points),
        "plain": lambda: embedder([points]),
        "fast": lambda: fast._pillars(points[None]),
    }
    times = median_seconds_in_turn(runs, 9)
    for name, each in times.items():
        ratio = times["by unique rows"] / each
        print(f"  front end, {name:14} {1e3 * each:7.1f} ms per cloud, {ratio:.1f} times as fast")


def student_against_teachers(forms: dict[str, Callable], pair: data.SweepPair) -> None:
    """CPU time on one thread: the student's forms and the teachers, all on the same points."""
    with zeroflow.one_thread():
        pc0, pc1 = input_points(pair)
        teachers = {"nsfp": nsfp_seconds(pc0, pc1)}
        start = time.process_time()
        nsfp.estimate_flow(pc0, pc1)
        teachers["fast"] = time.process_time() - start

        # "plain" is left out: `student` has compared it with the other forms already.
        for form in ("as published", "fast float32", "fast bfloat16"):
            times = []
            for _ in range(4):
                start = time.process_time()
                forms[form]([pc0], [pc1])
                times.append(time.process_time() - start)
            own = statistics.median(times[1:])  # the first one only warms up
            ratios = []
            for name, each in teachers.items():
                ratios.append(f"{each / own:.1f} times faster than `{name}`")
            print(f"  one thread, student {form}: {own:.2f} s, {', '.join(ratios)}")


# --- Training -------------------------------------------------------------------------------------


def training(folder: Path) -> None:
    """Pairs per second of loading, of steps and of both, at full density; memory of a step."""
    # Labels of five iterations are bad, but they load like good ones.
    street_settings = dataclasses.replace(synthetic.PRESETS["full"], sweeps=7)
    synthetic.write_logs(folder / "streets", 1, street_settings)
    dataset = data.open_dataset(folder / "streets", true_flow=False)
    quick = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=5)
    labels.label_dataset(dataset, folder / "labels", quick)
    samples = train.Samples([train.LabeledPairs(dataset, folder / "labels")])
    in_memory = [samples[i] for i in range(len(samples))]

    # Loading alone, in this process and into the memory of the CPU.
    device = train.default_device()
    settings = train.TrainSettings(
        batch_size=1, micro_batch=1, steps=20, dtype="bfloat16", device=device, workers=0
    )
    batches = train.load(samples, dataclasses.replace(settings, device="cpu"), 0)
    with zeroflow.one_thread():
        load = median_seconds(lambda: next(batches), 12)

    # Steps on samples that are in memory, and on samples that one worker reads from disk.
    step = training_rate(in_memory, settings, folder / "step", 8)
    with_worker = dataclasses.replace(settings, workers=1)
    both = training_rate(samples, with_worker, folder / "both", 8)
    print(f"training normal, bfloat16, {device}: ", end="")
    print(f"loading {1 / load:.1f} pairs/s on one core, step {step:.2f} pairs/s,")
    print(f"  both {both:.2f} pairs/s: {both / step:.0%} of the step; ", end="")
    print(f"for 250 pairs/s loading takes {250 * load:.1f} cores")

    # Each size runs in a new process, so that its peak memory is its own.
    one_step = dataclasses.replace(settings, steps=1)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count in (1, 4):
            peak = pool.apply(training_peak_gb, (in_memory[:1] * count, one_step))
            print(f"  peak memory at a micro-batch of {count}: {peak:.2f} GB")


def training_rate(
    samples: Sequence[train.Sample], settings: train.TrainSettings, folder: Path, skipped: int
) -> float:
    """Median pairs per second of a short training, without its first `skipped` steps."""
    # During the first steps the workers read ahead, which keeps the processor busy.
    train.train(samples, settings, folder)
    return statistics.median(line["pairs_per_s"] for line in train.read_log(folder)[skipped:])


def training_peak_gb(samples: list[train.Sample], settings: train.TrainSettings) -> float:
    """The most memory in GB, of the GPU or of the process, if the samples are one micro-batch."""
    count = len(samples)
    train.train(samples, dataclasses.replace(settings, batch_size=count, micro_batch=count))
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return process_peak_gb()


# --- At once and one by one -----------------------------------------------------------------------


def at_once(folder: Path) -> None:
    """Pillars and RANSAC at full density on the CPU, in the old way and in the new one."""
    pairs = ten_streets(folder)
    compare_at_once([input_points(pair) for pair in pairs], (1, 2, 4), "normal")


def compare_at_once(
    pairs: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int], name: str
) -> None:
    """What a micro-batch, and several candidates, gain if one pass replaces a loop over them.

    pairs: points (N, 3) and (M, 3), on the device to measure. Both ways run in turn, in one call.
    """
    for count in counts:
        pillars_at_once(name, [pc0 for pc0, _ in pairs[:count]])
    ransac_at_once(*pairs[0])


def pillars_at_once(name: str, clouds: Sequence[Tensor]) -> None:
    """Forward and backward pass of the embedder, in training."""
    device = clouds[0].device
    embedder = fastflow3d.FastFlow3D(fastflow3d.MODELS[name]).embedder.to(device).train()
    images = embedder(clouds)[0]
    assert torch.allclose(pillars_cloud_by_cloud(embedder, clouds), images, atol=1e-3)
    gradient = torch.ones_like(images.detach())

    def run(embed: Callable) -> None:
        embed().backward(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()

    ways = {
        "one by one": lambda: run(lambda: pillars_cloud_by_cloud(embedder, clouds)),
        "at once": lambda: run(lambda: embedder(clouds)[0]),
    }
    print_ratio(f"pillars of {len(clouds)} clouds, {name}, {device.type}", ways)


def ransac_at_once(pc0: Tensor, pc1: Tensor) -> None:
    """RANSAC of the four candidates of `fast`, after a short fit; on the CPU, as in labelling."""
    quick = dataclasses.replace(nsfp.TEACHERS["fast"], iterations=30)
    flows = nsfp.fit_fast([pc0], [pc1], quick)[0].cpu().double()  # (K, N, 3)
    points = pc0.cpu().double()
    cluster = nsfp.find_clusters(points, quick.cluster_reach, quick.cluster_points)
    rows = nsfp._sample_clusters(cluster, (cluster >= 0).nonzero()[:, 0], quick)
    points, cluster = points[rows], cluster[rows]
    moved = points + flows[:, rows]  # (K, S, 3)
    count, clusters = len(moved), int(cluster.max()) + 1
    own_cluster = cluster + clusters * torch.arange(count)[:, None]  # (K, S)
    all_points = points.repeat(count, 1), moved.flatten(0, 1), own_cluster.flatten()
    ways = {
        "one by one": lambda: [
            nsfp.motions_by_ransac(points, each, cluster, quick) for each in moved
        ],
        "at once": lambda: nsfp.motions_by_ransac(*all_points, quick, count),
    }
    assert torch.allclose(torch.cat(ways["one by one"]()), ways["at once"](), atol=1e-9)
    print_ratio(f"RANSAC of {count} candidates, {clusters} clusters, cpu", ways)


def print_ratio(what: str, ways: dict[str, Callable]) -> None:
    """Time of two ways, measured in turn, and how many times as fast the second one is."""
    times = median_seconds_in_turn(ways, 5)
    before, after = times.values()
    each = ", ".join(f"{way} {1e3 * seconds:.1f} ms" for way, seconds in times.items())
    print(f"{what}: {each}, {before / after:.2f} times as fast")


# --- On a GPU -------------------------------------------------------------------------------------


def gpu(folder: Path) -> None:
    """Students, training and teachers on a GPU and ten streets at full density: 4 minutes."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    pairs = ten_streets(folder)
    pc0s, pc1s = [], []
    for pair in pairs:
        pc0, pc1 = input_points(pair)
        pc0s.append(pc0.cuda())
        pc1s.append(pc1.cuda())
    compare_at_once(list(zip(pc0s, pc1s, strict=True)), (1, 4, 10), "normal")
    for name in ("normal", "xl"):
        students_on_a_gpu(name, pc0s, pc1s)
    training_on_a_gpu(folder, pairs)
    teachers_on_a_gpu(pairs, pc0s, pc1s)


def students_on_a_gpu(name: str, pc0s: Sequence[Tensor], pc1s: Sequence[Tensor]) -> None:
    """Error, time and memory of the student's forms, alone and with eight pairs at once."""
    model = seeded_model(fastflow3d.MODELS[name], pc0s[0].cpu(), pc1s[0].cpu()).cuda()
    (expected,), _ = prepare_form(model, "plain")(pc0s[:1], pc1s[:1])

    # "as published" is measured on a CPU only.
    for form in FORMS[1:]:
        torch.cuda.reset_peak_memory_stats()
        run = prepare_form(model, form)
        flow = run(pc0s[:1], pc1s[:1])[0][0]
        error = (flow - expected).norm(dim=1)
        print(f"student {name}, {form:13}: error median {error.median():.1e}, ", end="")
        print(f"maximum {error.max():.1e} m", end="")
        for count in (1, 8):
            some0, some1 = pc0s[:count], pc1s[:count]
            call = functools.partial(run, some0, some1)
            each = median_seconds(lambda call=call: wait_for_gpu(call()), 20) / count
            print(f"; {count} at once {1e3 * each:.2f} ms/pair", end="")
        print(f"; peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def training_on_a_gpu(folder: Path, pairs: data.Argoverse2Pairs) -> None:
    """Pairs per second with the published batch: from memory, and from disk with 8 workers."""
    # A batch never shows a sample twice, so ten pairs must be repeated to fill one of 64.
    samples = train.Samples([train.LabeledPairs(pairs, None)])
    in_memory = [samples[i % len(samples)] for i in range(160)]
    from_disk = torch.utils.data.Subset(samples, [i % len(samples) for i in range(640)])
    for name, what, workers in (("in memory", in_memory, 0), ("from disk", from_disk, 8)):
        for dtype in ("float32", "bfloat16"):
            torch.cuda.reset_peak_memory_stats()
            settings = train.TrainSettings(steps=8, dtype=dtype, device="cuda", workers=workers)
            rate = training_rate(what, settings, folder / f"{name} {dtype}", 2)
            peak = torch.cuda.max_memory_allocated() / 1e9
            print(f"training normal, {dtype}, 64 pairs in micro-batches of 16, {name}: ", end="")
            print(f"{rate:.0f} pairs/s, {peak:.1f} GB")


def teachers_on_a_gpu(
    pairs: data.Argoverse2Pairs, pc0s: Sequence[Tensor], pc1s: Sequence[Tensor]
) -> None:
    """Time of `nsfp`; time of `fast`, alone and with ten pairs at once; errors of `fast`."""
    # The clock on the wall is right here: every iteration reads the loss and so waits for the GPU.
    each = nsfp_seconds(pc0s[0], pc1s[0], time.perf_counter)
    print(f"nsfp, {NSFP_ITERATIONS} iterations: {each:.1f} s per pair of {len(pc0s[0])} points")

    # `fast` in its two parts, the fit and the refinement.
    settings = nsfp.TEACHERS["fast"]
    for count in (1, 10):
        start = time.perf_counter()
        fitted = wait_for_gpu(nsfp.fit_fast(pc0s[:count], pc1s[:count], settings))
        fit = (time.perf_counter() - start) / count
        for pc0, flows, pc1 in zip(pc0s[:count], fitted, pc1s[:count], strict=True):
            nsfp.refine_flow(pc0, flows, pc1, settings)
        both = (time.perf_counter() - start) / count
        print(f"fast, {count} at once: {both:.2f} s per pair, {fit:.2f} of them the fit")
    print_fast_errors(pairs, "cuda")


# --- Command line ---------------------------------------------------------------------------------

# Run without a name.
SHORT = {
    "street": street,
    "data": reading,
    "labels": label_files,
    "metrics": all_metrics,
    "teacher": teacher,
    "student": student,
    "train": training,
    "at_once": at_once,
}

# Run only by name.
LONG = {
    "remote": from_a_bucket,
    "scale": scale,
    "departures": departures,
    "nsfp": slow_teachers,
    "student_xl": student_xl,
    "gpu": gpu,
}


def main(names: Sequence[str]) -> None:
    """Run benchmarks by their names, each in a temporary folder of its own."""
    benchmarks = SHORT | LONG
    for name in names:
        if name not in benchmarks:
            sys.exit(f"{name}: no such benchmark; choose from {', '.join(benchmarks)}")
    for name in names or SHORT:
        with tempfile.TemporaryDirectory() as folder:
            benchmarks[name](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
