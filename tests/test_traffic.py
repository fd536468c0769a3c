"""What a compiled program reads, writes and multiplies, by hand."""

import pytest

from empdg_jax.hardware import traffic

# A look-up of 6 rows of a table of 1,000, and a scatter of them into another.
ROWS = """\
HloModule m

%look_up (p0: f32[1000,8], p1: s32[6,1]) -> f32[6,8] {
  %p0 = f32[1000,8]{1,0} parameter(0)
  %p1 = s32[6,1]{1,0} parameter(1)
  ROOT %g = f32[6,8]{1,0} gather(%p0, %p1), offset_dims={1}
}

%add_rows (q0: f32[1000,8], q1: s32[6,1], q2: f32[6,8]) -> f32[1000,8] {
  %q0 = f32[1000,8]{1,0} parameter(0)
  %q1 = s32[6,1]{1,0} parameter(1)
  %q2 = f32[6,8]{1,0} parameter(2)
  ROOT %s = f32[1000,8]{1,0} scatter(%q0, %q1, %q2), to_apply=%sum
}

ENTRY %main (t: f32[1000,8], u: f32[1000,8], i: s32[6,1]) -> f32[1000,8] {
  %t = f32[1000,8]{1,0} parameter(0)
  %u = f32[1000,8]{1,0} parameter(1)
  %i = s32[6,1]{1,0} parameter(2)
  %rows = f32[6,8]{1,0} fusion(%t, %i), kind=kLoop, calls=%look_up
  ROOT %r = f32[1000,8]{1,0} fusion(%u, %i, %rows), kind=kLoop, calls=%add_rows
}
"""

# Five products of 2 x 8 and 8 x 8, of which one factor is in on-chip memory.
LOOP = """\
HloModule m

%body (c: (s32[], f32[2,8], bf16[8,8])) -> (s32[], f32[2,8], bf16[8,8]) {
  %c = (s32[], f32[2,8]{1,0}, bf16[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %x = f32[2,8]{1,0} get-tuple-element(%c), index=1
  %w = bf16[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%c), index=2
  %n = s32[] get-tuple-element(%c), index=0
  %y = f32[2,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %o = (s32[], f32[2,8]{1,0}, bf16[8,8]{1,0:T(8,128)S(1)}) tuple(%n, %y, %w)
}

%condition (d: (s32[], f32[2,8], bf16[8,8])) -> pred[] {
  %d = (s32[], f32[2,8]{1,0}, bf16[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %k = s32[] get-tuple-element(%d), index=0
  %bound = s32[] constant(5)
  ROOT %lt = pred[] compare(%k, %bound), direction=LT
}

ENTRY %main (a: (s32[], f32[2,8], bf16[8,8])) -> (s32[], f32[2,8], bf16[8,8]) {
  %a = (s32[], f32[2,8]{1,0}, bf16[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  ROOT %l = (s32[], f32[2,8]{1,0}, bf16[8,8]{1,0:T(8,128)S(1)}) while(%a), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_look_up_counts_its_rows() -> None:
  work = traffic.count_work(ROWS)
  rows, ids = 6 * 8 * 4, 6 * 4
  # Rows read and written; then read, added to rows that are read and written.
  assert work.traffic == (2 * rows + ids) + (3 * rows + ids)


@pytest.mark.parametrize(
  "config",
  ["", ', backend_config={"known_trip_count":{"n":"5"}}'],
)
def test_a_loop_counts_as_often_as_it_runs(config: str) -> None:
  text = LOOP.replace("body=%body", "body=%body" + config)
  once, work = traffic.count_work(text, loops=False), traffic.count_work(text)
  assert once.products == 2 * 2 * 8 * 8
  # The dot's other factor and result, and the comparison of two numbers.
  assert once.traffic == 2 * (2 * 8 * 4) + 9
  assert work == tuple(5 * x for x in once)


@pytest.mark.parametrize(
  ("source", "place", "expected"),
  [
    ("", "S(1)", 2 * 8 * 4),  # Into on-chip memory: rows are read.
    ("S(1)", "", 2 * 8 * 4),
    ("", "", 2 * (2 * 8 * 4)),
    ("S(1)", "S(1)", 0),
  ],
)
def test_a_slice_that_is_fetched_ahead_counts_its_rows(
  source: str, place: str, expected: int
) -> None:
  table = f"f32[1000,8]{{1,0:T(8,128){source}}}"
  rows = f"f32[2,8]{{1,0:T(8,128){place}}}"
  text = f"""\
ENTRY %main (t: f32[1000,8]) -> f32[2,8] {{
  %t = {table} parameter(0)
  %s = (({table}), {rows}, s32[]{{:S(2)}}) slice-start(%t), slice={{[0:2]}}
  ROOT %d = {rows} slice-done(%s)
}}
"""
  assert traffic.count_work(text).traffic == expected


def test_products_as_convolutions() -> None:
  text = """\
ENTRY %main (x: bf16[208,300], w: bf16[300,20100]) -> bf16[208,20100] {
  %x = bf16[208,300]{1,0} parameter(0)
  %w = bf16[300,20100]{1,0} parameter(1)
  ROOT %y = bf16[208,20100]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}
"""
  assert traffic.count_work(text).products == 2 * 208 * 300 * 20_100
