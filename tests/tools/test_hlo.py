"""Parsing HLO: every notation that XLA uses for collectives, and how often they run."""

import pytest

from tools.hlo import Array, Collective, collectives, custom_calls, list_carried

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(%p), replica_groups=[1,4]<=[4], to_apply=%add
}

%inner (carry: (s32[], bf16[16,2])) -> (s32[], bf16[16,2]) {
  %carry = (s32[], bf16[16,2]{1,0}) parameter(0)
  %x = bf16[16,2]{1,0} get-tuple-element(%carry), index=1
  %y = f8e4m3fn[4]{0} fusion(%x), kind=kLoop, calls=%wrapped
  %start = (SHARDS, (bf16[64,2]{1,0}, /*index=1*/f8e4m3fn[16])) all-gather-start(%x, %y), GROUPS
  %done = (bf16[64,2]{1,0}, f8e4m3fn[16]{0}) all-gather-done(%start)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %next = (s32[], bf16[16,2]{1,0}) tuple(%i, %x)
}

%condition (carry: (s32[], bf16[16,2])) -> pred[] {
  %carry.1 = (s32[], bf16[16,2]{1,0}) parameter(0)
  ROOT %more = pred[] custom-call(%carry.1), custom_call_target="more"
}

ENTRY %main (p0: bf16[16,2], p1: f32[8]) -> f32[8] {
  %p0 = bf16[16,2]{1,0} parameter(0)
  %p1 = f32[8]{0:T(256)} parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[16,2]{1,0}) tuple(%zero, %p0)
  %while.1 = (s32[], bf16[16,2]{1,0}) while(%t), condition=%condition, body=%inner, TRIPS
  %async = ((f32[8]{0}), f32[2]{0}) async-start(%p1), calls=%wrapped
  %async.done = f32[2]{0} async-done(%async)
  %call = f32[2]{0} custom-call(%p1), custom_call_target="__cublas$gemm"
  ROOT %all = f32[8]{0} all-reduce(%p1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""
TEXT = TEXT.replace('TRIPS', 'backend_config={"known_trip_count":{"n":"5"}}')
TEXT = TEXT.replace('SHARDS', '(bf16[16,2]{1,0}, f8e4m3fn[4]{0})')
TEXT = TEXT.replace('GROUPS', "replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}")


def test_collectives_are_counted_with_the_loops_around_them():
    assert collectives(TEXT) == {
        Collective('all-gather', 'bf16', 16 * 2 * 4, 4): 5,
        Collective('all-gather', 'f8e4m3fn', 16, 4): 5,
        Collective('reduce-scatter', 'f32', 8, 4): 6,  # in the loop, and asynchronous outside it
        Collective('all-reduce', 'f32', 8, 4): 1,
    }


def test_loops_carry_arrays_and_custom_calls_have_targets():
    assert list_carried(TEXT) == [Array('s32', ()), Array('bf16', (16, 2))]
    assert custom_calls(TEXT) == {'__cublas$gemm': 1}


def test_a_ring_sends_every_part_but_its_own():
    sent = {
        kind: Collective(kind, 'bf16', 100, 4).sent
        for kind in ('all-gather', 'reduce-scatter', 'all-reduce', 'collective-permute')
    }
    assert sent == {
        'all-gather': 150,
        'reduce-scatter': 150,
        'all-reduce': 300,
        'collective-permute': 200,
    }


@pytest.mark.parametrize(
    'groups, devices',
    [
        ('{{0,1}}', 2),
        ('[2,4]<=[4,2]T(1,0)', 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(groups, devices):
    text = TEXT.replace('{{0,1,2,3},{4,5,6,7}}', groups)
    assert collectives(text)[Collective('all-reduce', 'f32', 8, devices)] == 1


def test_a_loop_of_unknown_length_is_not_guessed():
    with pytest.raises(ValueError, match='while.1 has no known trip count'):
        collectives(TEXT.replace('known_trip_count', 'unknown'))


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match='no ENTRY'):
        collectives('HloModule empty\n')
