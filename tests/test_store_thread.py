"""Questions to a store that may be slow, or never answer."""

from __future__ import annotations

import threading

import pytest

from equipoise.comm import store_thread
from equipoise.comm.store_thread import StoreThread


def test_many_threads_ask_and_each_gets_its_own_answer() -> None:
    asked = StoreThread()
    wrong: list[str | None] = []

    def ask(name: int) -> None:
        for number in range(50):
            word = f"{name}/{number}"
            answer = asked.ask(lambda word=word: word, 20.0)  # type: ignore[misc]
            if answer != word:
                wrong.append(answer)

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_who_never_answers_is_given_up_and_the_next_question_is_answered() -> None:
    asked, never = StoreThread(), threading.Event()
    assert asked.ask(lambda: str(never.wait(30)), 0.05) is None
    assert asked.ask(lambda: "here", 20.0) == "here"
    never.set()


def test_a_store_that_fails_answers_nothing() -> None:
    def fail() -> str:
        raise RuntimeError("closed")

    asked = StoreThread()
    assert asked.ask(fail, 20.0) is None
    assert asked.ask(lambda: "here", 20.0) == "here"


def test_no_thread_stays_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_thread, "_IDLE_S", 0.01)
    before = set(threading.enumerate())
    asked = StoreThread()
    assert asked.ask(lambda: "one", 20.0) == "one"
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
    assert asked.ask(lambda: "two", 20.0) == "two"
