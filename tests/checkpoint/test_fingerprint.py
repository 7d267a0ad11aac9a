"""Fingerprints do not depend on the mesh or on how arrays are cut, but differ if contents do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

from jaxfm.checkpoint import fingerprint
from jaxfm.checkpoint.fingerprint import fingerprint_of_part, fingerprints

DTYPES = [
    'float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2', 'int32', 'int16', 'int8',
    'uint32', 'uint16', 'uint8', 'bool', 'complex64',
]  # fmt: skip
WIDE = ['float64', 'int64', 'uint64', 'complex128']


def draw(dtype, shape, seed=0):
    """Random bits, which include every kind of NaN for floating dtypes."""
    random, dtype = np.random.default_rng(seed), jnp.dtype(dtype)
    if dtype.kind == 'b':
        return random.integers(0, 2, shape).astype(bool)
    content = random.bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape)


def of(values, sharding=None):
    return fingerprints({'x': jax.device_put(values, sharding)})['x']


def by_definition(values):
    """The definition in the module's docstring, in numpy."""
    values = np.ascontiguousarray(values).reshape(-1)
    words = values.view({1: np.uint8, 2: np.uint16}.get(values.itemsize, np.uint32))
    word = words.astype(np.uint32) + np.arange(words.size, dtype=np.uint32) * np.uint32(0x9E3779B1)
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return int((word ^ (word >> 16)).sum(dtype=np.uint64) % 2**32)


def of_parts(array, sizes):
    steps = [range(0, size, part) for size, part in zip(array.shape, sizes)]
    total = 0
    for start in itertools.product(*steps):
        where = tuple(slice(at, at + part) for at, part in zip(start, sizes))
        total += fingerprint_of_part(np.ascontiguousarray(array[where]), array.shape, start)
    return total % 2**32


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'bool', 'complex64', 'uint32'])
def test_fingerprints_of_parts_add_up_to_that_of_the_array(dtype):
    values = np.random.default_rng(0).standard_normal((6, 10, 8)) * 100
    values = np.asarray(values.astype(jnp.dtype(dtype)))
    whole = fingerprints({'x': jnp.asarray(values)})['x']
    mesh = jax.make_mesh((2,), ('fsdp',))
    split = jax.device_put(values, NamedSharding(mesh, jax.P(None, 'fsdp')))
    assert fingerprints({'x': split})['x'] == whole
    for sizes in ((6, 10, 8), (1, 10, 8), (4, 3, 5)):
        assert of_parts(values, sizes) == whole


def test_elements_of_eight_bytes_keep_all_their_bits():
    values = np.random.default_rng(0).integers(0, 2**63, (6, 4))
    with jax.enable_x64(True):
        whole = fingerprints({'x': jnp.asarray(values)})['x']
    assert of_parts(values, (2, 4)) == whole
    values[3, 3] ^= 1 << 62
    assert of_parts(values, (2, 4)) != whole


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_fingerprint_follows_its_definition_for_every_dtype(dtype):
    values = draw(dtype, (6, 5, 4))
    assert of(values) == by_definition(values)
    scalar = values[0, 0, 0]
    assert of(scalar) == by_definition(scalar)


@pytest.mark.parametrize('dtype', WIDE)
def test_each_word_of_a_wide_element_has_its_own_index(dtype):
    values = draw(dtype, (16, 3))
    with jax.enable_x64(True):
        mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Explicit,))
        split = of(values, NamedSharding(mesh, jax.P('fsdp')))
        assert of(values) == split == by_definition(values)
    assert of_parts(values, (4, 2)) == by_definition(values)


def mesh_of_two():
    devices = jax.devices()[:2]
    return jax.make_mesh((2,), ('fsdp',), axis_types=(AxisType.Explicit,), devices=devices)


def specs(*names):
    """Every way to shard three dimensions over these mesh axes."""
    entries = [None, *names, *itertools.permutations(names, 2)]
    for spec in itertools.product(entries, repeat=3):
        used = [name for one in spec if one for name in (one if isinstance(one, tuple) else [one])]
        if len(used) == len(set(used)):
            yield jax.P(*spec)


@pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize('shape', [(1,), (8,), (2, 4)])
def test_no_sharding_changes_a_fingerprint(shape, axis_type, quick_compilation):
    values = draw('float32', (8, 16, 24))
    names = ('fsdp', 'tensor')[: len(shape)]
    mesh = jax.make_mesh(
        shape, names, axis_types=(axis_type,) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )
    for spec in specs(*names):
        assert of(values, NamedSharding(mesh, spec)) == by_definition(values), spec


def test_the_current_mesh_does_not_matter():
    values = draw('float32', (8, 16))
    large = jax.make_mesh((2, 4), ('fsdp', 'tensor'), axis_types=(AxisType.Explicit,) * 2)
    small = mesh_of_two()
    elsewhere = [
        NamedSharding(large, jax.P(('fsdp', 'tensor'))),
        NamedSharding(small, jax.P(None, 'fsdp')),
        SingleDeviceSharding(jax.devices()[5]),
    ]
    for mesh in (large, small):
        with jax.set_mesh(mesh):
            for sharding in elsewhere:
                assert of(values, sharding) == by_definition(values)


@pytest.mark.parametrize('dtype', [dtype for dtype in DTYPES if dtype != 'bool'])
def test_every_flipped_bit_changes_a_fingerprint(dtype):
    values = draw(dtype, (3,))
    content, prints = values.tobytes(), {of(values)}
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        prints.add(of(np.frombuffer(bytes(changed), values.dtype)))
    assert len(prints) == 8 * len(content) + 1


def test_a_flipped_bool_changes_a_fingerprint():
    values = draw('bool', (17,))
    assert len({of(values ^ (np.arange(17) == place)) for place in range(18)}) == 18


@pytest.mark.parametrize('dtype', DTYPES)
def test_exchanged_elements_change_a_fingerprint(dtype):
    values = np.arange(7).astype(jnp.dtype(dtype))
    for first, second in itertools.combinations(range(7), 2):
        exchanged = values.copy()
        exchanged[[first, second]] = values[[second, first]]
        is_other = exchanged.tobytes() != values.tobytes()
        assert (of(exchanged) != of(values)) == is_other


def test_transposing_changes_a_fingerprint():
    values = draw('float32', (4, 4))
    assert of(values.T) != of(values)
    assert of(values[::-1]) != of(values)


def test_a_fingerprint_does_not_include_the_shape():
    values = draw('float32', (4, 6))
    assert of(values) == of(values.reshape(6, 4)) == of(values.reshape(24))


@pytest.mark.parametrize('shape', [(8, 3, 5), (7, 64), (3, 7, 11), (64, 64), (1, 999), (4, 8, 8)])
def test_summing_in_slices_gives_the_same_fingerprint(shape, monkeypatch):
    monkeypatch.setattr(fingerprint, '_MANY', 64)
    monkeypatch.setattr(fingerprint, '_FEW', 16)
    jax.clear_caches()  # drop programs compiled with the real constants
    values = draw('float32', shape)
    assert of(values) == by_definition(values)
    if shape[0] % 2 == 0:
        assert of(values, NamedSharding(mesh_of_two(), jax.P('fsdp'))) == by_definition(values)
    jax.clear_caches()


def test_empty_arrays_have_a_fingerprint():
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Explicit,))
    for shape in ((0,), (0, 4), (16, 0), (2, 0, 3)):
        for dtype in ('float32', 'bool', 'complex64'):
            values = np.zeros(shape, dtype)
            assert of(values) == of(values, NamedSharding(mesh, jax.P())) == 0
    assert of(np.zeros((16, 0)), NamedSharding(mesh, jax.P('fsdp'))) == 0


@pytest.mark.parametrize('shape', [(12, 768, 1536), (6, 768, 3072), (32768, 768), (12, 768, 768)])
def test_the_hashes_of_an_array_are_never_all_in_memory(shape):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    memory = fingerprint._sum_shards.lower(leaf, None).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * np.prod(shape) // 7
