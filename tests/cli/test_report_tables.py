"""Tables in the terminal: whatever the columns are called, cells stay on one line."""

import io

from rich.console import Console

from batchnorm.cli.tables import shown
from batchnorm.report import Table


def test_headings_wrap_cells_do_not_and_columns_can_be_left_out():
    columns = ("a", "root mean square of the singular values", "effective directions of a hundred", "left")
    rows = [("with BN", "0.064 – 0.79 – 1.93", "1.0e-01 → 6.1e-03", 7), ("no", 1, 2, 3)]
    console = Console(width=62, record=True, file=io.StringIO())
    console.print(shown(Table("", columns, rows, "of all layers"), "title", left_out=("left",)))
    lines = [line.replace("│", " ").split("  ") for line in console.export_text().splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert ["with BN", "0.064 – 0.79 – 1.93", "1.0e-01 → 6.1e-03"] in cells
    assert ["no", "1", "2"] in cells
    assert ["title"] in cells
    assert ["of all layers"] in cells


def test_a_table_without_rows_still_has_its_headings():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(shown(Table("", ("one two", "three"), []), "title"))
    assert "three" in console.export_text()
