"""Speed, and the teacher's error: python tests/bench.py NAME ...

Names: street, data, labels, metrics, teacher, student, train, which is all without a name; student_xl, departures and
published, which take longer; gpu.
Machines are shared and noisy: believe the ratios, and run it twice.
"""

import copy
import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from plain_student import seeded_model

import data
import fastflow3d
import metrics
import nsfp
import synthetic
import train
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
    """A pair from disk, with each kind of ground and with true flow; ground against the raster's; opening a split."""
    torch.set_num_threads(1)
    logs = list(a_full_pair(folder)._folders.values())
    kinds = {name: data.Argoverse2Pairs(logs, true_flow=False, ground=name) for name in data.GROUNDS}
    times = interleaved({name: lambda kind=kind: kind[0] for name, kind in kinds.items()}, 15)
    pair, labelled = kinds["raster"][0], data.Argoverse2Pairs(logs)
    print(f"reading a pair of {len(pair.pc0)} points, one thread, its log in memory, ms by ground: ", end="")
    print(", ".join(f"{name} {1e3 * each:.0f}" for name, each in times.items()))
    print(f"  with true flow and the raster {1e3 * seconds(lambda: labelled[0], 15):.0f} ms")
    points = pair.pc0.double().numpy()
    print(f"  ground without a map: {1e3 * seconds(lambda: data.is_ground_without_map(points), 15):.0f} ms a sweep")
    for name in ("vector", "points"):
        for sweep in "01":
            inside = data.is_in_grid(getattr(pair, f"pc{sweep}"))
            mask, truth = (getattr(each, f"is_ground{sweep}")[inside] for each in (kinds[name][0], pair))
            precision, recall = ((mask & truth).sum() / each.sum() for each in (mask, truth))
            f1 = 2 * precision * recall / (precision + recall)
            print(f"  {name} against the raster in the grid, sweep {sweep}: F1 {f1:.4f}, ", end="")
            print(f"precision {precision:.4f}, recall {recall:.4f}")
    for log in range(1000):
        lidar = Path(folder) / "split" / f"{log:04d}" / "sensors" / "lidar"
        lidar.mkdir(parents=True)
        for sweep in range(157):
            (lidar / f"{sweep * 10**8}.feather").touch()
    opening = seconds(lambda: data.open_dataset(Path(folder) / "split"))
    print(f"  opening a split of 1,000 logs of 157 sweeps: {opening:.2f} s")


def teacher(folder: str) -> None:
    """CPU time and error of `fast`, seeds 0 to 4, on one pair, against 346 iterations of `published`; then ten streets,
    seeds 0 to 2.

    346 is what a fit of the published teacher on the real pair was seen to take, with seed 0.
    """
    torch.set_num_threads(1)
    pairs = a_full_pair(folder)
    pc0, pc1 = inputs_of(pairs[0])
    published = published_seconds(pc0, pc1)
    times, results = [], []
    for seed in range(5):
        fast = zeroflow.from_teacher(nsfp.NSFPSettings(seed=seed))

        def in_cpu_time(pair: data.SweepPair, fast: zeroflow.Estimator = fast) -> zeroflow.Estimate:
            start = time.process_time()
            return fast(pair)._replace(seconds=time.process_time() - start)

        results.append(zeroflow.evaluate(pairs, in_cpu_time))
        times.append(results[-1]["seconds_per_pair"])
    epe, three_way = ([result[name] for result in results] for name in ("grid_epe", "grid_three_way"))
    print(f"teacher, {len(pc0)} points, CPU time, one thread: published, 346 iterations, {published:.0f} s")
    print(f"  fast {statistics.mean(times):.2f} s: {published / statistics.mean(times):.0f} times cheaper")
    print(f"  fast, seeds 0 to 4: EPE {statistics.mean(epe):.4f}, grid 3-way {statistics.mean(three_way):.4f},")
    print(f"  worst {max(three_way):.4f}")
    fast_on(ten_streets(folder))


def fast_on(streets: data.Argoverse2Pairs, device: str = "cpu") -> None:
    """Errors of `fast` by seed, beside no motion's; a GPU draws other points for a seed."""
    rows = {"no motion": zeroflow.evaluate(streets, zeroflow.timed(zeroflow.no_motion))}
    for seed in range(3):
        rows[f"fast, seed {seed}"] = zeroflow.evaluate(
            streets, zeroflow.from_teacher(nsfp.NSFPSettings(seed=seed), device)
        )
    print(zeroflow.table(rows))


def inputs_of(pair: data.SweepPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both sweeps the points (N, 3) that teacher and student see."""
    is_source, is_target = zeroflow.input_masks(pair)
    return pair.pc0[is_source], pair.pc1[is_target]


def published(folder: str) -> None:
    """The published teacher and Chodosh's on two of the ten streets, `fast` beside them: about 25 minutes."""
    torch.set_num_threads(1)
    streets = ten_streets(folder)
    some = [streets[index] for index in (0, 3)]
    flows = {}

    def refined(pair: data.SweepPair) -> zeroflow.Estimate:
        """Chodosh's teacher, from the published one's flow."""
        rows, flow = zeroflow.input_masks(pair)[0], torch.zeros_like(pair.pc0)
        start = time.perf_counter()
        flow[rows] = nsfp.refine_flow(pair.pc0[rows], flows[pair.key][rows], settings=nsfp.TEACHERS["chodosh"])
        return zeroflow.Estimate(flow, time.perf_counter() - start)

    def fitted(pair: data.SweepPair) -> zeroflow.Estimate:
        estimate = zeroflow.from_teacher(nsfp.TEACHERS["published"])(pair)
        flows[pair.key] = estimate.flow
        return estimate

    rows = {"no motion": zeroflow.evaluate(some, zeroflow.timed(zeroflow.no_motion))}
    rows["fast"] = zeroflow.evaluate(some, zeroflow.from_teacher(nsfp.TEACHERS["fast"]))
    rows["published"] = zeroflow.evaluate(some, fitted)
    rows["chodosh, after it"] = zeroflow.evaluate(some, refined)
    print(zeroflow.table(rows))


def departures(folder: str) -> None:
    """What each departure of `fast` from the published teacher is worth: `fast` without it, on ten streets."""
    torch.set_num_threads(1)
    streets, rows = ten_streets(folder), {}
    for name, change in {
        "fast": {},
        "one prior": {"priors": 1},
        "one prior, batches of 1,024": {"priors": 1, "batch_points": 1024},
        "points drawn evenly": {"draw_min": 1.0, "draw_max": 1.0},
        "raw metres in": {"input_scale": 1.0},
        "constant rate": {"cosine": False},
        "150 steps": {"iterations": 150},
        "no evidence asked for": {"evidence": 1.0},
        "not drawn to sweep 1": {"icp_steps": 0},
        "all points speak": {"cluster_sample": 0},
        "one prior, clusters as the flow says": {"priors": 1, "batch_points": 1024, "refine": "flow"},
        "one prior, not refined": {"priors": 1, "batch_points": 1024, "refine": ""},
    }.items():
        settings = dataclasses.replace(nsfp.TEACHERS["fast"], **change)
        rows[name] = zeroflow.evaluate(streets, zeroflow.from_teacher(settings))
    print(zeroflow.table(rows))


def ten_streets(folder: str) -> data.Argoverse2Pairs:
    """Ten pairs at full density, a street each, of a seed on which nothing was tuned."""
    settings = dataclasses.replace(synthetic.PRESETS["full"], sweeps=2, seed=51)
    synthetic.write_logs(Path(folder) / "streets", 10, settings)
    return data.open_dataset(Path(folder) / "streets")


def labels(folder: str) -> None:
    """What a label costs beside the fit: bytes, writing, and reading it again to see that it is whole."""
    pair = a_full_pair(folder)[0]
    label = zeroflow.make_labels([pair], nsfp.TEACHERS["fast"])[0]
    path = zeroflow.write_label(folder, label)
    write = seconds(lambda: zeroflow.write_label(folder, label))
    read = seconds(lambda: zeroflow.read_label(folder, pair.key))
    lost = (zeroflow.read_label(folder, pair.key).flow - label.flow).abs().max()
    size = path.stat().st_size
    print(
        f"label of {len(label.flow)} rows: {size / 1e3:.0f} kB, {1e3 * write:.0f} ms to write, {1e3 * read:.1f} ms to"
    )
    print(f"  check; float16 moved a coordinate by {1e3 * lost:.2f} mm at most")


def all_metrics(folder: str) -> None:
    """Every metric on a sweep of some 80,000 points that lies in memory, one thread."""
    pairs = a_full_pair(folder)
    pair = pairs[0]
    estimate = pair.flow + 0.05
    sweep = {
        "estimate": estimate,
        "flow": pair.flow,
        "points": pair.pc0,
        "category": pair.category,
        "is_dynamic": pair.is_dynamic,
        "is_valid": pair.is_valid,
        "is_ground": pair.is_ground0,
        "is_input": zeroflow.input_masks(pair)[0],
        "is_in_mask": pairs.challenge_mask(pair),
    }
    sweep = {name: x[~pair.is_ground0] for name, x in sweep.items()}
    sweep["raw"] = [data.total_flow(flow, pair)[~pair.is_ground0] for flow in (estimate, pair.flow)]
    scores = metrics.Scores(data.CATEGORIES)
    with zeroflow.one_thread():
        each = seconds(lambda: scores.add(**sweep), 100)
    print(f"metrics: {1e3 * each:.1f} ms a sweep of {len(sweep['flow'])} points, {1000 * each:.0f} s a thousand")


def student(folder: str, name: str = "normal", repeats: int = 5) -> None:
    """The student's forms on one pair: time, error, memory; then its training step, its front end, and its teachers.

    The weights are the tests' random ones. "as published" is the plain model, its pictures in torch's default layout.
    """
    pair = a_full_pair(folder)[0]
    pc0, pc1 = pair.pc0[~pair.is_ground0], pair.pc1[~pair.is_ground1]
    model = seeded_model(fastflow3d.MODELS[name], pc0, pc1)
    forms = {form: in_form(model, form) for form in FORMS}
    runs = {form: lambda run=run: run([pc0], [pc1]) for form, run in forms.items()}
    times = interleaved(runs, repeats)
    (right,), (inside,) = runs["plain"]()
    print(f"student {name}, {len(pc0)} points, {torch.get_num_threads()} threads, flows of ", end="")
    print(f"{right[inside].norm(dim=1).median():.2f} m")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for form in FORMS:
            error = (runs[form]()[0][0] - right)[inside].norm(dim=1) if form.startswith("fast") else torch.zeros(1)
            peak = pool.apply(peak_gb, (name, form, pc0, pc1))
            published, plain = (times[other] / times[form] for other in ("as published", "plain"))
            print(
                f"  {form:13} {times[form]:7.3f} s, {published:4.2f} x as published, {plain:4.2f} x plain; "
                f"error median {error.median():.1e}, maximum {error.max():.1e} m; peak {peak:.2f} GB"
            )
    if name == "normal":
        training_step(pc0, pc1)
        front_end(model, pc0)
        against_teachers(forms, pair)


def training(folder: str) -> None:
    """Pairs a second of loading alone, of the step alone and of both, at full density; and the step's peak memory."""
    streets, labels = Path(folder) / "streets", Path(folder) / "labels"
    synthetic.write_logs(streets, 1, dataclasses.replace(synthetic.PRESETS["full"], sweeps=7))
    dataset = data.open_dataset(streets, true_flow=False)
    zeroflow.label_dataset(dataset, labels, dataclasses.replace(nsfp.TEACHERS["fast"], iterations=5))
    samples = train.Samples([train.LabelledPairs(dataset, labels)])
    kept = [samples[i] for i in range(len(samples))]
    device = zeroflow.default_device()
    settings = train.TrainSettings(batch_size=1, micro_batch=1, steps=20, dtype="bfloat16", device=device, workers=0)
    batches = train.load(samples, dataclasses.replace(settings, device="cpu"), 0)
    with zeroflow.one_thread():
        load = seconds(lambda: next(batches), 12)
    rates = {}
    for name, what, workers in (("step", kept, 0), ("both", samples, 1)):
        run = Path(folder) / name
        train.train(what, dataclasses.replace(settings, workers=workers), run)
        # The first steps do not count: the worker reads ahead beside them.
        rates[name] = statistics.median(line["pairs_per_s"] for line in train.read_log(run)[8:])
    step, both = rates["step"], rates["both"]
    print(f"training normal, bfloat16, {device}: loading {1 / load:.1f} pairs/s of one core, step {step:.2f} pairs/s,")
    print(f"  both {both:.2f}: {both / step:.0%} of the step; for 250 pairs/s loading takes {250 * load:.1f} cores")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count in (1, 4):
            peak = pool.apply(peak_of_training, (kept[:1] * count, dataclasses.replace(settings, steps=1)))
            print(f"  peak memory at a micro-batch of {count}: {peak:.2f} GB")


def peak_of_training(samples: list, settings: train.TrainSettings) -> float:
    count = len(samples)
    train.train(samples, dataclasses.replace(settings, batch_size=count, micro_batch=count))
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def student_xl(folder: str) -> None:
    """The same for XL, each form twice: about 15 minutes."""
    student(folder, "xl", repeats=2)


FORMS = ("as published", "plain", "fast float32", "fast bfloat16")


def in_form(model: fastflow3d.FastFlow3D, form: str) -> Callable:
    if form.startswith("fast"):
        return model.prepare_inference(getattr(torch, form.split()[1]))
    model = copy.deepcopy(model)
    if form == "as published":
        model.backbone.register_forward_pre_hook(default_layout)
    return torch.no_grad()(model)


def default_layout(_, images: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(image.contiguous() for image in images)


def peak_gb(name: str, form: str, pc0: torch.Tensor, pc1: torch.Tensor) -> float:
    """Most memory that a process of its own had, torch's code included."""
    in_form(fastflow3d.FastFlow3D(fastflow3d.MODELS[name]).eval(), form)([pc0], [pc1])
    status = Path("/proc/self/status").read_text()  # not getrusage, which remembers the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def interleaved(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn, so that a busy machine is busy for all. Of few repeats the first counts."""
    times = {name: [] for name in runs}
    for _ in range(repeats + (repeats > 2)):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[-repeats:]) for name, each in times.items()}


def training_step(pc0: torch.Tensor, pc1: torch.Tensor) -> None:
    def step(layout: torch.memory_format, precision: torch.dtype) -> Callable:
        model = fastflow3d.FastFlow3D().to(memory_format=layout).train()
        if layout == torch.contiguous_format:
            model.backbone.register_forward_pre_hook(default_layout)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16):
                flows, _ = model([pc0], [pc1])
            flows[0].square().sum().backward()

        return run

    times = interleaved(
        {
            "default layout": step(torch.contiguous_format, torch.float32),
            "channels_last": step(torch.channels_last, torch.float32),
            "channels_last, bfloat16": step(torch.channels_last, torch.bfloat16),
        },
        5,
    )
    for name, each in times.items():
        print(f"  training step, {name:23} {each:6.2f} s, {times['default layout'] / each:.2f} times as fast")


@torch.no_grad()
def front_end(model: fastflow3d.FastFlow3D, points: torch.Tensor) -> None:
    """Points to pillars to a picture, against the same by torch.unique over rows of (row, column)."""
    embedder = model.embedder

    def by_unique_rows(points: torch.Tensor) -> torch.Tensor:
        rows, columns = embedder.settings.cells
        cell, center = fastflow3d.assign_cells(points, embedder.settings)
        inside = cell >= 0
        index = torch.stack([cell[inside] // columns, cell[inside] % columns], dim=1)
        used, pillar = index.unique(dim=0, return_inverse=True)
        features = embedder.feature_net(points[inside], (points - center)[inside], pillar, len(used))
        image = features.new_zeros(features.shape[1], rows, columns)
        image[:, used[:, 0], used[:, 1]] = features.T
        return image[None]

    assert torch.allclose(by_unique_rows(points), embedder([points])[0], atol=1e-5)
    fast = model.prepare_inference()
    times = interleaved(
        {
            "by unique rows": lambda: by_unique_rows(points),
            "plain": lambda: embedder([points]),
            "fast": lambda: fast._pillars(points[None]),
        },
        9,
    )
    for name, each in times.items():
        ratio = times["by unique rows"] / each
        print(f"  front end, {name:14} {1e3 * each:7.1f} ms a cloud, {ratio:.1f} times as fast")


def against_teachers(forms: dict[str, Callable], pair: data.SweepPair) -> None:
    """CPU time of one thread: the teachers on the points they see, 346 iterations of `published` (see `teacher`)."""
    with zeroflow.one_thread():
        pc0, pc1 = inputs_of(pair)
        teachers = {"published": published_seconds(pc0, pc1)}
        start = time.process_time()
        nsfp.estimate_flow(pc0, pc1)
        teachers["fast"] = time.process_time() - start
        for form in ("as published", "fast float32", "fast bfloat16"):
            times = []
            for _ in range(4):  # the first does not count
                start = time.process_time()
                forms[form]([pc0], [pc1])
                times.append(time.process_time() - start)
            mine = statistics.median(times[1:])
            ratios = ", ".join(f"{each / mine:.1f} times faster than `{name}`" for name, each in teachers.items())
            print(f"  one thread, student {form}: {mine:.2f} s, {ratios}")


def published_seconds(pc0: torch.Tensor, pc1: torch.Tensor, clock: Callable[[], float] = time.process_time) -> float:
    """CPU time of 346 iterations of the published teacher, from a few of them. clock: another time than the CPU's."""
    times = []
    for count in (1, 2, 8):  # the first only warms up
        start = clock()
        nsfp.estimate_flow(pc0, pc1, dataclasses.replace(nsfp.TEACHERS["published"], iterations=count))
        times.append(clock() - start)
    return 346 * (times[2] - times[1]) / 6


def gpu(folder: str) -> None:
    """On a GPU and ten streets at full density: the students, their training, and the teachers. About 4 minutes."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    pairs = ten_streets(folder)
    pc0s, pc1s = zip(*([points.cuda() for points in inputs_of(pair)] for pair in pairs), strict=True)
    for name in ("normal", "xl"):
        students_on_a_gpu(name, pc0s, pc1s)
    training_on_a_gpu(folder, pairs)
    teachers_on_a_gpu(pairs, pc0s, pc1s)


def students_on_a_gpu(name: str, pc0s: Sequence[torch.Tensor], pc1s: Sequence[torch.Tensor]) -> None:
    model = seeded_model(fastflow3d.MODELS[name], pc0s[0].cpu(), pc1s[0].cpu()).cuda()
    (right,), _ = in_form(model, "plain")(pc0s[:1], pc1s[:1])
    for form in FORMS[1:]:
        torch.cuda.reset_peak_memory_stats()
        run = in_form(model, form)
        error = (run(pc0s[:1], pc1s[:1])[0][0] - right).norm(dim=1)
        print(f"student {name}, {form:13}: error median {error.median():.1e}, maximum {error.max():.1e} m", end="")
        for batch in (1, 8):
            each = seconds(lambda run=run, batch=batch: done(run(pc0s[:batch], pc1s[:batch])), 20) / batch
            print(f"; {batch} at once {1e3 * each:.2f} ms a pair", end="")
        print(f"; peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def done(result: object) -> object:
    """The result, once the GPU has it."""
    torch.cuda.synchronize()
    return result


def training_on_a_gpu(folder: str, pairs: data.Argoverse2Pairs) -> None:
    """Pairs a second of the published batch: samples in memory, and from disk by 8 workers."""
    samples = train.Samples([train.LabelledPairs(pairs, None)])
    kept = [samples[i % len(samples)] for i in range(160)]
    from_disk = torch.utils.data.Subset(samples, [i % len(samples) for i in range(640)])
    for name, what, workers in (("in memory", kept, 0), ("from disk", from_disk, 8)):
        for dtype in train.DTYPES:
            torch.cuda.reset_peak_memory_stats()
            run = Path(folder) / f"{name} {dtype}"
            settings = train.TrainSettings(steps=8, dtype=dtype, device="cuda", workers=workers)
            train.train(what, settings, run)
            rate = statistics.median(line["pairs_per_s"] for line in train.read_log(run)[2:])
            peak = torch.cuda.max_memory_allocated() / 1e9
            print(
                f"training normal, {dtype}, 64 pairs in micro-batches of 16, {name}: {rate:.0f} pairs/s, {peak:.1f} GB"
            )


def teachers_on_a_gpu(pairs: data.Argoverse2Pairs, pc0s: Sequence[torch.Tensor], pc1s: Sequence[torch.Tensor]) -> None:
    each = published_seconds(pc0s[0], pc1s[0], time.perf_counter)  # its loss is asked for, so it waits for the GPU
    print(f"published, 346 iterations: {each:.1f} s a pair of {len(pc0s[0])} points")
    for count in (1, 10):
        start = time.perf_counter()
        fitted = done(nsfp._fit(pc0s[:count], pc1s[:count], nsfp.TEACHERS["fast"]))
        fit = time.perf_counter() - start
        for pc0, flows, pc1 in zip(pc0s, fitted, pc1s, strict=False):
            nsfp.refine_flow(pc0, flows, pc1, nsfp.TEACHERS["fast"])
        refined = time.perf_counter() - start
        print(f"fast, {count} at once: {refined / count:.2f} s a pair, {fit / count:.2f} of them the fit")
    fast_on(pairs, "cuda")


if __name__ == "__main__":
    benches = {
        "street": street,
        "data": reading,
        "labels": labels,
        "metrics": all_metrics,
        "teacher": teacher,
        "student": student,
        "train": training,
    }
    for name in sys.argv[1:] or benches:
        with tempfile.TemporaryDirectory() as folder:
            longer = {"departures": departures, "published": published, "student_xl": student_xl, "gpu": gpu}
            (benches | longer)[name](folder)
