"""Questions are asked ahead of the answers that are looked at, in order, and not many of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import ContextVar

import pytest

from migration_pipelines.ahead import answers, in_turns

WHO = ContextVar("WHO", default="nobody")


def test_answers_come_in_order_from_threads_that_know_the_callers_context() -> None:
    WHO.set("caller")
    found = list(answers(lambda n: (n, WHO.get()), range(50), ahead=3))
    assert found == [(n, "caller") for n in range(50)]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_are_asked_than_were_allowed_ahead(ahead: int) -> None:
    asked: list[int] = []
    for number, _ in enumerate(answers(asked.append, range(20), ahead=ahead)):
        assert len(asked) <= number + 1 + ahead
    assert sorted(asked) == list(range(20))


def test_a_later_question_is_under_way_while_an_answer_is_looked_at() -> None:
    both = threading.Barrier(2, timeout=10)
    assert len(list(answers(lambda _: both.wait(), range(4), ahead=2))) == 4


def test_an_error_comes_in_its_place_and_ends_the_asking() -> None:
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    found = answers(ask, range(100), ahead=2)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(found)
    assert len(asked) <= 7


def test_nothing_is_at_work_after_the_reader_has_left() -> None:
    before = threading.active_count()
    found = answers(lambda number: number, range(100), ahead=4)
    next(found)
    found.close()
    assert threading.active_count() == before


def test_sources_of_any_length_are_read_in_turns_by_threads_that_know_the_callers_context() -> None:
    WHO.set("caller")

    def source(name: str, length: int) -> Iterator[tuple[str, int, str]]:
        return ((name, number, WHO.get()) for number in range(length))

    found = list(in_turns([source("a", 1), source("b", 3), source("c", 0)]))
    expected = [("a", 0), ("b", 0), ("b", 1), ("b", 2)]
    assert found == [(*item, "caller") for item in expected]


def test_the_next_item_of_each_source_is_made_while_one_is_looked_at() -> None:
    both = threading.Barrier(2, timeout=10)
    sources = [(both.wait() for _ in range(5)) for _ in range(2)]
    assert len(list(in_turns(sources))) == 10


def test_what_a_source_raises_comes_in_its_place_and_ends_them_all() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("two")

    endless = iter(int, 1)
    found = in_turns([failing(), endless])
    assert [next(found) for _ in range(2)] == [1, 0]
    with pytest.raises(ValueError, match="two"):
        list(found)


def test_nothing_is_at_work_after_the_reader_of_several_has_left() -> None:
    before = threading.active_count()
    found = in_turns([iter(int, 1), iter(int, 1)])
    next(found)
    found.close()
    assert threading.active_count() == before
