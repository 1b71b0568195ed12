"""What the crate `formats` must equal bit for bit, computed by ml_dtypes and NumPy.

    formats_golden.py encode             f32 on stdin; for each part of 2^20 values, the codes in each format
    formats_golden.py decode             the value of every code, as f32
    formats_golden.py mx                 f32 on stdin, in blocks of 32; for each MX format and rounding of the scale,
                                         the scales and then a byte for each code
    formats_golden.py tile ROWS COLUMNS  f32 on stdin; for each shape and kind of scale, the scales as f32 and the codes

Formulas of scales are written as in their publications, in float64, and share nothing with the Rust code. Everything
is little endian. The order of formats is that of the lists below.
"""

import sys

import ml_dtypes
import numpy as np

PART_VALUES = 1 << 20
MX_BLOCK = 32
TILE = 128

# Name, bits of a code. NumPy has the binary16 that ml_dtypes leaves to it.
ELEMENTS = [
    (ml_dtypes.float8_e4m3fn, 8),
    (ml_dtypes.float8_e5m2, 8),
    (ml_dtypes.float6_e3m2fn, 6),
    (ml_dtypes.float6_e2m3fn, 6),
    (ml_dtypes.float4_e2m1fn, 4),
    (ml_dtypes.bfloat16, 16),
    (np.float16, 16),
]

# OCP MX v1.0, table 1: the element's dtype, its emax and its largest value.
MX = [
    (ml_dtypes.float8_e4m3fn, 8, 448.0),
    (ml_dtypes.float8_e5m2, 15, 57344.0),
    (ml_dtypes.float6_e3m2fn, 4, 28.0),
    (ml_dtypes.float6_e2m3fn, 2, 7.5),
    (ml_dtypes.float4_e2m1fn, 2, 6.0),
]


def code_dtype(bits):
    return np.uint16 if bits > 8 else np.uint8


def read_values():
    return np.frombuffer(sys.stdin.buffer.read(), dtype="<f4")


def write(array):
    sys.stdout.buffer.write(np.ascontiguousarray(array).tobytes())


def encode():
    while part := sys.stdin.buffer.read(PART_VALUES * 4):
        values = np.frombuffer(part, dtype="<f4")
        for dtype, bits in ELEMENTS:
            write(values.astype(dtype).view(code_dtype(bits)))


def decode():
    for dtype, bits in [*ELEMENTS, (ml_dtypes.float8_e8m0fnu, 8)]:
        codes = np.arange(1 << bits).astype(code_dtype(bits))
        write(codes.view(dtype).astype("<f4"))


def floor_log2(positive):
    return np.frexp(positive)[1] - 1


def ceil_log2(positive):
    mantissa, exponent = np.frexp(positive)
    return np.where(mantissa == 0.5, exponent - 1, exponent)


def mx():
    blocks = read_values().reshape(-1, MX_BLOCK).astype(np.float64)
    amax = np.abs(blocks).max(axis=1)
    # A block of zeros takes the least scale, 2^-127.
    positive = np.where(amax == 0, 2.0**-200, amax)
    for dtype, emax, largest in MX:
        for exponent in (floor_log2(positive) - emax, ceil_log2(positive / largest)):
            exponent = np.maximum(exponent, -127)
            scaled = np.clip(blocks * 2.0 ** -exponent[:, None].astype(np.float64), -largest, largest)
            write((exponent + 127).astype(np.uint8))
            write(scaled.astype(np.float32).astype(dtype).view(np.uint8))


def tile(rows, columns):
    matrix = read_values().reshape(rows, columns)
    for tile_rows in (1, TILE):
        amax = np.zeros((-(-rows // tile_rows), -(-columns // TILE)), dtype=np.float32)
        for row in range(amax.shape[0]):
            for column in range(amax.shape[1]):
                part = matrix[row * tile_rows : (row + 1) * tile_rows, column * TILE : (column + 1) * TILE]
                amax[row, column] = np.abs(part).max()
        exact = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
        for scale in (exact, (2.0 ** ceil_log2(exact.astype(np.float64))).astype(np.float32)):
            whole = np.repeat(np.repeat(scale, tile_rows, axis=0)[:rows], TILE, axis=1)[:, :columns]
            write(scale)
            write((matrix / whole).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


if __name__ == "__main__":
    # NaN and overflow are among what is asked for.
    np.seterr(all="ignore")
    match sys.argv[1:]:
        case ["encode"]:
            encode()
        case ["decode"]:
            decode()
        case ["mx"]:
            mx()
        case ["tile", rows, columns]:
            tile(int(rows), int(columns))
        case _:
            sys.exit(__doc__)
