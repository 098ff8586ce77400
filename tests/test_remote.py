"""Argoverse 2 from a bucket: a local server that serves a folder, and fails if it is told to."""

import dataclasses
import http.server
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
import torch

import commands
import data
import labels
import nsfp
import remote
import zeroflow

ROOT = Path(remote.__file__).parent
QUICK = dataclasses.replace(nsfp.TEACHERS["fast"], priors=1, iterations=2, refine="none")


class Handler(http.server.BaseHTTPRequestHandler):
    """Path-style S3: /bucket?list-type=2... and /bucket/key."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, url = self.server, urllib.parse.urlsplit(self.path)
        key = urllib.parse.unquote(url.path).removeprefix("/bucket").lstrip("/")
        with server.lock:
            server.requests.append(key or url.query)
            fault = server.faults.pop(0) if server.faults else None
        if fault == "sleep":
            time.sleep(1.0)
        if fault == "close" or server.is_away:
            self.close_connection = True
            return
        if fault == "503":
            self.answer(503, b"slow down")
            return
        file = server.root / key
        if not key:
            self.answer(200, listing(server, dict(urllib.parse.parse_qsl(url.query))))
        elif key in server.forbidden or not file.is_file():
            self.answer(403 if key in server.forbidden else 404, b"no")
        else:
            self.answer(200, file.read_bytes(), fault)

    def answer(self, status: int, content: bytes, fault: str | None = None) -> None:
        sent = content[: len(content) // 2] if fault in ("torn", "short") else content
        self.send_response(status)
        # A torn body is shorter than announced; a short one is announced as if it were whole.
        self.send_header("Content-Length", str(len(sent if fault == "short" else content)))
        self.end_headers()
        for start in range(0, len(sent), 1 << 14):
            self.wfile.write(sent[start : start + (1 << 14)])
            self.wfile.flush()
            time.sleep(self.server.pause_s)
        self.close_connection = fault == "torn"


def listing(server, query: dict) -> bytes:
    """One page of ListObjectsV2, of at most `page` names."""
    prefix, names = query["prefix"], []
    folder = server.root / prefix
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            size = path.stat().st_size
            key = escape(prefix + path.name)
            if path.is_dir():
                names.append(f"<CommonPrefixes><Prefix>{key}/</Prefix></CommonPrefixes>")
            else:
                names.append(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>")
    start = int(query.get("continuation-token", 0))
    end = start + server.page
    is_more = end < len(names)
    token = f"<NextContinuationToken>{end}</NextContinuationToken>" if is_more else ""
    more = f"<IsTruncated>{str(is_more).lower()}</IsTruncated>{token}"
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    page = f'<ListBucketResult xmlns="{space}">{"".join(names[start:end])}{more}'
    return f"{page}</ListBucketResult>".encode()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.lock = root, threading.Lock()
        self.requests, self.faults, self.forbidden = [], [], set()
        self.page, self.pause_s, self.is_away = 1000, 0.0, False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        pass  # a client that was killed


ADDRESS = "s3://bucket/street"


@pytest.fixture
def server(tmp_path, street_folder, monkeypatch):
    """A bucket with the street in it, as the folder `street`."""
    root = tmp_path / "bucket"
    shutil.copytree(street_folder, root / "street")
    made = Server(root)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(remote, "PATIENCE_S", 20.0)
    yield made
    made.shutdown()
    made.server_close()


def open_cached(tmp_path, address: str = ADDRESS, **options) -> data.Pairs:
    return data.open_dataset(address, cache=tmp_path / "cache", **options)


def assert_same_pairs(found, expected) -> None:
    assert found.pair_keys == expected.pair_keys and found.stamps == expected.stamps
    for one, two in zip(found, expected, strict=True):
        for field in dataclasses.fields(data.SweepPair):
            a, b = getattr(one, field.name), getattr(two, field.name)
            same = torch.equal(a.nan_to_num(), b.nan_to_num()) if torch.is_tensor(a) else a == b
            assert same, field.name


# --- What is read ---------------------------------------------------------------------------------


def test_pairs_from_a_bucket_are_those_of_the_same_folder(tmp_path, server, street):
    """And the second time, nothing is asked of the server."""
    server.page = 2  # listings of several pages
    dataset = open_cached(tmp_path)
    assert dataset.bytes_to_fetch() > 0
    assert_same_pairs(dataset, street)
    assert dataset.bytes_to_fetch() == 0
    count = len(server.requests)
    keys = [key for key in server.requests if key.endswith(".feather")]
    assert len(keys) == len(set(keys)), "each file is fetched once"
    assert_same_pairs(open_cached(tmp_path), street)
    assert len(server.requests) == count
    # The cache is in the layout of the bucket, so it can be read as a folder, too.
    assert_same_pairs(data.open_dataset(tmp_path / "cache" / "bucket" / "street"), street)


def test_one_log_is_an_address_too_and_only_its_files_are_fetched(tmp_path, server, street):
    log_id = street.pair_keys[0].log_id
    dataset = open_cached(tmp_path, f"{ADDRESS}/{log_id}", true_flow=False, pairs_per_log=1)
    assert {key.log_id for key in dataset.pair_keys} == {log_id} and len(dataset) == 1
    assert dataset[0].flow is None and torch.equal(dataset[0].pc1, street[0].pc1)
    sweeps = [key for key in server.requests if "lidar/3" in key]
    assert len(sweeps) == 2 and all(log_id in key for key in sweeps)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket", "expected s3://bucket/folder"),
        ("s3://bucket/nothing", "there is nothing, and no log"),
        ("s3://bucket/", "expected s3://bucket/folder"),
        (f"{ADDRESS}/street-000-0000/map", "there are 3 files, and no log"),
        (
            f"{ADDRESS}/street-000-0000/sensors",
            r"no Argoverse 2 log in it, but folders \['lidar'\]",
        ),
    ],
)
def test_an_address_without_a_log_is_refused(address, message, tmp_path, server):
    with pytest.raises(data.DataError, match=message):
        open_cached(tmp_path, address)


def test_options_of_clouds_are_refused_for_an_address(tmp_path, server):
    with pytest.raises(data.DataError, match="rate_hz 5.0 is not for Argoverse 2's folders"):
        open_cached(tmp_path, rate_hz=5.0)


def test_the_next_sweeps_are_fetched_ahead_when_pairs_are_read_in_order(
    tmp_path, server, street_folder, monkeypatch
):
    log = server.root / "street" / "street-000-0000"
    stamps = sorted(int(path.stem) for path in (log / "sensors" / "lidar").iterdir())
    monkeypatch.setattr(remote, "PREFETCH", 2)
    dataset = open_cached(tmp_path)
    monkeypatch.setattr(dataset, "stamps", {**dataset.stamps, log.name: stamps})
    lidar = tmp_path / "cache" / "bucket" / "street" / log.name / "sensors" / "lidar"
    dataset[0]
    assert len(list(lidar.iterdir())) == 2, "after one pair, nobody knows that they come in order"
    late = lidar / f"{stamps[-1]}.feather"
    dataset._last = data.PairKey(log.name, 0, stamps[0])
    dataset.stamps[log.name] = [0, *stamps]
    dataset[0]
    deadline = time.monotonic() + 10
    while not late.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert late.exists()


# --- What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["close", "503", "torn", "short", "sleep"])
def test_a_server_that_fails_now_and_then_costs_only_time(fault, tmp_path, server, street):
    """Nothing short is taken for whole, whatever request it happens to."""
    server.faults = [None, fault] * 6
    assert_same_pairs(open_cached(tmp_path), street)
    assert not server.faults


def test_a_server_that_is_away_for_a_second_costs_only_that(tmp_path, server, street):
    dataset = open_cached(tmp_path)
    first = dataset[0]
    server.is_away = True
    threading.Timer(1.0, setattr, (server, "is_away", False)).start()
    start = time.monotonic()
    assert_same_pairs(dataset, street)
    assert time.monotonic() - start > 0.9
    assert torch.equal(first.pc0, street[0].pc0)


def test_a_file_that_is_missing_or_forbidden_costs_its_pair_at_once(tmp_path, server, street):
    dataset = open_cached(tmp_path)
    log = f"street/{street.pair_keys[0].log_id}/sensors/lidar"
    missing, forbidden = (f"{log}/{street.pair_keys[0][i]}.feather" for i in (1, 2))
    (server.root / missing).unlink()
    server.forbidden.add(forbidden)
    start = time.monotonic()
    for index, message in ((0, "is not there; check the address"), (1, r"\(status 403\)")):
        with pytest.raises(data.DataError, match=message):
            dataset[index]
    assert time.monotonic() - start < 5
    assert torch.equal(dataset[2].pc0, street[2].pc0)
    found = zeroflow.evaluate(dataset, zeroflow.from_baseline("no-motion"), max_broken=0.5)
    assert (found.numbers["pairs"], found.numbers["broken"]) == (2, 2)


def test_an_outage_stops_a_run_and_is_not_a_broken_pair(tmp_path, server, monkeypatch, capsys):
    dataset = open_cached(tmp_path)
    server.is_away = True
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    with pytest.raises(data.Outage, match=r"gave no whole answer for 0 s \(.*finished work is"):
        dataset[0]
    with pytest.raises(data.Outage):
        labels.label_dataset(dataset, tmp_path / "labels", QUICK, workers=1)
    assert not list((tmp_path / "labels").rglob("*.broken.json"))
    argv = ["evaluate", "--data", ADDRESS, "--cache", str(tmp_path / "cache")]
    assert commands.main([*argv, "--baseline", "nearest", "--max-broken", "1"]) == 1
    assert "error: s3://bucket/street/" in capsys.readouterr().err


def test_labels_and_scores_come_from_an_address_as_a_user_types_it(tmp_path, server, capsys):
    common = ["--data", ADDRESS, "--cache", str(tmp_path / "cache"), "--cache-gb", "1"]
    assert commands.main(["check", *common, "--sample", "1", "--model", "narrow"]) == 0
    assert "an epoch would still transfer: " in capsys.readouterr().out
    argv = ["label", *common, "--labels", str(tmp_path / "labels"), "--iterations", "2"]
    argv += ["--priors", "1", "--refine", "none", "--workers", "2", "--device", "cpu"]
    assert commands.main(argv) == 0
    argv = ["evaluate", *common, "--labels", str(tmp_path / "labels"), "--device", "cpu"]
    assert commands.main([*argv, "--json", str(tmp_path / "numbers.json")]) == 0
    assert json.loads((tmp_path / "numbers.json").read_text())["pairs"] == 4


# --- Processes ------------------------------------------------------------------------------------


def test_a_download_that_is_killed_leaves_nothing_short(tmp_path, server, street):
    server.pause_s = 0.01  # a sweep takes some 0.1 s
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data
dataset = data.open_dataset({ADDRESS!r}, cache={str(tmp_path / "cache")!r})
print("open", flush=True)
for pair in dataset: pass
"""
    folder = tmp_path / "cache" / "bucket" / "street"
    for seconds in (0.05, 0.2, 0.4):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        for file in folder.rglob("*"):
            if file.is_file() and not file.name.startswith("."):
                whole = server.root / "street" / file.relative_to(folder)
                assert file.read_bytes() == whole.read_bytes(), file
    server.pause_s = 0.0
    assert_same_pairs(open_cached(tmp_path), street)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_both_kinds_read_side_by_side(method, tmp_path, server, street):
    """Also if their parent has used its connection before."""
    dataset = open_cached(tmp_path)
    dataset[0]
    context = multiprocessing.get_context(method)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=4, multiprocessing_context=context
    )
    found = [pair.pc0 for pair in loader]
    assert all(torch.equal(a, pair.pc0) for a, pair in zip(found, street, strict=True))


def test_beyond_its_size_the_cache_loses_the_logs_unused_for_longest_but_none_in_use(
    tmp_path, server, street
):
    dataset = open_cached(tmp_path, cache_gb=1e-9)
    cache, folder = dataset.cache, tmp_path / "cache" / "bucket" / "street"
    first, second = (f"street/{log_id}" for log_id in street.stamps)
    dataset[0], dataset[2]
    assert (folder / first[7:]).is_dir() and (folder / second[7:]).is_dir()
    with cache.in_use(first):
        cache.evict([first, second])
        assert (folder / first[7:]).is_dir() and not (folder / second[7:]).exists()
    # It is fetched again. There is room for one and a half logs: the older one has to go.
    assert torch.equal(dataset[2].pc0, street[2].pc0)
    os.utime(cache._lock_file(first), (1, 1))
    cache.most_gb = 1.5e-9 * data.bytes_in(folder / first[7:])
    cache.evict([first, second])
    assert (folder / second[7:]).is_dir() and not (folder / first[7:]).exists()
