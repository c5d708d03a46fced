"""Edits other programs' settings as text: one value is put or removed, and no other byte changes.

Law: after an edit the text parses to what it parsed to before, but for that one value. Where that cannot be had,
EditError, and nothing was changed. JSON may have comments and trailing commas. TOML is edited by lines: a key is
found in its `[table]`, or the table is appended; anything cleverer is refused.
"""

import json
import re
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol

Path = tuple[str, ...]
"""Where a value stands: `("env", "OTEL_METRICS_EXPORTER")`."""
MISSING: Any = type("Missing", (), {"__repr__": lambda _: "missing"})()


class EditError(Exception):
    """The text cannot be read, or not be edited safely; says why."""


class Language(Protocol):
    """How a settings file is written. `put` and `remove` may go wrong; `edit` finds out."""

    def parse(self, text: str) -> dict[str, Any]: ...
    def write(self, value: Any) -> str: ...
    def raw(self, text: str, path: Path) -> str: ...
    def put(self, text: str, path: Path, raw: str) -> str: ...
    def remove(self, text: str, path: Path) -> str: ...


def get(parsed: Any, path: Path) -> Any:
    """The value at `path`, or MISSING."""
    for key in path:
        if not isinstance(parsed, dict) or key not in parsed:
            return MISSING
        parsed = parsed[key]
    return parsed


def put(language: Language, text: str, path: Path, value: Any, raw: str = "") -> str:
    """The text with `value` at `path`, written as `raw` if that is given."""
    return _checked(language, text, path, value, lambda: language.put(text, path, raw or language.write(value)))


def remove(language: Language, text: str, path: Path) -> str:
    """The text without the value at `path`."""
    return _checked(language, text, path, MISSING, lambda: language.remove(text, path))


def _checked(language: Language, text: str, path: Path, value: Any, work: Callable[[], str]) -> str:
    try:
        before, result = language.parse(text), work()
        after = language.parse(result)
        is_right = get(after, path) == value and _without(after, path) == _without(before, path)
    except RecursionError:
        raise EditError("it is nested too deeply") from None
    except (IndexError, ValueError):
        is_right = False
    if not is_right:
        raise EditError(f"{'.'.join(path)} stands there in a way that cannot be changed safely")
    return result


def _without(parsed: dict[str, Any], path: Path) -> dict[str, Any]:
    """Delete the value at `path`, and the tables that are then empty, in place."""
    *tables, key = path
    chain: list[dict[str, Any]] = [parsed]
    for table in tables:
        inner = chain[-1].get(table)
        if not isinstance(inner, dict):
            return parsed
        chain.append(inner)
    chain[-1].pop(key, None)
    for table, outer, inner in reversed([*zip(tables, chain, chain[1:], strict=False)]):
        if not inner:
            del outer[table]
    return parsed


# --- JSON ------------------------------------------------------------------------------------------------------

_SPACE = " \t\r\n"
_STRING = r'"(?:[^"\\]|\\.)*"'
_COMMENT = re.compile(rf"{_STRING}|//[^\r\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=[ \t\r\n]*[}}\]])", re.DOTALL)
_COMMENTS_OF_LINE = re.compile(r"(?:[ \t]*(?://[^\r\n]*|/\*[^\r\n]*?\*/))*")
_DECODER = json.JSONDecoder()


class _Member(NamedTuple):
    key: str
    at: int
    value: int
    end: int


class _Object(NamedTuple):
    """An object in a text: where its braces stand, and its members in order."""

    open: int
    close: int
    members: list[_Member]

    def last(self, key: str) -> int:
        """The index of the member of this key; of several the last one, which counts. -1: there is none."""
        return max((number for number, member in enumerate(self.members) if member.key == key), default=-1)


def _without_comments(text: str) -> str:
    """The text with spaces for comments and byte order mark, so that places stay what they are."""
    blank = _COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else re.sub(r"[^\r\n]", " ", m[0]), text)
    return " " + blank[1:] if blank.startswith("\ufeff") else blank


def _plain(text: str) -> str:
    """The text as plain JSON of the same length: trailing commas are blank as well."""
    blank = _without_comments(text)

    def without_comma(match: re.Match[str]) -> str:
        is_trailing = match[0] == "," and blank[: match.start()].rstrip(_SPACE)[-1:] not in ("", "{", "[", ",", ":")
        return " " if is_trailing else match[0]

    return _TRAILING_COMMA.sub(without_comma, blank)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _skip(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at


def _object(plain: str, at: int) -> _Object:
    """The object whose brace stands at `at`."""
    members: list[_Member] = []
    here = _skip(plain, at + 1)
    while plain[here] != "}":
        key, end = _DECODER.raw_decode(plain, here)
        value = _skip(plain, _skip(plain, end) + 1)
        _, end = _DECODER.raw_decode(plain, value)
        members.append(_Member(key, here, value, end))
        here = _skip(plain, end)
        if plain[here] == ",":
            here = _skip(plain, here + 1)
    return _Object(at, here, members)


def _indentation(text: str, at: int) -> str:
    """The white space that the line of `at` begins with."""
    start = text.rfind("\n", 0, at) + 1
    return text[start : start + len(text[start:at]) - len(text[start:at].lstrip(" \t"))]


class _Json:
    def parse(self, text: str) -> dict[str, Any]:
        plain = _plain(text)
        if not plain.strip(_SPACE):
            return {}
        try:
            value = json.loads(plain, parse_constant=_refuse)
        except RecursionError:
            raise EditError("it is nested too deeply") from None
        except ValueError as error:
            raise EditError(f"it is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise EditError("it is not a JSON object in { }")
        return value

    def write(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def _find(self, text: str, path: Path) -> tuple[_Object, int]:
        """The innermost object on the way to `path` that exists, and how many keys of the path lead to it."""
        plain = _plain(text)
        here = _object(plain, _skip(plain, 0))
        for depth, key in enumerate(path[:-1]):
            number = here.last(key)
            if number < 0:
                return here, depth
            if plain[here.members[number].value] != "{":
                raise EditError(f"{'.'.join(path[: depth + 1])} is not an object")
            here = _object(plain, here.members[number].value)
        return here, len(path) - 1

    def raw(self, text: str, path: Path) -> str:
        parent, _ = self._find(text, path)
        member = parent.members[parent.last(path[-1])]
        return text[member.value : member.end]

    def put(self, text: str, path: Path, raw: str) -> str:
        line_end = "\r\n" if "\r\n" in text else "\n"
        if not _plain(text).strip(_SPACE):
            kept = text.rstrip(_SPACE)
            text = f"{kept}{line_end if kept.strip(chr(0xFEFF)) else ''}{{}}{line_end}"
        parent, depth = self._find(text, path)
        key = path[depth]
        number = parent.last(key)
        if depth == len(path) - 1 and number >= 0:
            member = parent.members[number]
            return f"{text[: member.value]}{raw}{text[member.end :]}"
        is_leaf = depth == len(path) - 1
        text = self._insert(text, parent, f"{self.write(key)}: {raw if is_leaf else '{}'}", line_end)
        return text if is_leaf else self.put(text, path, raw)

    def _insert(self, text: str, parent: _Object, member: str, line_end: str) -> str:
        if not parent.members:
            return self._fill(text, parent, member, line_end)
        last = parent.members[-1]
        comma = _without_comments(text).find(",", last.end, parent.close)
        place = _COMMENTS_OF_LINE.match(text, comma + 1 if comma >= 0 else last.end)
        at = place.end() if place else last.end
        has_lines = "\n" in text[last.end : parent.close]
        gap = f"{line_end}{_indentation(text, last.at)}" if has_lines else " "
        return f"{text[: last.end]}{'' if comma >= 0 else ','}{text[last.end : at]}{gap}{member}{text[at:]}"

    def _fill(self, text: str, parent: _Object, member: str, line_end: str) -> str:
        plain = _plain(text)
        root = _object(plain, _skip(plain, 0))
        kept = text[parent.open + 1 : parent.close].rstrip(_SPACE)
        if not kept and root.members and "\n" not in text[root.open : root.close]:
            return f"{text[: parent.open + 1]}{member}{text[parent.close :]}"
        outer = _indentation(text, parent.open)
        unit = (_indentation(text, root.members[0].at) if root.members else "") or "  "
        return f"{text[: parent.open + 1]}{kept}{line_end}{outer}{unit}{member}{line_end}{outer}{text[parent.close :]}"

    def remove(self, text: str, path: Path) -> str:
        parent, _ = self._find(text, path)
        number = parent.last(path[-1])
        member = parent.members[number]
        commas = _without_comments(text)
        after = commas.find(",", member.end, parent.close)
        if number < len(parent.members) - 1:
            return text[: member.at] + text[after + 1 :].lstrip(_SPACE)
        kept = text[: member.at].rstrip(_SPACE)
        if len(parent.members) == 1:
            rest = text[(after if after >= 0 else member.end - 1) + 1 :]
            is_empty = kept.endswith("{") and rest.lstrip(_SPACE).startswith("}")
            return kept + (rest.lstrip(_SPACE) if is_empty else rest)
        if after >= 0:  # there was a trailing comma, and there is again
            return kept + text[after + 1 :]
        before = commas.find(",", parent.members[number - 1].end, member.at)
        return text[:before] + kept[before + 1 :] + text[member.end :]


# --- TOML ------------------------------------------------------------------------------------------------------


class _Toml:
    def parse(self, text: str) -> dict[str, Any]:
        try:
            return tomllib.loads(text)
        except RecursionError:
            raise EditError("it is nested too deeply") from None
        except ValueError as error:
            raise EditError(f"it is not valid TOML: {error}") from None

    def write(self, value: Any) -> str:
        if not isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False)  # JSON's strings, numbers and booleans are TOML as well
        return "{ " + ", ".join(f"{key} = {self.write(inner)}" for key, inner in value.items()) + " }"

    def _header(self, text: str, table: str) -> re.Match[str] | None:
        """The line of a `[table]`, its line end not included."""
        return re.search(rf"^[ \t]*\[[ \t]*{re.escape(table)}[ \t]*\][ \t]*(?:#[^\r\n]*)?(?=\r?$)", text, re.MULTILINE)

    def _line(self, text: str, path: Path) -> re.Match[str] | None:
        """The line `key = value`, its line end not included; the value is group 1."""
        table, key = path
        header = self._header(text, table)
        if header is None:
            return None
        following = re.compile(r"^[ \t]*\[", re.MULTILINE).search(text, header.end())
        line = re.compile(rf"^[ \t]*{re.escape(key)}[ \t]*=[ \t]*([^\r\n]*)", re.MULTILINE)
        return line.search(text, header.end(), following.start() if following else len(text))

    def raw(self, text: str, path: Path) -> str:
        line = self._line(text, path)
        if line is None:
            raise EditError(f"{'.'.join(path)} stands there in a way that cannot be changed safely")
        return line[1]

    def put(self, text: str, path: Path, raw: str) -> str:
        table, key = path
        line_end = "\r\n" if "\r\n" in text else "\n"
        if (line := self._line(text, path)) is not None:
            return text[: line.start(1)] + raw + text[line.end() :]
        if (header := self._header(text, table)) is not None:
            return f"{text[: header.end()]}{line_end}{key} = {raw}{text[header.end() :]}"
        gap = "" if not text else line_end if text.endswith("\n") else line_end * 2
        return f"{text}{gap}[{table}]{line_end}{key} = {raw}{line_end}"

    def remove(self, text: str, path: Path) -> str:
        line = self._line(text, path) if len(path) == 2 else self._header(text, path[0])
        if line is None:
            raise EditError(f"{'.'.join(path)} stands there in a way that cannot be changed safely")
        end = text.find("\n", line.end())
        kept = text[: line.start()]
        if len(path) == 1 and kept.endswith(("\n\n", "\n\r\n")):
            kept = kept.removesuffix("\n").removesuffix("\r")  # the blank line that went before the table
        return kept + (text[end + 1 :] if end >= 0 else "")


JSON: Language = _Json()
TOML: Language = _Toml()
