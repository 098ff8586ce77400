"""What the scene flow challenges of Argoverse 2 hand out and take: masks, and zips of predictions.

All of them exchange zips of Feather files, one file per pair of consecutive sweeps. They differ in
nearly everything else:

                   2023                           2024                           2026
  scored           every fifth pair of the split  every fifth pair of each log   the server knows
  name of a file   <log_id>/<timestamp0>.feather  <log_id>/<place of sweep 0>..  as in 2023
  rows             the points of the mask         all points of sweep 0          as in 2024
  flow             raw, ego-motion included       residual                       residual
  further column   is_dynamic: 5 cm or more       is_valid: has a prediction     none
  further file     none                           metadata.json                  none

Points are (N0, 3) float32 in meters, in the ego frame of sweep 0, and row i of a flow belongs to
row i of `pc0`. Inside this project flow is always residual. It is converted to raw flow and back
here, where a file of 2023 is written or read.

Sources: the submission tools of the av2 package (`av2.evaluation.scene_flow`) for 2023, and
BucketedSceneFlowEval (Khatri et al., "I Can't Believe It's Not Scene Flow!", ECCV 2024) for 2024.
The servers of both are closed and the labels of the test split are released, so today a submission
is evaluated on one's own disk: `ChallengePredictions` reads it back. The challenge of 2026 is live
(sceneflow.argoverse.org); its data are HDF5 scenes of several data sets (hdf5.py), and its format
is known here from the code that its organizers have published, not from a file.
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

CHALLENGES = (2023, 2024, 2026)
EVERY = 5  # the challenges of 2023 and 2024 score every fifth pair
UPLOAD_2026 = "https://sceneflow.argoverse.org/submissions/upload"
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

    2023 takes every fifth of all pairs of the split in a row, 2024 every fifth of each log. Which
    pairs 2026 scores is known only to its server, so all of them are written.
    """
    keys = consecutive_keys(dataset)
    if challenge == 2023:
        scored = keys[::EVERY]
    elif challenge == 2026:
        scored = keys
    else:
        scored = [key for key in keys if _place_in_log(dataset, key) % EVERY == 0]
    return {f"{key.log_id}/{_file_stem(dataset, key, challenge)}.feather": key for key in scored}


def _place_in_log(dataset: data.Pairs, key: PairKey) -> int:
    """The place of sweep 0 among all sweeps of its log, from 0."""
    return dataset.stamps[key.log_id].index(key.timestamp0_ns)


def _file_stem(dataset: data.Pairs, key: PairKey, challenge: int) -> str:
    """The name of a pair's file, without its ending."""
    if challenge in (2023, 2026):
        # Scenes in HDF5 may count time in another unit; the file has the scene's own number.
        unit_ns = getattr(dataset, "unit_ns", {}).get(key.log_id, 1)
        return str(key.timestamp0_ns // unit_ns)
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
    """Write the zip that a challenge of CHALLENGES takes. Returns the number of pairs in it.

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
    mask: (N0,) bool, the points that 2023 scores; not used in other years.
    """
    if challenge == 2026:
        flow, further_column = residual, {}
    elif challenge == 2023:
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

    def column_names(self, log_id: str, name: str) -> list[str]:
        """The columns of one file. Raises DataError naming it if it is missing or torn."""
        member = self.members[log_id, name]
        return data.read_feather(self.path / member, [], self._unpacked(member)).column_names

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
    """Predictions on disk in the layout of a challenge: a folder, or a submission's zip.

    challenge: one of CHALLENGES, recognized by the names of the files, and by their columns.
    pair_keys: the pairs of `dataset` that have a prediction.
    masks: the official masks of 2023, if the predictions were made with them. None: the rows are
    assigned to points by a mask that is made by the rules the official masks follow.
    Raises DataError if no pair has a prediction, or if there are files of two challenges.
    """

    def __init__(self, path: str | Path, dataset: data.Pairs, masks: ChallengeFiles | None = None):
        self.files = ChallengeFiles(path)
        self._mask_of = functools.partial(mask_of, dataset) if masks is None else masks.mask

        # Look for every pair under the names that it would have. The two kinds of names cannot be
        # confused: a place is filled up to ten digits with zeros, a time is not.
        by_time, by_place = {}, {}
        for key in dataset.pair_keys:
            for challenge, found in ((2023, by_time), (2024, by_place)):
                stem = _file_stem(dataset, key, challenge)
                if (key.log_id, stem) in self.files.members:
                    found[key] = stem
        if by_time and by_place:
            raise DataError(f"{path}: holds files of two challenges; evaluate them one at a time")
        self._stems = by_time or by_place
        self.pair_keys = list(self._stems)
        if not self.pair_keys:
            raise DataError(
                f"{path}: no prediction for any pair of the data; expected "
                "<log_id>/<timestamp0_ns>.feather (2023, 2026) or "
                "<log_id>/<number of sweep 0, ten digits>.feather (2024)"
            )
        self.challenge = 2024 if by_place else self._year_of(self.pair_keys[0])

    def _year_of(self, key: PairKey) -> int:
        """2023 or 2026, whose names are alike: only the files of 2023 tell what is dynamic."""
        names = self.files.column_names(key.log_id, self._stems[key])
        return 2023 if "is_dynamic" in names else 2026

    def __call__(self, pair: SweepPair) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction for a pair: residual flow (N0, 3) float32, and is_dynamic (N0,) bool.

        Flow is 0, and is_dynamic False, for points without a prediction: those outside the mask in
        2023, or not valid in 2024. is_dynamic is None but for 2023: other files do not hold it.
        Raises DataError naming the file if it cannot be read.
        """
        readers = {2023: self._read_2023, 2024: self._read_2024, 2026: self._read_2026}
        read = readers[self.challenge]
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

    def _read_2026(self, pair: SweepPair) -> tuple[torch.Tensor, None]:
        return _flow(self._read(pair, None, len(pair.pc0))), None

    def _read(self, pair: SweepPair, further_column: str | None, num_rows: int) -> pyarrow.Table:
        columns = [*FLOW_COLUMNS, *([further_column] if further_column else [])]
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
