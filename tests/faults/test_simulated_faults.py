"""Thousands of schedules over the real controller, with ranks and time that are played."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from equipoise.bundled import model_directory
from equipoise.elastic.spec import ServiceSpec
from equipoise.elastic.verdict import Word
from tests.faults.played_ranks import PlayedRank, World
from tests.faults.simulation import CLOCKED, Game

NUM_SCHEDULES = int(os.environ.get("EQUIPOISE_SIMULATIONS", "20"))
FIRST_SEED = int(os.environ.get("EQUIPOISE_SEED", "1"))
LONGEST_S = 600.0
"""Of played time: as many deadlines as may follow on each other."""

Deed = Callable[[Game, PlayedRank, float], None]


def kill(game: Game, rank: PlayedRank, seconds: float) -> None:
    rank.end(-9)


def leave_by_itself(game: Game, rank: PlayedRank, seconds: float) -> None:
    rank.say(say="failed", reason="an error", traceback="")
    rank.end(1)


def stop(game: Game, rank: PlayedRank, seconds: float) -> None:
    rank.is_stopped = True
    game.world.after(seconds, rank.wake)


def stop_out_of_reach(game: Game, rank: PlayedRank, seconds: float) -> None:
    rank.is_far = True
    stop(game, rank, seconds)


def cut(game: Game, rank: PlayedRank, seconds: float) -> None:
    if rank.channel is not None:
        rank.channel.close()


def hold(game: Game, rank: PlayedRank, seconds: float) -> None:
    rank.is_far = True
    rank.held_until = game.world.now + seconds
    game.world.after(seconds, rank.wake)


def cut_from_store(game: Game, rank: PlayedRank, seconds: float) -> None:
    rank.lacks_store = True
    game.world.after(seconds, rank.wake)


def cut_from_peers(game: Game, rank: PlayedRank, seconds: float) -> None:
    rank.is_cut_off = game.has_cut_off = True
    game.world.after(seconds, rank.wake)


def scale(game: Game, rank: PlayedRank, seconds: float) -> None:
    game.scale(game.world.chance.randint(2, 5))


DEEDS: tuple[tuple[Deed, int], ...] = (
    (kill, 8),
    (leave_by_itself, 2),
    (stop, 3),
    (stop_out_of_reach, 3),
    (cut, 3),
    (hold, 2),
    (cut_from_store, 2),
    (cut_from_peers, 2),
    (scale, 6),
)


@contextlib.contextmanager
def open_game(seed: int, **options: Any) -> Iterator[Game]:
    """A service of played ranks that are all there."""
    world = World(seed)
    clock = SimpleNamespace(monotonic=world.monotonic)
    with pytest.MonkeyPatch.context() as patch:
        for name in CLOCKED:
            patch.setattr(importlib.import_module(f"equipoise.elastic.{name}"), "time", clock)
        spec = ServiceSpec(
            model_directory(),
            world.chance.randint(2, 5),
            slots_per_rank=8,
            max_batch_size=4,
            max_len=64,
            respawn=True,
            respawn_s=0.1,
            respawn_tries=10_000,
        )
        game = Game(world, replace(spec, **options), world.chance.choice((0.0, 0.0, 0.1)))
        game.open()
        try:
            go_on_until(game, game.is_at_rest)
            yield game
        finally:
            game.close()


def play(seed: int) -> None:
    """One schedule, up to rest or to the end of patience."""
    with open_game(seed) as game:
        for _ in range(6):
            game.submit()
        befall(game)
        game.failure_rate = 0.0
        go_on_until(game, lambda: game.is_at_rest() and not any(map(is_afflicted, game.ranks)))
        done = game.num_done
        go_on_until(game, lambda: game.num_done >= done + 12)
        # Of two that do not reach each other, one goes, whichever is to blame.
        assert game.has_cut_off or not game.find_wronged(), game.find_wronged()


def befall(game: Game) -> None:
    """Some deeds, at random moments, to all ranks but one."""
    chance = game.world.chance
    spared = chance.choice(game.ranks)
    for _ in range(chance.randint(1, 6)):
        pause = chance.choice((0.0, 0.02, chance.uniform(0, 1.0), chance.uniform(0, 4.0)))
        until = game.world.now + pause
        go_on_until(game, lambda until=until: game.world.now >= until)
        well = [one for one in game.ranks if one.is_well]
        if spared not in well:
            # It has left.
            spared = well[0] if well else spared
        victims = [
            one
            for one in game.ranks
            if well and one.is_alive and one is not spared and not is_afflicted(one)
        ]
        (deed,) = chance.choices([deed for deed, _ in DEEDS], [weight for _, weight in DEEDS])
        if victims:
            seconds = chance.choice((chance.uniform(0.05, 2.0), chance.uniform(2.0, 60.0)))
            victim = chance.choice(victims)
            victim.was_hit |= deed is not scale
            deed(game, victim, seconds)


def is_afflicted(rank: PlayedRank) -> bool:
    return rank.is_stopped or rank.is_far or rank.is_cut_off or rank.lacks_store


def go_on_until(game: Game, is_so: Callable[[], bool]) -> None:
    until = game.world.now + LONGEST_S
    while not is_so():
        assert not game.wrong, game.wrong[:3]
        assert game.world.now < until, f"it hangs: {game.controller._describe()}"
        game.world.go_on()


def seeds() -> Iterator[int]:
    return iter(range(FIRST_SEED, FIRST_SEED + NUM_SCHEDULES))


@pytest.mark.timeout(200 + 3 * NUM_SCHEDULES)
def test_the_controller_brings_every_request_to_its_end() -> None:
    for seed in seeds():
        try:
            play(seed)
        except Exception as error:
            raise AssertionError(
                f"{error}\nto see it again: EQUIPOISE_SEED={seed} EQUIPOISE_SIMULATIONS=1"
            ) from error


def test_a_size_that_a_death_left_is_kept_where_it_is_asked_for() -> None:
    with open_game(FIRST_SEED, num_ranks=4, respawn=False) as game:
        game.ranks[1].end(-9)
        go_on_until(game, lambda: game.controller._changes.num_recoveries == 1)
        assert not game.is_at_rest()
        game.scale(3)
        assert game.is_at_rest()


def test_a_rank_that_has_left_is_no_death_though_others_say_late_that_they_serve() -> None:
    with open_game(1, num_ranks=3) as game:
        game.failure_rate = 0.0
        game.scale(2)
        go_on_until(game, lambda: is_decided(game))
        late, gone = game.ranks[0], game.ranks[2]
        late.held_until = game.world.now + 2.0
        go_on_until(game, lambda: gone.code == 0 and game.is_at_rest())
        assert late.record.generation == game.controller._changes.generation
        assert game.controller._describe().totals.deaths == 0


def test_ranks_are_not_silent_while_the_controller_is_held_up() -> None:
    with open_game(1) as game:
        until = game.world.now + 2 * game.spec.silence_s
        # It finds what they said meanwhile behind its own look.
        game.held_until = until
        for rank in game.ranks:
            rank.held_until = until
        go_on_until(game, lambda: game.world.now > until + 1.0)
        assert game.controller._describe().totals.deaths == 0
        # One that says no more is given up as ever.
        game.ranks[0].is_stopped = True
        go_on_until(game, lambda: game.controller._describe().totals.deaths == 1)
        assert game.world.now < until + 1.0 + 2 * game.spec.silence_s


def is_decided(game: Game) -> bool:
    """Whether a rank knows of a change that it stands."""
    return any(Word.SWITCH in one.words.values() for one in game.preparations.values())
