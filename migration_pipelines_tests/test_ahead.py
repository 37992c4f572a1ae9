"""Questions are asked ahead of the answers that are looked at, in order, and not many of them."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import pytest

from migration_pipelines.ahead import answers

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
