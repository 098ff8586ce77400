"""The benchmarks that a GPU needs, too, at a small size: they run, and both ways agree."""

import bench

import data


def test_pillars_and_ransac_at_once_are_compared_with_one_by_one(street, capsys):
    pairs = [bench.input_points(street[i]) for i in range(2)]
    assert all(data.is_in_grid(points).all() for pair in pairs for points in pair)
    bench.compare_at_once(pairs, (1, 2), "narrow")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "pillars of 1 clouds",
        "pillars of 2 clouds",
        "RANSAC of 4 candidates",
    ]
    assert all(line.endswith("times as fast") for line in lines)
