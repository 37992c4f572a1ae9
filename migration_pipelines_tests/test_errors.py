"""The tree of errors that errors.py draws is the tree that it defines."""

from __future__ import annotations

import inspect
import re

import pytest

from migration_pipelines import errors
from migration_pipelines.errors import MigrationError

_LINE = re.compile(r"^(?P<indent>[│├└─ ]*)(?P<name>\w+Error)(?:\s+(?P<status>\d))?(?:\s|$)")


def drawn() -> dict[str, tuple[str | None, int]]:
    """Each name in the drawing with its parent and its exit status, its own or else its parent's."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        depth = len(match["indent"])
        above = [(level, name) for level, name in above if level < depth]
        parent = above[-1][1] if above else None
        status = int(match["status"]) if match["status"] else tree[parent][1] if parent in tree else 1
        tree[match["name"]] = (parent, status)
        above.append((depth, match["name"]))
    return tree


CLASSES = {
    name: item
    for name, item in inspect.getmembers(errors, inspect.isclass)
    if issubclass(item, MigrationError)
}


def test_drawing_and_classes_name_the_same_errors() -> None:
    assert set(drawn()) == set(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_error_has_the_parent_and_the_exit_status_that_the_drawing_gives_it(name: str) -> None:
    parent, status = drawn()[name]
    assert CLASSES[name].__base__ is (CLASSES[parent] if parent else Exception)
    assert CLASSES[name].exit_status == status


def test_exit_statuses_are_the_documented_ones() -> None:
    assert {item.exit_status for item in CLASSES.values()} == {1, 2, 3, 4}


def test_facts_are_attributes_and_no_part_of_the_message() -> None:
    error = errors.StoreRefusedError("qdrant://host/docs refused the call", store="qdrant", expected=1)
    assert str(error) == "qdrant://host/docs refused the call"
    assert error.facts == {"store": "qdrant", "expected": 1}
