"""Loops, bytes and collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainers.fit.hlo import Program, array_bytes
from trainers.fit.report import collectives, what


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[8,128]", 4096),
        ("bf16[3]", 6),
        ("pred[]{:T(512)}", 1),
        ("f32[2,3,196]{2,1,0:T(8,128)}", 4 * 2 * 8 * 256),  # padded to the tile of the layout
        ("f32[196,3]{0,1:T(8,128)}", 4 * 256 * 8),
        ("(f32[4]{0}, /*index=1*/s8[5]{0})", 16 + 5),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),  # in the vector memory
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type(shape, size):
    assert array_bytes(shape) == size


def test_instructions_in_loops_count_as_often_as_they_run():
    def f(x):
        def outer(x, _):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ x), x), None

        return jax.lax.scan(outer, x, length=5)[0]

    text = jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text()
    program = Program(text)
    runs = list(program.runs())
    sines = [run for run in runs if run.instruction.op_name.endswith("/sin")]
    assert program.unknown_loops == []
    assert sum(run.times for run in sines) == 15
    assert all(len(run.loops) == 2 for run in sines)


LOOPS = """HloModule m, is_scheduled=true

FileNames
1 "/src/site-packages/flax/dense.py"
2 "/src/siglip/towers/vit.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=77 end_line=77 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%fused (param_0: f32[12,8,128], param_1: s32[]) -> f32[8,128] {
  %param_0 = f32[12,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero, %zero), \
dynamic_slice_sizes={1,8,128}
  ROOT %one = f32[8,128]{1,0:T(8,128)} bitcast(%slice)
}

%body (arg: (s32[], f32[12,8,128], s32[])) -> (s32[], f32[12,8,128], s32[]) {
  %arg = (s32[]{:T(128)}, f32[12,8,128]{2,1,0:T(8,128)}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %stack = f32[12,8,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %layer = f32[8,128]{1,0:T(8,128)} fusion(%stack, %i), kind=kLoop, calls=%fused, \
metadata={op_name="jit(f)/dot_general" stack_frame_id=2}, backend_config={"estimated_cycles":"100"}
  %start = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%layer), \
source_target_pairs={{0,1},{1,0}}
  %work = f32[8,128]{1,0} fusion(%layer, %i), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"7"}
  %done = f32[8,128]{1,0} collective-permute-done(%start)
  %sum = f32[8,128]{1,0} all-reduce(%done), to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[12,8,128]{2,1,0:T(8,128)}, s32[]) tuple(%i, %stack, %i)
}

%condition (arg.1: (s32[], f32[12,8,128], s32[])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[12,8,128]{2,1,0:T(8,128)}, s32[]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %end = s32[] get-tuple-element(%arg.1), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (p: f32[12,8,128]) -> f32[12,8,128] {
  %p = f32[12,8,128]{2,1,0:T(8,128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %begin = s32[]{:T(128)} copy(%two)
  %twelve = s32[]{:T(128)} constant(12)
  %state = (s32[]{:T(128)}, f32[12,8,128]{2,1,0:T(8,128)}, s32[]) tuple(%begin, %p, %twelve)
  %loop = (s32[]{:T(128)}, f32[12,8,128]{2,1,0:T(8,128)}, s32[]) while(%state), \
condition=%condition, body=%body
  %start.1 = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%p), \
source_target_pairs={{0,1}}
  %done.1 = f32[8,128]{1,0} collective-permute-done(%start.1)
  ROOT %result = f32[12,8,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_runs_from_its_first_number_to_the_end_that_it_is_handed():
    runs = {run.instruction.name: run for run in Program(LOOPS).runs()}
    assert runs["layer"].times == 10
    assert runs["layer"].instruction.cycles == 100
    assert runs["start.1"].times == 1 and runs["start.1"].loops == ()


def test_of_a_stack_of_layers_only_the_slice_is_traffic():
    program = Program(LOOPS)
    runs = {run.instruction.name: run for run in program.runs()}
    assert program.traffic(runs["layer"]) == 2 * 4096 + 4  # read, written, and the index


def test_the_place_is_the_innermost_line_of_our_code():
    program = Program(LOOPS)
    runs = {run.instruction.name: run for run in program.runs()}
    assert program.place(runs["layer"].instruction, "/src") == "siglip/towers/vit.py:77"
    assert program.place(runs["done"].instruction, "/src") == ""


def test_collectives_are_asynchronous_where_work_stands_before_their_end():
    program = Program(LOOPS)
    found = {
        (c.kind, c.asynchronous, c.in_loop): (c.count, c.bytes)
        for c in collectives(program, list(program.runs()))
    }
    assert found == {
        ("collective-permute", True, True): (10, 10 * 4096),
        ("collective-permute", False, False): (1, 12 * 4096),  # of the text's own operand
        ("all-reduce", False, True): (10, 10 * 4096),
    }


TPU_FORMS = """HloModule m, is_scheduled=true

%started (p: bf16[8,128]) -> (bf16[8,128], bf16[64,128], u32[]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %gathered = bf16[64,128]{1,0} all-gather(%p), dimensions={0}
  ROOT %call = (bf16[8,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) custom-call(%gathered), \
custom_call_target="AsyncCollectiveStart"
}

%continued (q: bf16[8,128]) -> (f32[8], bf16[64,128]) {
  %q = bf16[8,128]{1,0} parameter(0)
  %more = bf16[64,128]{1,0} all-gather(%q), dimensions={0}
  ROOT %both = (f32[8]{0}, bf16[64,128]{1,0}) tuple(%q, %more)
}

%all-reduce-scatter (r: f32[64,128]) -> f32[8,128] {
  %r = f32[64,128]{1,0} parameter(0)
  %sum = f32[64,128]{1,0} all-reduce(%r), to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[8,128]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={8,128}
}

ENTRY %main (x: bf16[8,128], g: f32[64,128]) -> f32[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %g = f32[64,128]{1,0} parameter(1)
  %begin = (bf16[8,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, \
calls=%started
  %work = (f32[8]{0}, bf16[64,128]{1,0}) fusion(%x), kind=kOutput, calls=%continued
  %near = ((f32[64,128]{1,0}), f32[16,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%g), slice={}
  %out = (f32[64,128]{1,0}, f32[64,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)
  ROOT %scattered = f32[8,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""


MORE = """HloModule m, is_scheduled=true

%look (t: f32[1000,8], i: s32[2]) -> f32[2,8] {
  %t = f32[1000,8]{1,0} parameter(0)
  %i = s32[2]{0} parameter(1)
  ROOT %rows = f32[2,8]{1,0} gather(%t, %i), offset_dims={1}
}

%few (a: f32[4]) -> f32[] {
  ROOT %nan = f32[] constant(nan)
}

%many (b: f32[4]) -> f32[] {
  %b = f32[4]{0} parameter(0)
  %square = f32[4]{0} multiply(%b, %b)
  ROOT %norm = f32[] reduce(%square, %square), to_apply=%add
}

%keep (c: f32[4096]) -> f32[4096] {
  ROOT %c = f32[4096]{0} parameter(0)
}

%apply (d: f32[4096]) -> f32[4096] {
  %d = f32[4096]{0} parameter(0)
  ROOT %updated = f32[4096]{0} multiply(%d, %d)
}

ENTRY %main (table: f32[1000,8], ids: s32[2], a: f32[8], b: f32[16]) -> f32[2,8] {
  %table = f32[1000,8]{1,0} parameter(0)
  %ids = s32[2]{0} parameter(1)
  %a = f32[8]{0} parameter(2)
  %b = f32[16]{0} parameter(3)
  %found = f32[2,8]{1,0} fusion(%table, %ids), kind=kLoop, calls=%look
  %both = ((f32[8]{0}, f32[16]{0}), (f32[64]{0}, f32[128]{0})) all-gather-start(%a, %b)
  %logged = f32[] conditional(%ids, %a, %a), branch_computations={%few, %many}
  %state = f32[4096]{0} conditional(%ids, %a, %a), branch_computations={%keep, %apply}
  ROOT %copy = f32[2,8]{1,0} copy(%found)
}
"""


def test_a_lookup_reads_its_rows_and_a_combined_gather_counts_all_its_results():
    program = Program(MORE)
    runs = {run.instruction.name: run for run in program.runs()}
    assert program.traffic(runs["found"]) == 64 + 8 + 64
    assert program.traffic(runs["both"]) == 4 * (8 + 16) + 4 * (64 + 128)
    (gather,) = collectives(program, [*runs.values()])
    assert (gather.kind, gather.bytes) == ("all-gather", 4 * (64 + 128))


def test_of_conditionals_the_update_counts_and_what_only_logged_steps_do_does_not():
    names = {run.instruction.name for run in Program(MORE).runs()}
    assert "updated" in names and "norm" not in names


def test_forms_that_only_tpus_have():
    program = Program(TPU_FORMS)
    runs = {run.instruction.name: run for run in program.runs()}
    found = [
        (c.kind, c.count, c.bytes, c.asynchronous) for c in collectives(program, [*runs.values()])
    ]
    assert found == [
        ("all-gather", 1, 64 * 128 * 2, True),
        ("reduce-scatter", 1, 64 * 128 * 4, False),
    ]
    assert program.traffic(runs["near"]) == 16 * 128 * 4  # only the slice is read
    assert program.traffic(runs["out"]) == 64 * 128 * 4  # only written


def test_collectives_of_a_program_of_emulated_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def local(x):
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        return jax.lax.psum(x.sum(), "data"), jax.lax.psum_scatter(gathered, "data", tiled=True)

    specs = dict(in_specs=PartitionSpec("data"), out_specs=(PartitionSpec(), PartitionSpec("data")))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=rows)
    text = jax.jit(jax.shard_map(local, mesh=mesh, **specs)).lower(x).compile().as_text()
    program = Program(text)
    found = {c.kind: c.bytes for c in collectives(program, list(program.runs()))}
    assert found["all-gather"] == 16 * 8 * 4
    assert found["reduce-scatter"] == 16 * 8 * 4
    assert found["all-reduce"] == 4


@pytest.mark.parametrize(
    "op_name, name",
    [
        (
            "jit(update)/transpose(jvp(TwoTowers.encode_image))/img/Transformer/while/body/"
            "closed_call/checkpoint/encoderblock_3/MlpBlock_0/Dense_1/dot_general",
            "backward img MlpBlock_0 Dense_1 dot_general",
        ),
        (
            "jit(update)/transpose(jvp(shard_map))/TwoTowers.encode_image/img/Transformer/"
            "encoderblock/rematted_computation/LayerNorm_0/mul",
            "again img LayerNorm_0 mul",
        ),
        ("jit(update)/jvp()/shard_map/while/body/closed_call/ppermute", "ppermute"),
    ],
)
def test_short_names_of_operations(op_name, name):
    assert what(op_name) == name
