"""Milvus's filter expressions, of which records are named by: literals of our own.

pymilvus joins ids into an expression unescaped (`get` and `delete` break on a quote, a backslash or a
newline, and say something else where an id is made for it), and Milvus Lite knows no templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# What both grammars have: Milvus's takes the escapes of Go, Milvus Lite only these. Other characters stand
# for themselves in both, U+0000 and tabs included.
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"})

Key = int | str


def literal(key: Key) -> str:
    """Return a key as it stands in an expression."""
    return str(key) if isinstance(key, int) else f'"{key.translate(_ESCAPES)}"'


def among(field: str, keys: Iterable[Key]) -> str:
    """Return the expression for records whose key is one of these."""
    return f"{field} in [{','.join(map(literal, keys))}]"


def beyond(field: str, key: Key | None) -> str:
    """Return the expression for records whose key comes after `key`; all of them after None."""
    return "" if key is None else f"{field} > {literal(key)}"


def everything(field: str, *, is_text: bool) -> str:
    """Return an expression that all keys satisfy.

    Milvus Lite counts a whole collection in place of a partition where the expression is empty.
    """
    return f'{field} >= ""' if is_text else f"{field} >= {-(2**63)}"


def chunks(keys: Sequence[Key], size: int) -> Iterable[Sequence[Key]]:
    """Yield the keys in lists of at most `size`."""
    return (keys[start : start + size] for start in range(0, len(keys), size))
