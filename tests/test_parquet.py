"""The footer of a parquet file, as pyarrow writes it and damaged."""

import pytest

from neon import NeonError
from neon.parquet import rows_of_groups


def written(path, groups: int, rows: int, columns: int = 1):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({f"c{i}": list(range(groups * rows)) for i in range(columns)})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def footed(path, footer: bytes):
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return path


@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 3, 1), (40, 2, 1), (3, 70, 20)])
def test_rows_of_groups(tmp_path, groups, rows, columns):
    """Lists of more than 14, and numbers of more than a byte."""
    assert rows_of_groups(written(tmp_path / "a.parquet", groups, rows, columns)) == [rows] * groups


# A row group with one column (field 1), whose metadata (3) has bytes (6, 7), and with one row (3).
GROUP = b"\x19\x1c\x3c\x66\x08\x16\x08\x00\x00\x26\x02\x00"


def test_what_a_footer_can_claim(tmp_path):
    path = tmp_path / "a.parquet"
    assert rows_of_groups(footed(path, b"\x49\x1c" + GROUP + b"\x00")) == [1]
    for change, said in {
        (b"\x26\x02", b"\x26\x80\x10"): "claims 1,024 rows in ",
        (b"\x26\x02", b"\x26\x01"): "a size is -1",
        (b"\x66\x08", b"\x66\x80\x80\x80\x80\x08"): "a column claims 1,073,741,824 bytes out of 4",
        (b"\x16\x08", b"\x16\x80\x10"): "a column claims 4 bytes out of 1,024",
        (b"\x16\x08", b"\x06\x0c\x08"): "field 6 is there twice",
        (b"\x16\x08", b"\x1b\x08"): "a value of kind 11",
        (b"\x16\x08", b"\x19" + 40 * b"\x19"): "too deep",
        (b"\x16\x08", b"\x19\xfc\xff\x7f"): "a list of 16383",
        (b"\x16\x08", b"\x18\x7f"): "127 bytes",
        (b"\x16\x08", b"\x16" + 10 * b"\xff"): "more than 64 bits",
        (b"\x16\x08", b""): "no parquet file (7)",
    }.items():
        footer = b"\x49\x1c" + GROUP + b"\x00"
        assert footer.count(change[0]) == 1
        with pytest.raises(NeonError) as error:
            rows_of_groups(footed(path, footer.replace(*change)))
        assert said in str(error.value)


@pytest.mark.parametrize("data", [b"", b"PAR1PAR1", b"PAR1" + bytes(4) + b"PARE", b"PAR1\xff\xff\xff\xffPAR1"])
def test_other_ends(tmp_path, data):
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(NeonError, match="no parquet file"):
        rows_of_groups(tmp_path / "a.parquet")
