"""Peak matmul throughput of devices, the denominator of MFU: dense, from the vendors' data sheets.

Where a sheet gives only a figure "with sparsity", the table has half of it. GeForce figures are for
float32 accumulation, which we use. 'float32' is the rate of TF32 tensor cores, because XLA uses
them for float32 products at default precision.
"""

# The key must occur in jax's device_kind. The first match wins, so longer names come first.
# TFLOP/s: (bfloat16 and float16, float32 as TF32, float8)
_PEAK_TFLOPS = {
    'GB300': (2500, 1250, 5000),
    'B300': (2250, 1125, 4500),
    'GB200': (2500, 1250, 5000),
    'B200': (2250, 1125, 4500),
    'H200 NVL': (835.5, 417.5, 1670.5),
    'H200': (989.5, 494.5, 1979),
    'GH200': (989.5, 494.5, 1979),
    'H100 NVL': (835.5, 417.5, 1670.5),
    'H100 PCIe': (756, 378, 1513),
    'H100': (989.5, 494.5, 1979),
    'H800': (989.5, 494.5, 1979),
    'A100': (312, 156, None),
    'A800': (312, 156, None),
    'A30': (165, 82, None),
    'A40': (149.7, 74.8, None),
    'L40S': (362, 183, 733),
    'L40': (181, 90.5, 362),
    'L4': (121, 60, 242.5),
    'RTX 6000 Ada': (364.2, 182.1, 728.5),
    'RTX A6000': (154.8, 77.4, None),
    'RTX 5090': (209.5, 104.8, 419),
    'RTX 4090': (165.2, 82.6, 330.3),
    'RTX 3090 Ti': (80, 40, None),
    'RTX 3090': (71, 35.6, None),
}
# Words that mark a smaller device with the name of a larger one: mobile chips, parts of a device.
_SMALLER = ('LAPTOP', 'MOBILE', 'MAX Q', 'MIG', 'D')
_COLUMN = {'bfloat16': 0, 'float16': 0, 'float32': 1, 'float8_e4m3fn': 2, 'float8_e5m2': 2}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak dense FLOP/s of one device for matmuls in `dtype`.

    device_kind: as in `jax.Device.device_kind`. Returns None if the device or the dtype is not in
    the table, because no MFU is better than a wrong one.
    """
    words = f' {device_kind.upper().replace("-", " ")} '
    if dtype not in _COLUMN or any(f' {word} ' in words for word in _SMALLER):
        return None
    for name, row in _PEAK_TFLOPS.items():
        if f' {name.upper()} ' in words:
            tflops = row[_COLUMN[dtype]]
            return tflops * 1e12 if tflops else None
    return None
