"""The command line behind `python zeroflow.py COMMAND` and `python train.py`.

One function per command, in the order in which a user needs them, then the parser. Options that are
settings (of the teacher, the street, the trainer) are made from the settings' dataclasses: the
type, the choices, the default and the help text of an option each have a single source.

Exit status: 0 if all went well, 1 after an error or if something was left out, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import statistics
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import feather
from tqdm import tqdm

import challenge
import clouds
import data
import demo
import fastflow3d
import labels
import metrics
import nsfp
import synthetic
import train
import zeroflow
from data import DataError, Outage


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands of `python zeroflow.py`. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(argv).parse_args(argv)
    return _run(lambda: arguments.run(arguments))


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `python train.py`. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _train_parser(argv).parse_args(argv)
    return _run(lambda: _train(arguments))


def _run(command: Callable[[], int]) -> int:
    """Call a command. An error that the user can fix is one line, without a traceback."""
    # File names may not be valid UTF-8. Printing one must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except (DataError, Outage, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


# --- Data -----------------------------------------------------------------------------------------


def _synthesize(arguments: argparse.Namespace) -> int:
    settings = chosen_settings(arguments, synthetic.PRESETS[arguments.preset])
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        raise DataError(f"{arguments.out}: is not empty; choose a new folder")
    train.print_settings(settings)
    synthetic.write_logs(arguments.out, arguments.logs, settings)
    pairs = data.open_dataset(arguments.out)
    print(f"{arguments.logs} logs, {len(pairs)} pairs, in {arguments.out}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    train.check_device(arguments.device)
    dataset = train.open_and_report(arguments.data, arguments)
    grid = fastflow3d.MODELS[arguments.model].half_extent_m
    found = survey(dataset, arguments.sample, grid)
    found["kind"] = type(dataset).__name__.removesuffix("Pairs")
    found["notes"] = dataset.notes  # reading may have added some
    is_remote = hasattr(dataset, "bytes_to_fetch")
    found["bytes"] = dataset.bytes_to_fetch() if is_remote else data.bytes_in(Path(arguments.data))
    found["is_remote"] = is_remote
    found["is_usable"] = len(found["broken"]) <= arguments.max_broken * found["pairs_read"]

    # City coordinates, for instance, lie far outside any student's grid: nothing would be learned.
    is_outside = found.get("share_input") == 0
    found["is_usable"] &= not is_outside

    # Time labeling and training, if there is a pair to try it on. This takes half a minute or more,
    # so it is done only on request.
    if arguments.cost and len(found["broken"]) < found["pairs_read"]:
        found |= cost(dataset, arguments.device, arguments.model)
    _print_survey(arguments, found)
    if arguments.json:
        _write_json(arguments.json, found)

    reason = f"cannot be used: more than {arguments.max_broken:.0%} is broken"
    if is_outside:
        reason = "cannot be used: no point is in the student's grid; are these ego coordinates?"
    print("can be used" if found["is_usable"] else reason)
    return 0 if found["is_usable"] else 1


def survey(dataset: data.Pairs, sample: int | None, half_extent_m: zeroflow.Grid) -> dict:
    """What a data set holds, from reading `sample` of its pairs (None: all), evenly spread.

    `broken` lists what is wrong with the pairs that cannot be read.
    """
    # A sample tells nearly as much as the whole: logs of one data set resemble each other.
    points, shares, seconds, broken, with_true_flow = [], [], [], [], 0
    indices = data.evenly_spread(len(dataset), sample)
    for index in tqdm(indices, desc="check", unit="pair"):
        start = time.perf_counter()
        try:
            pair = dataset[index]
        except (DataError, OSError) as error:
            broken.append(str(error))
            continue
        seconds.append(time.perf_counter() - start)
        points.append(len(pair.pc0))
        is_input = data.input_masks(pair, half_extent_m)[0]
        shares.append([mask.float().mean().item() for mask in (~pair.is_ground0, is_input)])
        with_true_flow += pair.flow is not None

    # Folder listings are enough to count logs and pairs ...
    recorded_ns = sum(stamps[-1] - stamps[0] for stamps in dataset.stamps.values() if stamps)
    found = {
        "logs": len(dataset.stamps),
        "pairs": len(dataset),
        "seconds_recorded": recorded_ns / 1e9,
        "skipped": dataset.skipped,
        "broken": broken,
        "pairs_read": len(indices),
    }
    # ... and the sample shows what the sweeps look like.
    if points:
        not_ground, is_input = np.mean(shares, axis=0).tolist()
        found |= {
            "points_least": min(points),
            "points_most": max(points),
            "pairs_with_true_flow": with_true_flow,
            "share_not_ground": not_ground,
            "share_input": is_input,
            "seconds_to_read": float(np.median(seconds)),
        }
    return found


def cost(dataset: data.Pairs, device: str, model: str) -> dict[str, float]:
    """Seconds that the `fast` teacher and a training step take for the first readable pair."""
    for index in range(len(dataset)):
        with contextlib.suppress(DataError, OSError):
            pair = dataset[index]
            break
    start = time.perf_counter()
    with zeroflow.one_thread():
        grid = fastflow3d.MODELS[model].half_extent_m
        (label,) = zeroflow.make_labels([pair], nsfp.TEACHERS["fast"], grid, device)
    seconds_to_label = time.perf_counter() - start
    return {
        "suspicion": labels.suspicion(label, pair),
        "seconds_to_label": seconds_to_label,
        "seconds_to_train": _seconds_to_train(pair, device, model),
    }


def _seconds_to_train(pair: data.SweepPair, device: str, model: str) -> float:
    """Seconds of one training step with one pair."""
    student = fastflow3d.FastFlow3D(fastflow3d.MODELS[model])
    student.to(device, memory_format=torch.channels_last).train()
    pc0, pc1 = pair.pc0[~pair.is_ground0].to(device), pair.pc1[~pair.is_ground1].to(device)

    # The first step also chooses kernels and allocates memory, so the second one is measured.
    for _ in range(2):
        start = time.perf_counter()
        flows, _ = student([pc0], [pc1])
        flows[0].norm(dim=1).sum().backward()
        flows[0].cpu()  # a GPU has finished by then, too
    return time.perf_counter() - start


def _print_survey(arguments: argparse.Namespace, found: dict) -> None:
    recorded = _duration(found["seconds_recorded"])
    print(
        f"{arguments.data}: {found['kind']}, {found['logs']} logs, {found['pairs']} pairs", end=""
    )
    print(f", {recorded}, {len(found['skipped'])} files or neighbors that form no pair")
    where = "an epoch would still transfer" if found["is_remote"] else "disk"
    print(f"{where}: {found['bytes'] / 1e6:.3g} MB")
    for line in found["broken"]:
        print(f"broken: {line}")
    print(f"read: {found['pairs_read']} pairs, evenly spread, {len(found['broken'])} broken")
    if "seconds_to_read" not in found:
        return

    reading = f"reading: {1e3 * found['seconds_to_read']:.0f} ms/pair"
    print(f"{reading}, {found['pairs_with_true_flow']} of them with true flow")
    shares = f"{found['share_not_ground']:.0%} not ground, {found['share_input']:.0%} used"
    print(f"points per sweep: {found['points_least']} to {found['points_most']}", end="")
    print(f", {shares} (not ground and in the student's grid)")
    if found.get("suspicion"):
        print(f"suspicious: {found['suspicion']}")

    # Extrapolated from one pair, so these times are a first guess.
    if "seconds_to_label" not in found:
        return
    for what, name, unit in (
        ("label", "labels by fast", "of one worker"),
        ("train", f"training {arguments.model}", "per epoch"),
    ):
        seconds = found[f"seconds_to_{what}"]
        print(f"{name}: {seconds:.2f} s per pair here", end="")
        print(f", {_duration(found['pairs'] * seconds)} {unit}")


def _duration(seconds: float) -> str:
    """A time in a unit that gives a handy number."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


# --- Labels ---------------------------------------------------------------------------------------


def _label(arguments: argparse.Namespace) -> int:
    settings = chosen_settings(arguments, nsfp.TEACHERS[arguments.teacher])
    train.check_device(arguments.device)
    shard, device = labels.chosen_shard(arguments.shard), arguments.device

    # torchrun starts one process per GPU and numbers them.
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise DataError(
                f"torchrun's rank {device}: start as many ranks as there are GPUs, "
                "or use --device cpu"
            )

    half_extent_m = fastflow3d.MODELS[arguments.model].half_extent_m
    dataset = train.open_and_report(arguments.data, arguments, true_flow=False)
    train.print_settings(zeroflow.label_settings(settings, half_extent_m))
    start = time.perf_counter()
    count = labels.label_dataset(
        dataset,
        arguments.labels,
        settings,
        half_extent_m,
        workers=arguments.workers,
        device=device,
        shard=shard,
        max_broken=arguments.max_broken,
        whole=arguments.whole,
    )
    for key, reason in count.failed:
        print(f"no label for {tuple(key)}: {reason}", file=sys.stderr)
    for key, reason in count.suspicious[:20]:
        print(f"{tuple(key)}: {reason}", file=sys.stderr)
    if len(count.suspicious) > 20:
        print(f"and {len(count.suspicious) - 20} more pairs like these", file=sys.stderr)
    minutes = (time.perf_counter() - start) / 60
    print(
        f"{arguments.labels}, shard {shard[0]}/{shard[1]}: {count.made} labels made in "
        f"{minutes:.1f} min, {count.found} found, {len(count.failed)} failed",
        flush=True,
    )

    # torchrun stops all ranks as soon as one of them fails. There, a failed pair must not stop the
    # work of the other ranks.
    return 1 if count.failed and "TORCHELASTIC_RUN_ID" not in os.environ else 0


def _status(arguments: argparse.Namespace) -> int:
    if arguments.shards < 1:
        raise DataError(f"--shards {arguments.shards}: give the number of shards, 1 or more")
    dataset = train.open_and_report(arguments.data, arguments, true_flow=False)
    status = labels.label_status(dataset, arguments.labels, arguments.sample, arguments.whole)
    for state in ("failed", "torn", "foreign"):
        for key, reason in status.states[state].items():
            print(f"{state}: {tuple(key)}: {reason}")

    # Which logs lack labels? A few names tell whether whole logs are missing.
    to_make = [*status.states["missing"], *status.states["torn"]]
    lacking: dict[str, int] = {}
    for key in to_make:
        lacking[key.log_id] = lacking.get(key.log_id, 0) + 1
    if lacking:
        some = ", ".join(f"{count} of {log}" for log, count in list(lacking.items())[:5])
        more = f" and of {len(lacking) - 5} more logs" if len(lacking) > 5 else ""
        print(f"no label yet: {some}{more}")

    again, hours = [], None
    if not status.is_published and to_make:
        shards = {labels.shard_of(key, arguments.shards) for key in to_make}
        again = [f"{i}/{arguments.shards}" for i in sorted(shards)]
        # Without --whole, a label that is damaged in the middle would count as made.
        whole = ", each with --whole" if arguments.whole and status.states["torn"] else ""
        print("run again:", " ".join(f"--shard {shard}" for shard in again) + whole)
    if status.seconds:
        mean_s = float(np.mean(status.seconds))
        hours = len(to_make) * mean_s / 3600
        if to_make:
            print(f"left: {hours:.2f} hours of one worker, at {mean_s:.2f} s per pair")

    counts = {state: len(pairs) for state, pairs in status.states.items()}
    if arguments.json:
        found = {"run_again": again, "hours_left": hours, "lacking": lacking}
        _write_json(arguments.json, {**counts, **found})
    text = ", ".join(f"{n} {state}" for state, n in counts.items() if n or state != "foreign")
    print(f"{arguments.labels}: {text}, of {len(dataset)} pairs")
    return 0 if counts["made"] == len(dataset) else 1


# --- Training -------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    settings = train.resolve(given_settings(arguments, train.TrainSettings))
    given_demo = given_settings(arguments, demo.DemoSettings)
    if settings.data and given_demo:
        name = next(iter(given_demo)).replace("_", "-")
        raise DataError(f"--{name}: belongs to the demo, which runs without --data; leave it out")
    with train.processes(settings) as settings:
        if settings.data:
            train.run(settings)
        else:
            demo.run(settings, dataclasses.replace(demo.DemoSettings(), **given_demo))
    return 0


def _curve(arguments: argparse.Namespace) -> int:
    import viz  # matplotlib is loaded only when a picture is asked for

    lines = train.read_log(arguments.out)
    if not lines:
        raise DataError(f"{arguments.out}: no log.jsonl of a run; give the --out of one")
    file = arguments.out / "curve.png"
    viz.learning_curve_figure(lines).savefig(file, dpi=120)
    print(f"wrote {file}")
    return 0


# --- Evaluation -----------------------------------------------------------------------------------


def _evaluate(arguments: argparse.Namespace) -> int:
    method = _chosen_method(arguments)
    masks = challenge.ChallengeFiles(arguments.masks) if arguments.masks else None
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
    whole = train.open_and_report(arguments.data, arguments, truth=arguments.truth)
    dataset, half_extent_m, estimator = method(whole, masks)

    # Every method is scored on the points of one student's grid, see --model.
    if arguments.model:
        half_extent_m = fastflow3d.MODELS[arguments.model].half_extent_m
    if not _has_truth(dataset):
        return _judge(arguments, dataset, estimator, half_extent_m)
    if arguments.against:
        raise DataError("--against: is for data without annotations; leave it out")
    mask_of = masks.mask if masks else functools.partial(challenge.mask_of, dataset)
    evaluation = zeroflow.evaluate(
        dataset, estimator, half_extent_m, mask_of, arguments.max_broken
    )
    numbers, name = evaluation.numbers, _name_of_method(arguments)
    size = " x ".join(f"{2 * half:g}" for half in half_extent_m)
    print(f"{numbers['pairs']} pairs; errors in meters; the grid is {size} m", end="")
    print("; boxes grow with speed" if arguments.truth == "grown" else "")
    # On Waymo only this number can be compared with what others have published.
    if type(dataset).__name__ == "WaymoPairs":
        others = ", ".join(f"{who} {value}" for who, value in metrics.WAYMO_BUCKETED.items())
        mean = numbers["bucketed_dynamic_mean"]
        print(f"\nbucketed, dynamic: {mean:.3f}; published for the validation split: {others}")
    print(zeroflow.table({name: numbers}), metrics.report(numbers), sep="\n\n")

    # The paper's numbers are of the whole validation split, so only that is shown beside them.
    is_whole = numbers["pairs"] == len(whole) and len(whole.stamps) == metrics.AV2_VAL_LOGS
    is_whole &= arguments.truth == "av2"
    if is_whole and Path(arguments.data).name == "val":
        print(metrics.beside_the_paper(name, numbers))
    if arguments.json:
        grid = dict(zip(("grid_x_m", "grid_y_m", "grid_z_m"), half_extent_m, strict=True))
        _write_json(arguments.json, {**numbers, **grid, "truth": arguments.truth})
    if arguments.figures:
        _draw_figures(arguments.figures, dataset, estimator, name, evaluation, half_extent_m)
    if numbers["broken"]:
        print(f"{numbers['broken']} pairs were left out; the reasons are on stderr")
    return 1 if numbers["broken"] else 0


def _has_truth(dataset: data.Pairs) -> bool:
    """Does the first readable pair have a true flow? If none is readable, the caller finds out."""
    for index in range(len(dataset)):
        with contextlib.suppress(DataError, OSError):
            return dataset[index].flow is not None
    return True


def _judge(arguments: argparse.Namespace, dataset: data.Pairs, estimator, half_extent_m) -> int:
    """`evaluate` without a true flow: print what can be measured, but no errors."""
    import look  # Pillow and matplotlib are loaded only when they are needed

    if arguments.figures:
        raise DataError("--figures: draws errors, and this data has no annotations; see `show`")
    other = None
    if arguments.against:
        other = labels.from_labels(labels.open_labels(arguments.against, dataset))
    numbers = look.judge(dataset, estimator, half_extent_m, other, arguments.max_broken)
    size = " x ".join(f"{2 * half:g}" for half in half_extent_m)
    print(f"{numbers['pairs']} pairs without annotations; the grid is {size} m")
    print("no error can be measured; these are means over pairs:\n")
    for name, about in look.JUDGED.items():
        if name in numbers:
            print(f"{numbers[name]:10.4f}  {about}")
    if arguments.json:
        _write_json(arguments.json, numbers)
    return 1 if numbers["broken"] else 0


def _submit(arguments: argparse.Namespace) -> int:
    if arguments.out.suffix != ".zip":
        raise DataError(f"{arguments.out}: choose a name that ends in .zip")
    if arguments.masks and arguments.challenge != 2023:
        raise DataError("--masks: only the 2023 challenge has masks; others score every point")
    if arguments.supervised and arguments.challenge != 2024:
        raise DataError("--supervised: only the 2024 challenge asks for it; leave it out")

    # Check the method and the masks first: this does not need the data.
    method = _chosen_method(arguments)
    masks = challenge.ChallengeFiles(arguments.masks) if arguments.masks else None
    whole = train.open_and_report(arguments.data, arguments, true_flow=False)
    _, _, estimator = method(whole, masks)
    count = challenge.write_submission(
        arguments.out, whole, estimator, arguments.challenge, masks, arguments.supervised
    )
    print(f"{arguments.out}: {count} pairs for the challenge of {arguments.challenge}")
    if arguments.challenge == 2026:
        fields = f"-F 'file=@{arguments.out}' -F 'method_name=NAME' -F 'is_unsupervised=true'"
        print("upload it, with the key of your account and the name of your method, by")
        print(f"curl -X POST {challenge.UPLOAD_2026} -H 'X-API-Key: KEY' {fields}")
    return 0


# A method, once the data is open: the pairs that it covers, its grid, and its estimator.
Method = Callable[
    [data.Pairs, challenge.ChallengeFiles | None],
    tuple[data.Pairs, tuple[float, float, float], zeroflow.Estimator],
]


def _chosen_method(arguments: argparse.Namespace) -> Method:
    """What --checkpoint, --labels, --teacher, --baseline or --predictions names.

    Mistakes that can be found without the data are reported here, before the data is opened.
    """
    train.check_device(arguments.device)
    if arguments.seed is not None and not arguments.teacher:
        raise DataError("--seed: is only for a teacher; give --teacher, or leave it out")
    if arguments.dtype != "float32" and not arguments.checkpoint:
        raise DataError("--dtype: is only for a student; give its --checkpoint, or leave it out")

    # A student has its own grid, and so have labels. For the others, --model chooses one.
    grid = fastflow3d.MODELS[arguments.model or "normal"].half_extent_m
    if arguments.checkpoint:
        model = _load_student(arguments)
        estimator = zeroflow.from_student(model)
        return lambda dataset, masks: (dataset, model.settings.half_extent_m, estimator)
    if arguments.teacher:
        teacher = nsfp.TEACHERS[arguments.teacher]
        teacher = dataclasses.replace(teacher, seed=arguments.seed or 0)
        train.print_settings(zeroflow.label_settings(teacher, grid))
        torch.set_num_threads(1)
        estimator = zeroflow.from_teacher(teacher, grid, arguments.device)
        return lambda dataset, masks: (dataset, grid, estimator)
    if arguments.baseline:
        estimator = zeroflow.from_baseline(arguments.baseline, grid)
        return lambda dataset, masks: (dataset, grid, estimator)
    if arguments.labels:
        return lambda dataset, masks: _label_method(arguments.labels, dataset)
    return lambda dataset, masks: _prediction_method(arguments.predictions, dataset, masks, grid)


def _label_method(folder: str, dataset: data.Pairs) -> tuple:
    label_folder = labels.open_labels(folder, dataset)
    labeled = [dataset.pair_keys[i] for i in label_folder.indices]
    part = _covered_by(folder, dataset, labeled)
    return part, label_folder.half_extent_m, labels.from_labels(label_folder)


def _prediction_method(path: str, dataset: data.Pairs, masks, grid) -> tuple:
    predictions = challenge.ChallengePredictions(path, dataset, masks)
    name = f"{path}, for the challenge of {predictions.challenge}"
    part = _covered_by(name, dataset, predictions.pair_keys)
    return part, grid, challenge.from_predictions(predictions)


def _covered_by(name: str, dataset: data.Pairs, pair_keys: list[data.PairKey]) -> data.Pairs:
    """Only these pairs of the data set; prints how many there are."""
    covered = set(pair_keys)
    without = [key for key in dataset.pair_keys if key not in covered]
    example = f"; the first missing one is {tuple(without[0])}" if without else ""
    print(f"{name}: has {len(pair_keys)} of {len(dataset)} pairs{example}")
    return data.subset(dataset, pair_keys)


OUR_WEIGHTS = Path(__file__).parent / "weights" / "street.pt"

METHOD_OPTIONS = ("checkpoint", "labels", "teacher", "baseline", "predictions")


def _name_of_method(arguments: argparse.Namespace) -> str:
    given = [getattr(arguments, option, None) for option in METHOD_OPTIONS]
    return str(next(value for value in given if value))


def _load_student(arguments: argparse.Namespace, file: str | None = None) -> torch.nn.Module:
    """The student of `file`, or of --checkpoint, or the one that comes with the project."""
    train.check_device(arguments.device)
    file = file or arguments.checkpoint or OUR_WEIGHTS
    try:
        model = fastflow3d.load_checkpoint(file)
    except ValueError as error:
        raise DataError(error) from error
    if file == OUR_WEIGHTS:
        what = "no --checkpoint: using our own, which was trained on synthetic streets only"
        print(f"{what} ({OUR_WEIGHTS}; see the README.md beside it)", file=sys.stderr)
    if model.is_foreign:
        size = " x ".join(f"{2 * half:g}" for half in model.settings.half_extent_m)
        what = f"does not store its grid and frames; assuming {size} m around the ego"
        frames = "and both sweeps in the ego frame of sweep 0, as published"
        print(f"{file}: {what}, {frames}", file=sys.stderr)
    if arguments.device == "cpu" and model.settings == fastflow3d.MODELS["narrow"]:
        torch.set_num_threads(1)  # two threads would wait for each other next to a busy process
    return model.prepare_inference(getattr(torch, arguments.dtype)).to(arguments.device)


def _draw_figures(
    folder: Path,
    dataset: data.Pairs,
    estimator: zeroflow.Estimator,
    name: str,
    evaluation: zeroflow.Evaluation,
    half_extent_m: tuple[float, float, float],
) -> None:
    """Error by speed, distance and time, and the worst and the median pair (by grid three-way)."""
    import viz  # matplotlib is loaded only when a picture is asked for

    rows = {name: evaluation.numbers}
    figures = {
        "error_by_speed": viz.error_by_speed_figure(rows),
        "error_by_distance": viz.error_by_distance_figure(rows),
        "error_against_time": viz.error_against_time_figure(rows),
    }

    # Pairs without any point to score have no error, and cannot be the worst one.
    three_ways = evaluation.pair_three_ways
    known = [index for index, value in three_ways.items() if not math.isnan(value)]
    best_first = sorted(known, key=three_ways.get)
    examples = {}
    if best_first:
        examples = {"median": best_first[len(best_first) // 2], "worst": best_first[-1]}
    for place, index in examples.items():
        pair = dataset[index]
        title = f"the {place} pair: {pair.log_id}, {pair.timestamp0_ns}"
        title += f"; grid 3-way {three_ways[index]:.3f} m"
        is_input = data.input_masks(pair, half_extent_m)[0]
        flow = estimator(pair).flow
        figure = viz.error_map_figure(pair, flow, is_input, title, half_extent_m[0])
        figures[f"{place}_pair"] = figure
    for file, figure in figures.items():
        figure.savefig(folder / f"{file}.png", dpi=120)
    print(f"figures: {folder}/" + ".png, ".join(figures) + ".png")


# --- Look -----------------------------------------------------------------------------------------


def _video(arguments: argparse.Namespace) -> int:
    import look  # Pillow and matplotlib are loaded only when something is drawn

    if arguments.out is None and arguments.rerun is None:
        raise DataError("nothing to write: give --out, --rerun, or both")
    if arguments.out is not None:
        look.check_film_file(arguments.out)
    dataset, estimators, half_m = _methods_to_show(arguments)
    keys = look.pairs_of_log(dataset, arguments.log, arguments.start, arguments.end)

    # Without a chosen rate, the film is as fast as the drive.
    fps = arguments.fps or 1 / statistics.median(key.seconds for key in keys)
    recording = look.Recording(arguments.rerun, dataset) if arguments.rerun else None
    watch = recording.add if recording else None
    frames = look.film_frames(dataset, keys, estimators, arguments.view, half_m, watch)
    if arguments.out is None:
        count = sum(1 for _ in frames)
    else:
        count = look.write_film(arguments.out, frames, fps)
        megabytes = arguments.out.stat().st_size / 1e6
        size = f"{count} frames, {fps:.3g} per second, {megabytes:.1f} MB"
        print(f"{arguments.out}: {size}")
    if recording:
        recording.close()
        print(f"{arguments.rerun}: {count} pairs; look at it with `rerun {arguments.rerun}`")
    return 0 if count == len(keys) else 1


def _show(arguments: argparse.Namespace) -> int:
    import look  # Pillow and matplotlib are loaded only when something is drawn
    import viz

    _check_picture(arguments.out)
    dataset, estimators, half_m = _methods_to_show(arguments)
    pair = dataset.read(look.pairs_of_log(dataset, arguments.log, arguments.at)[0])
    flows = {name: estimator(pair).flow for name, estimator in estimators.items()}
    figure = viz.flow_figure(pair, flows, half_m, arguments.around)
    figure.suptitle(f"{pair.log_id}, sweep {pair.timestamp0_ns}")
    figure.savefig(arguments.out, dpi=120)
    print(f"wrote {arguments.out}")
    return 0


def _methods_to_show(
    arguments: argparse.Namespace,
) -> tuple[data.Pairs, dict[str, zeroflow.Estimator], float]:
    """The data, the methods by name in the order of panels, and how far a panel reaches (m)."""
    if arguments.range is not None and not arguments.range > 0:
        raise DataError(f"--range {arguments.range}: must be positive")
    train.check_device(arguments.device)
    # If no method is named, the student that comes with the project is shown.
    named = (arguments.truth, *arguments.baseline, *arguments.labels, *arguments.teacher)
    files = arguments.checkpoint or ([] if any(named) else [OUR_WEIGHTS])
    students = {}
    for file in files:
        name = "student" if len(files) == 1 else file
        students[name] = _load_student(arguments, file)

    # The picture covers the grid of the first checkpoint's student, unless --model names another.
    grid = fastflow3d.MODELS[arguments.model or "normal"].half_extent_m
    if students and not arguments.model:
        grid = next(iter(students.values())).settings.half_extent_m
    dataset = train.open_and_report(arguments.data, arguments, true_flow=arguments.truth)
    import look

    estimators = {"truth": look.true_flow} if arguments.truth else {}
    for name in arguments.baseline:
        estimators[name] = zeroflow.from_baseline(name, grid)
    for folder in arguments.labels:
        name = "labels" if len(arguments.labels) == 1 else folder
        estimators[name] = labels.from_labels(labels.open_labels(folder, dataset))
    for name in arguments.teacher:
        torch.set_num_threads(1)
        teacher = dataclasses.replace(nsfp.TEACHERS[name], seed=arguments.seed or 0)
        estimators[name] = zeroflow.from_teacher(teacher, grid, arguments.device)
    for name, model in students.items():
        estimators[name] = zeroflow.from_student(model)
    return dataset, estimators, arguments.range or grid[0]


def _check_picture(file: Path) -> None:
    """Raise DataError unless a picture can be written there."""
    suffixes = (".png", ".pdf", ".svg")
    if file.suffix not in suffixes:
        raise DataError(f"{file}: choose a name that ends in {' or '.join(suffixes)}")
    if not file.parent.is_dir():
        raise DataError(f"{file}: there is no such folder; make it first")


# --- Use ------------------------------------------------------------------------------------------


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.data is not None:
        if arguments.cloud0 or arguments.pose or arguments.picture:
            raise DataError("--data: leave out CLOUD0, CLOUD1, --pose and --picture; see `show`")
        return _predict_folder(arguments)
    if arguments.cloud1 is None:
        raise DataError("give two clouds, CLOUD0 and CLOUD1, or a folder of them as --data")
    if arguments.poses is not None:
        raise DataError("--poses: belongs to a folder of clouds, --data; two clouds need --pose")
    if arguments.ground not in ("auto", "points", "none"):
        raise DataError(f"--ground {arguments.ground}: two clouds have no map; points or none")
    return _predict_two(arguments)


def _predict_folder(arguments: argparse.Namespace) -> int:
    """One file per pair; existing files are kept."""
    out = arguments.out
    if out.suffix or (out.exists() and not out.is_dir()):
        raise DataError(f"{out}: with --data, give a folder, in which each pair has a file")
    model = _load_student(arguments)
    dataset = train.open_and_report(arguments.data, arguments, true_flow=False)

    # Flow of another student, or of another kind, must not be mixed with this one's.
    checkpoint = Path(arguments.checkpoint or OUR_WEIGHTS)
    weights = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    _claim_predictions(out, {"checkpoint_sha256": weights, "total": arguments.total})
    done, failed = 0, []
    for key in tqdm(dataset.pair_keys, desc="predict", unit="pair"):
        file = out / key.log_id / f"{key.timestamp0_ns}.feather"
        if file.exists():
            done += 1
            continue
        try:
            pair = dataset.read(key)
        except (DataError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
            failed.append(key)
            continue
        flow, has_flow = zeroflow.student_flow(model, pair)
        flow = data.total_flow(flow, pair) if arguments.total else flow
        write_flow(file, flow, has_flow)
    made = len(dataset) - done - len(failed)
    print(f"{out}: {made} pairs predicted, {done} were there already, {len(failed)} left out")
    return 1 if failed else 0


def _claim_predictions(folder: Path, settings: dict) -> None:
    """Write settings.json of a new folder. Raises DataError if it holds flow of other settings."""
    file = folder / "settings.json"
    if file.exists():
        remedy = "choose another folder"
        if demo.read_json(file, remedy) != settings:
            raise DataError(f"{folder}: holds flow of another student or kind; {remedy}")
    with data.atomic_file(file) as out:
        out.write(json.dumps(settings, indent=2).encode())


def _predict_two(arguments: argparse.Namespace) -> int:
    _check_out_files(arguments)
    points0 = _read_cloud(arguments.cloud0, arguments)
    points1 = _read_cloud(arguments.cloud1, arguments)
    pose = clouds.read_pose(arguments.pose) if arguments.pose else None
    if pose is None:
        print("no --pose: both clouds are taken to be in one frame; only residual flow is left")

    # A student has never seen ground. Without a map it is found from the points alone.
    is_ground0 = is_ground1 = None
    if arguments.ground != "none":
        is_ground0 = clouds.is_ground_without_map(points0)
        is_ground1 = clouds.is_ground_without_map(points1)
        shares = f"{is_ground0.mean():.0%} and {is_ground1.mean():.0%} of the points"
        print(f"ground: {shares}, found without a map")

    model = _load_student(arguments)
    pair = clouds.pair_of_clouds(points0, points1, pose, is_ground0, is_ground1)
    pair = dataclasses.replace(pair, timestamp1_ns=round(1e9 / arguments.rate_hz))
    start = time.perf_counter()
    flow, has_flow = zeroflow.student_flow(model, pair)
    seconds = time.perf_counter() - start
    write_flow(arguments.out, data.total_flow(flow, pair) if arguments.total else flow, has_flow)
    if arguments.picture:
        import viz  # matplotlib is loaded only when a picture is asked for

        figure = viz.flow_figure(pair, {"student": flow}, model.settings.half_extent_m[0])
        figure.savefig(arguments.picture, dpi=120)

    # If not a single point got an estimate, tell the user why.
    if pair.is_ground0.all():
        print("all points of sweep 0 were taken for ground; --ground none leaves ground in")
    elif not has_flow.any():
        size = " x ".join(f"{2 * half:g}" for half in model.settings.half_extent_m)
        print(f"no point lies in the student's grid of {size} m around the ego", end="")
        print(": are these clouds in an ego frame?")
    moving = int((flow.norm(dim=1) >= data.DYNAMIC_THRESHOLD_M).sum())
    kind = "total" if arguments.total else "residual"
    print(
        f"{arguments.out}: {kind} flow of {len(flow)} points, {int(has_flow.sum())} of them "
        f"estimated in {seconds:.2f} s, {moving} moving by 5 cm or more"
    )
    return 0


def _read_cloud(file: Path, arguments: argparse.Namespace) -> np.ndarray:
    """A cloud (N, 3) of `predict`; rows that are not a return, or too near, are NaN."""
    points = clouds.read_cloud(file, arguments.columns)
    return clouds.no_returns_to_nan(points, arguments.min_range_m or 0.0)


def _check_out_files(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix not in (".feather", ".npz"):
        raise DataError(f"{arguments.out}: choose a name that ends in .feather or .npz")
    if arguments.picture is not None:
        _check_picture(arguments.picture)


def write_flow(file: Path, flow: torch.Tensor, has_flow: torch.Tensor) -> None:
    """Write flow (N, 3) and has_flow (N,) as .npz, or as .feather with a label's columns.

    In float32, unlike a label. The file appears whole or not at all.
    """
    with data.atomic_file(file) as out:
        if file.suffix == ".npz":
            np.savez(out, flow=flow.numpy(), has_flow=has_flow.numpy())
        else:
            columns = {name: flow[:, i].numpy() for i, name in enumerate(data.FLOW_COLUMNS)}
            columns["has_flow"] = has_flow.numpy()
            feather.write_feather(pyarrow.table(columns), out)


def _write_json(file: str, numbers: dict) -> None:
    """Write numbers; NaN, which JSON does not have, becomes null."""
    known = {}
    for name, value in numbers.items():
        is_nan = isinstance(value, float) and math.isnan(value)
        known[name] = None if is_nan else value
    with data.atomic_file(Path(file)) as out:
        out.write(json.dumps(known, indent=2).encode())


# --- Options from settings ------------------------------------------------------------------------


def add_settings(parser, settings_class: type, base: object) -> None:
    """Add an option --name for every field of a dataclass of settings.

    base: an instance, whose values are shown as the defaults.
    """
    hints = typing.get_type_hints(settings_class)
    comments = field_comments(settings_class)
    for field in dataclasses.fields(settings_class):
        # argparse gets no default: the result holds only what the user gave, so that it can
        # override a preset, or the settings stored in a run.
        comment = comments[field.name]
        default = _as_text(getattr(base, field.name), comment)
        text = f"{comment} (default: {default})".replace("%", "%%")
        option = _option_of_type(hints[field.name])
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **option)


def field_comments(settings_class: type) -> dict[str, str]:
    """The comment of every field of a dataclass: at the end of its line, or on the lines above."""
    comments, above = {}, []
    for line in inspect.getsource(settings_class).splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
            continue
        field = re.match(r"    (\w+): ", line)
        if field:
            _, _, beside = line.partition("  # ")
            comments[field[1]] = beside or " ".join(above)
        above = []
    return comments


NONE_WORDS = ("none", "all", "auto")  # on the command line, for settings that are None


def _option_of_type(hint) -> dict:
    """How argparse parses a field of this type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"choices": inner}
    if origin is tuple:
        return {"nargs": "+", **_option_of_type(inner[0])}
    if origin in (types.UnionType, typing.Union):
        kind = next(each for each in inner if each is not type(None))

        def parse(text: str):
            return None if text in NONE_WORDS else kind(text)

        parse.__name__ = kind.__name__  # argparse names it in its error
        return {"type": parse, "metavar": kind.__name__}
    return {"type": hint, "metavar": hint.__name__}


def _as_text(value, comment: str) -> str:
    """A default as the user would type it. None is `all` if the comment contains that word."""
    if isinstance(value, tuple):
        return " ".join(_as_text(each, comment) for each in value) if value else "none"
    if value is None:
        return "all" if re.search(r"\ball\b", comment) else "none"
    return str(value)


def given_settings(arguments: argparse.Namespace, settings_class: type) -> dict:
    """Those fields that the user gave on the command line."""
    given = {}
    for field in dataclasses.fields(settings_class):
        if hasattr(arguments, field.name):
            value = getattr(arguments, field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return given


def chosen_settings(arguments: argparse.Namespace, base):
    """`base` with the fields that the user gave on the command line."""
    try:
        return dataclasses.replace(base, **given_settings(arguments, type(base)))
    except ValueError as error:  # settings that contradict each other
        raise DataError(error) from error


def _peek(argv: Sequence[str], option: str) -> str | None:
    """The value of an option before everything is parsed, so that --help shows its defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, nargs="?")
    return getattr(parser.parse_known_args(argv)[0], option.strip("-"))


# --- The parser -----------------------------------------------------------------------------------
# fmt: off: each option is one call on two lines, its name and help text first.


def _option(parser, name: str, text: str, **details) -> None:
    """Add an option. Its help text ends with the default, if it has one."""
    if details.get("default") is not None:
        text += " (default: %(default)s)"
    parser.add_argument(name, help=text, **details)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    description = "ZeroFlow: scene flow via distillation."
    parser = argparse.ArgumentParser(prog="zeroflow.py", description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_synthesize(commands, argv)
    _add_check(commands)
    _add_label(commands, argv)
    _add_status(commands)
    _add_evaluate(commands)
    _add_submit(commands)
    _add_show(commands)
    _add_video(commands)
    _add_predict(commands)
    _add_curve(commands)
    return parser


def _command(commands, name: str, run: Callable, text: str, example: str):
    epilog = f"example: python zeroflow.py {name} {example}"
    sub = commands.add_parser(
        name, help=text, description=text, epilog=epilog, allow_abbrev=False
    )
    sub.set_defaults(run=run)
    return sub


def _add_synthesize(commands, argv: Sequence[str]) -> None:
    sub = _command(commands, "synthesize", _synthesize,
                   "write a synthetic street in Argoverse 2's layout", "--out street --logs 10")
    _option(sub, "--out", "folder for the new logs; must be new or empty",
            required=True, type=Path, metavar="DIR")
    _option(sub, "--logs", "number of logs to write", required=True, type=int, metavar="N")
    _option(sub, "--preset", "size of a sweep", choices=synthetic.PRESETS, default="full")
    base = synthetic.PRESETS.get(_peek(argv, "--preset") or "full", synthetic.StreetSettings())
    add_settings(sub, synthetic.StreetSettings, base)


def _add_check(commands) -> None:
    sub = _command(commands, "check", _check,
                   "report what a data set contains, what is broken, and what labeling and "
                   "training would cost; exit status 0 if it can be used", "--data av2/train")
    _add_data_options(sub)
    _option(sub, "--model", "the student whose grid is used and whose training step is timed",
            choices=fastflow3d.MODELS, default="normal")
    _option(sub, "--sample", "number of pairs to read, evenly spread, or `all`",
            type=_number_or_all, default=20, metavar="N")
    _option(sub, "--cost", "also time labeling and a training step of one pair on this machine",
            action="store_true")
    _option(sub, "--device", "cpu or cuda", default=train.default_device())
    _option(sub, "--json", "write the numbers to this file", metavar="FILE")
    _add_max_broken(sub, "the pairs read")


def _add_label(commands, argv: Sequence[str]) -> None:
    sub = _command(commands, "label", _label,
                   "let the teacher label pairs of sweeps; labels that are already there are kept",
                   "--data av2/train --labels labels")
    _add_data_options(sub)

    # What to make, ...
    _option(sub, "--labels", "folder for the labels, one file per pair",
            required=True, metavar="DIR")
    _option(sub, "--teacher", "the cheap `fast`, the paper's `nsfp`, or its refined `chodosh`",
            choices=nsfp.TEACHERS, default="fast")
    _option(sub, "--model", "the student that will learn from the labels, which cover its grid",
            choices=fastflow3d.MODELS, default="normal")

    # ... by how many workers of this machine and of others ...
    _option(sub, "--workers", "processes, with one thread each (default: one per core)",
            type=int, metavar="N")
    _option(sub, "--device", "cpu or cuda", default=train.default_device())
    _option(sub, "--shard", "label part I of 0 ... N-1 (default: torchrun's rank, else the task "
            "of a SLURM array, else everything)", metavar="I/N")
    _option(sub, "--whole", "also read existing labels completely, and make damaged ones again "
            "(default: read only their ends)", action="store_true")
    _add_max_broken(sub, "the pairs")

    # ... and how: every setting of the teacher.
    base = nsfp.TEACHERS.get(_peek(argv, "--teacher") or "fast", nsfp.NSFPSettings())
    add_settings(sub.add_argument_group("settings of the teacher"), nsfp.NSFPSettings, base)


def _add_status(commands) -> None:
    sub = _command(commands, "status", _status,
                   "count the labels that are made, missing, torn and failed; exit status 0 if "
                   "all are made", "--data av2/train --labels labels --shards 16")
    _add_data_options(sub)
    _option(sub, "--labels", "a folder that `label` has written, or one of published labels",
            required=True, metavar="DIR")
    _option(sub, "--shards", "name the shards to run again, out of this many",
            type=int, default=1, metavar="N")
    _option(sub, "--sample", "number of labels to compare with their sweeps, or `all`",
            type=_number_or_all, default=20, metavar="N")
    _option(sub, "--whole", "read all labels completely, which finds every flipped bit (default: "
            "read only their ends)", action="store_true")
    _option(sub, "--json", "write counts, shards to run again and hours left to this file",
            metavar="FILE")


def _add_evaluate(commands) -> None:
    sub = _command(commands, "evaluate", _evaluate,
                   "compare the flow of a method with the true flow",
                   "--data av2/val --checkpoint run/last.pt")
    methods = _add_method_options(sub)
    _option(methods, "--predictions", "a submission to a challenge: a zip, or a folder",
            metavar="PATH")
    _option(sub, "--truth", "how Argoverse 2's boxes become flow: as its own tools do it, or with "
            "boxes that are `grown` with speed, as many papers since 2025 do",
            choices=data.TRUTHS, default="av2")
    _option(sub, "--json", "write all numbers to this file; metrics.py explains their names",
            metavar="FILE")
    _option(sub, "--against", "on data without annotations, compare with the labels in this folder",
            metavar="DIR")
    _option(sub, "--figures", "draw errors by speed, distance and time, and two pairs, into this "
            "folder", type=Path, metavar="DIR")
    _add_max_broken(sub, "the pairs")


def _add_submit(commands) -> None:
    sub = _command(commands, "submit", _submit,
                   "write the archive that a scene flow challenge takes", "--data av2/test "
                   "--checkpoint run/last.pt --challenge 2024 --out submission.zip")
    _add_method_options(sub)
    _option(sub, "--challenge", "year of the challenge, which decides the format",
            type=int, choices=challenge.CHALLENGES, required=True)
    _option(sub, "--out", "file to write", type=Path, required=True, metavar="ZIP")
    _option(sub, "--supervised", "declare that the method learned from human labels (2024 only)",
            action="store_true")


def _add_method_options(sub: argparse.ArgumentParser):
    """--data, and the method to use on it; returns the group of which one option is required."""
    _add_data_options(sub)

    # One of these methods, ...
    methods = sub.add_mutually_exclusive_group(required=True)
    _option(methods, "--checkpoint", "a student: a checkpoint of train.py, or a published file",
            metavar="FILE")
    _option(methods, "--labels", "a folder that `label` has written, or one of published labels",
            metavar="DIR")
    _option(methods, "--teacher", "fit this teacher to every pair now", choices=nsfp.TEACHERS)
    _option(methods, "--baseline", "a method that does not learn", choices=zeroflow.BASELINES)

    # ... and how to run it.
    _option(sub, "--seed", "seed of the teacher (default: 0)", type=int)
    _option(sub, "--model", "use the grid of this student (default: the grid of the checkpoint or "
            "the labels, else of `normal`)", choices=fastflow3d.MODELS)
    _option(sub, "--device", "cpu or cuda", default=train.default_device())
    _option(sub, "--dtype", "number format of the student's U-Net",
            choices=("float32", "bfloat16"), default="float32")
    _option(sub, "--masks", "the masks of the 2023 challenge, a zip or a folder (default: made "
            "by av2's rule)", metavar="PATH")
    return methods


def _add_show(commands) -> None:
    sub = _command(commands, "show", _show,
                   "draw one pair from above: both sweeps, the flow of one or more methods by "
                   "color, and their errors with --truth",
                   "--data clouds --checkpoint run/last.pt --out pair.png")
    _add_methods_to_show(sub)
    _option(sub, "--at", "seconds from the first sweep of the log to the pair",
            type=float, default=0.0, metavar="S")
    _option(sub, "--around", "center of the picture in meters, ahead and to the left (default: "
            "the ego)", type=float, nargs=2, metavar=("X", "Y"))
    _option(sub, "--out", "picture to write, .png, .pdf or .svg",
            required=True, type=Path, metavar="FILE")


def _add_video(commands) -> None:
    sub = _command(commands, "video", _video,
                   "make a film of a log, with a panel per method; flow is shown by color, hue for "
                   "direction and saturation for speed", "--data clouds --checkpoint run/last.pt "
                   "--out film.gif")
    _add_methods_to_show(sub)
    _option(sub, "--view", "from above with the ego looking to the right; from above and turned as "
            "the map is; or from above and behind", choices=("ego", "world", "3d"), default="ego")
    _option(sub, "--from", "seconds from the first sweep of the log to the film's first",
            dest="start", type=float, default=0.0, metavar="S")
    _option(sub, "--to", "seconds from the first sweep of the log to the film's last (default: the "
            "end of the log)", dest="end", type=float, metavar="S")
    _option(sub, "--fps", "frames per second of the film (default: as fast as the drive)",
            type=float, metavar="N")
    _option(sub, "--out", "film to write, .gif, .webp, or .mp4 where ffmpeg is installed",
            type=Path, metavar="FILE")
    _option(sub, "--rerun", "also write points, flow and boxes for the viewer of rerun.io, .rrd",
            type=Path, metavar="FILE")


def _add_methods_to_show(sub: argparse.ArgumentParser) -> None:
    """--data, a log of it, and the methods to show side by side."""
    _add_data_options(sub)
    _option(sub, "--log", "name of the log to show (default: the first one)", metavar="ID")
    again = {"action": "append", "default": []}
    sub.add_argument("--truth", action="store_true", help="show the true flow")
    sub.add_argument("--baseline", choices=zeroflow.BASELINES, help="show a baseline", **again)
    sub.add_argument("--labels", metavar="DIR", help="show the labels of this folder", **again)
    sub.add_argument("--teacher", choices=nsfp.TEACHERS, help="fit this teacher to each pair now",
                     **again)
    sub.add_argument("--checkpoint", metavar="FILE", help="show a student (default, if no method "
                     "is given: the one in weights/); this option and the three before it may be "
                     "repeated", **again)
    _option(sub, "--seed", "seed of the teacher (default: 0)", type=int)
    _option(sub, "--model", "the student whose grid the others use (default: the student of the "
            "first checkpoint, else `normal`)", choices=fastflow3d.MODELS)
    _option(sub, "--range", "how far the picture reaches, in meters (default: the grid's)",
            type=float, metavar="M")
    _option(sub, "--device", "cpu or cuda", default=train.default_device())
    _option(sub, "--dtype", "number format of the student's U-Net",
            choices=("float32", "bfloat16"), default="float32")


def _add_predict(commands) -> None:
    sub = _command(commands, "predict", _predict,
                   "estimate the flow between two clouds of your own, or between all consecutive "
                   "sweeps of a folder; one output row per point of the first cloud",
                   "--checkpoint run/last.pt 0.bin 1.bin --pose pose.txt --out flow.npz")

    # What goes in, ...
    suffixes = ", ".join(clouds.CLOUD_SUFFIXES)
    _option(sub, "cloud0", f"the first sweep, one of {suffixes}",
            type=Path, nargs="?", metavar="CLOUD0")
    _option(sub, "cloud1", "the next sweep", type=Path, nargs="?", metavar="CLOUD1")
    _option(sub, "--pose", "ego1_SE3_ego0 of two clouds, 4 x 4, as text or .npy",
            type=Path, metavar="FILE")
    _add_data_options(sub, required=False)
    _option(sub, "--checkpoint", "a student: a checkpoint of train.py, or a published file "
            "(default: the one in weights/)", metavar="FILE")

    # ... and what comes out.
    _option(sub, "--out", ".feather or .npz file for flow and has_flow; with --data, a folder with "
            "one .feather file per pair, where existing files are kept",
            required=True, type=Path, metavar="PATH")
    _option(sub, "--total", "write raw flow, ego-motion included, instead of residual flow",
            action="store_true")
    _option(sub, "--picture", "draw two clouds and their flow into this .png, .pdf or .svg file",
            type=Path, metavar="FILE")
    _option(sub, "--device", "cpu or cuda", default=train.default_device())
    _option(sub, "--dtype", "number format of the student's U-Net",
            choices=("float32", "bfloat16"), default="float32")


def _add_curve(commands) -> None:
    sub = _command(commands, "curve", _curve,
                   "draw the loss and the validations of a training run", "--out run")
    _option(sub, "--out", "folder of the run, in which curve.png is written",
            required=True, type=Path, metavar="RUN")


def _train_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False,
        description="Train a student on pseudo-labels. Without --data: the whole method on a "
        "synthetic street.",
        epilog="example: python train.py --preset zeroflow-1x --data av2/train --labels labels "
        "--val av2/val --out run",
    )
    # The defaults in the help text are those of the preset that would be used.
    preset = _peek(argv, "--preset") or (None if "--data" in argv else "street")
    changes = {"preset": preset, **train.PRESETS.get(preset, {})}
    base = dataclasses.replace(train.TrainSettings(), **changes)
    add_settings(parser, train.TrainSettings, base)
    group = parser.add_argument_group("the demo, without --data")
    add_settings(group, demo.DemoSettings, demo.DemoSettings())
    return parser


def _add_data_options(sub: argparse.ArgumentParser, required: bool = True) -> None:
    """--data, and how to read it: see `data.open_dataset`."""
    _option(sub, "--data", "a split (a folder of logs), one log, or a folder of clouds; or the "
            "address s3://... of a split or log of Argoverse 2",
            required=required, metavar="FOLDER")
    _option(sub, "--ground", "where ground comes from; auto: the first of raster, vector and "
            "points that a log has", choices=data.GROUNDS, default="auto")
    _option(sub, "--pairs-per-log", "use only this many pairs of each log, at regular intervals; "
            "for LiDAR logs, 12 is the paper's 3x and 24 its 5x (default: all)",
            type=_number_or_all, metavar="N")
    _option(sub, "--sweeps-per-log", "use only this many sweeps of each log, the first ones; the "
            "published code uses 145 (default: all)", type=_number_or_all, metavar="N")
    _option(sub, "--poses", "poses of a folder of clouds (default: poses.txt in it, in the "
            "folder above, or above folders such as velodyne_points/data)", metavar="FILE")
    _option(sub, "--rate-hz", "sweeps per second of clouds whose names are not time stamps",
            type=float, default=10.0, metavar="HZ")
    _option(sub, "--columns", "numbers per row of .bin clouds (default: recognized)",
            type=int, metavar="N")
    _option(sub, "--min-range-m", "ignore nearer points of clouds, which belong to the ego's own "
            "body; 0 keeps all (default: 2.5)", dest="min_range_m", type=float, metavar="M")
    _option(sub, "--cache", "folder for files of an s3:// address (default: in ~/.cache/zeroflow)",
            metavar="DIR")
    _option(sub, "--cache-gb", "limit the cache to this size by deleting the least recently used "
            "logs (default: keep all)", dest="cache_gb", type=float, metavar="GB")


def _add_max_broken(sub: argparse.ArgumentParser, of: str) -> None:
    _option(sub, "--max-broken", f"give up if more than this share of {of} is broken",
            type=float, default=0.05, metavar="SHARE")


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)
