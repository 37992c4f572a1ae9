"""A user's own mapping of records, as pure functions on batches: which fields travel, called what, as what.

The filter looks at the source's records; then the rules are applied, always in this order:

0. `before`: functions of a whole batch, in order.
1. `include_fields`, `exclude_fields` choose metadata fields, by the source's names.
2. `field_mapping` renames them, all at once. From here on the new names count.
3. `document_to` makes the document a field.
4. `defaults` fill fields that are absent; one that is null is there.
5. `transforms` take fields through their steps, in the order written. Only a `template` makes a field.
6. `id_from` makes the id from a field or a template; the field stays.
7. `document_from` makes a field, or a template, the document. The field leaves the metadata.
8. `vectors`: each is embedded anew, projected or truncated, normalised, cast, renamed, or dropped.
9. `after`: functions of a whole batch, in order.

What the target can't hold is fitted to it afterwards, as without a mapping. A record that a rule can't be
applied to is rejected, gets the default, or fails the plan before anything is written: `on_error` says which.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
from pydantic import BeforeValidator, Field, model_serializer, model_validator

from migration_pipelines import batch as batches
from migration_pipelines.batch import DOCUMENT, ID, ID_TYPE, METADATA, VECTOR
from migration_pipelines.errors import ConfigurationError, SchemaMappingError
from migration_pipelines.mapping_steps import Step, is_template, parse_step, render, template_fields
from migration_pipelines.mapping_vectors import (
    Label,
    VectorMapping,
    embedded,
    map_vectors,
    vector_changes,
)
from migration_pipelines.metadata import dump_all, dump_metadata, load_all, load_metadata
from migration_pipelines.model import APPROXIMATE, CollectionSchema, DType, Loss, Value

Policy = Literal["reject", "default", "fail"]
Records = list[dict[str, Any] | None]
_INT64 = range(-(2**63), 2**63)
_AS_IT_IS = VectorMapping()


def _steps(given: Any) -> Any:
    return tuple(map(parse_step, given if isinstance(given, (list, tuple)) else [given]))


def _hooks(given: Any) -> Any:
    found = _steps(given)
    if any(hook.function is None for hook in found):
        raise ValueError("a function of batches can be given from Python only")
    return found


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """What became of a batch.

    `rows`, int64[n_mapped], says which records of the batch the mapped ones were; `refused` by row why the
    others couldn't be mapped; `changes` counts what was changed, by field and detail.
    """

    batch: pa.RecordBatch
    rows: npt.NDArray[np.int64]
    refused: Mapping[int, str]
    changes: Counter[tuple[str, str]]


class SchemaMapping(Value):
    """Rules by which records are changed on their way; the module says in which order.

    Parameters
    ----------
    field_mapping
        New names of metadata fields by their old ones.
    include_fields, exclude_fields
        Metadata fields that travel (None: all), and that don't.
    defaults
        Values of fields that are absent.
    transforms
        Steps by field, one or a list; `mapping_steps` has the vocabulary. From Python a step may be a
        function of one value, at the top level of a module.
    document_to, document_from
        The metadata field that the document becomes; the field or template that becomes the document.
    id_from
        The field or template that becomes the id: a text, or an integer of 64 bits. The plan proves the new
        ids distinct before anything is written.
    before, after
        Functions of a `pyarrow.RecordBatch`, at the top level of a module, that return one with the same
        columns and records: before all rules, and after them. Plans call them on batches without vectors.
    vectors
        What becomes of vectors, by label: `vector`, `vector:<name>`.
    on_error
        What becomes of a record that a rule can't be applied to: `fail`, `reject` or `default`, for all rules
        or by field, `id`, `document` and label of a vector. Those not named fail.
    """

    before: Annotated[tuple[Step, ...], BeforeValidator(_hooks)] = ()
    after: Annotated[tuple[Step, ...], BeforeValidator(_hooks)] = ()
    field_mapping: Mapping[str, str] = Field(default_factory=dict)
    include_fields: tuple[str, ...] | None = None
    exclude_fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = Field(default_factory=dict)
    transforms: Mapping[str, Annotated[tuple[Step, ...], BeforeValidator(_steps)]] = Field(
        default_factory=dict
    )
    document_from: str | None = None
    document_to: str | None = None
    id_from: str | None = None
    vectors: Mapping[Label, VectorMapping] = Field(default_factory=dict)
    on_error: Policy | Mapping[str, Policy] = "fail"

    @model_validator(mode="before")
    @classmethod
    def _from_document(cls, given: Any) -> Any:
        """Take the form of `document` as well, in which another process gets a mapping."""
        if not isinstance(given, Mapping):
            return given
        found = dict(given)
        pairs = found.get("transforms")
        if isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            found["transforms"] = {str(name): steps for name, steps in pairs}
        if isinstance(found.get("defaults"), str):
            found["defaults"] = load_metadata(found["defaults"])
        return found

    @model_serializer(mode="wrap", when_used="json")
    def _as_document(self, _: Any) -> dict[str, Any]:
        return self.document()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = list(self.field_mapping.values())
        if len(set(names)) < len(names):
            raise ValueError("field_mapping gives two fields the same name")
        gone = [name for name in self.field_mapping if not self.travels(name)]
        if gone:
            raise ValueError(f"field_mapping renames {gone[0]!r}, which doesn't travel")
        both = set(self.include_fields or ()) & set(self.exclude_fields)
        if both:
            raise ValueError(f"{min(both)!r} is both included and excluded")
        for template in (self.id_from, self.document_from):
            if template is not None and is_template(template):
                template_fields(template)
        labels = [rule.rename for rule in self.vectors.values() if rule.rename]
        if len(set(labels)) < len(labels):
            raise ValueError("vectors gives two vectors the same name")
        needed = {name for name, policy in self._policies() if policy == "default"} - self.defaults.keys()
        if needed:
            raise ValueError(f"on_error names a default for {min(needed)!r}, and defaults has none")
        made = {ID: self.id_from, DOCUMENT: self.document_from, **self.vectors}
        lacking = [name for name, rule in made.items() if rule is not None and self.policy(name) == "default"]
        if lacking:
            raise ValueError(f"{lacking[0]} has no default: say reject or fail in on_error")
        try:
            dump_metadata(dict(self.defaults))
        except TypeError as error:
            raise ValueError(f"defaults: {error}") from None
        return self

    def _policies(self) -> Iterator[tuple[str, Policy]]:
        if not isinstance(self.on_error, str):
            yield from self.on_error.items()
        elif self.on_error == "default":
            yield from ((name, self.on_error) for name in self.transforms)

    def policy(self, name: str) -> Policy:
        """Return what becomes of a record where the rules for `name` can't be applied."""
        if not isinstance(self.on_error, str):
            return self.on_error.get(name, "fail")
        # For all rules: the id, the document and vectors have no default.
        return "fail" if self.on_error == "default" and name not in self.defaults else self.on_error

    def travels(self, name: str) -> bool:
        """Whether a metadata field of the source travels."""
        included = self.include_fields is None or name in self.include_fields
        return included and name not in self.exclude_fields

    @property
    def changes_nothing(self) -> bool:
        """Whether there are no rules at all."""
        return self.model_copy(update={"on_error": "fail"}) == SchemaMapping()

    @property
    def uses_functions(self) -> bool:
        """Whether a step, a hook or a vector is made by a function, which no other process can be told."""
        steps = chain(self.before, self.after, *self.transforms.values())
        return any(step.function is not None for step in steps) or any(
            rule.embed is not None for rule in self.vectors.values()
        )

    @property
    def narrows(self) -> bool:
        """Whether a vector may become infinite, so that a plan has to look at the vectors."""
        return any(rule.dtype is DType.FLOAT16 for rule in self.vectors.values())

    def document(self) -> dict[str, Any]:
        """Return the rules as JSON holds them, functions by their names; what isn't set is left out."""
        found = self.model_dump(exclude_defaults=True, exclude={"transforms", "defaults", "before", "after"})
        if self.defaults:
            found["defaults"] = dump_metadata(self.defaults)  # as text: JSON has no dates, nor long integers
        for name in ("before", "after"):
            hooks: tuple[Step, ...] = getattr(self, name)
            if hooks:
                found[name] = [hook.document() for hook in hooks]
        if self.transforms:
            # In pairs: their order counts, and that of an object's keys doesn't.
            found["transforms"] = [
                [name, [step.document() for step in steps]] for name, steps in self.transforms.items()
            ]
        plain: dict[str, Any] = orjson.loads(orjson.dumps(found))
        return plain

    def digest(self) -> str:
        """Return a digest of the rules, by which a plan knows them again."""
        return hashlib.sha256(orjson.dumps(self.document(), option=orjson.OPT_SORT_KEYS)).hexdigest()

    def inverse(self) -> SchemaMapping:
        """Return the mapping that undoes this one, where there is one: of renames, and of a document's place.

        It gives back every record that had no field of a new name before, and in which the field of
        `document_from` was a text or absent.

        Raises
        ------
        ConfigurationError
            A rule loses what it would need.
        """
        lasting = {"field_mapping", "document_from", "document_to", "vectors"}
        lossy = sorted(self.document().keys() - lasting - {"on_error"})
        lossy += [label for label, rule in self.vectors.items() if rule != VectorMapping(rename=rule.rename)]
        if self.document_from is not None and is_template(self.document_from):
            lossy.append("document_from")
        if lossy:
            raise ConfigurationError(
                f"the mapping has no inverse: {', '.join(lossy)} can't be undone; renames, document_from a "
                "field and document_to can",
                found=lossy,
            )
        back = {new: old for old, new in self.field_mapping.items()}
        # The field that became the document was renamed before: it gets its old name at once.
        was = back.pop(self.document_from, self.document_from) if self.document_from else None
        return SchemaMapping(
            field_mapping=back,
            document_to=was,
            document_from=self.document_to,
            vectors={
                rule.rename: VectorMapping(rename=old) for old, rule in self.vectors.items() if rule.rename
            },
            on_error=self.on_error,
        )

    # ── schema ───────────────────────────────────────────────────────────────────────────────────────

    def map_schema(self, schema: CollectionSchema) -> CollectionSchema:
        """Return the schema of the mapped records; what only a store understands of the old one stays behind.

        Raises
        ------
        ConfigurationError
            A rule is for a vector that isn't there, or that it can't be applied to.
        """
        there = {batches.vector_column(field.name): field for field in schema.vectors}
        unknown = sorted(self.vectors.keys() - there.keys())
        if unknown:
            raise ConfigurationError(
                f"the mapping names {', '.join(unknown)}; "
                f"{schema.name} has {', '.join(there) or 'no vectors'}"
            )
        fields = []
        for label, found in there.items():
            rule = self.vectors.get(label, _AS_IT_IS)
            name = (rule.rename or label).removeprefix(VECTOR).removeprefix(":")
            if not rule.drop:
                fields.append(rule.field(found).model_copy(update={"name": name}))
        if len({field.name for field in fields}) < len(fields):
            raise ConfigurationError(f"the mapping would give two vectors of {schema.name} the same name")
        has_documents = schema.has_documents and self.document_to is None
        return schema.model_copy(
            update={
                "vectors": tuple(fields),
                "has_documents": has_documents or self.document_from is not None,
                # Columns and index settings of the store's own, which speak of the old fields.
                "options": {key: own for key, own in schema.options.items() if key == APPROXIMATE},
            }
        )

    # ── records ──────────────────────────────────────────────────────────────────────────────────────

    def apply(self, batch: pa.RecordBatch) -> Mapped:
        """Return a batch's records after all rules; vectors only where the batch has them.

        Raises
        ------
        SchemaMappingError
            A rule can't be applied to a record, and is told to fail.
        """
        for hook in self.before:
            batch = _hooked(hook, batch)
        work = _Work(self, batch)
        columns = {name: batch.column(name) for name in batch.schema.names}
        if self._touches_records:
            columns |= work.texts()
        for label, rule in self.vectors.items():
            for row in () if rule.embed is None else np.flatnonzero(columns[DOCUMENT].is_null()):
                work.trouble(int(row), label, "there is no document to embed")
        vectors: dict[str, pa.Array] = {}  # by their new labels, which may be others' old ones
        for label in batches.vector_columns(batch.schema):
            rule, column = self.vectors.get(label, _AS_IT_IS), columns.pop(label)
            if rule.drop:
                continue
            if rule.embed is not None:
                column = embedded(rule, columns[DOCUMENT].to_pylist())
            mapped, infinite = map_vectors(column, rule)
            for row in np.flatnonzero(infinite):
                work.trouble(int(row), label, f"a number is too large for {rule.dtype}")
            vectors[rule.rename or label] = mapped
        found = _in_order(columns, vectors)
        for hook in self.after:
            found = _hooked(hook, found)
        return work.finish(found)

    def vectors_only(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return a batch with its vectors mapped and nothing else; none is refused."""
        # What a model would have to make anew isn't made for a sample.
        rules = {
            label: VectorMapping(drop=True) if rule.embed is not None else rule
            for label, rule in self.vectors.items()
        }
        return self.model_copy(update={**_NO_RECORD_RULES, "vectors": rules}).apply(batch).batch

    @property
    def _touches_records(self) -> bool:
        return any(getattr(self, name) != value for name, value in _NO_RECORD_RULES.items())

    def changed(
        self, schema: CollectionSchema, counts: Mapping[tuple[str, str], int], records: int
    ) -> Iterator[Loss]:
        """Yield what the rules change of a collection's records, as accepted: it is what was asked for."""
        for (name, detail), count in sorted(counts.items()):
            yield Loss(field=name, kind="mapped", count=count, detail=detail, accepted=True)
        for field in schema.vectors:
            label = batches.vector_column(field.name)
            rule = self.vectors.get(label)
            for detail in () if rule is None else vector_changes(rule, field):
                yield Loss(field=label, kind="mapped", count=records, detail=detail, accepted=True)


_NO_RECORD_RULES = {
    name: field.get_default(call_default_factory=True)
    for name, field in SchemaMapping.model_fields.items()
    if name not in ("vectors", "on_error")
}


class _Work:
    """One batch on its way through a mapping: its metadata parsed once, and what went wrong."""

    def __init__(self, rules: SchemaMapping, batch: pa.RecordBatch) -> None:
        self._rules, self._batch = rules, batch
        self._refused: dict[int, str] = {}
        self._changes: defaultdict[tuple[str, str], list[int]] = defaultdict(list)  # rows
        self._records: Records = []

    def trouble(self, row: int, name: str, why: str) -> None:
        """Do with a record what `on_error` says of the rules for `name`."""
        policy = self._rules.policy(name)
        if policy == "fail":
            found = self._batch.column(ID)[row].as_py()
            raise SchemaMappingError(
                f"record {found!r}: {name}: {why}; mend the record or the mapping, or say on_error for it",
                record=found,
                field=name,
            )
        if policy == "reject":
            self._refused.setdefault(row, f"{name}: {why}")
            return
        self._changes[name, "the default, where the rules can't be applied"].append(row)
        self._fields(row)[name] = self._rules.defaults[name]

    def _fields(self, row: int) -> dict[str, Any]:
        """Return a record's fields, to change them; empty ones for a record that had none."""
        fields = self._records[row]
        if fields is None:
            fields = self._records[row] = {}
        return fields

    def _whole(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield row and fields of every record that isn't refused; empty ones where it has no metadata."""
        for row, fields in enumerate(self._records):
            if row not in self._refused:
                yield row, {} if fields is None else fields

    def texts(self) -> dict[str, pa.Array]:
        """Return the columns of ids, documents and metadata after the rules for them."""
        rules, batch = self._rules, self._batch
        texts = batch.column(METADATA).to_pylist()
        found = iter(load_all([text for text in texts if text is not None]))
        self._records = [None if text is None else next(found) for text in texts]
        documents = batch.column(DOCUMENT).to_pylist()
        self._choose()
        if rules.document_to is not None:
            documents = self._document_to(rules.document_to, documents)
        for name, value in rules.defaults.items():
            for row, fields in self._whole():
                if name not in fields:
                    self._fields(row)[name] = value
        for name, steps in rules.transforms.items():
            self._transform(name, steps)
        columns = {} if rules.id_from is None else self._ids(rules.id_from)
        if rules.document_from is not None:
            documents = self._document_from(rules.document_from, documents)
        dumped = [None if text is None else text.decode() for text in dump_all(self._records)]
        columns[DOCUMENT] = pa.array(documents, pa.string())
        columns[METADATA] = pa.array(dumped, pa.string())
        return columns

    def _choose(self) -> None:
        rules, names = self._rules, self._rules.field_mapping
        travels: dict[str, bool] = {}
        for row, fields in enumerate(self._records):
            if fields is None:
                continue
            for name in fields.keys() - travels.keys():
                travels[name] = rules.travels(name)
            kept: dict[str, Any] = {}
            twice = []
            for name, value in fields.items():
                new = names.get(name, name)
                if not travels[name]:
                    self._changes[name, "left out"].append(row)
                elif new in kept:
                    twice.append(new)
                else:
                    kept[new] = value
            self._records[row] = kept
            for name in twice:
                self.trouble(row, name, "two of the record's fields would have this name")

    def _document_to(self, name: str, documents: list[str | None]) -> list[str | None]:
        for row, fields in self._whole():
            if documents[row] is None:
                continue
            if name in fields:
                self.trouble(row, name, "the document would become a field that is there already")
            else:
                self._fields(row)[name] = documents[row]
        return [None] * len(documents)

    def _transform(self, name: str, steps: tuple[Step, ...]) -> None:
        makes = bool(steps) and steps[0].makes_fields
        detail = ", ".join(_as_text(step) for step in steps)
        for row, fields in self._whole():
            before = value = fields.get(name)
            if value is None and not makes:
                continue  # absent or null: there is nothing to transform
            try:
                for step in steps:
                    value = step(value, fields)
            except ValueError as error:
                self.trouble(row, name, str(error))
                continue
            self._fields(row)[name] = value
            if type(value) is not type(before) or value != before:
                self._changes[name, detail].append(row)

    def _ids(self, source: str) -> dict[str, pa.Array]:
        ids: list[batches.RecordId] = [""] * self._batch.num_rows
        for row, fields in self._whole():
            try:
                found = render(source, fields) if is_template(source) else fields.get(source)
            except ValueError as error:
                self.trouble(row, ID, str(error))
                continue
            if type(found) is str or (type(found) is int and found in _INT64):
                ids[row] = found
                self._changes[ID, f"made from {source}"].append(row)
            else:
                self.trouble(row, ID, f"{source!r} isn't a text or an integer of 64 bits in this record")
        texts, kinds = batches.id_columns(ids)
        return {ID: texts, ID_TYPE: kinds}

    def _document_from(self, source: str, documents: list[str | None]) -> list[str | None]:
        made: list[str | None] = [None] * len(documents)
        for row, fields in self._whole():
            try:
                found = render(source, fields) if is_template(source) else fields.pop(source, None)
            except ValueError as error:
                self.trouble(row, DOCUMENT, str(error))
                continue
            if found is not None and not isinstance(found, str):
                self.trouble(row, DOCUMENT, f"{source!r} isn't a text in this record")
                continue
            made[row] = found
            if documents[row] is not None and documents[row] != found:
                self._changes[DOCUMENT, f"replaced by {source}"].append(row)
        return made

    def finish(self, batch: pa.RecordBatch) -> Mapped:
        """Return the mapped batch without the records that were refused."""
        rows = np.arange(batch.num_rows)
        if self._refused:
            rows = np.delete(rows, list(self._refused))
            batch = batch.take(pa.array(rows))
        changes = {what: len(set(changed) - self._refused.keys()) for what, changed in self._changes.items()}
        return Mapped(batch=batch, rows=rows, refused=self._refused, changes=+Counter(changes))


def _hooked(hook: Step, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return what a function of batches makes of one; it may change values, and neither columns nor records.

    Raises
    ------
    SchemaMappingError
        The function fails, or gives back something else.
    """
    assert hook.function is not None
    try:
        found = hook.function(batch)
    except Exception as error:
        raise SchemaMappingError(f"{hook.argument} failed: {type(error).__name__}: {error}") from error
    same = isinstance(found, pa.RecordBatch) and found.schema.equals(batch.schema)
    if not same or found.num_rows != batch.num_rows:
        raise SchemaMappingError(
            f"{hook.argument} must return a batch of the {batch.num_rows} records and the columns that it "
            f"got ({', '.join(batch.schema.names)})",
            hook=hook.argument,
        )
    return found


def _in_order(columns: Mapping[str, pa.Array], vectors: Mapping[str, pa.Array]) -> pa.RecordBatch:
    """Return a batch of these columns, the vectors after the ids as everywhere."""
    ids = {name: columns[name] for name in (ID, ID_TYPE)}
    return pa.RecordBatch.from_pydict({**ids, **vectors, **columns})


def _as_text(step: Step) -> str:
    return step.name if step.argument is None else f"{step.name} {step.argument!r}"
