"""What the scene flow challenges of Argoverse 2 hand out and take: masks, and zips of predictions.

Both challenges score every fifth pair of consecutive sweeps, and both exchange zips of Feather
files, one file per pair. They differ in nearly everything else:

                   2023                                    2024
  counted          over the whole split in a row           from 0 in each log
  name of a file   <log_id>/<timestamp0_ns>.feather        <log_id>/<place of sweep 0>.feather
  rows             the points of the challenge's mask      all points of sweep 0
  flow             raw, ego-motion included                residual
  further column   is_dynamic: moves by more than 5 cm     is_valid: has a prediction
  further file     none                                    metadata.json

Points are (N0, 3) float32 in meters, in the ego frame of sweep 0, and row i of a flow belongs to
row i of `pc0`. Inside this project flow is always residual. It is converted to raw flow and back
here, where a file of 2023 is written or read.

Sources: the submission tools of the av2 package (`av2.evaluation.scene_flow`) for 2023, and
BucketedSceneFlowEval (Khatri et al., "I Can't Believe It's Not Scene Flow!", ECCV 2024) for 2024.
The servers of both challenges are closed and the labels of the test split are released, so today a
submission is evaluated on one's own disk: `ChallengePredictions` reads it back.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow
import torch
from pyarrow import feather
from tqdm import tqdm

import data
import zeroflow
from data import FLOW_COLUMNS, DataError, PairKey, SweepPair

CHALLENGES = (2023, 2024)
EVERY = 5  # both challenges score every fifth pair
GROUND_THRESHOLD_M = 0.30  # the av2 package, which made the masks of 2023 (ZeroFlow: 0.40)

# --- Which pairs are scored, and how their files are named -------------------------------------


def consecutive_keys(dataset: data.Pairs) -> list[PairKey]:
    """All pairs of consecutive sweeps, log by log, counted as the challenges count them.

    Unlike `dataset.pair_keys` this includes pairs with a gap between their sweeps: leaving one out
    would shift the number of every pair after it.
    """
    # `stamps` holds all sweeps of a log, whether or not they form pairs of `dataset`.
    keys = []
    for log_id, stamps in dataset.stamps.items():
        for stamp0, stamp1 in itertools.pairwise(stamps):
            keys.append(PairKey(log_id, stamp0, stamp1))
    return keys


def challenge_members(dataset: data.Pairs, challenge: int) -> dict[str, PairKey]:
    """The pairs that a challenge scores: name of the file in a submission -> pair.

    2023 takes every fifth of all pairs of the split in a row, 2024 every fifth of each log.
    """
    keys = consecutive_keys(dataset)
    if challenge == 2023:
        scored = keys[::EVERY]
    else:
        scored = [key for key in keys if _place_in_log(dataset, key) % EVERY == 0]
    return {f"{key.log_id}/{_file_stem(dataset, key, challenge)}.feather": key for key in scored}


def _place_in_log(dataset: data.Pairs, key: PairKey) -> int:
    """The place of sweep 0 among all sweeps of its log, from 0."""
    return dataset.stamps[key.log_id].index(key.timestamp0_ns)


def _file_stem(dataset: data.Pairs, key: PairKey, challenge: int) -> str:
    """The name of a pair's file, without its ending."""
    if challenge == 2023:
        return str(key.timestamp0_ns)
    return f"{_place_in_log(dataset, key):010d}"


def mask_of(dataset: data.Pairs, pair: SweepPair) -> torch.Tensor | None:
    """(N0,) bool: the points that the 2023 challenge scores, by the rules of the official masks.

    None if this is unknown, because the log has no ground raster.
    """
    log = dataset.log(pair.log_id) if isinstance(dataset, data.Argoverse2Pairs) else None
    if log is None or not isinstance(log.ground, data.GroundRaster):
        return None

    # The challenge scores |x| and |y| up to 50 m, without the ground by the av2 package's rule.
    points = pair.pc0.double().numpy()  # (N0, 3)
    points_city = data.transform(log.city_SE3_ego(pair.timestamp0_ns), points)
    is_ground = log.ground.is_ground(points_city, GROUND_THRESHOLD_M, np.trunc)
    is_near = (np.abs(points[:, :2]) <= 50).all(axis=1)
    return torch.from_numpy(is_near & ~is_ground)


# --- Writing a submission -------------------------------------------------------------------------


def write_submission(
    file: Path,
    dataset: data.Pairs,
    estimator: zeroflow.Estimator,
    challenge: int,
    masks: ChallengeFiles | None = None,
    is_supervised: bool = False,
) -> int:
    """Write the zip that a challenge (2023 or 2024) takes. Returns the number of pairs in it.

    masks: the official masks of 2023, which then decide which pairs and which points are written.
    None: both are chosen by the rules that the official masks follow.
    is_supervised: whether the method has learned from human labels; 2024 asks for it.

    The file appears under its name only when it is complete. Raises DataError if a scored pair
    cannot be read or estimated, because the challenges refuse a submission with a missing pair.
    """
    if masks is None:
        members = challenge_members(dataset, challenge)
    else:
        members = _masked_members(dataset, masks)

    with (
        data.atomic_file(file) as out,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        if challenge == 2024:
            archive.writestr("metadata.json", json.dumps({"Is Supervised?": is_supervised}))
        for name, key in tqdm(members.items(), desc="submit", unit="pair"):
            # `read` takes any two sweeps of a log, so a pair with a gap is treated like any other.
            pair = dataset.read(key)

            # The mask comes first: if it is missing, a slow teacher must not have run for nothing.
            mask = _scored_points(pair, dataset, masks) if challenge == 2023 else None
            residual = estimator(pair).flow

            # NaN could be written to the file without an error, and must not get into a submission.
            zeroflow.check_flow(residual, pair)
            archive.writestr(name, challenge_file(pair, residual, challenge, mask))
    return len(members)


def _masked_members(dataset: data.Pairs, masks: ChallengeFiles) -> dict[str, PairKey]:
    """The pairs that have an official mask: name of the file in a submission -> pair."""
    # Masks of another split, or of logs that were not downloaded, must not shrink the submission
    # silently: each of them has to find its pair.
    by_name = {(key.log_id, str(key.timestamp0_ns)): key for key in consecutive_keys(dataset)}
    members = {}
    for log_id, stem in masks.members:
        if (log_id, stem) not in by_name:
            raise DataError(
                f"{masks.path}: holds a mask for {log_id}/{stem}, where no pair of consecutive "
                "sweeps of the data begins; is it of this split?"
            )
        members[f"{log_id}/{stem}.feather"] = by_name[log_id, stem]

    # The other way round, masks may be missing because only a part of them was downloaded.
    missing = sorted(set(challenge_members(dataset, 2023)) - set(members))
    if missing:
        found = f"has no mask for {len(missing)} pairs that count in 2023, such as {missing[0]}"
        print(f"{masks.path}: {found}; they are left out", file=sys.stderr)
    return members


def _scored_points(
    pair: SweepPair, dataset: data.Pairs, masks: ChallengeFiles | None
) -> torch.Tensor:
    """(N0,) bool: the points that the 2023 challenge scores."""
    mask = mask_of(dataset, pair) if masks is None else masks.mask(pair)
    if mask is None:
        raise DataError(f"{pair.log_id}: no ground raster to make a mask of; give --masks")
    return mask


def challenge_file(
    pair: SweepPair, residual: torch.Tensor, challenge: int, mask: torch.Tensor | None
) -> bytes:
    """The content of a pair's file in a submission, a Feather table with flow in float16 meters.

    residual: (N0, 3) flow of all points of sweep 0, 0 for points without an estimate.
    mask: (N0,) bool, the points that 2023 scores; not used in 2024.
    """
    if challenge == 2023:
        # Whether a point is dynamic depends on its own motion only, so this is decided on the
        # residual, in meters per sweep, before the motion of the ego is added.
        is_dynamic = residual.norm(dim=1) > data.DYNAMIC_THRESHOLD_M  # (N0,)
        flow = data.total_flow(residual, pair)[mask]  # (M, 3)
        further_column = {"is_dynamic": is_dynamic[mask].numpy()}
    else:
        # Points without an estimate are valid, too. Their residual 0 is a prediction: they do not
        # move by themselves.
        flow = residual
        further_column = {"is_valid": np.ones(len(residual), dtype=bool)}

    # float16 has steps of 1 mm or less for flows under 2 m, which is 20 m/s.
    columns = {}
    for axis, name in enumerate(FLOW_COLUMNS):
        columns[name] = flow[:, axis].numpy().astype(np.float16)
    content = pyarrow.BufferOutputStream()
    feather.write_feather(pyarrow.table(columns | further_column), content)
    return content.getvalue().to_pybytes()


# --- Reading masks and submissions ----------------------------------------------------------------


class ChallengeFiles:
    """The Feather files `<log_id>/<name>.feather` of a folder or a zip: masks, or a submission.

    members: (log_id, name without ending) -> where the file is. Folders above the log's folder do
    not matter: the official zips have some.
    Raises DataError if `path` is neither a folder nor a zip, or holds two files for the same name.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._archive: zipfile.ZipFile | None = None
        with data.naming(path, "neither a folder nor a whole zip", "download it again"):
            if not self.path.exists():
                wanted = "give a folder or zip of <log_id>/<name>.feather"
                raise DataError(f"{path}: no such file or folder; {wanted}")

            # Names in a zip have slashes on every system. `as_posix` gives the same form in a
            # folder.
            if self.path.is_dir():
                files = self.path.rglob("*.feather")
                names = [file.relative_to(self.path).as_posix() for file in files]
            else:
                self._archive = zipfile.ZipFile(self.path)
                names = self._archive.namelist()

        self.members: dict[tuple[str, str], str] = {}
        for name in sorted(names):
            self._add_member(name)

    def _add_member(self, name: str) -> None:
        file = PurePosixPath(name)
        # A Mac adds a file ._x to a zip for every file x.
        if file.suffix != ".feather" or file.name.startswith("."):
            return
        first = self.members.setdefault((file.parent.name, file.stem), str(file))
        if first != str(file):
            raise DataError(
                f"{self.path}: holds both {first} and {file}; choose one of the folders above them"
            )

    def read(self, log_id: str, name: str, columns: list[str], num_rows: int) -> pyarrow.Table:
        """Read one file: flow columns of floating-point numbers, and others of booleans.

        Raises DataError naming the file if it is missing or torn, or has other columns or rows.
        """
        if (log_id, name) not in self.members:
            raise DataError(f"{self.path}: has no {log_id}/{name}.feather; is it of this split?")
        member = self.members[log_id, name]
        file = self.path / member
        table = data.read_feather(file, columns, self._unpacked(member))
        if table.num_rows != num_rows:
            raise DataError(
                f"{file}: has {table.num_rows} rows, expected {num_rows}; is it of this sweep and "
                "these masks?"
            )

        # Check types, because the text "False" would be read as True, and a null as some number.
        for column in columns:
            kind = table[column].type
            if column in FLOW_COLUMNS:
                is_expected_kind = pyarrow.types.is_floating(kind)
            else:
                is_expected_kind = pyarrow.types.is_boolean(kind)
            if not is_expected_kind or table[column].null_count:
                raise DataError(
                    f"{file}: its column {column} is {kind}, or has nulls; make the file again"
                )
        return table

    def _unpacked(self, member: str) -> bytes | None:
        """The content of a file in a zip; None in a folder, where it is read from the disk."""
        if self._archive is None:
            return None
        with data.naming(self.path / member, "cannot be unpacked"):
            return self._archive.read(member)

    def mask(self, pair: SweepPair) -> torch.Tensor | None:
        """(N0,) bool: the points of a pair that 2023 scores; None if it does not score the pair.

        Only for the official masks of 2023. Raises DataError if the mask does not fit the sweep.
        """
        name = str(pair.timestamp0_ns)
        if (pair.log_id, name) not in self.members:
            return None
        return _bools(self.read(pair.log_id, name, ["mask"], len(pair.pc0)), "mask")


class ChallengePredictions:
    """Predictions on disk in the layout of either challenge: a folder, or a submission's zip.

    challenge: 2023 or 2024, recognized by the names of the files.
    pair_keys: the pairs of `dataset` that have a prediction.
    masks: the official masks of 2023, if the predictions were made with them. None: the rows are
    assigned to points by a mask that is made by the rules the official masks follow.
    Raises DataError if no pair has a prediction, or if there are files of both challenges.
    """

    def __init__(self, path: str | Path, dataset: data.Pairs, masks: ChallengeFiles | None = None):
        self.files = ChallengeFiles(path)
        self._mask_of = functools.partial(mask_of, dataset) if masks is None else masks.mask

        # Look for every pair under the name that it would have in either challenge. The two kinds
        # of names cannot be confused: a place is filled up to ten digits with zeros, a time is not.
        found: dict[int, dict[PairKey, str]] = {challenge: {} for challenge in CHALLENGES}
        for key in dataset.pair_keys:
            for challenge in CHALLENGES:
                stem = _file_stem(dataset, key, challenge)
                if (key.log_id, stem) in self.files.members:
                    found[challenge][key] = stem
        if found[2023] and found[2024]:
            raise DataError(f"{path}: holds files of both challenges; evaluate them one at a time")

        self.challenge = 2023 if found[2023] else 2024
        self._stems = found[self.challenge]
        self.pair_keys = list(self._stems)
        if not self.pair_keys:
            raise DataError(
                f"{path}: no prediction for any pair of the data; expected "
                "<log_id>/<timestamp0_ns>.feather (2023) or "
                "<log_id>/<number of sweep 0, ten digits>.feather (2024)"
            )

    def __call__(self, pair: SweepPair) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction for a pair: residual flow (N0, 3) float32, and is_dynamic (N0,) bool.

        Flow is 0, and is_dynamic False, for points without a prediction: those outside the mask in
        2023, or not valid in 2024. is_dynamic is None for 2024, whose files do not contain it.
        Raises DataError naming the file if it cannot be read.
        """
        read = self._read_2023 if self.challenge == 2023 else self._read_2024
        residual, is_dynamic = read(pair)

        # NaN has no error: depending on the metric it would count as bad, as good, or not at all.
        is_lost = ~residual.isfinite().all(dim=1) & pair.pc0.isfinite().all(dim=1)  # (N0,)
        if is_lost.any():
            raise DataError(
                f"{self.files.path}: {pair.log_id}/{self._stems[pair.key]}.feather: flow is not "
                f"finite at {int(is_lost.sum())} points; make the file again"
            )
        return residual, is_dynamic

    def _read_2023(self, pair: SweepPair) -> tuple[torch.Tensor, torch.Tensor]:
        mask = self._mask_of(pair)  # (N0,), M of them True
        if mask is None:
            raise DataError(
                f"{self.files.path}: which points are these? The log has no ground raster: "
                "give the masks"
            )
        table = self._read(pair, "is_dynamic", int(mask.sum()))  # (M rows)

        is_dynamic = torch.zeros_like(mask)
        is_dynamic[mask] = _bools(table, "is_dynamic")

        # Raw flow can only be converted together with its points, so its rows are put into place
        # first. Outside the mask the converted zeros mean nothing: there the residual stays 0.
        total = torch.zeros_like(pair.pc0)  # (N0, 3), raw
        total[mask] = _flow(table)
        residual = torch.zeros_like(pair.pc0)  # (N0, 3)
        residual[mask] = data.residual_flow(total, pair)[mask]
        return residual, is_dynamic

    def _read_2024(self, pair: SweepPair) -> tuple[torch.Tensor, None]:
        table = self._read(pair, "is_valid", len(pair.pc0))
        is_valid = _bools(table, "is_valid")  # (N0,)

        # Rows that are not valid may hold anything, even NaN.
        residual = torch.zeros_like(pair.pc0)
        residual[is_valid] = _flow(table)[is_valid]
        return residual, None

    def _read(self, pair: SweepPair, further_column: str, num_rows: int) -> pyarrow.Table:
        columns = [*FLOW_COLUMNS, further_column]
        return self.files.read(pair.log_id, self._stems[pair.key], columns, num_rows)


def from_predictions(predictions: ChallengePredictions) -> zeroflow.Estimator:
    """An estimator that reads predictions. Its seconds are NaN: the files do not hold times."""

    def estimator(pair: SweepPair) -> zeroflow.Estimate:
        residual, is_dynamic = predictions(pair)
        return zeroflow.Estimate(residual, math.nan, is_dynamic)

    return estimator


def _flow(table: pyarrow.Table) -> torch.Tensor:
    """(rows, 3) float32 meters, residual in 2024 and raw in 2023."""
    return torch.from_numpy(data.stack(table, FLOW_COLUMNS).astype(np.float32))


def _bools(table: pyarrow.Table, column: str) -> torch.Tensor:
    """(rows,) bool."""
    return torch.from_numpy(table[column].to_numpy().astype(bool))
