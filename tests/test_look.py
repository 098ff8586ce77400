"""Pictures, films and recordings of flow, and what can be said of a flow without a truth."""

import builtins
import dataclasses
import json
import math
import shutil
import stat
import sys

import numpy as np
import pytest
import torch
from conftest import a_pair
from PIL import Image

import commands
import data
import labels
import look
import nsfp
import viz
import zeroflow

TRUTH = {"truth": look.true_flow}


def a_moving_point(point, flow, seconds=0.1, others=()) -> data.SweepPair:
    """One point that moves, and others that stand."""
    points = torch.tensor([point, *others], dtype=torch.float32)
    flows = torch.zeros_like(points)
    flows[0] = torch.tensor(flow)
    return dataclasses.replace(a_pair(points, flows), timestamp1_ns=round(seconds * 1e9))


def picture_of(film: viz.Film, pair, **how) -> np.ndarray:
    """(H, W, 3) what is painted into the first panel, without titles and legend."""
    film.frame(pair, [pair.flow], **how)
    return np.asarray(film.pictures[0].get_array())


def painted(picture: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(*np.nonzero((picture != viz.NIGHT).any(axis=2)), strict=True))


# --- Frames ---------------------------------------------------------------------------------------


def test_a_point_is_painted_where_it_is_in_the_color_of_its_motion():
    """Seen from above, x to the right and y up, 4 pixels per meter; static, ground, and ahead at
    full speed. A point outside the picture is not painted.
    """
    film = viz.Film(["truth"], half_m=10.0, pixels=80)
    others = [(-5.0, 5.0, 0.0), (5.0, 5.0, 1.0), (30.0, 0.0, 0.0)]
    pair = a_moving_point((5.0, -2.0, 0.0), (1.0, 0.0, 0.0), others=others)
    is_ground = torch.tensor([False, True, False, False])
    picture = picture_of(film, dataclasses.replace(pair, is_ground0=is_ground))
    moving, static = picture[48, 60], picture[20, 60]
    assert moving.tolist() == pytest.approx([0.9, 0, 0]), "red is ahead"
    assert static.tolist() == pytest.approx([viz.NIGHT_STILL] * 3)
    assert picture[20, 20].tolist() == pytest.approx([viz.NIGHT_GROUND] * 3)
    squares = [(48, 60), (20, 60)]  # four pixels each, and ground has one
    expected = {(r + i, c + j) for r, c in squares for i in (0, 1) for j in (0, 1)} | {(20, 20)}
    assert painted(picture) == expected


def test_the_faster_of_two_points_at_one_place_is_on_top_and_speed_is_per_second():
    film = viz.Film(["truth"], half_m=10.0, pixels=80)
    pair = a_moving_point((5.0, 0.0, 0.0), (0.0, 0.5, 0.0), others=[(5.0, 0.0, 1.0)])
    slow = picture_of(film, pair)[40, 60]
    assert slow[1] > slow[0] and slow[1] > slow[2], "green-yellow is left"
    # The same displacement in half of the time is twice as fast, and has more color.
    fast = picture_of(film, dataclasses.replace(pair, timestamp1_ns=round(0.05 * 1e9)))[40, 60]
    assert np.ptp(fast) > np.ptp(slow) > 0.2


def test_the_view_of_the_world_turns_points_and_flow_as_the_map_is():
    """The ego looks to the left of the map: what is ahead of it is up in the picture."""
    pair = a_moving_point((5.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    turned = np.array([[0.0, -1, 0, 3], [1, 0, 0, 4], [0, 0, 1, 0], [0, 0, 0, 1]])
    for view, row, column in (("ego", 40, 60), ("world", 20, 40)):
        film = viz.Film(["truth"], half_m=10.0, view=view, pixels=80)
        picture = picture_of(film, pair, world_SE3_ego0=turned)
        assert (row, column) in painted(picture) and len(painted(picture)) == 4
    left = viz.flow_colors(torch.tensor([[0.0, 10.0, 0.0]]), viz.MOST_SPEED_MPS)[0]
    assert picture[20, 40].tolist() == pytest.approx(left.tolist())


def test_seen_from_behind_what_is_near_is_large_and_hides_what_is_far():
    film = viz.Film(["truth"], half_m=20.0, view="3d", pixels=160)
    behind = picture_of(film, a_moving_point((-30.0, 0.0, 0.0), (1.0, 0.0, 0.0)))
    assert not painted(behind), "what is behind the camera is not seen"
    rows = []
    for x in (0.0, 5.0, 15.0):
        seen = painted(picture_of(film, a_moving_point((x, 0.0, 0.0), (1.0, 0.0, 0.0))))
        assert all(78 <= column <= 81 for _, column in seen)
        rows.append(min(row for row, _ in seen))
    assert rows[0] > rows[1] > rows[2], "farther is higher up"
    columns = []
    for x in (0.0, 15.0):
        seen = painted(picture_of(film, a_moving_point((x, 2.0, 0.0), (1.0, 0.0, 0.0))))
        columns.append(80 - min(column for _, column in seen))
    assert columns[0] > columns[1] > 0, "left is left, and smaller far away"
    # A static point on the ray from the camera to a moving one, and before it.
    camera = np.array([-0.45 * 20, 0, 0.35 * 20])
    moving = np.array([12.0, 0, 0])
    before = tuple(camera + 0.5 * (moving - camera))
    picture = picture_of(film, a_moving_point(tuple(moving), (1.0, 0, 0), others=[before]))
    assert np.ptp(picture.max(axis=(0, 1))) == pytest.approx(0), "all of it is gray"


def test_a_view_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="view 'moon': choose one of ego, world, 3d"):
        viz.Film(["truth"], view="moon")


def test_a_figure_has_errors_only_where_there_is_a_truth():
    """Of two points that are not ground, one is wrong by 0.4 m: 0.2 m on average."""
    pair = a_moving_point((5.0, 0.0, 0.0), (0.4, 0.0, 0.0), others=[(3.0, 3.0, 0.0), (4.0, 4.0, 0)])
    pair = dataclasses.replace(pair, is_ground0=torch.tensor([False, False, True]))
    pair = dataclasses.replace(pair, is_ground1=pair.is_ground0)
    still = torch.zeros(3, 3)

    def titles(pair, flows, **how) -> list[str]:
        axes = viz.flow_figure(pair, flows, 10.0, **how).axes
        return [ax.get_title() for ax in axes if ax.get_title()]

    sweeps = "sweep 0 (blue), sweep 1 (orange)"
    assert titles(without_truth(pair), {"still": still}) == [sweeps, "flow: still"]
    with pytest.raises(ValueError, match="no true flow, so no error either"):
        viz.error_map_figure(without_truth(pair), still, ~pair.is_ground0, "title")
    assert titles(pair, {"truth": pair.flow}) == [sweeps, "flow: truth"]
    expected = [sweeps, "flow: still", "true flow", "error: still, 0.200 m on average"]
    assert titles(pair, {"still": still}) == expected
    ax = viz.flow_figure(pair, {"still": still}, 4.0, around=(5.0, 1.0)).axes[0]
    assert (*ax.get_xlim(), *ax.get_ylim()) == (1.0, 9.0, -3.0, 5.0)


# --- Films ----------------------------------------------------------------------------------------


def test_a_film_has_a_frame_for_each_pair_of_its_log_and_its_time_span(street):
    log = street.pair_keys[-1].log_id
    first, second = look.pairs_of_log(street, log)
    assert [first.log_id, second.log_id] == [log, log]
    assert look.pairs_of_log(street, None)[0] == street.pair_keys[0]
    assert look.pairs_of_log(street, log, 0.05) == [second]
    assert look.pairs_of_log(street, log, 0.0, 0.05) == [first]
    with pytest.raises(data.DataError, match=r"no pair then; its pairs begin at 0 to 0\.1 s"):
        look.pairs_of_log(street, log, 5.0)
    with pytest.raises(
        data.DataError, match=f"--log moon: has no pairs here; choose one of {log[:8]}"
    ):
        look.pairs_of_log(street, "moon")
    frames = list(look.film_frames(street, [first, second], TRUTH | {"again": look.true_flow}))
    assert len(frames) == 2 and frames[0].dtype == np.uint8
    assert frames[0].shape[1] == 2 * 480, "one panel per method"
    assert (frames[0] != frames[1]).any()


def test_in_the_view_of_the_world_what_stands_does_not_turn_with_the_ego():
    """The ego turns left by 90 degrees between two pairs. A static point ahead of it is to its
    right afterwards, and in the same place of the picture.
    """
    ego1_SE3_ego0 = torch.eye(4, dtype=torch.float64)
    ego1_SE3_ego0[:2, :2] = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    first = a_moving_point((10.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    first = dataclasses.replace(first, ego1_SE3_ego0=ego1_SE3_ego0)
    times = {"timestamp0_ns": first.timestamp1_ns, "timestamp1_ns": 2 * first.timestamp1_ns}
    second = dataclasses.replace(first, pc0=torch.tensor([[0.0, -10.0, 0.0]]), **times)
    pairs = {pair.key: pair for pair in (first, second)}

    class Drive:
        read = staticmethod(pairs.__getitem__)

    def differ(view: str) -> int:
        one, two = look.film_frames(Drive, list(pairs), TRUTH, view, 20.0)
        return int((one != two)[26:-30].any(axis=2).sum())  # without title and caption

    assert differ("world") == 0 and differ("ego") > 0


def test_a_pair_that_cannot_be_read_has_no_frame_but_all_of_them_are_an_error(
    tmp_path, street_folder, capsys
):
    folder = tmp_path / "street"
    shutil.copytree(street_folder, folder)
    dataset = data.open_dataset(folder)
    keys = look.pairs_of_log(dataset, None)
    lidar = folder / keys[0].log_id / "sensors" / "lidar"
    (lidar / f"{keys[0].timestamp0_ns}.feather").write_bytes(b"torn")
    assert len(list(look.film_frames(dataset, keys, TRUTH))) == len(keys) - 1
    assert "left out: " in capsys.readouterr().err
    with pytest.raises(data.DataError, match="none of 1 pairs could be shown"):
        list(look.film_frames(dataset, keys[:1], TRUTH))
    without = data.open_dataset(street_folder, true_flow=False)
    with pytest.raises(data.DataError, match="none of 2 pairs"):
        list(look.film_frames(without, keys, TRUTH))
    assert "has no true flow to show; leave --truth out" in capsys.readouterr().err


def some_frames(count: int = 3) -> list[np.ndarray]:
    """Frames of one color each."""
    colors = viz.flow_colors(torch.eye(3)[:count], 1.0, viz.NIGHT_STILL)
    return [np.full((20, 31, 3), np.round(color * 255)).astype(np.uint8) for color in colors]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_film_comes_back_frame_by_frame_with_its_colors_and_its_rate(tmp_path, suffix):
    """The 40 hues of a .gif are 9 degrees apart: half of that is 18 of 230 levels of a color."""
    file = tmp_path / f"film{suffix}"
    assert look.write_film(file, iter(some_frames()), fps=5) == 3
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with Image.open(file) as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        for i, expected in enumerate(some_frames()):
            film.seek(i)
            found = np.asarray(film.convert("RGB")).astype(int)
            assert film.info["duration"] == 200
            assert np.abs(found - expected).max() <= 18


def test_a_film_that_stops_half_way_leaves_no_file(tmp_path):
    def frames():
        yield some_frames()[0]
        raise data.DataError("stopped")

    for suffix in (".gif", ".webp"):
        with pytest.raises(data.DataError, match="stopped"):
            look.write_film(tmp_path / f"film{suffix}", frames(), fps=5)
    assert not list(tmp_path.iterdir())


def a_program(folder, text: str) -> None:
    """An ffmpeg that is a Python script."""
    folder.mkdir(exist_ok=True)
    program = folder / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_mp4_is_made_by_ffmpeg_from_raw_frames_of_even_size(tmp_path, monkeypatch):
    """By a program of its name that writes its arguments and what it is given."""
    text = "out = open(sys.argv[-1], 'wb')\nout.write(' '.join(sys.argv).encode() + b'|')\n"
    a_program(tmp_path / "bin", text + "out.write(sys.stdin.buffer.read())")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    file = tmp_path / "film.mp4"
    assert look.write_film(file, iter(some_frames()), fps=5) == 3
    about, _, raw = file.read_bytes().partition(b"|")
    assert b"-video_size 30x20 -framerate 5" in about
    expected = b"".join(frame[:20, :30].tobytes() for frame in some_frames())
    assert raw == expected


def test_without_ffmpeg_or_if_it_fails_mp4_says_so_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    file = tmp_path / "film.mp4"
    with pytest.raises(data.DataError, match="needs the program ffmpeg; install it, or choose"):
        look.write_film(file, iter(some_frames()), fps=5)
    a_program(tmp_path / "bin", "sys.exit('no such codec')")
    with pytest.raises(data.DataError, match=r"film\.mp4: ffmpeg failed \(no such codec\)"):
        look.write_film(file, iter(some_frames()), fps=5)
    assert not file.exists()
    for wrong, message in (
        ("film.avi", "choose a name that ends in"),
        ("no/a.gif", "no such fold"),
    ):
        with pytest.raises(data.DataError, match=message):
            look.check_film_file(tmp_path / wrong)


# --- Commands -------------------------------------------------------------------------------------


def test_video_and_show_as_a_user_types_them(tmp_path, street_folder, student_file, capsys):
    common = ["--data", str(street_folder), "--truth", "--checkpoint", str(student_file)]
    common += ["--baseline", "no-motion", "--device", "cpu"]
    film, picture = tmp_path / "film.gif", tmp_path / "pair.png"
    assert commands.main(["video", *common, "--out", str(film), "--range", "25"]) == 0
    assert f"{film}: 2 frames, 10 per second" in capsys.readouterr().out
    with Image.open(film) as made:
        assert made.n_frames == 2 and made.width == 3 * 480
    argv = ["video", *common, "--out", str(film), "--from", "0.05", "--fps", "2", "--view", "3d"]
    assert commands.main(argv) == 0
    assert f"{film}: 1 frames, 2 per second" in capsys.readouterr().out
    argv = ["show", *common, "--out", str(picture), "--at", "0.1", "--around", "5", "0"]
    assert commands.main([*argv, "--range", "8"]) == 0
    with Image.open(picture) as made:
        assert made.width > 1000


def test_of_a_published_student_it_is_said_what_is_assumed(tmp_path, street_folder, capsys):
    state = zeroflow.fastflow3d.FastFlow3D(zeroflow.fastflow3d.MODELS["normal"]).state_dict()
    file = tmp_path / "published.ckpt"
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, file)
    argv = ["show", "--data", str(street_folder), "--checkpoint", str(file), "--device", "cpu"]
    assert commands.main([*argv, "--out", str(tmp_path / "a.png")]) == 0
    said = "does not store its grid and frames; assuming 102.4 x 102.4 x 6 m around the ego"
    assert f"{file}: {said}" in capsys.readouterr().err


def test_without_a_method_the_student_that_comes_with_the_project_is_taken_and_named(
    tmp_path, street_folder, street, student_file, capsys, monkeypatch
):
    monkeypatch.setattr(commands, "OUR_WEIGHTS", student_file)
    said = "no --checkpoint: using our own, which was trained on synthetic streets only"
    folder, with_own = ["--data", str(street_folder)], ["--checkpoint", str(student_file)]
    for command, out in (("show", "a.png"), ("video", "a.gif"), ("predict", "flow")):
        made = []
        for name, options in (("without", []), ("with", with_own)):
            place = tmp_path / name / out
            place.parent.mkdir(exist_ok=True)
            assert commands.main([command, *folder, *options, "--out", str(place)]) == 0
            made.append(place)
            # Named on the command line, it is taken as any other file.
            assert (said in capsys.readouterr().err) == (name == "without")
        if command != "predict":
            assert made[0].read_bytes() == made[1].read_bytes()
            continue
        for key in street.pair_keys:
            there = [place / key.log_id / f"{key.timestamp0_ns}.feather" for place in made]
            assert there[0].read_bytes() == there[1].read_bytes()
    # Whoever asks for something else gets that alone.
    argv = ["show", *folder, "--truth", "--out", str(tmp_path / "truth.png")]
    assert commands.main(argv) == 0 and said not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--truth"], "nothing to write: give --out"),
        (["--truth", "--out", "a.avi"], "choose a name that ends in .gif"),
        (["--truth", "--out", "a.gif", "--range", "-1"], "--range -1.0: must be positive"),
        (["--labels", "nowhere", "--out", "a.gif"], "nowhere: has no label"),
        (["--checkpoint", "nowhere.pt", "--out", "a.gif"], "nowhere.pt"),
        (["--truth", "--out", "a.gif", "--log", "moon"], "--log moon: has no pairs"),
    ],
)
def test_a_film_that_cannot_be_made_is_refused_with_the_reason(
    options, message, street_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert commands.main(["video", "--data", str(street_folder), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_is_predicted_pair_by_pair_and_what_is_there_is_kept(
    tmp_path, street_folder, street, student_file, capsys
):
    out = tmp_path / "flow"
    argv = ["predict", "--data", str(street_folder), "--checkpoint", str(student_file)]
    argv += ["--out", str(out), "--device", "cpu"]
    assert commands.main(argv) == 0
    assert f"{out}: {len(street)} pairs predicted, 0 were there already" in capsys.readouterr().out
    model = zeroflow.fastflow3d.load_checkpoint(student_file).prepare_inference()
    for pair in street:
        file = out / pair.log_id / f"{pair.timestamp0_ns}.feather"
        table = data.read_feather(file, [*data.FLOW_COLUMNS, "has_flow"])
        flow, has_flow = zeroflow.student_flow(model, pair)
        found = np.stack([table[name].to_numpy() for name in data.FLOW_COLUMNS], axis=1)
        np.testing.assert_allclose(found, flow.numpy(), atol=1e-5)
        assert (table["has_flow"].to_numpy() == has_flow.numpy()).all()

    # An interrupted run goes on where it was, and does not touch what is there.
    before = file.stat().st_mtime_ns
    other = out / street[0].log_id / f"{street[0].timestamp0_ns}.feather"
    other.unlink()
    assert commands.main(argv) == 0
    assert f"1 pairs predicted, {len(street) - 1} were there" in capsys.readouterr().out
    assert other.exists() and file.stat().st_mtime_ns == before
    assert commands.main([*argv, "--total"]) == 1
    assert "holds flow of another student or kind" in capsys.readouterr().err


def test_a_pair_that_cannot_be_read_costs_predict_only_itself(
    tmp_path, street_folder, student_file, capsys
):
    folder = tmp_path / "street"
    shutil.copytree(street_folder, folder)
    key = data.open_dataset(folder).pair_keys[0]
    lidar = folder / key.log_id / "sensors" / "lidar" / f"{key.timestamp0_ns}.feather"
    lidar.write_bytes(b"torn")
    argv = ["predict", "--data", str(folder), "--checkpoint", str(student_file), "--out"]
    assert commands.main([*argv, str(tmp_path / "flow"), "--device", "cpu"]) == 1
    found = capsys.readouterr()
    assert "3 pairs predicted" in found.out and "1 left out" in found.out and "left" in found.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "FOLDER", "0.bin", "1.bin", "--out", "a"], "--data: leave out CLOUD0"),
        (["--data", "FOLDER", "--out", "a.npz"], "with --data, give a folder"),
        (["0.bin", "--out", "a.npz"], "give two clouds"),
        (["0.bin", "1.bin", "--poses", "p.txt", "--out", "a.npz"], "two clouds need --pose"),
        (["0.bin", "1.bin", "--ground", "raster", "--out", "a.npz"], "two clouds have no map"),
    ],
)
def test_predict_takes_two_clouds_or_a_folder(
    options, message, street_folder, student_file, capsys
):
    options = [str(street_folder) if option == "FOLDER" else option for option in options]
    assert commands.main(["predict", "--checkpoint", str(student_file), *options]) == 1
    assert message in capsys.readouterr().err


# --- A recording ----------------------------------------------------------------------------------


def test_without_the_library_a_recording_says_what_to_install(tmp_path, street, monkeypatch):
    real = builtins.__import__

    def no_rerun(name, *rest, **more):
        if name == "rerun":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_rerun)
    with pytest.raises(data.DataError, match="pip install rerun-sdk, or leave --rerun out"):
        look.Recording(tmp_path / "a.rrd", street)


def test_a_recording_holds_points_flow_and_boxes(tmp_path, street_folder, capsys):
    pytest.importorskip("rerun", reason="needs the optional library rerun-sdk")
    file = tmp_path / "a.rrd"
    argv = ["video", "--data", str(street_folder), "--truth", "--rerun", str(file)]
    assert commands.main([*argv, "--device", "cpu"]) == 0
    assert f"{file}: 2 pairs" in capsys.readouterr().out
    content = file.read_bytes()
    for name in (b"sweep 0", b"sweep 1", b"flow of truth", b"boxes"):
        assert name in content.replace(b"\\ ", b" "), name


# --- Without a truth ------------------------------------------------------------------------------


def without_truth(pair: data.SweepPair) -> data.SweepPair:
    none = dict.fromkeys(data.TRUTH_FIELDS)
    return dataclasses.replace(pair, **none)


def test_a_flow_is_judged_by_what_can_be_counted():
    """Two boxes of 400 points each, of which one moves by 0.5 m in 0.1 s; the flow finds all of it,
    half of it, or turns it into noise.
    """
    generator = torch.Generator().manual_seed(0)
    box = torch.rand(400, 3, generator=generator) * 1.5
    points = torch.cat([box + torch.tensor([5.0, 0, 0]), box + torch.tensor([-9.0, 0, 0])])
    flow = torch.zeros(800, 3)
    flow[:400, :2] = torch.tensor([0.3, 0.4])  # 0.5 m
    pair = dataclasses.replace(a_pair(points), pc1=points + flow, timestamp1_ns=10**8)
    pair = without_truth(pair)
    pair = dataclasses.replace(pair, is_ground1=torch.zeros(800, dtype=torch.bool))
    noise = flow + 0.1 * torch.randn(800, 3, generator=generator) * (flow != 0).any(1)[:, None]
    grid = (25.6, 25.6, 3.0)
    judged = {}
    for name, each in {"right": flow, "half": flow / 2, "noise": noise}.items():
        method = zeroflow.timed(lambda _, each=each: each)
        right = zeroflow.timed(lambda _: flow)
        judged[name] = look.judge([pair], method, grid, right)
    right, half = judged["right"], judged["half"]
    assert right["pairs"] == 1 and right["broken"] == 0
    assert right["distance_after_m"] < 1e-5 < right["distance_before_m"]
    assert right["distance_after_m"] < half["distance_after_m"]
    shares = [right[f"share_above_{mps:g}_mps"] for mps in look.SPEEDS_MPS]
    assert shares == [0.5, 0.5, 0.0, 0.0] or shares == [0.5, 0.5, 0.5, 0.0]  # 5 m/s: on the border
    assert half["share_above_2_mps"] == 0.5 and half["share_above_5_mps"] == 0
    assert (
        right["not_rigid_m"] == pytest.approx(0, abs=1e-5) and judged["noise"]["not_rigid_m"] > 0.05
    )
    assert right["difference_m"] == 0
    assert half["difference_m"] == pytest.approx(0.125)
    assert half["difference_moving_m"] == pytest.approx(0.25)
    assert set(right) <= {"pairs", "broken", *look.JUDGED}


def test_nothing_is_said_of_what_is_not_there():
    """A pair without points in the grid: NaN instead of a number; and without a pair an error."""
    pair = without_truth(dataclasses.replace(a_pair(torch.full((3, 3), 90.0)), timestamp1_ns=10**8))
    still = zeroflow.from_baseline("no-motion", (25.6, 25.6, 3.0))
    found = look.judge([pair], still, (25.6, 25.6, 3.0))
    assert math.isnan(found["distance_before_m"]) and math.isnan(found["not_rigid_m"])
    assert "difference_m" not in found and found["suspicious_pairs"] == 0
    with pytest.raises(data.DataError, match="none of 0 pairs"):
        look.judge([], still, (25.6, 25.6, 3.0))


def test_evaluate_judges_data_without_annotations_and_makes_no_error_up(
    tmp_path, street_folder, capsys
):
    folder = tmp_path / "street"
    shutil.copytree(street_folder, folder)
    for file in folder.rglob("annotations.feather"):
        file.unlink()
    dataset = data.open_dataset(folder)
    quick = dataclasses.replace(nsfp.TEACHERS["fast"], priors=1, iterations=3, refine="none")
    labels.label_dataset(dataset, tmp_path / "labels", quick, workers=1)
    numbers = tmp_path / "numbers.json"
    argv = ["evaluate", "--data", str(folder), "--baseline", "no-motion", "--device", "cpu"]
    against = ["--against", str(tmp_path / "labels")]
    assert commands.main([*argv, *against, "--json", str(numbers)]) == 0
    text = capsys.readouterr().out
    assert "4 pairs without annotations" in text and "no error can be measured" in text
    found = json.loads(numbers.read_text())
    assert found["distance_after_m"] == found["distance_before_m"] > 0
    assert found["difference_m"] > 0 and found["share_above_0.5_mps"] == 0
    assert not any("epe" in name or "three_way" in name for name in found)
    assert commands.main([*argv, "--figures", str(tmp_path / "figures")]) == 1
    assert "this data has no annotations; see `show`" in capsys.readouterr().err
    argv[2] = str(street_folder)
    assert commands.main([*argv, *against]) == 1
    assert "--against: is for data without annotations" in capsys.readouterr().err
