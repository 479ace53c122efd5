r"""What the losses on a few tokens of each row need of all its tokens: a sum of exponentials, and shares of a number.

Between them, torch evaluates the few tokens of all rows at once. A row may be split over several programs, for batches
of fewer rows than a GPU runs programs: each has a part of the row, and parts are added in their order.

Exponentials are relative to the largest logit so far, each lane's own, and sums are brought along where it rises. None
overflows, and a row without tokens has the sum zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opdtheory.kernels.programs.elementary import in_bits

__all__ = ["below", "raised", "shares_program", "sums_program", "taken", "weight_of"]

_INF = tl.constexpr(float("inf"))
# Any logit that is not -inf is as large.
_LEAST = tl.constexpr(-3.4028234663852886e38)
# After all tokens.
_NEVER = tl.constexpr(1 << 60)


@triton.jit
def taken(logits, step, start, end, BLOCK: tl.constexpr):
    """A block of logits in float32; beyond the end, tokens that are absent."""
    # In 64 bits, as tokens may be far from the start of a row that is not contiguous.
    at = start + tl.arange(0, BLOCK).to(tl.int64)
    return tl.load(logits + at * step, mask=at < end, other=-_INF).to(tl.float32)


@triton.jit
def below(logits, top, factor):
    """The exponentials of logits less the largest, whose difference is exact near it."""
    return tl.exp2((logits - top) * factor)


@triton.jit
def raised(top, a, b):
    """The largest logit of each lane; NaN enters the sums only."""
    return tl.maximum(top, tl.maximum(a, b))


@triton.jit
def weight_of(weights, row, WEIGHED: tl.constexpr):
    """The weight of a row, float64."""
    weight = tl.full((), 1.0, tl.float64)
    if WEIGHED:
        weight = tl.load(weights + row).to(tl.float64)
    return weight


@triton.jit
def _outside(x, ids, place, following, listed, start, BLOCK: tl.constexpr):
    """A block without its listed tokens, and the place of the next listed one with the token itself."""
    at = start + tl.arange(0, BLOCK)
    while following < start + BLOCK:
        x = tl.where(at == following, -_INF, x)
        place += 1
        following = tl.load(ids + place, mask=place < listed, other=_NEVER)
    return x, place, following


@triton.jit
def sums_program(
    logits,
    ids,
    weights,
    tops,
    sums,
    logits_row,
    logits_word,
    words,
    listed,
    span,
    scale,
    WEIGHED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest logit of a part of a row and the sum of exponentials relative to it, of the tokens not listed."""
    row = tl.program_id(0).to(tl.int64)
    found = row * tl.num_programs(1) + tl.program_id(1)
    logits += row * logits_row
    weight = weight_of(weights, row, WEIGHED)
    if weight == 0.0:
        tl.store(tops + found, 0.0)
        tl.store(sums + found, weight + 1.0)
    else:
        factor = in_bits(scale)
        begin = tl.program_id(1) * span
        end = tl.minimum(begin + span, words)
        # In ascending order, those before this part first.
        ids += row * listed
        every = tl.arange(0, SLOTS)
        before = tl.load(ids + every, mask=every < listed, other=_NEVER) < begin
        place = tl.sum(before.to(tl.int32), 0)
        following = tl.load(ids + place, mask=place < listed, other=_NEVER)
        top = tl.full((BLOCK,), _LEAST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(begin, end, 4 * BLOCK):
            a = taken(logits, logits_word, start, end, BLOCK)
            b = taken(logits, logits_word, start + BLOCK, end, BLOCK)
            c = taken(logits, logits_word, start + 2 * BLOCK, end, BLOCK)
            d = taken(logits, logits_word, start + 3 * BLOCK, end, BLOCK)
            a, place, following = _outside(a, ids, place, following, listed, start, BLOCK)
            b, place, following = _outside(b, ids, place, following, listed, start + BLOCK, BLOCK)
            c, place, following = _outside(c, ids, place, following, listed, start + 2 * BLOCK, BLOCK)
            d, place, following = _outside(d, ids, place, following, listed, start + 3 * BLOCK, BLOCK)
            new = raised(raised(top, a, b), c, d)
            pairs = (below(a, new, factor) + below(b, new, factor)) + (below(c, new, factor) + below(d, new, factor))
            total = tl.fma(total, below(top, new, factor), pairs)
            top = new
        highest = tl.max(top, 0)
        tl.store(tops + found, highest)
        tl.store(sums + found, tl.sum((total * below(top, highest, factor)).to(tl.float64), 0))


@triton.jit
def shares_program(
    logits,
    gradient,
    tops,
    factors,
    logits_row,
    logits_word,
    gradient_row,
    gradient_word,
    words,
    span,
    scale,
    BLOCK: tl.constexpr,
):
    """A number for each token of a part of a row: the row's factor times the exponential relative to its top."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    gradient += row * gradient_row
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, words)
    every = tl.arange(0, BLOCK).to(tl.int64)
    share = tl.load(factors + row)
    if share == 0.0:
        # Nothing is read, whatever the logits hold.
        for start in range(begin, end, BLOCK):
            at = start + every
            tl.store(gradient + at * gradient_word, tl.zeros((BLOCK,), tl.float32), mask=at < end)
    else:
        top = tl.load(tops + row)
        factor = in_bits(scale)
        for start in range(begin, end, BLOCK):
            at = start + every
            slope = below(taken(logits, logits_word, start, end, BLOCK), top, factor) * share
            tl.store(gradient + at * gradient_word, slope, mask=at < end)
