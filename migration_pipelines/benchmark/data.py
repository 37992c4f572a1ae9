"""Records to measure with: text of about 280 characters, six metadata fields, vectors of length one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_PAGE = 5_000
_WORDS = 2_000
_WORDS_IN_A_TEXT = 44
_LANGUAGES = ("de", "en", "fr", "ja", "pt")
_LETTERS = np.array(list("aeionrstldmu"))


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some records, column by column; `vectors` is float32[n_records, dimensions]."""

    ids: list[str]
    vectors: npt.NDArray[np.float32]
    documents: list[str]
    metadatas: list[dict[str, Any]]


def pages(records: int, dimensions: int) -> Iterator[Page]:
    """Yield the records, the same ones each time."""
    words = _words(np.random.default_rng(0))
    for start in range(0, records, _PAGE):
        yield _page(range(start, min(start + _PAGE, records)), dimensions, words)


def _words(rng: np.random.Generator) -> npt.NDArray[np.str_]:
    lengths = rng.integers(2, 9, _WORDS)
    return np.array(["".join(rng.choice(_LETTERS, length)) for length in lengths])


def _page(numbers: range, dimensions: int, words: npt.NDArray[np.str_]) -> Page:
    rng = np.random.default_rng(numbers.start + 1)
    vectors = rng.standard_normal((len(numbers), dimensions)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = rng.choice(words, (len(numbers), _WORDS_IN_A_TEXT))
    scores = rng.integers(0, 1000, len(numbers))
    return Page(
        ids=[f"passage-{number:08d}" for number in numbers],
        vectors=vectors,
        documents=[" ".join(row) for row in texts],
        metadatas=[
            {
                "source": f"book-{number % 97:03d}.pdf",
                "page": number % 500,
                "language": _LANGUAGES[number % len(_LANGUAGES)],
                "score": int(score) / 1000,
                "reviewed": number % 3 == 0,
                "section": f"section {number % 41}",
            }
            for number, score in zip(numbers, scores, strict=True)
        ],
    )
