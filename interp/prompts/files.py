"""Prompts files: JSONL with one prompt or pair per line, read with every mistake located."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from interp.errors import InputError
from interp.prompts.encoding import Encoded, Tokenizing, answer_tokens, encode

KEYS = ("text", "ids", "positions", "spans", "answer", "distractor", "options", "target", "context", "tags", "task", "seed", "drawn")
"""What a line of a prompts file may hold; only ``text`` is required."""

COLUMNS = {"answer": "answers", "distractor": "distractors", "options": "options", "target": "targets", "context": "contexts"}
"""Keys of a line and the fields of ``Prompts`` they fill, which all lines have or none."""

T = TypeVar("T")


def write(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line."""
    path = Path(path)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


def numbered_lines(path: str | Path) -> list[tuple[int, Any]]:
    """The numbered lines of a file, as JSON values, or as strings from a .txt file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not there'}, expected a file of prompts")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 text (byte {error.start})") from error
    # Only line feeds end a line: JSON strings may hold other separators, such as U+2028.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise InputError(f"{path.name} is empty, expected one prompt per line")
    if path.suffix == ".txt":
        return lines
    rows = []
    for number, line in lines:
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} of {path.name} is not JSON ({error.msg} at column {error.colno}): {line[:60]!r}") from error
    return rows


def columns(model: Tokenizing, lines: Sequence[tuple[int, Any]], source: str) -> dict[str, Any]:
    """The fields of ``Prompts`` from numbered JSON values.

    Raises:
        InputError: a line cannot be used; it is named with its number and the source.
    """
    rows = [_checked(value, number, source) for number, value in lines]

    def located(number: int, make: Callable[[], T]) -> T:
        """Whatever is wrong with the first prompt handed over is said of its line."""
        try:
            return make()
        except InputError as error:
            what = str(error).replace(" of prompt 0", "").replace("prompt 0", "the prompt")
            raise InputError(f"line {number} of {source}: {what}") from error

    encoded = [located(n, lambda row=row: encode(model, [row["text"]])[0]) for (n, _), row in zip(lines, rows, strict=True)]
    numbered = [(n, e, row) for (n, _), e, row in zip(lines, encoded, rows, strict=True)]
    found: dict[str, Any] = {}
    for key, name in COLUMNS.items():
        given = [row.get(key) is not None for row in rows]
        if any(given) and not all(given):
            raise InputError(f"line {lines[given.index(False)][0]} of {source} has no {key}, but other lines have")
        if all(given):
            found[name] = tuple(located(n, lambda e=e, row=row, key=key: _read(model, e, row, key)) for n, e, row in numbered)
    places = [located(n, lambda e=e, row=row: _places(e, row)) for n, e, row in numbered]
    tags = [row.get("tags", {}) for row in rows]
    for what, per_row in (("positions", places), ("tags", tags)):
        for (number, _), names in zip(lines, per_row, strict=True):
            if set(names) != set(per_row[0]):
                other = ", ".join(sorted(set(names) ^ set(per_row[0])))
                raise InputError(f"line {number} of {source} does not have the same {what} as the others: {other}")
    return found | {
        "texts": tuple(row["text"] for row in rows),
        "ids": tuple(e.ids for e in encoded),
        "positions": {name: tuple(p[name] for p in places) for name in places[0]},
        "tags": {name: tuple(t[name] for t in tags) for name in tags[0]},
        "task": rows[0].get("task", ""),
        # Without a digest nobody knows whether these lines are still what the task made.
        "seed": rows[0].get("seed") if rows[0].get("drawn") else None,
        "drawn": rows[0].get("drawn", ""),
    }


def _checked(value: Any, number: int, source: str) -> dict[str, Any]:
    """A line as a dictionary with known keys of the right kinds."""
    where = f"line {number} of {source}"
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise InputError(f"{where} is a JSON {type(value).__name__}, expected an object with a text, or a string")
    if set(value) == {"clean", "corrupt"}:
        raise InputError(f"{where} is a clean/corrupt pair; read the file with PromptPairs.read")
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise InputError(f"{where} has the unknown key {unknown[0]!r}; known: {', '.join(KEYS)} (columns of your own go into tags)")
    if not isinstance(value.get("text"), str):
        raise InputError(f"{where} has no text")
    kinds: dict[str, type | tuple[type, ...]] = {
        "target": str, "context": str, "task": str, "tags": dict, "positions": dict, "spans": dict, "ids": list,
        "answer": (str, int), "distractor": (str, int), "options": list, "seed": int, "drawn": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        found = value.get(key)
        if found is not None and (not isinstance(found, kind) or isinstance(found, bool)):
            raise InputError(f"{where}: {key} is {json.dumps(found)[:40]}, which is not what belongs there")
    tags = value.get("tags") or {}
    if any(not isinstance(v, str) for v in tags.values()):
        raise InputError(f"{where}: the values of tags must be strings")
    return {key: found for key, found in value.items() if found is not None or key == "seed"}


def _read(model: Tokenizing, prompt: Encoded, row: Mapping[str, Any], key: str) -> Any:
    """One entry of a column."""
    value = row[key]
    if key in ("target", "context"):
        return value
    wanted = value if isinstance(value, list) else [value]
    if any(isinstance(v, int) for v in wanted) and "ids" not in row:
        raise InputError(f"the {key} {value} is a token id; write it as text")
    if any(not isinstance(v, str | int) or isinstance(v, bool) for v in wanted):
        raise InputError(f"the {key} {value!r} is neither a text nor a token id")
    words = [v for v in wanted if isinstance(v, str)]
    of_word = dict(zip(words, answer_tokens(model, [prompt] * len(words), words, key.removesuffix("s")), strict=True))
    ids = tuple(of_word[v] if isinstance(v, str) else v for v in wanted)
    return ids if key == "options" else ids[0]


def _places(prompt: Encoded, row: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Named positions from token indices and from spans of characters."""
    if "ids" in row and tuple(row["ids"]) != prompt.ids:
        raise InputError("its token ids are not those of this model's tokenizer; leave out ids and positions, or use its own model")
    if "positions" in row and "ids" not in row:
        raise InputError("positions are token indices and need the ids they belong to; name characters with spans instead")
    places: dict[str, tuple[int, ...]] = {}
    for name, value in row.get("positions", {}).items():
        wanted = value if isinstance(value, list) else [value]
        if any(type(i) is not int for i in wanted):
            raise InputError(f"position {name} is {value!r}, expected token indices")
        places[name] = tuple(wanted)
    for name, value in row.get("spans", {}).items():
        ranges = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        for span in ranges:
            good = isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span)
            if not good or not 0 <= span[0] < span[1] <= len(prompt.text):
                raise InputError(f"span {name} is {span!r}, expected [start, end] within the {len(prompt.text)} characters of the text")
        places[name] = tuple(i for span in ranges for i in prompt.covering((span[0], span[1])))
    return places
