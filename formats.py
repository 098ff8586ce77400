"""Files with the points of one sweep, in common formats: .feather, .bin, .npy, .npz, .ply, .pcd.

`read_cloud` gives the points (N, 3) of any of them, in the unit and frame of the file. This file
needs data.py beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import data
from data import DataError

CLOUD_SUFFIXES = (".feather", ".bin", ".npy", ".npz", ".ply", ".pcd")


def read_cloud(file: str | Path, columns: int | None = None) -> np.ndarray:
    """(N, 3): the points of a file, in its own floating dtype.

    .feather: the columns x, y, z. .bin: rows of 3 to 9 float32 or float64, of which x, y, z are the
    first (KITTI has 4 float32, nuScenes 5); columns: how many; None: they are recognized. .npy: an
    array (N, 3 or more) of which the first three columns count, the same transposed, or one with
    fields x, y, z. .npz: the same, as the only array or the one called points. .ply (ascii, binary)
    and .pcd (ascii, binary, compressed): the fields x, y, z of any type; VIEWPOINT is not applied.
    Raises DataError naming the file and the remedy.
    """
    file = Path(file)
    suffix = file.suffix.lower()
    if suffix == ".feather":
        return data.read_points(file)
    if suffix == ".bin":
        return data.read_points(file, lambda file: read_bin(file, columns))
    if suffix not in _READERS:
        formats = ", ".join(CLOUD_SUFFIXES)
        raise DataError(f"{file}: not a format of clouds; convert it to one of {formats}")
    return data.read_points(file, _READERS[suffix])


# --- .bin: rows of numbers without a header -------------------------------------------------------


def read_bin(file: Path, columns: int | None = None) -> np.ndarray:
    """All columns (N, columns) of a .bin file, in the file's dtype."""
    if columns is not None and columns < 3:
        raise ValueError(f"--columns {columns}: x, y and z are three; give 3 or more")
    content = file.read_bytes()
    # float32 comes first: read as such, float64 is never plausible.
    for dtype in (np.dtype("<f4"), np.dtype("<f8")):
        found = _row_width(np.frombuffer(content, dtype, len(content) // dtype.itemsize))
        if found is not None and columns in (None, found):
            columns = found
            break
    else:
        dtype = np.dtype("<f4")
        if columns is None and file.name.lower().endswith(".pcd.bin"):
            columns = 5  # as nuScenes names its files
    if columns is None and content:
        found = f"its {len(content)} bytes were not recognized as rows of 3 to 9 float32 or float64"
        raise ValueError(f"{found}; say how many numbers a row has with --columns")
    columns = columns or 4
    if len(content) % (columns * dtype.itemsize):
        found = f"{len(content)} bytes are not a whole number of rows"
        raise ValueError(f"{found} of {columns} {dtype.name} numbers")
    return np.frombuffer(content, dtype).reshape(-1, columns)


def _row_width(values: np.ndarray) -> int | None:
    """How many columns the table has whose values follow each other in (M,); None: unknown.

    x, y, z and intensity are distributed differently. So where the width is right, the column says
    something about the value; where it is wrong, the columns mix. How much it says is their mutual
    information: 0.35 to 1.1 nats in real sweeps, and little more than half at a wrong width.
    """
    # Up to 20 pieces from all over the file: the values, and where each stood.
    length = min(2400, len(values))
    starts = np.unique(np.linspace(0, len(values) - length, 20).astype(int))
    position = (starts[:, None] + np.arange(length)).ravel()
    with np.errstate(invalid="ignore"):  # there may be NaN of all kinds
        sample = values[position].astype(np.float64)
    is_finite = np.isfinite(sample)
    if is_finite.sum() < 9:
        return None

    # Sort the values into 4 to 16 bins of equal counts; NaN and infinity have one of their own.
    bins = min(max(len(sample) // 50, 4), 16)
    edges = np.unique(np.quantile(sample[is_finite], np.arange(1, bins) / bins))
    value_bin = np.where(is_finite, np.searchsorted(edges, sample, "right"), bins)
    information = {}
    for width in range(3, 10):
        cell = position % width * (bins + 1) + value_bin
        counts = np.bincount(cell, minlength=width * (bins + 1)).reshape(width, bins + 1)
        counts = counts[:, counts.any(axis=0)]  # (width, used bins)
        expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / len(sample)
        nats = (counts * np.log(np.maximum(counts, 1) / expected)).sum()
        # By chance alone, twice this would be chi-squared: take off its mean and five deviations.
        freedom = (counts.shape[1] - 1) * (width - 1)
        information[width] = (nats - freedom / 2 - 5 * np.sqrt(freedom / 2)) / len(sample)
    best = max(information.values())
    if best <= 0:
        return None

    # Multiples of the right width say as much: take the narrowest. They say even more if lasers
    # fire low and high in turn. Then a row is two points, whose x and y rise and fall together.
    width = next(width for width in information if information[width] > best / 1.2)
    rows = values[: len(values) // width * width].reshape(-1, width)[:: len(values) // 20_000 + 1]
    rows = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
    if len(rows) < 2:
        return None
    ranks = rows.argsort(axis=0, kind="stable").argsort(axis=0)
    correlation = np.corrcoef(ranks.T)
    for half in range(3, width):
        if width % half == 0 and min(correlation[0, half], correlation[1, half + 1]) > 0.4:
            width = half
            break
    rival = max(information[other] for other in information if other % width)

    # Coordinates beyond 10,000 km are the bits of another type; if all are equal, its zeros.
    is_far = np.abs(rows[:, :3]) > 1e7
    is_constant = (rows[:, :2] == rows[0, :2]).all(axis=0).any()
    is_plausible = rival < 0.7 * information[width] and is_far.mean() < 0.01 and not is_constant
    return width if is_plausible else None


# --- .npy and .npz --------------------------------------------------------------------------------


def _read_npy(file: Path) -> np.ndarray:
    return _as_rows(np.load(file, allow_pickle=False))


def _read_npz(file: Path) -> np.ndarray:
    with np.load(file, allow_pickle=False) as arrays:
        if "points" in arrays:
            return _as_rows(arrays["points"])
        if len(arrays.files) != 1:
            raise ValueError(f"it holds {arrays.files}, and none of them is called points")
        return _as_rows(arrays[arrays.files[0]])


def _as_rows(array: np.ndarray) -> np.ndarray:
    """Points as rows, also from an array with fields x, y, z, or one with points as columns."""
    if array.dtype.names:
        return _stack_xyz(array.ravel())
    # No cloud has more than 16 numbers per point, or only 3 to 6 points.
    is_transposed = array.ndim == 2 and 3 <= array.shape[0] <= 6 and array.shape[1] > 16
    return array.T if is_transposed else array


# --- .ply -----------------------------------------------------------------------------------------


# PLY's older names of types; the newer ones (int8 ... float64) are NumPy's own.
_PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
_PLY_TYPES |= {"float": "f4", "double": "f8"}
_PLY_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}


def _read_ply(file: Path) -> np.ndarray:
    content = file.read_bytes()
    header = re.match(rb"ply\s.*?\nend_header\r?\n", content, re.DOTALL)
    if not header:
        raise ValueError("it does not begin with ply ... end_header")
    form, elements = _parse_ply_header(header[0].decode("ascii", "replace"))

    # The elements follow each other without gaps, each as `count` rows of its properties. Walk over
    # them until the vertices. `lines` is what remains of a text file, `body` of a binary one.
    body = content[header.end() :]
    lines = body.split(b"\n") if form == "ascii" else []
    for element, count, properties in elements:
        # Its rows would differ in length, so that they can neither be read nor skipped.
        if "list" in [kind for _, kind in properties]:
            raise ValueError(f"a list among or before the vertices, in {element}, is not supported")
        row = _row_type(properties).newbyteorder(_PLY_ORDERS[form])
        if element == "vertex" and form == "ascii":
            return _text_xyz(lines, count, row.names)
        if element == "vertex":
            return _stack_xyz(np.frombuffer(body, row, count))
        lines = lines[count:]
        body = body[count * row.itemsize :]
    raise ValueError("it has no vertices")


def _parse_ply_header(header: str) -> tuple[str, list[tuple[str, int, list[tuple[str, str]]]]]:
    """The format; of each element its name, number of rows, and properties (name, NumPy's type)."""
    form, elements = "", []
    for line in header.splitlines():
        match line.split():
            case ["format", form, _]:
                pass
            case ["element", name, count]:
                elements.append((name, _count(count), []))
            case ["property", kind, *_, name]:
                elements[-1][2].append((name, _PLY_TYPES.get(kind, kind)))
    return form, elements


def _count(text: str) -> int:
    """Negative numbers are refused: NumPy would read all rows."""
    if not text.isdecimal():
        raise ValueError(f"its header has {text!r} where a number of rows is expected")
    return int(text)


def _row_type(fields: list[tuple[str, str]]) -> np.dtype:
    """One point as a structured dtype, from names and types in the order of a file."""
    # Only x, y, z are read. Other names may occur twice, which NumPy refuses: number them.
    numbered = []
    for i, (name, kind) in enumerate(fields):
        numbered.append((name if name in ("x", "y", "z") else f"{i} {name}", kind))
    return np.dtype(numbered)


# --- .pcd -----------------------------------------------------------------------------------------


def _read_pcd(file: Path) -> np.ndarray:
    content = file.read_bytes()
    header_end = re.search(rb"^DATA\s+(\w+)[^\n]*\n", content, re.MULTILINE)
    if not header_end:
        raise ValueError("it has no line DATA")
    form, body = header_end[1], content[header_end.end() :]
    header = {}  # first word of a line -> the other words
    for line in content[: header_end.end()].decode("ascii", "replace").splitlines():
        words = line.split()
        if words:
            header[words[0]] = words[1:]
    missing = [word for word in ("FIELDS", "SIZE", "TYPE", "POINTS") if not header.get(word)]
    if missing:
        raise ValueError(f"its header has no {', '.join(missing)}")
    row, count = _pcd_row(header), _count(header["POINTS"][0])

    if form == b"ascii":
        return _text_xyz(body.split(b"\n"), count, row.names)
    if form == b"binary":
        return _stack_xyz(np.frombuffer(body, row, count))
    if form != b"binary_compressed":
        raise ValueError(f"its DATA is {form}")

    # Compressed: two sizes, then all values of the first field, all of the second, and so on.
    packed_size, unpacked_size = np.frombuffer(body, "<u4", 2).tolist()
    unpacked = _unpack_lzf(body[8 : 8 + packed_size], unpacked_size)
    columns = {}
    for name, (kind, offset) in row.fields.items():
        # A field that begins `offset` bytes into a row begins `count * offset` bytes into this.
        columns[name] = np.frombuffer(unpacked, kind, count, count * offset)
    return _stack_xyz(columns)


def _pcd_row(header: dict[str, list[str]]) -> np.dtype:
    """One point of a .pcd file as a structured dtype."""
    names = header["FIELDS"]
    counts = header.get("COUNT", ["1"] * len(names))
    fields = []
    for name, size, kind, count in zip(names, header["SIZE"], header["TYPE"], counts, strict=True):
        # One field may be several numbers (padding, histograms): each becomes a field.
        if _count(count) > 10_000:
            raise ValueError(f"its field {name} has {count} numbers per point")
        fields += [(name, f"<{kind.lower()}{size}")] * _count(count)  # F 4 becomes <f4
    return _row_type(fields)


def _unpack_lzf(packed: bytes, size: int) -> bytes:
    """Undo LZF compression. Raises ValueError or IndexError unless it gives `size` bytes."""
    output, position = bytearray(), 0
    while position < len(packed):
        control = packed[position]
        position += 1

        # A control byte below 32: the next `control + 1` bytes are copied as they are.
        if control < 32:
            output += packed[position : position + control + 1]
            position += control + 1
            continue

        # Otherwise earlier output repeats. Its length is in the upper three bits, less 2; if they
        # are all set, the next byte adds to it. The other five bits and one more byte say how far
        # back it starts, less 1.
        length = (control >> 5) + 2
        if length == 7 + 2:
            length += packed[position]
            position += 1
        distance = ((control & 31) << 8) + packed[position] + 1
        position += 1
        start = len(output) - distance
        if start < 0:
            raise ValueError("its compressed part refers to bytes before its beginning")
        for i in range(start, start + length):  # one by one: it may repeat bytes it just wrote
            output.append(output[i])
    if len(output) != size:
        raise ValueError(f"its compressed part has {len(output)} bytes, expected {size}")
    return bytes(output)


# --- Shared ---------------------------------------------------------------------------------------


def _stack_xyz(columns: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """(N, 3) from a structured array, or a dict of columns, with the names x, y, z."""
    names = columns if isinstance(columns, dict) else columns.dtype.names
    _require_xyz(names)
    return np.stack([columns[axis] for axis in "xyz"], axis=1)


def _text_xyz(lines: list[bytes], count: int, names: tuple[str, ...]) -> np.ndarray:
    """(count, 3): x, y, z from rows of numbers as text; names: of all columns."""
    _require_xyz(names)
    columns = [names.index(axis) for axis in "xyz"]
    points = np.loadtxt(lines[:count], usecols=columns, ndmin=2)
    if len(points) != count:
        raise ValueError(f"it has {len(points)} points, expected {count}")
    return points


def _require_xyz(names: Iterable[str]) -> None:
    missing = sorted(set("xyz") - set(names))
    if missing:
        raise ValueError(f"its points have no {', '.join(missing)}")


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".ply": _read_ply, ".pcd": _read_pcd}
