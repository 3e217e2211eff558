"""The footer of a parquet file, read here: what it claims is checked before pyarrow sees the file.

pyarrow ends the whole process, not the call, where its Python side asks for the metadata of a damaged column. So we do
not ask it. The footer is a struct of Thrift's compact protocol: https://github.com/apache/parquet-format.
"""

from dataclasses import dataclass
from pathlib import Path

from neon import NeonError
from neon.archives import LARGE, RATIO
from neon.files import reading, regular

MAGIC = b"PAR1"  # at both ends of the file; of an encrypted footer it is another
TAIL = 8  # bytes: the length of the footer, and MAGIC
# Fields of the structs, by number: of the file, of a row group, of a column in it, and of that column's metadata.
ROW_GROUPS, COLUMNS, NUM_ROWS, METADATA, UNPACKED, PACKED = 4, 1, 3, 3, 6, 7
DEEP = 32  # structs and lists in each other


def rows_of_groups(path: str | Path) -> list[int]:
    """The rows of each row group. Raises NeonError if the footer is damaged, or if it claims more rows or bytes than
    there can be in the file."""
    path = regular(path)
    size = path.stat().st_size
    with reading(path, "no parquet file"):
        groups = _footer(path, size)[ROW_GROUPS]
        rows = [_number(group[NUM_ROWS]) for group in groups]
        columns = [column[METADATA] for group in groups for column in group[COLUMNS]]
        claims = [(_number(column[UNPACKED]), _number(column[PACKED])) for column in columns]
    if sum(rows) > size:
        raise NeonError(f"{path}: claims {sum(rows):,} rows in {size:,} bytes")
    for unpacked, packed in claims:
        if packed > size or unpacked > max(LARGE, RATIO * packed):
            raise NeonError(f"{path}: a column claims {unpacked:,} bytes out of {packed:,}")
    return rows


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a size is {value}")
    return value


def _footer(path: Path, size: int) -> dict:
    with path.open("rb") as file:
        if size < TAIL + len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin as one")
        file.seek(size - TAIL)
        tail = file.read(TAIL)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or length > size - TAIL - len(MAGIC):
            raise ValueError("it does not end as one")
        file.seek(size - TAIL - length)
        return _Compact(file.read(length)).struct()


@dataclass
class _Compact:
    """Values of Thrift's compact protocol, one after the other. Raises ValueError, IndexError: of damaged ones."""

    data: bytes
    at: int = 0

    def struct(self, depth: int = 0) -> dict[int, object]:
        """Field number → value."""
        found: dict[int, object] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._zigzag()
            if number in found:
                raise ValueError(f"field {number} is there twice")
            found[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> object:
        if depth > DEEP:
            raise ValueError("too deep")
        match kind:
            case 1 | 2 | 3:  # booleans in a list, and bytes
                return self._byte()
            case 4 | 5 | 6:  # integers of 16, 32 and 64 bits
                return self._zigzag()
            case 7:
                return self._take(8)
            case 8:
                return self._take(self._varint())
            case 9 | 10:
                return self._list(depth + 1)
            case 12:
                return self.struct(depth + 1)
        raise ValueError(f"a value of kind {kind}")

    def _list(self, depth: int) -> list:
        head = self._byte()
        count = self._varint() if head >> 4 == 15 else head >> 4
        if count > len(self.data) - self.at:
            raise ValueError(f"a list of {count}")
        return [self._value(head & 15, depth) for _ in range(count)]

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def _varint(self) -> int:
        found = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        raise ValueError("a number of more than 64 bits")

    def _zigzag(self) -> int:
        found = self._varint()
        return found >> 1 ^ -(found & 1)
