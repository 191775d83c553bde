"""The same recipe several times at once: one works, the others wait, or are told and leave everything alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_arena import MESSAGE, SAME, WRONG, Bench, broken, digest, of_stage, some


@pytest.mark.parametrize("count", some(2, slow=[8]))
def test_in_one_folder(count: int, bench: Bench, tmp_path: Path) -> None:
    place = bench.copy(tmp_path / "place").without("teach", "sweep")
    found = bench.server.run(*[place.job() for _ in range(count)])
    outcomes = [bench.verdict(place, ended) for ended in found]
    assert WRONG not in outcomes
    assert SAME in outcomes
    refused = [ended for ended, outcome in zip(found, outcomes, strict=True) if outcome == MESSAGE]
    assert all("in use by process" in ended.err for ended in refused)
    made = [ended for ended in found if ended.code == 0 and "nothing has changed" not in ended.err]
    assert len(made) == 1, "only one of them did the work"


@pytest.mark.parametrize("count", some(2, slow=[8]))
def test_in_folders_of_their_own_with_one_cold_cache(count: int, bench: Bench, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    places = [bench.copy(tmp_path / str(number)).without("report") for number in range(count)]
    places[0].without("teach")
    found = bench.server.run(*[place.job(cache=str(cache)) for place in places])
    for place, ended in zip(places, found, strict=True):
        assert bench.verdict(place, ended) == SAME, ended.err
    (entry,) = [p for p in cache.iterdir() if not p.name.startswith(".")]
    (whole,) = [p for p in bench.whole.cache.iterdir() if not p.name.startswith(".")]
    assert digest(entry / "model.safetensors") == digest(whole / "model.safetensors")
    assert list(cache.glob(".part-*")) == []


@pytest.mark.parametrize("at", some(9, slow=[4, 14, 19]))
def test_one_dies_while_it_fills_the_cache_that_others_wait_for(at: int, bench: Bench, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    places = [bench.copy(tmp_path / str(number)).without("report") for number in range(3)]
    plan = places[0].plan(at, match=of_stage("load"), action="sleep 0.4; kill -9 $PPID", cache=cache)
    jobs = [place.job(cache=cache, plan=plan if place is places[0] else None) for place in places]
    first, *others = bench.server.run(*jobs)
    assert first.code in (-9, 0), "the cache may be filled by another one"
    for place, ended in zip(places[1:], others, strict=True):
        assert bench.verdict(place, ended) == SAME, ended.err
    assert broken(places[0]) == []
    assert bench.verdict(places[0], bench.run(places[0])) == SAME


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(4))
def test_eight_from_nothing(round_: int, bench: Bench, tmp_path: Path) -> None:
    """In four folders, two in each, with one cold cache."""
    places = [bench.cold(tmp_path / str(number)) for number in range(4)]
    jobs = [place.job(cache=str(tmp_path / "cache")) for place in places for _ in range(2)]
    outcomes = [bench.verdict(places[n // 2], ended) for n, ended in enumerate(bench.server.run(*jobs))]
    assert WRONG not in outcomes
    assert all(SAME in outcomes[n : n + 2] for n in range(0, 8, 2))
