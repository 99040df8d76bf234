"""Faults that have a name, each by a script, over one service; replacements that do not come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from equipoise.bundled import model_directory
from equipoise.elastic.launcher import RankHandle, RankSeat
from equipoise.launch.processes import LocalLauncher
from tests.elastic.services import WAIT_S, list_serving, serving, streaming, wait_until
from tests.elastic.test_controller_faults import kill
from tests.faults.schedules import Act, Moment, Schedule
from tests.faults.small_service import SILENCE_S, TIMEOUT_S
from tests.faults.storm import Storm, open_storm

pytestmark = [pytest.mark.more_faults, pytest.mark.timeout(600)]


def kill_at(moment: Moment, rank: int = 1) -> Act:
    return Act("kill", 0.0, moment, rank, 0.0)


SCRIPTS: dict[str, tuple[int, tuple[Act, ...]]] = {
    "rank 0 dies": (1, (kill_at("now"),)),
    "all but one die at once": (0, (kill_at("now"), kill_at("now"), kill_at("now"))),
    "another dies in a recovery's preparation": (0, (kill_at("now"), kill_at("preparing"))),
    "another dies at a recovery's switch": (0, (kill_at("now"), kill_at("committing"))),
    "another dies as a recovery's old parts close": (0, (kill_at("now"), kill_at("retiring"))),
    "one dies while ranks come": (0, (Act("scale", 0.0, "now", 5, 0.0), kill_at("preparing"))),
    "one dies as all switch": (0, (Act("scale", 0.0, "now", 5, 0.0), kill_at("committing"))),
    "one dies as old parts close": (0, (Act("scale", 0.0, "now", 5, 0.0), kill_at("retiring"))),
    "a leaver dies": (0, (Act("scale", 0.0, "now", 2, 0.0), kill_at("preparing", 3))),
    "one that was given up wakes": (0, (Act("hang", 0.0, "now", 1, 0.0),)),
    "rank 0 was given up and wakes": (1, (Act("hang", 0.0, "now", 1, 0.0),)),
    "one is slow": (0, (Act("slow", 0.0, "now", 1, SILENCE_S / 3),)),
    "a link to the controller drops": (0, (Act("cut", 0.0, "now", 1, 0.0),) * 3),
    "connections to the store drop": (
        0,
        (
            Act("store", 0.0, "now", 1, 0.0),
            Act("rebalance", 0.2, "now", 1, 0.0),
            Act("scale", 0.2, "now", 3, 0.0),
            Act("store", 0.0, "preparing", 1, 0.0),
        ),
    ),
    "one does not reach the store for long, and another dies": (
        0,
        (Act("mute", 0.0, "now", 1, 4 * TIMEOUT_S), kill_at("now", 2)),
    ),
    "one does not reach the store for long as experts are balanced": (
        0,
        (Act("mute", 0.0, "now", 1, 4 * TIMEOUT_S), Act("rebalance", 0.1, "now", 1, 0.0)),
    ),
    "one is cut off from controller and store for long": (
        0,
        (Act("block", 0.0, "now", 1, 2 * SILENCE_S),),
    ),
}


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storm]:
    with open_storm(tmp_path_factory.mktemp("model"), "torch_gloo") as one:
        yield one


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_survived(storm: Storm, name: str) -> None:
    spared, acts = SCRIPTS[name]
    before = storm.controller.status().totals.deaths
    storm.run(Schedule(0, 4, spared, acts))
    num_deaths = storm.controller.status().totals.deaths - before
    if {act.deed for act in acts} <= {"slow", "cut"}:
        assert num_deaths == 0
    if {"kill", "hang", "block"} & {act.deed for act in acts}:
        assert num_deaths > 0
    if name == "one is slow":
        nearest = max(rank.near_deadline for rank in storm.controller.status().ranks)
        assert 0.3 < nearest < 1


class UnluckyLauncher(LocalLauncher):
    """Kills so many of the ranks that take a name again, as soon as they have been started."""

    def __init__(self, num_doomed: int) -> None:
        super().__init__("cpu", model_directory())
        self.num_doomed = num_doomed
        self.starts: Counter[str] = Counter()

    def start(self, seat: RankSeat) -> RankHandle:
        handle = super().start(seat)
        self.starts[seat.name] += 1
        if 1 < self.starts[seat.name] <= 1 + self.num_doomed:
            handle.stop(kill=True)
        return handle


def test_a_replacement_that_dies_while_it_joins_is_tried_again() -> None:
    launcher = UnluckyLauncher(2)
    with (
        serving(2, launcher, respawn=True, respawn_s=0.2) as controller,
        streaming(controller) as stream,
    ):
        kill(controller, "rank-1")
        wait_until(lambda: launcher.starts["rank-1"] == 4 and len(list_serving(controller)) == 2)
        stream.wait_for(10, WAIT_S)
        totals = controller.status().totals
        assert (totals.recoveries, totals.deaths) == (1, 3)


def test_replacements_that_never_come_are_not_tried_without_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    launcher = UnluckyLauncher(1000)
    with (
        serving(2, launcher, respawn=True, respawn_s=0.1, respawn_tries=3) as controller,
        streaming(controller) as stream,
    ):
        kill(controller, "rank-1")
        wait_until(lambda: "3 replacements in a row failed" in caplog.text)
        stream.wait_for(40, WAIT_S)
        assert launcher.starts["rank-1"] == 4
        assert list_serving(controller) == ["rank-0"]
        # Whoever asks for a change may know better.
        launcher.num_doomed = 0
        assert controller.scale(to=2, timeout_s=WAIT_S).done
