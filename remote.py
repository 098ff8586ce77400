"""Argoverse 2 straight from its public bucket, without an account, and cached on disk.

`--data s3://argoverse/datasets/av2/sensor/val`, or the address of one log, opens like a folder. A
file is fetched whole when it is first needed; from then on it is a local file, in the layout of the
bucket, and the reader of data.py reads it like any other.

  <cache>/<bucket>/<...>/<log>/sensors/lidar/<timestamp_ns>.feather    as in the bucket
  <cache>/<bucket>/<...>/.listing.json                                 logs and sweeps, with sizes
  <cache>/.locks/                                                      who reads which log

Fetching needs only HTTPS and the standard library: one connection per process and thread, made when
it is first used, so that both ways to start processes, fork and spawn, work. (pyarrow's own reader
of S3 promises neither, and may hang at exit.)

Errors are of two kinds. If a file is missing or forbidden, its pair is broken: DataError, at once.
If the server cannot be reached, or drops connections, the request is repeated for minutes; after
that the run stops with an `Outage`, which is never counted as a broken pair. AWS_ENDPOINT_URL names
a server other than the public one, as it does for the tools of AWS.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import http.client
import json
import os
import random
import shutil
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data
from data import DataError, Outage, PairKey, SweepPair

LISTING_THREADS = 16  # a split has up to 16,000 logs, with a request for each
PATIENCE_S = 300.0  # how long a request is repeated before it is an outage
TIMEOUT_S = 30.0  # how long the server may be silent
PREFETCH = 8  # sweeps that are fetched ahead while pairs are read in order
EVERY_S = 60.0  # how often a process looks whether the cache is too large


# --- HTTP -----------------------------------------------------------------------------------------

_connections = threading.local()


class Bucket:
    """Lists and fetches what a public bucket holds."""

    def __init__(self, name: str):
        self.name = name
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        url = urllib.parse.urlsplit(endpoint or f"https://{name}.s3.amazonaws.com")
        self.is_https, self.host = url.scheme == "https", url.netloc
        # The public server has the bucket in its name, others have it in the path.
        self.path = f"{url.path.rstrip('/')}/{name}" if endpoint else ""

    def get(self, key: str, size: int | None = None, patience_s: float | None = None) -> bytes:
        """The content of a key, whole. Raises DataError if it is not there, Outage if no answer.

        size: bytes that it must have, if known. patience_s: how long the request is repeated.
        """
        path = f"{self.path}/{urllib.parse.quote(key)}"
        return self._answer(path, f"s3://{self.name}/{key}", size, patience_s)

    def _answer(
        self, path: str, address: str, size: int | None = None, patience_s: float | None = None
    ) -> bytes:
        """The whole answer to a request; address: for messages."""
        patience_s = PATIENCE_S if patience_s is None else patience_s
        started, wait_s = time.monotonic(), 0.5
        while True:
            try:
                status, content = self._request(path)
            except (OSError, http.client.HTTPException) as error:
                _connections.__dict__.clear()  # the next attempt gets a new connection
                problem = f"{type(error).__name__}: {error}"
            else:
                if status == 200 and size in (None, len(content)):
                    return content
                if status not in (200, 429, 500, 502, 503, 504):
                    what = "is not there" if status == 404 else f"cannot be read (status {status})"
                    raise DataError(f"{address}: {what}; check the address")
                problem = f"status {status}, {len(content)} of {size} bytes"
            if time.monotonic() + wait_s - started > patience_s:
                what = f"{self.host} gave no whole answer for {patience_s:.0f} s ({problem})"
                raise Outage(f"{address}: {what}; finished work is kept, try again")
            # Many processes that wait equally long would all try again at the same moment.
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, 30.0)

    def _request(self, path: str) -> tuple[int, bytes]:
        """Status and whole body of one request. Raises if the body is shorter than announced."""
        connection = self._connection()
        connection.request("GET", path, headers={"Connection": "keep-alive"})
        response = connection.getresponse()
        content = response.read()  # raises IncompleteRead for a body that is torn
        return response.status, content

    def _connection(self) -> http.client.HTTPConnection:
        # A process that was forked must not write into the connection of its parent.
        owner = (os.getpid(), self.host)
        if _connections.__dict__.get("owner") != owner:
            kind = http.client.HTTPSConnection if self.is_https else http.client.HTTPConnection
            _connections.open, _connections.owner = kind(self.host, timeout=TIMEOUT_S), owner
        return _connections.open

    def list(self, prefix: str) -> tuple[dict[str, int], list[str]]:
        """The files right below a prefix, name -> bytes, and the names of the folders there."""
        files, folders, token = {}, [], ""
        while True:
            query = {"list-type": "2", "prefix": prefix, "delimiter": "/"}
            if token:
                query["continuation-token"] = token
            path = f"{self.path}/?{urllib.parse.urlencode(query)}"
            content = self._answer(path, f"s3://{self.name}/{prefix}")
            try:
                page = ElementTree.fromstring(content)
            except ElementTree.ParseError as error:
                what = f"its listing is not XML ({error}); is this address a bucket?"
                raise DataError(f"s3://{self.name}/{prefix}: {what}") from error
            # A page has at most 1,000 names, and a token by which the next page is asked for.
            for element in page.iter():
                # Names carry the name space of the page: {http://...}Contents.
                kind = element.tag.rpartition("}")[2]
                values = {child.tag.rpartition("}")[2]: child.text for child in element}
                if kind == "Contents":
                    files[values["Key"][len(prefix) :]] = int(values["Size"])
                elif kind == "CommonPrefixes":
                    folders.append(values["Prefix"][len(prefix) :].rstrip("/"))
                elif kind == "NextContinuationToken":
                    token = element.text
            if not any(e.tag.endswith("IsTruncated") and e.text == "true" for e in page):
                return files, folders


# --- Pairs ----------------------------------------------------------------------------------------


def open_remote(
    address: str,
    true_flow: bool,
    ground: str,
    cache: str | None,
    cache_gb: float | None,
    **options: object,
) -> RemotePairs:
    """The pairs of a split, or of one log, at an address s3://bucket/...; see `data.open_dataset`.

    cache: folder for what is fetched; None: in the user's cache folder. cache_gb: limit the cache
    to this size by deleting the least recently used logs; None: keep all. options: the other
    arguments of `data.Argoverse2Pairs`.
    """
    bucket_name, _, prefix = address.removeprefix("s3://").strip("/").partition("/")
    if not bucket_name or not prefix:
        raise DataError(f"{address}: expected s3://bucket/folder of a split or a log")
    try:
        base = Path(cache or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # in a container, a user may have no home
        raise DataError(f"{address}: you have no home folder here; give --cache") from error
    root = base if cache else base / "zeroflow" / "bucket"
    store = Cache(root, Bucket(bucket_name), cache_gb)
    listing = store.listing(prefix)
    return RemotePairs(store, listing, true_flow, ground, **options)


class Cache:
    """Files of a bucket that are fetched once and kept."""

    def __init__(self, root: Path, bucket: Bucket, most_gb: float | None):
        self.root, self.bucket, self.most_gb = root.absolute(), bucket, most_gb
        self.folder = self.root / bucket.name

    def listing(self, prefix: str) -> dict[str, dict[str, int]]:
        """Path of each log -> {name of a sweep's file: bytes}; kept on disk after the first time.

        Raises DataError if there is no log.
        """
        file = self.folder / prefix / ".listing.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(file.read_text())
        # One log has sweeps right below it; a split has folders, each of them a log.
        sweeps, _ = self.bucket.list(f"{prefix}/sensors/lidar/")
        if sweeps:
            logs = [prefix]
        else:
            files, folders = self.bucket.list(f"{prefix}/")
            logs = [f"{prefix}/{name}" for name in folders]
            if not logs:
                found = f"there are {len(files)} files" if files else "there is nothing"
                address = f"s3://{self.bucket.name}/{prefix}"
                raise DataError(f"{address}: {found}, and no log; give the address of a split")
        # The names and sizes of a log's sweeps take one request.
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            listings = pool.map(lambda log: self.bucket.list(f"{log}/sensors/lidar/")[0], logs)
            found = {log: files for log, files in zip(logs, listings, strict=True) if files}
        if not found:
            address = f"s3://{self.bucket.name}/{prefix}"
            raise DataError(f"{address}: no Argoverse 2 log in it, but folders {folders[:5]}")
        with data.atomic_file(file) as out:
            out.write(json.dumps(found).encode())
        return found

    def fetch(self, key: str, size: int | None = None, patience_s: float | None = None) -> Path:
        """The local file of a key; fetched if it is not there. Other arguments: `Bucket.get`."""
        file = self.folder / key
        if not file.exists():
            content = self.bucket.get(key, size=size, patience_s=patience_s)
            with data.atomic_file(file) as out:
                out.write(content)
        return file

    def fetch_log(self, log: str, patience_s: float | None = None) -> None:
        """Fetch everything of a log except its sweeps: poses, boxes, calibration and map."""
        done = self.folder / log / ".complete"
        if done.exists():
            return
        for folder in (log, f"{log}/calibration", f"{log}/map"):
            for name, size in self.bucket.list(f"{folder}/")[0].items():
                self.fetch(f"{folder}/{name}", size, patience_s)
        with data.atomic_file(done):
            pass

    @contextlib.contextmanager
    def in_use(self, log: str) -> Iterator[None]:
        """Keep all processes from deleting the log. The lock ends with the block or the process."""
        with self._lock_file(log).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            os.utime(lock.fileno())  # the log was used just now
            yield

    def _lock_file(self, log: str) -> Path:
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(f"{self.bucket.name}/{log}".encode()).hexdigest()[:24]
        return folder / name

    def evict(self, logs: list[str]) -> None:
        """Delete the least recently used logs, until the rest is small enough.

        A log that any process is reading is left alone.
        """
        if self.most_gb is None:
            return
        # How many bytes too many do all logs have?
        sizes = {log: data.bytes_in(self.folder / log) for log in logs}
        too_many = sum(sizes.values()) - self.most_gb * 1e9
        used = {log: self._lock_file(log) for log in logs if sizes[log]}
        for log in sorted(
            used, key=lambda log: used[log].stat().st_mtime if used[log].exists() else 0
        ):
            if too_many <= 0:
                return
            with used[log].open("ab") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A log that is only half deleted must not look complete.
                (self.folder / log / ".complete").unlink(missing_ok=True)
                shutil.rmtree(self.folder / log, ignore_errors=True)
                too_many -= sizes[log]


class RemotePairs(data.Argoverse2Pairs):
    """Pairs of logs in a bucket. Before a pair is read, its files are fetched into the cache."""

    def __init__(self, cache: Cache, listing: dict[str, dict[str, int]], *options, **others):
        self.cache = cache
        self._sizes = {cache.folder / log: files for log, files in listing.items()}
        self._logs = {data.log_id_of(cache.folder / log): log for log in listing}
        self._next_eviction = 0.0  # by the clock of this process
        self._last: PairKey | None = None  # the pair that was read last
        super().__init__(list(self._sizes), *options, **others)
        self.notes.append(f"files are fetched when needed, and kept in {cache.folder}")

    def _names(self, lidar: Path) -> list[str]:
        return sorted(self._sizes[lidar.parent.parent])

    def log(self, log_id: str) -> data.Log:
        """Poses, ground and boxes of a log."""
        with self.cache.in_use(self._logs[log_id]):
            self.cache.fetch_log(self._logs[log_id])
            return super().log(log_id)

    def read(self, key: PairKey) -> SweepPair:
        # Measuring the size of the cache takes a second for a thousand logs.
        if time.monotonic() > self._next_eviction:
            self.cache.evict(list(self._logs.values()))
            self._next_eviction = time.monotonic() + EVERY_S
        with self.cache.in_use(self._logs[key.log_id]):
            self._fetch(key.log_id, key[1:])
            pair = super().read(key)
        self._prefetch(key)
        return pair

    def _fetch(self, log_id: str, stamps: Sequence[int], patience_s: float | None = None) -> None:
        """Fetch everything that pairs of these sweeps need."""
        log = self._logs[log_id]
        self.cache.fetch_log(log, patience_s)
        for stamp in stamps:
            name = f"{stamp}.feather"
            size = self._sizes[self.cache.folder / log].get(name)
            self.cache.fetch(f"{log}/sensors/lidar/{name}", size, patience_s)

    def _prefetch(self, key: PairKey) -> None:
        """Fetch the next sweeps of the log in the background, if pairs are read in order."""
        last, self._last = self._last, key
        stamps = self.stamps[key.log_id]
        if last is None or last.log_id != key.log_id:
            return
        # Processes that share a log may read every other pair each, for example.
        ahead = stamps.index(key.timestamp0_ns) - stamps.index(last.timestamp0_ns)
        if 0 < ahead <= PREFETCH:
            after = stamps.index(key.timestamp1_ns) + 1
            for stamp in stamps[after : after + PREFETCH]:
                _pool(os.getpid()).submit(self._fetch_quietly, key.log_id, stamp)

    def _fetch_quietly(self, log_id: str, stamp: int) -> None:
        # An error here will happen again, and be reported, when the pair is read.
        with contextlib.suppress(DataError, OSError, Outage):
            with self.cache.in_use(self._logs[log_id]):
                self._fetch(log_id, [stamp], patience_s=0.0)

    def bytes_to_fetch(self) -> int:
        """Bytes of the sweeps of all pairs that are not in the cache yet."""
        sweeps = {(key.log_id, stamp) for key in self.pair_keys for stamp in key[1:]}
        total = 0
        for log_id, stamp in sweeps:
            folder = self.cache.folder / self._logs[log_id]
            if not (folder / "sensors" / "lidar" / f"{stamp}.feather").exists():
                total += self._sizes[folder][f"{stamp}.feather"]
        return total


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """The threads of this process that fetch ahead; a forked one needs its own."""
    return ThreadPoolExecutor(4, thread_name_prefix="fetch")
