"""A report's table in the terminal."""

from collections.abc import Collection

from rich.table import Column
from rich.table import Table as Shown

from batchnorm.report import Table


def shown(table: Table, title: str, *, left_out: Collection[str] = ()) -> Shown:
    """``table`` for rich's console, without the columns ``left_out``; headings wrap and cells do not."""
    places = [place for place, name in enumerate(table.columns) if name not in left_out]
    rows = [[str(row[place]) for place in places] for row in table.rows]
    names = [table.columns[place] for place in places]
    widths = (max(map(len, (*name.split(), *cells))) for name, *cells in zip(names, *rows, strict=True))
    columns = (Column(name, width=width) for name, width in zip(names, widths, strict=True))
    result = Shown(*columns, title=title, caption=table.caption)
    for row in rows:
        result.add_row(*row)
    return result
