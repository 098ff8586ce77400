"""Random changes to the content of files, as fuzz.py makes them.

Every function takes a valid content and a random generator, and returns a changed content and what
it did. `mutate` changes a file's bytes, or changes it in a way that only files of its form allow: a
column of a table gets another type, a number in a text becomes nan.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow
import torch
from numpy.random import Generator
from pyarrow import feather, parquet

SPECIAL = (None, np.nan, np.inf, -np.inf, 1e30, -1e9, 1e5, 0, -1, 300, 2**62, 10**400, "text", "")
OTHER_TEXT = (b"", b"hello\n", b"<html><body>404 Not Found</body></html>\n", b"\0" * 300)


def pick(choices: Sequence, rng: Generator):
    return choices[rng.integers(len(choices))]


def mutate(content: bytes, form: str, rng: Generator) -> tuple[bytes, str]:
    """Change a content as bytes, or in a way that only files of its form allow."""
    is_structural = rng.random() < 0.5
    if form in ("table", "parquet") and rng.random() < 0.5:
        # A flipped bit of a compressed file is mostly noticed when unpacking it. Not so in this:
        content = write_table(read_table(content, form), form, "none")
    if is_structural:
        # Some changes cannot be written as such a file. Then the bytes are changed after all.
        with contextlib.suppress(pyarrow.ArrowException, TypeError, ValueError, OverflowError):
            return FORMS[form](content, rng)
    changed, what = mutate_bytes(content, rng)
    return changed, f"bytes: {what}"


def mutate_bytes(content: bytes, rng: Generator) -> tuple[bytes, str]:
    size = len(content)
    # Short and long ranges are equally likely. Headers are at the beginning or at the end of files,
    # and most of the damage is done there.
    length = min(size, int(10 ** rng.uniform(0, 3.5)))
    start = int(rng.integers(size - length + 1))
    if rng.random() < 0.5:
        near = int(rng.integers(min(400, size - length + 1)))
        start = pick((near, size - length - near), rng)
    end = start + length
    before, middle, after = content[:start], content[start:end], content[end:]

    match rng.integers(13):
        case 0:
            return before, f"truncated to {start} of {size} bytes"
        case 1 | 2 | 3:
            flipped = bytearray(content)
            places = start + rng.integers(max(1, length), size=rng.integers(1, 5))
            for place in places:
                flipped[place] ^= 1 << int(rng.integers(8))
            return bytes(flipped), f"bits flipped at {places.tolist()}"
        case 4:
            return before + after, f"bytes {start} to {end} deleted"
        case 5:
            return before + 2 * middle + after, f"bytes {start} to {end} repeated"
        case 6:
            filled = pick((b"\0", b"\xff"), rng) * length
            return before + filled + after, f"bytes {start} to {end} filled with {filled[:1]}"
        case 7:
            return before + rng.bytes(length) + after, f"bytes {start} to {end} random"
        case 8 | 9 | 10:
            return change_number(content, rng)
        case 11:
            return content + middle, f"{length} of its bytes added at the end"
        case _:
            text = pick(OTHER_TEXT, rng)
            return text, f"replaced by {text[:20]!r}"


def change_number(content: bytes, rng: Generator) -> tuple[bytes, str]:
    """Change one whole number of four bytes that may be a count, a size or an offset."""
    numbers = np.frombuffer(content[: len(content) // 4 * 4], "<i4").copy()
    places = np.flatnonzero((numbers > 0) & (numbers < 1_000_000))
    if not len(places):
        return b"", "emptied"
    place, new = pick(places, rng), pick((-1, 0, 1000, 2**28, 2**30, 2**31 - 1, -(2**31)), rng)
    what = f"{numbers[place]} at byte {4 * place} changed to {new}"
    numbers[place] = new
    return numbers.tobytes() + content[4 * len(numbers) :], what


def read_table(content: bytes, form: str) -> pyarrow.Table:
    source = pyarrow.BufferReader(content)
    return parquet.read_table(source) if form == "parquet" else feather.read_table(source)


def write_table(table: pyarrow.Table, form: str, compression: str) -> bytes:
    out = pyarrow.BufferOutputStream()
    if form == "parquet":
        parquet.write_table(table, out, compression=compression)
    else:
        compression = {"none": "uncompressed"}.get(compression, compression)
        feather.write_feather(table, out, compression=compression)
    return out.getvalue().to_pybytes()


def mutate_table(content: bytes, rng: Generator, form: str = "table") -> tuple[bytes, str]:
    table, what = read_table(content, form), ""
    rows, name = table.num_rows, pick(table.column_names, rng)
    other, place = pick(table.column_names, rng), table.column_names.index(name)

    match rng.integers(12):
        case 0:
            table, what = table.drop_columns([name]), f"without column {name}"
        case 1:
            table, what = table.append_column(name, table[name]), f"column {name} twice"
        case 2:
            swapped = table.set_column(place, name, table[other])
            table = swapped.set_column(table.column_names.index(other), other, table[name])
            what = f"columns {name} and {other} swapped"
        case 3:
            names = [f"{each} " if each == name else each for each in table.column_names]
            table, what = table.rename_columns(names), f"column {name} renamed"
        case 4:
            column = change_type(table[name], rng)
            table, what = table.set_column(place, name, column), f"column {name} {column.type}"
        case 5 | 6 | 7:
            values = table[name].to_pylist()
            special = set_special(values, rng)
            column = as_column(values, table[name].type)
            table, what = table.set_column(place, name, column), f"{special} in column {name}"
        case 8:
            extra = table.take(rng.integers(rows, size=rng.integers(1, rows + 1)))
            table, what = pyarrow.concat_tables([table, extra]), f"{extra.num_rows} extra rows"
        case 9:
            kept = int(pick((0, 1, rows // 2, rows - 1), rng))
            table, what = table.slice(0, kept), f"only {kept} of {rows} rows"
        case 10:
            table, what = table.take(rng.permutation(rows)), "rows shuffled"
        case _:
            # Our labels keep JSON in the metadata; other files have none to lose.
            metadata = table.schema.metadata or {}
            text = metadata.get(b"zeroflow")
            changed, what = mutate_json(text, rng) if text else (b"", "without metadata")
            table = table.replace_schema_metadata({"zeroflow": changed} if text else None)
    return write_table(table, form, pick(("none", "lz4", "zstd"), rng)), what


def change_type(column: pyarrow.ChunkedArray, rng: Generator) -> pyarrow.ChunkedArray:
    numbers = [pyarrow.float16(), pyarrow.float32(), pyarrow.int8(), pyarrow.int64()]
    others = [pyarrow.string(), pyarrow.bool_(), pyarrow.timestamp("ns"), pyarrow.decimal128(30, 4)]
    kind = pick([*numbers, *others, pyarrow.uint64(), pyarrow.null(), "lists", "dictionary"], rng)
    if kind == "lists":
        return pyarrow.chunked_array([[[value] for value in column.to_pylist()]])
    if kind == "dictionary":
        return column.dictionary_encode()
    with contextlib.suppress(pyarrow.ArrowException):
        return column.cast(kind, safe=False)
    return pyarrow.chunked_array([as_column(column.to_pylist(), kind)])


def set_special(values: list, rng: Generator) -> str:
    """Put a value that hurts into one, half, or all of the values, or of the lists among them."""
    special = pick(SPECIAL, rng)
    count = int(pick((1, len(values) // 2, len(values)), rng))
    for row in rng.permutation(len(values))[:count].tolist():
        value = values[row]
        if isinstance(value, list) and value and rng.random() < 0.7:
            shorter = value[: rng.integers(len(value))]
            values[row] = pick((shorter, [*shorter, special, *value[len(shorter) + 1 :]]), rng)
        else:
            values[row] = special
    return f"{count} times {str(special)[:12]}"


def as_column(values: list, kind: pyarrow.DataType) -> pyarrow.Array:
    """A column of this type, if the values allow, else of their own type, else of text."""
    for wanted in (kind, None):
        with contextlib.suppress(pyarrow.ArrowException, TypeError, ValueError, OverflowError):
            return pyarrow.array(values, wanted)
    return pyarrow.array([str(value) for value in values])


def mutate_array(values: np.ndarray, rng: Generator) -> tuple[np.ndarray, str]:
    match rng.integers(10):
        # Other shapes and types, as other programs write them.
        case 0:
            return values.T, "transposed"
        case 1:
            shapes = (values.reshape(-1), values[None], values[:0], values[..., :0])
            changed = pick(shapes, rng)
            return changed, f"of shape {changed.shape}"
        case 2 | 3:
            kind = pick("f2 f8 >f4 i4 u1 ? c8 S9 O".split(), rng)
            with np.errstate(all="ignore"):
                return values.astype(kind), f"of type {kind}"
        case 4:
            fields = [(name, "<f4") for name in "xyzi"[: values.shape[-1]]]
            structured = np.zeros(len(values), fields)
            return structured, "a structured array of zeros"
        # Other rows and columns.
        case 5:
            return np.concatenate([values, values[: rng.integers(len(values) + 1)]]), "extra rows"
        case 6:
            return np.concatenate([values, values], axis=-1), "twice as many columns"
        case 7:
            return np.roll(values, 1, axis=-1), "columns rotated"
        # Other numbers.
        case _:
            changed = values.astype(np.float64).reshape(-1)
            special = pick((np.nan, np.inf, 1e30, 1e5, 0.0, -1e9), rng)
            count = int(pick((1, changed.size // 2, changed.size), rng))
            changed[rng.permutation(changed.size)[:count]] = special
            with np.errstate(all="ignore"):
                changed = changed.reshape(values.shape).astype(values.dtype)
            return changed, f"{count} times {special}"


def mutate_npy(content: bytes, rng: Generator) -> tuple[bytes, str]:
    values, what = mutate_array(np.load(io.BytesIO(content)), rng)
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue(), what


def mutate_npz(content: bytes, rng: Generator) -> tuple[bytes, str]:
    arrays = dict(np.load(io.BytesIO(content)))
    name = pick(list(arrays), rng)
    if rng.random() < 0.2:
        what = f"without {name}"
        del arrays[name]
    else:
        arrays[name], what = mutate_array(np.atleast_1d(arrays[name]), rng)
        what = f"{name}: {what}"
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue(), what


def mutate_bin(content: bytes, rng: Generator) -> tuple[bytes, str]:
    values, what = mutate_array(np.frombuffer(content, "<f4").reshape(-1, 4), rng)
    return np.ascontiguousarray(values).tobytes(), what


def mutate_text(content: bytes, rng: Generator) -> tuple[bytes, str]:
    lines = content.split(b"\n")
    # Headers are short, so every other change is made in the first lines.
    row = int(rng.integers(min(len(lines), pick((12, len(lines)), rng))))
    words = lines[row].split(b" ")
    match rng.integers(9):
        case 0 | 1 | 2:
            texts = "nan inf -inf 1e400 1e30 -1 0 abc 1e5 1_0 0x10 1,5 \xe9 999999999".split()
            new = pick([*texts, "9" * 400, ""], rng).encode("latin-1")
            column = int(rng.integers(len(words)))
            words[column] = new
            lines[row], what = b" ".join(words), f"{new[:12]} in line {row}, word {column}"
        case 3:
            what = f"line {row} deleted: {lines.pop(row)[:20]}"
        case 4:
            lines.insert(row, lines[row])
            what = f"line {row} repeated"
        case 5:
            first, second = rng.integers(len(words), size=2).tolist()
            lines = [swap_words(line, first, second) for line in lines]
            what = f"words {first} and {second} swapped in every line"
        case 6:
            lines, what = [line + b" 1" for line in lines], "one more word in every line"
        case 7:
            lines, what = [line.rpartition(b" ")[0] for line in lines], "the last words deleted"
        case _:
            encoding = pick(("utf-16", "utf-8-sig"), rng)
            return content.decode("latin-1").encode(encoding), f"encoded in {encoding}"
    return b"\n".join(lines), what


def swap_words(line: bytes, first: int, second: int) -> bytes:
    words = line.split(b" ")
    if max(first, second) < len(words):
        words[first], words[second] = words[second], words[first]
    return b" ".join(words)


def mutate_tree(tree: dict | list, rng: Generator) -> str:
    """Change one place in nested dicts and lists, in place."""
    places = []  # every (container, key), down to the leaves
    containers = [tree]
    while containers:
        container = containers.pop()
        keys = list(container) if isinstance(container, dict) else range(min(len(container), 5))
        for key in keys:
            places.append((container, key))
            if isinstance(container[key], dict | list):
                containers.append(container[key])
    container, key = pick(places, rng)
    old = container[key]
    match rng.integers(5):
        case 0:
            del container[key]
            return f"without {key}"
        case 1 if isinstance(container, dict):
            name = pick((f"module.{key}", f"{key}_new"), rng)
            container[name] = pick((container.pop(key), old), rng)
            return f"{key} also or only as {name}"
        case 2 if not isinstance(old, torch.Tensor):
            container[key] = pick(([], {}, [old], {"a": old}, str(old)), rng)
            return f"{key} is {str(container[key])[:20]}"
        case _ if isinstance(old, torch.Tensor):
            container[key], what = mutate_tensor(old, rng)
            return f"{key} {what}"
        case _:
            container[key] = pick(SPECIAL, rng)
            return f"{key} is {str(container[key])[:20]}"


def mutate_tensor(tensor: torch.Tensor, rng: Generator) -> tuple[object, str]:
    special = pick((float("nan"), 1e30, 0.0), rng)
    changes = {
        f"full of {special}": torch.full_like(tensor.float(), special),
        "float16": tensor.half(),
        "bool": tensor.bool(),
        "sparse": tensor.to_sparse(),
        "flat": tensor.reshape(-1),
        "with one more axis": tensor[None],
        "a list": tensor.tolist(),
        "None": None,
    }
    what = pick(list(changes), rng)
    return changes[what], what


def mutate_json(content: bytes, rng: Generator) -> tuple[bytes, str]:
    tree = json.loads(content)
    if rng.random() < 0.1:
        tree = pick((17, "text", None, [], [tree]), rng)
        return json.dumps(tree).encode(), "another kind of JSON"
    what = mutate_tree(tree, rng)
    return json.dumps(tree).encode(), what


def mutate_json_lines(content: bytes, rng: Generator) -> tuple[bytes, str]:
    if rng.random() < 0.3:
        return mutate_text(content, rng)
    lines = content.splitlines()
    row = int(rng.integers(len(lines)))
    lines[row], what = mutate_json(lines[row], rng)
    return b"\n".join([*lines, b""]), f"line {row}: {what}"


def mutate_checkpoint(content: bytes, rng: Generator) -> tuple[bytes, str]:
    tree = torch.load(io.BytesIO(content), weights_only=True)
    # Most of the tree are tensors. Change the other parts of a run as often as those.
    parts = [part for part in tree.values() if isinstance(part, dict)]
    what = mutate_tree(pick([tree, *parts], rng), rng)
    out = io.BytesIO()
    torch.save(tree, out)
    return out.getvalue(), what


def mutate_zip(content: bytes, rng: Generator) -> tuple[bytes, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = pick(list(members), rng)
    match rng.integers(6):
        # A member is missing, or there twice, or under another name, or broken itself.
        case 0:
            what = f"without {name[-20:]}"
            del members[name]
        case 1:
            new = pick((f"again/{name}", f"{name}.txt", f"x{name}"), rng)
            members[new], what = members[name], f"{name[-20:]} also as {new[:6]}..."
        case _:
            form = "table" if name.endswith(".feather") else "json"
            members[name], what = mutate(members[name], form, rng)
            what = f"{name[-20:]}: {what}"
    out = io.BytesIO()
    method = pick((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED), rng)
    with zipfile.ZipFile(out, "w", method) as archive:
        for member, stored in members.items():
            archive.writestr(member, stored)
    return out.getvalue(), what


FORMS: dict[str, Callable[[bytes, Generator], tuple[bytes, str]]] = {
    "table": mutate_table,
    "parquet": lambda content, rng: mutate_table(content, rng, "parquet"),
    "npy": mutate_npy,
    "npz": mutate_npz,
    "bin": mutate_bin,
    "text": mutate_text,
    "bytes": mutate_bytes,
    "json": mutate_json,
    "json lines": mutate_json_lines,
    "checkpoint": mutate_checkpoint,
    "zip": mutate_zip,
}
