"""The arithmetic of the cluster's measurement; the measurement itself takes minutes and a cluster."""

import pytest
from comfyui_hywu.benchmarks import cluster
from comfyui_hywu.benchmarks.cluster_timings import Notes, first_and_later, predicted, service_of


def test_passes_are_taken_apart():
    notes = Notes(marks=[0.0, 1.0, 1.5, 2.0, 3.0, 3.25], busy=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    rows = notes.rows(2)
    assert rows == [(1.0, 0.1, 0.2), (0.5, 0.3, 0.4), (0.25, 0.5, 0.6)] and notes.gaps == [0.5, 1.0]
    assert notes.rows(2) == []
    first, later = first_and_later(rows, 2)
    assert first == [1.0, 0.1, 0.2] and later == pytest.approx([0.375, 0.4, 0.5])
    assert first_and_later(rows, 1)[0] == pytest.approx([1.5, 0.4, 0.6])


def test_passes_whose_stages_were_not_timed():
    assert Notes(marks=[0.0, 1.0, 2.0, 4.0]).rows(3) == [(1.0,), (2.0,)]


def test_a_prediction_counts_what_an_edit_has():
    kinds = ("prompt", "token", "encode", "first", "step")
    timed = {"stages": dict.fromkeys(kinds, [0.1, 0.1]), "trips": dict.fromkeys(kinds, 0.25), "gap": 0.01, "pictures": 0.5,
             "generate": 0.2, "decode": 1.0}
    services = {arm: service_of(timed, *arm, 3, 8, 2) for arm in cluster.ARMS.values()}
    alone = {arm: predicted(service, 1) for arm, service in services.items()}
    plain = 0.5 + 0.25 + 0.2 + 4 * 0.25
    assert alone[False, False] == pytest.approx(plain, rel=0.05)
    assert alone[False, True] == pytest.approx(plain + 1.0, rel=0.05)
    assert alone[True, False] == pytest.approx(plain + 0.5 + 4 * 0.25, rel=0.05)
    work = sum(services[False, False].loads)
    assert work == pytest.approx(0.5 + 0.2 + 5 * (2 * 0.1 + 0.01))
    assert max(0.5, work / 2) <= predicted(services[False, False], 8) <= 1.3 * max(0.5, work / 2)


def test_growth_is_an_edit_s():
    seen = {at: {"store": at * 10.0, "processes": {"the desk": {"rss": 1000 + 5 * at}}} for at in (20, 60)}
    assert cluster.growth(seen, 20, 60) == {"the desk": 5.0, cluster.STORE: 10.0}


def test_the_page_keeps_what_is_around_the_markers():
    once = cluster.put("# A page\n", "first")
    assert once == f"# A page\n\n## Measured\n\n{cluster.BEGIN}\nfirst\n{cluster.END}\n"
    assert cluster.put(once + "after\n", "second") == once.replace("first", "second") + "after\n"
