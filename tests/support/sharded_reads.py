"""Which reads a sharded engine runs: a statement is taken apart into its queries, and each is held to the rules.

Every part of a query that reads a spread table must be tied to every other one by the column that the tables are
spread by, so that each shard answers for itself. Parts of a UNION ALL and common table expressions answer for
themselves. No query stands in a SELECT list, and none that is asked for each row counts or sums without a GROUP BY.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_QUERY = re.compile(r"\s*(WITH|SELECT)\b")
_ITEM = re.compile(
    r"\s*(\w+|§\d+§)(?:\s*\(.*?\))?(?:\s+(?:AS\s+)?(?!(?:ON|LEFT|RIGHT|FULL|INNER|CROSS)\b)(\w+))?", re.IGNORECASE
)
_FROM = re.compile(r"\bFROM\b(.*?)(?=\bWHERE\b|\bGROUP BY\b|\bORDER BY\b|\bHAVING\b|\bLIMIT\b|\bOFFSET\b|$)")
_TIE = re.compile(r"(\w+)\.(\w+) = (\w+)\.(\w+)")
_COMMON = re.compile(r"(\w+) AS (?:(?:NOT )?MATERIALIZED )?§(\d+)§")
_SUMS = re.compile(r"^SELECT (?:coalesce\()?(count|min|max|sum)\(", re.IGNORECASE)


Key = tuple[int, str]
"""A query's number, and a name in it."""

Tie = tuple[Key, Key]


class Part(NamedTuple):
    """A table, or a query in its place, that is read: spread by a column, tied to others under its name."""

    name: str
    column: str
    key: Key


def broken_by_read(statement: str, spread_by: Mapping[str, str]) -> str | None:
    """Say which rule a SELECT breaks."""
    return _Statement(statement, spread_by).broken()


class _Statement:
    def __init__(self, statement: str, spread_by: Mapping[str, str]) -> None:
        self._spread_by = spread_by
        self._queries: list[str] = []
        self._common: dict[str, int] = {}
        self._whole = self._take_apart(statement)

    def _take_apart(self, text: str) -> int:
        """Put every query in brackets aside, for a mark; return the number of this one."""
        kept, depth, began = [], 0, 0
        stack: list[tuple[bool, int]] = []
        for place, letter in enumerate(text):
            if letter == "(":
                is_query = depth == 0 and bool(_QUERY.match(text, place + 1))
                stack.append((is_query, place))
                if is_query:
                    kept.append(text[began:place])
                depth += is_query or depth > 0
            elif letter == ")":
                is_query, opened = stack.pop()
                depth -= depth > 0
                if is_query:
                    kept.append(f"§{self._take_apart(text[opened + 1 : place])}§")
                    began = place + 1
        kept.append(text[began:])
        self._queries.append(" ".join("".join(kept).split()))
        return len(self._queries) - 1

    def broken(self) -> str | None:
        for query in self._queries:
            self._common |= {name: int(number) for name, number in _COMMON.findall(query)}
        roots = [self._whole, *self._common.values()]
        for number in [*roots, *(one for one in range(len(self._queries)) if self._is_union(one))]:
            for arm in self._arms(number):
                if why := self._broken_arm(number, arm):
                    return why
        return None

    def _is_union(self, number: int) -> bool:
        return " UNION ALL " in self._queries[number]

    def _arms(self, number: int) -> list[str]:
        return re.split(r" UNION ALL ", self._bare(number))

    def _bare(self, number: int) -> str:
        """A query without its common table expressions."""
        return re.sub(r"^WITH .*?(?=\bSELECT\b)", "", self._queries[number])

    def _reads(self, number: int) -> bool:
        """Whether a query reads any spread table."""
        text = self._bare(number)
        return bool(self._parts(number, text)) or any(map(self._reads, self._inside(text)))

    def _tree(self, number: int, text: str) -> Iterator[Key]:
        """A query and those inside of it, but for unions, whose parts are held to the rules by themselves."""
        yield number, text
        for inner in self._inside(text):
            if not self._is_union(inner):
                yield from self._tree(inner, self._bare(inner))

    def _inside(self, text: str) -> list[int]:
        return [int(number) for number in re.findall(r"§(\d+)§", text)]

    def _parts(self, number: int, text: str) -> list[Part]:
        """What a query's own FROM reads that is spread. A query in its place: by the column that it hands on."""
        found = []
        for clause in _FROM.findall(text):
            for item in re.split(r",|\bJOIN\b", clause):
                match = _ITEM.match(item)
                if match is None:
                    continue
                name, alias = match[1], match[2] or match[1]
                inner = int(name.strip("§")) if name.startswith("§") else self._common.get(name)
                if name in self._spread_by:
                    found.append(Part(alias, self._spread_by[name], (number, alias)))
                elif inner is not None and self._reads(inner):
                    found.append(Part(alias, self._handed_on(inner), (number, alias)))
        return found

    def _handed_on(self, number: int) -> str:
        """The column that an inner query's rows stay spread by; empty where it hands none on."""
        parts = self._parts(number, self._bare(number))
        chosen = self._bare(number).partition(" FROM ")[0]
        columns = {part.column for part in parts}
        return next((one for one in columns if re.search(rf"\*|\b{one}\b(?! AS)|\b{one} AS {one}\b", chosen)), "")

    def _broken_arm(self, number: int, text: str) -> str | None:
        parts, groups = [], _Groups()
        for one, query in self._tree(number, text):
            own = self._parts(one, query)
            parts += own
            chosen = re.split(r" (?:FROM|WHERE) ", query)[0]
            if any(map(self._reads, self._inside(chosen))):
                return "no query stands in a SELECT list"
            if one != number and own and _SUMS.match(query) and "GROUP BY" not in query and not self._is_source(one):
                return "a query that is asked for each row neither counts nor sums without a GROUP BY"
            for left, right in self._handing_on(own, query):
                groups.join(left, right)
        for left, right in self._ties(number, text, parts):
            groups.join(left, right)
        tied = {groups.find(part.key) for part in parts}
        return "tables are joined by the column that they are spread by" if len(tied) > 1 else None

    def _is_source(self, number: int) -> bool:
        """Whether a query stands in a FROM, and is asked once."""
        return any(re.search(rf"\b(FROM|JOIN|,|AS) §{number}§", query) for query in self._queries)

    def _handing_on(self, own: list[Part], query: str) -> Iterator[Tie]:
        """A query in a FROM is as good as the table that it reads, where it hands on the column."""
        for part in own:
            match = re.search(rf"§(\d+)§ (?:AS )?{part.name}\b", query)
            # Alone it may hand on nothing: then it is answered first, and read like a table of one machine's.
            if match and (part.column or len(own) == 1):
                for inner in self._parts(int(match[1]), self._bare(int(match[1]))):
                    yield part.key, inner.key

    def _ties(
        self, number: int, text: str, parts: list[Part], outer: tuple[int, ...] = ()
    ) -> Iterator[tuple[Key, Key]]:
        """What is said to be equal, of columns that tables are spread by; names are looked for from the inside out."""
        columns, scopes = {part.key: part.column for part in parts}, (number, *outer)
        for names in _TIE.findall(text):
            keys = [next(((one, name) for one in scopes if (one, name) in columns), None) for name in names[::2]]
            left, right = keys
            if left and right and columns[left] == names[1] == names[3] == columns[right]:
                yield left, right
        for inner in self._inside(text):
            yield from self._ties(inner, self._bare(inner), parts, scopes)


class _Groups:
    """Which parts are tied to each other."""

    def __init__(self) -> None:
        self._above: dict[Key, Key] = {}

    def find(self, key: Key) -> Key:
        while key in self._above:
            key = self._above[key]
        return key

    def join(self, one: Key, other: Key) -> None:
        first, second = self.find(one), self.find(other)
        if first != second:
            self._above[first] = second
