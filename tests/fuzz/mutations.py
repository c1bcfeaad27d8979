"""Well-formed files, damaged: what a disk, a network, or someone with a plan makes of them."""

import gzip

from hypothesis import strategies as st

NUMBERS = [0, 1, 2, 7, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
NUMBERS += [1 << 40, (1 << 63) - 1, (1 << 64) - 1]
WORDS = [
    b"NaN",
    b"-1",
    b"1e999",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"9" * 30,
    b"true",
    b"\0",
    b"\xff",
    b"../../x",
]
WORDS += [b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"cos\nsystem\n", b"\x80\x04", b"PK\3\4", b"\x1f\x8b"]


@st.composite
def damaged(draw, seeds):
    """One of ``seeds`` after a few edits; gzip streams are also damaged inside."""
    content = draw(st.sampled_from(seeds))
    packed = content[:2] == b"\x1f\x8b" and draw(st.booleans())
    content = bytearray(gzip.decompress(content) if packed else content)
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(
            st.sampled_from(["set", "number", "cut", "insert", "drop", "repeat", "word", "splice", "digits"])
        )
        at = draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "set":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            number, size = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from([1, 2, 4, 8]))
            order = draw(st.sampled_from(["little", "big"]))
            content[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, order)
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "drop":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 512))]
        elif kind == "word":
            content[at : at + draw(st.integers(0, 4))] = draw(st.sampled_from(WORDS))
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            begin = draw(st.integers(0, max(0, len(other) - 1)))
            content[at : at + draw(st.integers(0, 64))] = other[begin : begin + 64]
        else:
            _change_digits(draw, content, at)
    return gzip.compress(bytes(content), mtime=0) if packed else bytes(content)


def _change_digits(draw, content, at):
    """Put another number, of any size, where text has one."""
    digits = b"0123456789"
    begin = next((i for i in range(at, len(content)) if content[i] in digits), None)
    if begin is None:
        return
    end = begin
    while end < len(content) and content[end] in digits:
        end += 1
    number = draw(st.sampled_from(NUMBERS))
    text = str(number).encode() if draw(st.booleans()) else f"{number:o}".encode()
    # Tar headers are of fixed width; JSON is not.
    keep = draw(st.booleans())
    content[begin:end] = text[-(end - begin) :].rjust(end - begin, b"0") if keep else text
