"""Values as bytes: what a pool stores of a Python object, and how it reads it back.

`encode` turns a value into bytes, `decode` turns bytes into an equal value of the same type,
`describe` reads no more than the header. Nothing is ever pickled or evaluated: decoding
can only build the types listed here. Checksums are the caller's.

The format, byte by byte
========================

All integers are little-endian. Offsets count from the first byte of the encoding. An encoding
is meant to start at an address that is a multiple of 64 (a page, a file, an aligned slot): the
data of arrays and tables then does too, since it starts at offsets that are multiples of 64.
Gaps that alignment leaves are zeros. The length of an encoding is kept by whoever stores it.

Header, 8 bytes::

    0   u8   magic, 0xE5
    1   u8   format version, 1
    2   u8   kind, see below
    3   u8   flags: 1 in an extended container, else 0
    4   u32  key id, 0 = not encrypted; otherwise all that follows is ciphertext

What follows depends on the kind::

     1 none      nothing
     2 bool      u8, 0 or 1
     3 int       two's complement, any number of bytes from 1
     4 float     f64
     5 complex   f64 real, f64 imaginary
     6 str       UTF-8
     7 bytes     the bytes
     8 datetime  u16 year, u8 month, day, hour, minute, second, u32 microsecond, u8 fold,
                 u8 zone: 0 naive; 1 i64 offset in microseconds; 2 the same and a UTF-8 name;
                 3 the UTF-8 key of a zoneinfo.ZoneInfo
     9 date      u16 year, u8 month, u8 day
    10 list, 11 tuple, 12 dict
                 plain (flags 0): MessagePack of the members, no extension types in it; a tuple
                 is written as an array, a dict's keys are strings.
                 extended (flags 1): u64 length of the MessagePack, the MessagePack, then the
                 attachments in the order in which the MessagePack refers to them, each at the
                 next offset that is a multiple of 64, the last one ending the encoding
    13 scalar    a NumPy scalar: u16 length of the dtype, the dtype, the item. For numpy.str_
                 the dtype is "U" and the item UTF-8, for numpy.bytes_ "S" and the bytes
    14 array     8 u32 length d of the dtype, 12 u8 number n of dimensions, 13 three zeros,
                 16 n times u64: the shape, 16+8n n times u8: the axes in the order of the
                 memory, slowest first, 16+9n d bytes of dtype, zeros up to a multiple of 64,
                 then the items without gaps
    15 table, 16 batch
                 8 u64 rows, 16 u32 columns, zeros up to 64, then an Arrow IPC stream of one
                 schema, the dictionary and record batches (a batch has exactly one of these),
                 and the end-of-stream mark: uncompressed, little-endian, every buffer at an
                 offset that is a multiple of 64, in ascending order, never overlapping

Extension types of the MessagePack in an extended container: 3 int (outside of 64 bits),
5 complex, 8 datetime, 9 date and 13 scalar hold what follows the header of that kind;
11 tuple holds the MessagePack array of its members, with the same extension types;
64 attachment holds the u64 length of the next attachment, a whole encoding of kind 14, 15 or 16.

A dtype is MessagePack::

    "<f8"                           NumPy's own notation, byte order stated; "q" and "Q" for
                                    longlong where that is another type than int64;
                                    long doubles carry their mantissa: "<f16:63", "<c32:63"
    ["sub", base, [shape...]]       a subarray
    ["rec", [field...], itemsize, aligned]
                                    a structure; field = [name, dtype, offset, title or nil]

Containers nest at most 200 levels deep.
"""

from everpool.values._codec import Described, decode, describe, encode, view_array
from everpool.values._dtypes import dtype_from_bytes, dtype_to_bytes
from everpool.values._wire import Buffer, Encoded

__all__ = [
    "Buffer",
    "Described",
    "Encoded",
    "decode",
    "describe",
    "dtype_from_bytes",
    "dtype_to_bytes",
    "encode",
    "view_array",
]
