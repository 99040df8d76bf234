"""What is said over channels that drop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from equipoise.elastic.channel import Message
from equipoise.elastic.said import Heard, Said


@given(st.lists(st.sampled_from(["say", "arrive", "confirm", "drop"]), max_size=60))
def test_everything_comes_once_and_in_order(story: list[str]) -> None:
    said, heard = Said(), Heard()
    under_way: list[Message] = []
    come: list[int] = []
    for what in story:
        if what == "say":
            under_way.append(said.add({"value": said.count}))
        elif what == "arrive" and under_way:
            message = under_way.pop(0)
            if heard.is_new(message):
                come.append(message["value"])
        elif what == "confirm":
            said.confirm(heard.count)
        elif what == "drop":
            # What the old channel still gives may come when the new one is there.
            under_way = under_way[:1] + said.unheard
    said.confirm(heard.count)
    come += [one["value"] for one in said.unheard if heard.is_new(one)]
    assert come == list(range(said.count))


def test_whoever_takes_a_place_goes_on_with_its_count() -> None:
    said = Said(7)
    heard = Heard(7)
    assert heard.is_new({"do": "something"})
    assert heard.is_new(said.add({"do": "adopt"}))
    said.confirm(8)
    assert not said.unheard
