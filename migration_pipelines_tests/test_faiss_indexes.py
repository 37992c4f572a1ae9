"""Every kind of FAISS index is read where its vectors really are, or refused; none ends the process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.model import DType, Metric, VectorField
from migration_pipelines.store import open_address
from migration_pipelines.stores.faiss import FaissStore, in_place
from migration_pipelines.stores.faiss.index import open_index
from migration_pipelines_tests.conformance import ids_of, read_all
from migration_pipelines_tests.records import Record, from_batches

N, DIMENSIONS = 900, 16
VECTORS = np.random.default_rng(0).standard_normal((N, DIMENSIONS)).astype(np.float32)
# Neither dense nor ascending, with negative ones: as FAISS takes them.
IDS = np.random.default_rng(1).permutation(np.arange(N) * 7 - 100)


def made(factory: str, metric: int = faiss.METRIC_L2, *, ids: bool = False) -> faiss.Index:
    """An index of all vectors."""
    index = faiss.index_factory(DIMENSIONS, factory, metric)
    index.train(VECTORS)
    index.add_with_ids(VECTORS, IDS) if ids else index.add(VECTORS)
    return index


def stored(index: faiss.Index, folder: Path) -> tuple[FaissStore, str]:
    """The store of one index file."""
    write = faiss.write_index_binary if isinstance(index, faiss.IndexBinary) else faiss.write_index
    write(index, str(folder / "docs.faiss"))
    store, name = open_address(f"faiss:{folder}/docs.faiss#docs")
    assert name == "docs"
    return store, name


def by_number(records: list[Record]) -> dict[int, bytes]:
    assert len({record.id for record in records}) == len(records)
    return {record.id: np.asarray(record.vectors[""]).tobytes() for record in records}


EXACT = ["Flat", "HNSW16", "IVF8,Flat", "NSG16", "Flat,RFlat", "PQ4x4,RFlat", "IVF8,PQ4x4,RFlat"]
EXACT_WITH_IDS = [
    "IDMap,Flat",
    "IDMap2,Flat",
    "IVF8,Flat",
    "IDMap,HNSW16",
    "IDMap2,HNSW16",
    "IDMap,IVF8,Flat",
]
CODED = ["SQ8", "PQ4x4", "LSH", "PCA8,Flat", "IVF8,SQ8", "IVF8,PQ4x4", "HNSW16_SQ8", "L2norm,Flat"]


@pytest.mark.parametrize("factory", EXACT)
def test_vectors_are_read_bit_for_bit(factory: str, tmp_path: Path) -> None:
    store, name = stored(made(factory), tmp_path)
    schema = store.describe(name)
    assert "approximate_vectors" not in schema.options
    assert (schema.vectors[0].dimensions, schema.vectors[0].metric) == (DIMENSIONS, Metric.EUCLIDEAN)
    found = by_number(read_all(store, name, span_records=70))
    assert found == {row: vector.tobytes() for row, vector in enumerate(VECTORS)}


@pytest.mark.parametrize("factory", EXACT_WITH_IDS)
def test_vectors_are_read_under_their_own_ids(factory: str, tmp_path: Path) -> None:
    """`reconstruct_n` gives memory that was never written for IVF, and ends the process for ID maps."""
    store, name = stored(made(factory, ids=True), tmp_path)
    expected = dict(zip(IDS.tolist(), (vector.tobytes() for vector in VECTORS), strict=True))
    assert by_number(read_all(store, name, span_records=70)) == expected
    wanted = [Record(id=int(number)) for number in [*IDS[:5], *IDS[400:403], 10**9]]
    found = store.fetch(name, ids_of(wanted))
    assert by_number(from_batches([found])) == {record.id: expected[record.id] for record in wanted[:-1]}


@pytest.mark.parametrize("factory", CODED)
@pytest.mark.parametrize("ids", [False, True], ids=["positions", "ids"])
def test_vectors_that_are_kept_as_codes_are_read_decoded_and_said_to_be(
    factory: str, ids: bool, tmp_path: Path
) -> None:
    with_map = ids and not factory.startswith("IVF")
    store, name = stored(made(f"IDMap,{factory}" if with_map else factory, ids=ids), tmp_path)
    assert store.describe(name).options["approximate_vectors"]
    original = dict(zip(IDS.tolist() if ids else range(N), VECTORS, strict=True))
    found = {record.id: record.vectors[""] for record in read_all(store, name)}
    assert found.keys() == original.keys()
    pairs = np.array([[found[key], original[key]] for key in original])
    likeness = [np.corrcoef(pair)[0, 1] for pair in pairs]
    # Of another vector the likeness would be around 0.
    assert np.mean(likeness) > 0.5


@pytest.mark.parametrize(
    ("number", "metric"),
    [
        (faiss.METRIC_INNER_PRODUCT, Metric.DOT),
        (faiss.METRIC_L2, Metric.EUCLIDEAN),
        (faiss.METRIC_L1, Metric.MANHATTAN),
        (faiss.METRIC_Linf, None),
    ],
)
@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IDMap,Flat"])
def test_the_metric_is_told(number: int, metric: Metric | None, factory: str, tmp_path: Path) -> None:
    store, name = stored(made(factory, number, ids=factory.startswith("ID")), tmp_path)
    schema = store.describe(name)
    assert schema.vectors[0].metric is metric
    assert schema.options.get("faiss_metric") == (None if metric else number)
    keys = IDS.tolist() if factory.startswith("ID") else range(N)
    found = by_number(read_all(store, name))
    assert found == dict(zip(keys, (vector.tobytes() for vector in VECTORS), strict=True))


def test_the_settings_of_an_index_are_told(tmp_path: Path) -> None:
    index = faiss.IndexHNSWFlat(DIMENSIONS, 24)
    index.hnsw.efConstruction = 77
    index.add(VECTORS)
    for number, one in enumerate([index, made("IVF8,Flat"), made("Flat")]):
        (tmp_path / str(number)).mkdir()
        store, name = stored(one, tmp_path / str(number))
        assert (
            store.describe(name).vectors[0].index
            == [
                {"type": "hnsw", "m": 24, "ef_construction": 77},
                {"type": "ivf", "lists": 8},
                {"type": "flat"},
            ][number]
        )


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IDMap,Flat", "IDMap2,HNSW16"])
def test_flat_and_graph_indexes_are_read_in_place_and_not_loaded(factory: str, tmp_path: Path) -> None:
    store, name = stored(made(factory, ids=factory.startswith("ID")), tmp_path)
    assert in_place.find_layout(tmp_path / "docs.faiss") is not None
    read_all(store, name)
    assert store._opened(name).index.loaded is None


@pytest.mark.parametrize("factory", [*EXACT, *EXACT_WITH_IDS])
def test_an_empty_index_is_read(factory: str, tmp_path: Path) -> None:
    index = faiss.index_factory(DIMENSIONS, factory)
    if "NSG" in factory:
        pytest.skip("FAISS writes none")
    index.train(VECTORS)
    store, name = stored(index, tmp_path)
    assert (store.count(name), read_all(store, name)) == (0, [])
    assert store.search(name, VECTORS[0], limit=3) == []


@pytest.mark.parametrize("metric", [faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT])
@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF8,Flat", "IDMap,Flat"])
def test_a_search_finds_by_the_index_what_a_search_of_all_finds(
    factory: str, metric: int, tmp_path: Path
) -> None:
    ids = factory.startswith("ID")
    store, name = stored(made(factory, metric, ids=ids), tmp_path)
    query = VECTORS[17] + 0.01
    squared = ((VECTORS - query) ** 2).sum(axis=1)
    scores = np.sqrt(squared) if metric == faiss.METRIC_L2 else -(VECTORS @ query)
    nearest = np.argsort(scores)[:4]
    found = store.search(name, query, limit=4)
    keys = IDS if ids else np.arange(N)
    assert found[0][0] == keys[nearest[0]]
    assert len({number for number, _ in found} & set(keys[nearest].tolist())) >= 3
    assert found[0][1] == pytest.approx(scores[nearest[0]], rel=1e-4)


def bits(n: int = 300) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (n, 4)).astype(np.uint8)


def binary_flat() -> faiss.IndexBinary:
    index = faiss.IndexBinaryFlat(32)
    index.add(bits())
    return index


def binary_map() -> faiss.IndexBinary:
    index = faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(32))
    index.add_with_ids(bits(), np.arange(300) * 3)
    index.own_fields = False
    return index


@pytest.mark.parametrize(("make", "step"), [(binary_flat, 1), (binary_map, 3)])
def test_binary_indexes_are_read_as_bits(
    make: Callable[[], faiss.IndexBinary], step: int, tmp_path: Path
) -> None:
    store, name = stored(make(), tmp_path)
    (field,) = store.describe(name).vectors
    assert (field.dtype, field.dimensions, field.metric) == (DType.BIT, 32, Metric.HAMMING)
    expected = {row * step: vector.tobytes() for row, vector in enumerate(bits())}
    assert by_number(read_all(store, name)) == expected
    query = np.unpackbits(bits()[5]).astype(np.float32)
    assert store.search(name, query, limit=1) == [(5 * step, 0.0)]


def test_a_kind_that_keeps_no_vectors_is_refused_by_name(tmp_path: Path) -> None:
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(32), 32, 2)
    index.train(bits())
    index.add(bits())
    store, name = stored(index, tmp_path)
    with pytest.raises(StoreRefusedError, match="IndexBinaryIVF"):
        store.count(name)


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────


def survives(action: Callable[[], object]) -> int:
    """The exit status of a process that does this: 0 done, 10 refused by our error; a signal is negative."""
    child = os.fork()
    if not child:
        status = 1
        try:
            action()
            status = 0
        except StoreRefusedError:
            status = 10
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF8,Flat", "IDMap,Flat", "SQ8"])
def test_a_file_cut_anywhere_is_refused_and_ends_no_process(factory: str, tmp_path: Path) -> None:
    store, name = stored(made(factory, ids=factory.startswith("ID")), tmp_path)
    path = tmp_path / "docs.faiss"
    whole = path.read_bytes()
    ends = [*range(0, 60, 5), *np.linspace(61, len(whole) - 1, 25).astype(int).tolist()]
    for end in ends:
        path.write_bytes(whole[:end])
        again = FaissStore(path=store.path)
        assert survives(lambda again=again: read_all(again, name)) == 10, end


def test_a_damaged_file_is_named_with_its_size(tmp_path: Path) -> None:
    store, name = stored(made("Flat"), tmp_path)
    path = tmp_path / "docs.faiss"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreRefusedError, match=r"docs\.faiss.*1,000 bytes"):
        store.count(name)


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docs.faiss").write_text("not an index, but long enough to look at its header")
    store, name = open_address(f"faiss:{tmp_path}/docs.faiss")
    with pytest.raises(StoreRefusedError, match="can't be read as a FAISS index"):
        store.describe(name)


def test_vectors_that_hold_nan_are_read_as_they_are(tmp_path: Path) -> None:
    index = faiss.IndexFlatL2(4)
    vectors = np.array([[1, np.nan, np.inf, -0.0], [1e-45, 2, 3, 4]], np.float32)
    index.add(vectors)
    store, name = stored(index, tmp_path)
    assert by_number(read_all(store, name)) == {0: vectors[0].tobytes(), 1: vectors[1].tobytes()}


@pytest.mark.parametrize("count", [0, 1, 700])
@pytest.mark.parametrize(
    ("metric", "number"),
    [
        (Metric.EUCLIDEAN, faiss.METRIC_L2),
        (Metric.DOT, faiss.METRIC_INNER_PRODUCT),
        (Metric.COSINE, faiss.METRIC_INNER_PRODUCT),
        (Metric.MANHATTAN, faiss.METRIC_L1),
        (Metric.HAMMING, None),
    ],
)
def test_a_flat_index_is_written_byte_for_byte_as_faiss_does(
    metric: Metric, number: Any, count: int, tmp_path: Path
) -> None:
    rng, is_bits = np.random.default_rng(0), metric is Metric.HAMMING
    flat = {faiss.METRIC_L2: faiss.IndexFlatL2, faiss.METRIC_INNER_PRODUCT: faiss.IndexFlatIP}
    vectors: Any = rng.standard_normal((count, 24)).astype(np.float32)
    index: Any
    if is_bits:
        vectors, index = rng.integers(0, 256, (count, 3), np.uint8), faiss.IndexBinaryFlat(24)
    else:
        index = flat[number](24) if number in flat else faiss.IndexFlat(24, number)
    index.add(vectors)
    (faiss.write_index_binary if is_bits else faiss.write_index)(index, str(tmp_path / "theirs"))
    field = VectorField(dimensions=24, metric=metric, dtype=DType.BIT if is_bits else DType.FLOAT32)
    with in_place.FlatWriter(tmp_path / "ours", field) as file:
        for some in np.array_split(vectors, 3):
            file.add(some)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (open_index(tmp_path / "ours").read(0, count) == vectors).all()
