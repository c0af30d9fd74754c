"""`dcbench report --discrepancies`: published numbers of one model, data set and metric that differ.

Beside them stand their protocols, and what these say differently if dcbench has protocols of their names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcbench.catalogue import ModelCard, Published, cards, find_model
from dcbench.errors import UserError
from dcbench.escape import markdown
from dcbench.files import write_text
from dcbench.protocol import protocols
from dcbench.reports.notations import csv_text, markdown_table
from dcbench.reports.tables import heading, show_value

COLUMNS = ("model", "dataset", "metric", "value", "protocol", "status", "source")
NOT_A_CHOICE = {"name", "version"}  # fields of a protocol that change no clip


@dataclass(frozen=True)
class Discrepancy:
    """Published numbers of one model, data set and metric, at least two of them different. Sorted by value."""

    model: ModelCard
    dataset: str
    metric: str
    entries: tuple[Published, ...]

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Field -> protocol -> value, for the protocols that dcbench has and the fields in which they differ."""
        known, tags = protocols(), {entry.protocol for entry in self.entries}
        resolved = {name: known[name].resolved(self.dataset).identity() for name in sorted(tags & set(known))}
        fields = dict.fromkeys(field for values in resolved.values() for field in values if field not in NOT_A_CHOICE)
        table = {field: {name: values.get(field) for name, values in resolved.items()} for field in fields}
        return {field: values for field, values in table.items() if len({repr(v) for v in values.values()}) > 1}


def find_discrepancies(models: Sequence[str] = ()) -> list[Discrepancy]:
    """Of these models (names or aliases; none: all). UserError for an unknown one, with a near match."""
    chosen = [find_model(name) for name in models] or list(cards("models").values())
    found = []
    for card in chosen:
        groups: dict[tuple[str, str], list[Published]] = {}
        for entry in card.published if isinstance(card, ModelCard) else ():
            groups.setdefault((entry.dataset, entry.metric), []).append(entry)
        for (dataset, metric), entries in sorted(groups.items()):
            if isinstance(card, ModelCard) and len({entry.value for entry in entries}) > 1:
                ordered = sorted(entries, key=lambda entry: (entry.value, entry.protocol))
                found.append(Discrepancy(card, dataset, metric, tuple(ordered)))
    return found


def to_markdown(found: Sequence[Discrepancy]) -> str:
    """A table for each, and a table of what the protocols that dcbench has say differently."""
    return "\n".join(_section(one) for one in found)


def _section(one: Discrepancy) -> str:
    low, high = one.entries[0].value, one.entries[-1].value
    ratio = f", {high / low:.2f} times" if low > 0 else ""
    metric = markdown(heading(one.metric))
    parts = [
        f"{markdown(one.model.title)} on {markdown(one.dataset)}, {metric}: "
        f"{show_value(low)} to {show_value(high)}{ratio}\n",
        markdown_table(
            ("value", "protocol", "status", "source"),
            [[show_value(e.value), *map(markdown, (e.protocol, e.status, e.source))] for e in one.entries],
        ),
    ]
    if one.choices:
        names = list(next(iter(one.choices.values())))
        rows = [[field, *(_show(values[name]) for name in names)] for field, values in one.choices.items()]
        parts += [
            "\nWhat the protocols of these names in dcbench say differently:\n",
            markdown_table(("field", *map(markdown, names)), [list(map(markdown, row)) for row in rows]),
        ]
    return "\n".join(parts) + "\n"


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {part}" for key, part in value.items()) or "none"
    return "none" if value is None else str(value)


def to_csv(found: Sequence[Discrepancy]) -> str:
    """Every number in full, one in each line."""
    lines = [
        [one.model.name, one.dataset, one.metric, entry.value, entry.protocol, entry.status, entry.source]
        for one in found
        for entry in one.entries
    ]
    return csv_text(COLUMNS, lines)


def write_discrepancies(models: Sequence[str], to: Path | None = None) -> str:
    """The Markdown; it is also written to a folder, as discrepancies.md and .csv, if one is given."""
    found = find_discrepancies(models)
    if not found:
        of = ", ".join(models) or "any model"
        raise UserError(f"no two published numbers of {of} are of one data set and metric and differ")
    text = to_markdown(found)
    if to is not None:
        write_text(to / "discrepancies.md", text)
        write_text(to / "discrepancies.csv", to_csv(found))
    return text
