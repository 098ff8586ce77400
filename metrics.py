"""The metrics: which points count in which group, and end-point errors by group.

"Three-way EPE" means different things in the field: always the mean of three groups' mean end-point errors, so that the
many points that stand still do not drown the few that move, but over different points and groups. Two of them, by name:
  grid   the project's own yardstick: every point that is not ground and in the student's grid
  paper  ZeroFlow's published numbers

End-point error is the length in metres of (estimated - true) residual flow; row i of everything is point i of sweep 0,
in the ego frame of sweep 0. This file needs torch, and none of its siblings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FD, FS, BS, NOT_COUNTED = 0, 1, 2, -1  # foreground dynamic, foreground static, background static
SWEEPS_PER_S = 10.0  # the nominal rate: speeds are 10 · displacement, whatever the pair's own time difference

_PEDESTRIANS = "PEDESTRIAN STROLLER WHEELCHAIR OFFICIAL_SIGNALER".split()
_SMALL_VEHICLES = "BICYCLE BICYCLIST MOTORCYCLE MOTORCYCLIST WHEELED_DEVICE WHEELED_RIDER".split()
_LARGE_VEHICLES = (
    "ARTICULATED_BUS BOX_TRUCK BUS LARGE_VEHICLE RAILED_VEHICLE REGULAR_VEHICLE SCHOOL_BUS TRUCK TRUCK_CAB "
    "VEHICULAR_TRAILER TRAFFIC_LIGHT_TRAILER MESSAGE_BOARD_TRAILER"
).split()
_PAPER_MOVERS = {*_PEDESTRIANS, *_SMALL_VEHICLES, *_LARGE_VEHICLES}


def grid_groups(category: torch.Tensor, is_dynamic: torch.Tensor, is_input: torch.Tensor) -> torch.Tensor:
    """(N,) int64 of category (N,) uint8, is_dynamic (N,) and is_input (N,): not ground and in the student's grid.

    Foreground is every labelled category, dynamic is av2's label (the residual is 5 cm or more).
    """
    groups = torch.where(category > 0, torch.where(is_dynamic, FD, FS), BS)
    return torch.where(is_input, groups, NOT_COUNTED)


def paper_groups(
    points: torch.Tensor, flow: torch.Tensor, category: torch.Tensor, is_input: torch.Tensor, names: Sequence[str]
) -> torch.Tensor:
    """(N,) int64, as ZeroFlow's published code: of the input, what has |x| and |y| at most 35 m.

    points (N, 3); flow (N, 3), the true one; category (N,) uint8, an index of `names`, Argoverse 2's. Movers are
    pedestrians and vehicles, split at 0.5 m/s; signs, cones and bollards count as background; animals are in no group.
    Points whose object is gone in sweep 1 (is_valid False) are *not* excluded.
    """
    is_mover, is_animal = (
        torch.tensor([name in group for name in names])[category.long()] for group in (_PAPER_MOVERS, ("ANIMAL", "DOG"))
    )
    is_fast = SWEEPS_PER_S * flow.norm(dim=1) >= 0.5
    groups = torch.where(is_mover, torch.where(is_fast, FD, FS), BS)
    is_near = (points[:, :2].abs() <= 35).all(dim=1)
    return torch.where(is_input & is_near & ~is_animal, groups, NOT_COUNTED)


class ThreeWayEPE:
    """End-point error (metres) by group, summed exactly over any number of sweeps."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.counts = torch.zeros(3, dtype=torch.float64)

    def add(self, error: torch.Tensor, groups: torch.Tensor) -> None:
        """error (N,) metres; groups (N,) FD, FS, BS or NOT_COUNTED."""
        is_counted = groups != NOT_COUNTED
        self.sums += torch.bincount(groups[is_counted], error[is_counted].double(), minlength=3)
        self.counts += torch.bincount(groups[is_counted], minlength=3)

    @property
    def epe(self) -> float:
        """Mean over all points, whatever their group; NaN without points."""
        return (self.sums.sum() / self.counts.sum()).item()

    @property
    def parts(self) -> tuple[float, float, float]:
        """Mean errors of FD, FS, BS; NaN for a group without points, never 0."""
        return tuple((self.sums / self.counts).tolist())

    @property
    def three_way(self) -> float:
        """Mean over the groups that have points."""
        return (self.sums / self.counts).nanmean().item()
