"""The one table type: built once, shown by the terminal, as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import rich.table
from markupsafe import Markup, escape
from rich import box
from rich.text import Text

WHOLE_CELLS = 24
"""A cell of at most this many characters is never broken: half of a number would be another number."""
NAME_CELLS = 16
"""Least width of a column of long names, which a narrow terminal folds."""

_LONG_WORD = re.compile(r"(\S{8,}?_)")

Cell = str | Text


class Table:
    """A table of text.

    Args:
        header: Headings; a newline in one breaks the line. None: no headings and no rules.
        rows: Cells of each row; a row may be shorter than the header. A `Text` keeps its style in the terminal.
        notes: What a reader must know, shown below the table in Markdown; a terminal prints them itself.
        left: Columns that are flush left; the others are flush right.
    """

    def __init__(
        self,
        title: str,
        header: Sequence[str] | None,
        rows: Iterable[Sequence[Cell]] = (),
        notes: Sequence[str] = (),
        left: Collection[int] = (0,),
    ) -> None:
        self.title, self.header, self.notes, self.left = title, header, notes, left
        self.rows = list(rows)
        self._rules: set[int] = set()

    def add(self, *cells: Cell) -> None:
        self.rows.append(cells)

    def add_rule(self) -> None:
        """Separates the rows added so far from those to come; Markdown has no such rule."""
        self._rules.add(len(self.rows))

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table(
            title=Text(self.title, "bold") if self.title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD if self.header is not None else None,
            show_header=self.header is not None,
            pad_edge=False,
        )
        for index in range(self._width()):
            heading = self.header[index] if self.header is not None else ""
            heading = _LONG_WORD.sub(r"\1\n", heading) if index else heading
            table.add_column(
                Text(heading),
                justify="left" if index in self.left else "right",
                overflow="fold",
                min_width=self._least_width(index, heading),
            )
        for number, row in enumerate(self.rows):
            if number in self._rules:
                table.add_section()
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        return table

    def markdown(self, level: int = 2) -> str:
        """The table as Markdown, below a heading of that level and above its notes."""
        header = self.header if self.header is not None else [""] * self._width()
        marks = ["---" if index in self.left else "---:" for index in range(len(header))]
        lines = [header, marks, *self._whole_rows()]
        table = "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in lines)
        title = [f"{'#' * level} {markdown_text(self.title)}"] if self.title else []
        return "\n\n".join([*title, table, *self.notes]) + "\n"

    def __html__(self) -> Markup:
        """The table as HTML, without its title and notes: `{{ table }}` in a template."""
        head = [_html_row("th", self.header)] if self.header is not None else []
        body = Markup("\n").join(_html_row("td", row) for row in self._whole_rows())
        return Markup("<table>\n{}<tbody>\n{}\n</tbody>\n</table>").format(
            Markup("<thead>{}</thead>\n").format(head[0]) if head else "", body
        )

    def _width(self) -> int:
        return len(self.header) if self.header is not None else max(map(len, self.rows), default=0)

    def _whole_rows(self) -> list[list[Cell]]:
        return [[*row, *[""] * (self._width() - len(row))] for row in self.rows]

    def _least_width(self, index: int, heading: str) -> int:
        cells = [str(row[index]) for row in self.rows if index < len(row)]
        if index == 0:
            return min(max(map(len, cells), default=0), NAME_CELLS)
        words = heading.split()
        for cell in cells:
            words += [cell] if len(cell) <= WHOLE_CELLS else cell.split()
        return max(map(len, words), default=0)


def markdown_page(tables: Iterable[Table]) -> str:
    return "\n".join(table.markdown() for table in tables)


def markdown_text(value: object) -> str:
    """Text in one line that Markdown shows as it is, also in the cell of a table."""
    return re.sub(r"([\\|`\[\]])", r"\\\1", _one_line(str(value))).replace("<", "&lt;")


def _one_line(cell: Cell) -> str:
    return str(cell).replace("\n", " ")


def _html_row(tag: str, cells: Sequence[Cell]) -> Markup:
    cell = Markup(f"<{tag}>{{}}</{tag}>")
    return Markup("<tr>{}</tr>").format(Markup("").join(cell.format(escape(_one_line(one))) for one in cells))
