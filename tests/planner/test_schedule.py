"""Costs of a small program, written in the form in which the TPU compiler prints a scheduled one."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.planner.hlo import parse, shape_bytes
from clip_jax.planner.schedule import estimate
from clip_jax.planner.topologies import Device

# 1 GHz; 1 GB/s to memory; 1 GB/s over 4 links to other chips.
DEVICE = Device(
    peak_flops=1e12,
    clock_hz=1e9,
    hbm_limit=2**30,
    hbm_bandwidth=1e9,
    ici_bandwidth=1e9,
    ici_links=4,
    dcn_bandwidth=1e8,
)

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %add.9 = f32[8,128]{1,0:T(8,128)} add(%p, %p)
}

%cond (c: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (b: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %b = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%b), index=1
  %send = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %fusion.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused, \
metadata={op_name="jit(step)/while/body/add"}, backend_config={"window_config":{"estimated_cycles":"5000"}}
  %sent = f32[8,128]{1,0} collective-permute-done(%send)
  %next = s32[]{:T(128)} add(%i, %i), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %result = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%next, /*index=1*/%sent)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)S(6)} copy(%zero), backend_config={"window_config":{"estimated_cycles":"1"}}
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%start, %a)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) while(%init), condition=%cond, body=%body
  %y = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
  %kernel = f32[8,128]{1,0:T(8,128)} custom-call(%y), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":20000000,"transcendentals":0,"bytes_accessed":8192}}}
  %sum = (f32[8,128]{1,0}, f32[]) all-reduce(%kernel, %zero), replica_groups=[1,4]<=[4], to_apply=%fused
  %first = f32[8,128]{1,0} get-tuple-element(%sum), index=0
  ROOT %out = f32[8,128]{1,0:T(8,128)} sort(%first), dimensions={0}
}
"""


# As the compiler writes fsdp: a gather that runs beside the fusions between its start and its end, and a sum of which
# every device keeps a part.
SHARDED = """\
%gather (s: f32[2,128]) -> f32[8,128] {
  %s = f32[2,128]{1,0} parameter(0)
  ROOT %g = f32[8,128]{1,0} all-gather(%s), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

%gather_on (s.1: f32[2,128]) -> f32[8,128] {
  %s.1 = f32[2,128]{1,0} parameter(0)
  ROOT %g.1 = f32[8,128]{1,0} all-gather(%s.1), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter (t: f32[8,128]) -> f32[2,128] {
  %t = f32[8,128]{1,0} parameter(0)
  %r = f32[8,128]{1,0} all-reduce(%t), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%gather
  ROOT %d = f32[2,128]{1,0} slice(%r), slice={[0:2], [0:128]}
}

ENTRY %main (a: f32[2,128]) -> f32[2,128] {
  %a = f32[2,128]{1,0} parameter(0)
  %async-collective-start.1 = (f32[2,128]{1,0}, f32[8,128]{1,0}) fusion(%a), kind=kCustom, calls=%gather
  %x = f32[2,128]{1,0} get-tuple-element(%async-collective-start.1), index=0
  %fusion.3 = (f32[8,128]{1,0}) fusion(%x), kind=kOutput, calls=%gather_on, \
backend_config={"window_config":{"estimated_cycles":"1500"}}
  %async-collective-done.1 = f32[8,128]{1,0} fusion(%x), kind=kCustom, calls=%gather
  ROOT %fusion.4 = f32[2,128]{1,0} fusion(%async-collective-done.1), kind=kCustom, calls=%all-reduce-scatter
}
"""


# Two slices: what leaves one goes through its host, and each slice takes its own branch.
SLICES = """\
%near (n: f32[8,128]) -> f32[8,128] {
  %n = f32[8,128]{1,0} parameter(0)
  ROOT %c.1 = f32[8,128]{1,0} copy(%n), backend_config={"window_config":{"estimated_cycles":"10"}}
}

%far (f: f32[8,128]) -> f32[8,128] {
  %f = f32[8,128]{1,0} parameter(0)
  ROOT %c.2 = f32[8,128]{1,0} copy(%f), backend_config={"window_config":{"estimated_cycles":"3000"}}
}

ENTRY %main (a: f32[8,128], which: s32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %which = s32[] parameter(1)
  %token = token[] after-all()
  %send.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true
  %recv.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true
  %moved = f32[8,128]{1,0} conditional(%which, %a, %a), branch_computations={%near, %far}
  %send-done.1 = token[] send-done(%send.1), channel_id=2
  %recv-done.1 = (f32[8,128]{1,0:T(8,128)}, token[]) recv-done(%recv.1), channel_id=1
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%recv-done.1), index=0
}
"""


@pytest.fixture(scope="module")
def cost():
    return estimate(PROGRAM, DEVICE)


def test_cycles_count_once_a_trip(cost):
    cycles = 1 + 10 * (5000 + 7)  # the counter goes from 2 to 12
    assert cost.compute_seconds == pytest.approx(cycles / 1e9)
    assert not cost.unknown_loops and not cost.unknown_groups


def test_collectives_count_with_their_trips(cost):
    permute, reduce = cost.collectives["collective-permute"], cost.collectives["all-reduce"]
    assert (permute.count, permute.bytes) == (10, 10 * 4096)
    assert (reduce.count, reduce.bytes) == (1, 4096 + 4)


def test_transfers_overlap_with_what_runs_meanwhile(cost):
    permute = 1e-6 + 4096 / 0.25e9  # over one link
    all_reduce = 1e-6 + 2 * 3 / 4 * 4100 / 1e9
    assert permute > 5e-6
    assert cost.collective_seconds == pytest.approx(10 * (permute - 5e-6) + all_reduce)


def test_collectives_inside_fusions():
    cost = estimate(SHARDED, DEVICE)
    gather, scatter = cost.collectives["all-gather"], cost.collectives["reduce-scatter"]
    assert (gather.count, gather.bytes, scatter.count, scatter.bytes) == (1, 4096, 1, 1024)
    assert set(cost.collectives) == {"all-gather", "reduce-scatter"}
    bandwidth_seconds = 3 * 1024 / 1e9
    assert cost.collective_seconds == pytest.approx(2 * (1e-6 + bandwidth_seconds) - 1.5e-6)
    assert cost.bounded_seconds == 0


def test_between_slices_the_host_network_carries_and_the_slower_branch_counts():
    cost = estimate(SLICES, DEVICE)
    assert cost.collectives == {"send": (1, 4096), "recv": (1, 4096)}
    assert cost.compute_seconds == pytest.approx(3000 / 1e9)
    assert cost.collective_seconds == pytest.approx(5e-5 + 4096 / 1e8 - 3e-6)  # both directions at once


def test_what_has_no_estimate_is_not_free(cost):
    kernel, sort = 2e7 / 1e12, 8192 / 1e9
    assert cost.bounded_seconds == pytest.approx(kernel + sort)


def test_the_parts_add_up(cost):
    parts = cost.compute_seconds + cost.bounded_seconds + cost.collective_seconds + cost.copy_seconds
    assert cost.seconds == pytest.approx(parts)
    assert cost.mfu(1e6, DEVICE) == pytest.approx(1e6 / parts / 1e12)


def test_a_loop_without_a_known_end_counts_once_and_is_reported():
    cost = estimate(PROGRAM.replace("constant(12)", "parameter(1)"), DEVICE)
    assert cost.unknown_loops == {"loop"}
    assert cost.compute_seconds == pytest.approx((1 + 5007) / 1e9)


def test_a_loop_whose_start_is_out_of_sight_is_reported():
    cost = estimate(
        PROGRAM.replace("while(%init)", "while(%elsewhere)")
        .replace("%init = ", "%elsewhere = ")
        .replace("tuple(%start, %a)", "custom-call(%start, %a)"),
        DEVICE,
    )
    assert cost.unknown_loops == {"loop"}


def test_collectives_that_do_not_say_who_takes_part_are_reported_and_count_as_of_all_devices():
    unknown = estimate(PROGRAM.replace("replica_groups=[1,4]<=[4]", "replica_groups=@group"), DEVICE)
    everyone = estimate(PROGRAM.replace("replica_groups=[1,4]<=[4]", "replica_groups={}"), DEVICE)
    assert unknown.unknown_groups == {"sum"} and not everyone.unknown_groups
    assert unknown.seconds == everyone.seconds
    assert unknown.collective_seconds > estimate(PROGRAM, DEVICE).collective_seconds  # 16 devices, not 4


def test_trip_counts_of_real_programs():
    def nested(x):
        inner = lambda y, _: (jnp.sin(y @ y), None)  # noqa: E731
        outer = lambda y, _: (jax.lax.scan(inner, y, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, length=5)[0]

    program = parse(jax.jit(nested).lower(jnp.ones((4, 4))).compile().as_text())
    loops = [
        program.trip_count(op, name) for name, ops in program.computations.items() for op in ops if op.opcode == "while"
    ]
    assert sorted(loops) == [3, 5]


def test_bytes_of_types():
    assert (
        shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[7], /*index=2*/s4[4], f32[], u32[]{:S(2)})")
        == 12 + 7 + 2 + 8
    )
    assert shape_bytes("f8e4m3fn[10]") == 10


@pytest.mark.parametrize(
    "groups, members",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("mesh['axis_0'=16,'axis_1'=4,'axis_2'=1] {'axis_0','axis_2'}", 16),
        ("mesh['axis_0'=16,'axis_1'=4], device_ids=([4,16]T(1,0)) {'axis_1':(1)2}", 2),
        ("{}", 16),
        ("@elsewhere", None),
    ],
)
def test_members_of_a_collective(groups, members):
    program = parse(PROGRAM.replace("[1,4]<=[4]", groups))
    [op] = [op for op in program.computations["main"] if op.opcode == "all-reduce"]
    assert program.group_size(op) == members
