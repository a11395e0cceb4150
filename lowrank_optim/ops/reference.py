"""Each operator in plain torch: its default kernel, and the truth that native kernels have to match.

Arguments were checked by `schema.py`. Codes, noise and moments have equal bits in all kernels, as products and sums
are rounded one by one here (`lerp_` and `alpha=` fuse them in some of torch's loops and not in others); the direction
may differ in its last bits, as torch's roots do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import cosines
from .blocks import blocks as column_blocks
from .products import add_product_, product

_TINY = torch.finfo(torch.float32).tiny
_NEARLY = {torch.float32: 1 - 2.0**-14, torch.float64: 1 - 2.0**-30}  # as large, but for rounding errors
PIECE = 1 << 16  # elements worked on at once on CPU, so that a piece and its temporaries stay in cache

# -- Adam --------------------------------------------------------------------------------------------------------------


def projected_adam_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    r: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    """One step of Adam's moments; r is overwritten by the direction. `step` stands in for t, read on the device."""
    count: Any = t if step is None else step.view(()).double()
    gain, correction = 1 / (1 - beta1**count), 1 - beta2**count
    inverse = 1 / (correction.sqrt() if isinstance(correction, Tensor) else math.sqrt(correction))
    size = PIECE if r.device.type == "cpu" else max(1, r.numel())
    for m, v, x in zip(*(torch.split(tensor.view(-1), size) for tensor in (exp_avg, exp_avg_sq, r)), strict=True):
        _adam_(m, v, x, beta1, beta2, eps, gain, inverse)


def projected_adam_rows_(
    exp_avg: Tensor, exp_avg_sq: Tensor, r: Tensor, beta1: float, beta2: float, eps: float, ages: Tensor
) -> None:
    """The same where each row has seen a number of steps of its own, `ages`."""
    count = ages.double().view(*r.shape[:-1], 1)
    gain, inverse = (x.to(r.dtype) for x in (1 / (1 - beta1**count), 1 / (1 - beta2**count).sqrt()))
    _adam_(exp_avg, exp_avg_sq, r, beta1, beta2, eps, gain, inverse)


def _adam_(m: Tensor, v: Tensor, x: Tensor, beta1: float, beta2: float, eps: float, gain: Any, inverse: Any) -> None:
    """`gain` and `inverse` are those of both bias corrections, numbers or tensors."""
    scratch = x * (1 - beta1)
    m.mul_(beta1).add_(scratch)
    torch.mul(x, 1 - beta2, out=scratch)
    v.mul_(beta2).add_(scratch.mul_(x))
    torch.sqrt(v, out=scratch).mul_(inverse).add_(eps)
    torch.mul(m, gain, out=x).div_(scratch)


def projected_adam_list_(
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    r: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    """The same for several tensors."""
    for m, v, x in zip(exp_avg, exp_avg_sq, r, strict=True):
        projected_adam_(m, v, x, beta1, beta2, eps, t, step)


def projected_adam_bfloat16_list_(
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    r: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None,
    key: list[int],
    purpose: int,
    purpose_sq: int,
    time: int,
    at: Tensor | None,
    start: list[int],
) -> None:
    """Moments in bfloat16, rounded stochastically: tensor i with elements `start[i]` and up of streams of `key[i]`."""
    for m, v, x, own, first in zip(exp_avg, exp_avg_sq, r, key, start, strict=True):
        size = PIECE if x.device.type == "cpu" else max(1, x.numel())
        pieces = zip(*(torch.split(tensor.view(-1), size) for tensor in (m, v, x)), strict=True)
        for i, (small, small_sq, piece) in enumerate(pieces):
            wide, wide_sq = small.float(), small_sq.float()
            projected_adam_(wide, wide_sq, piece, beta1, beta2, eps, t, step)
            round_to_bfloat16_(small, wide, own, purpose, time, at, first + i * size)
            round_to_bfloat16_(small_sq, wide_sq, own, purpose_sq, time, at, first + i * size)


def projected_adam_int8_list_(
    exp_avg: list[Tensor],
    peak: list[Tensor],
    exp_avg_sq: list[Tensor],
    peak_sq: list[Tensor],
    r: list[Tensor],
    code_map: Tensor,
    lower: Tensor,
    code_map_sq: Tensor,
    lower_sq: Tensor,
    block: int,
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    """Moments as codes of two maps, and the largest element of each block with its sign; no code 0 in `exp_avg_sq`."""
    maps = [(table, low, _midpoints(table, low)) for table, low in ((code_map, lower), (code_map_sq, lower_sq))]
    for m, m_peak, v, v_peak, x in zip(exp_avg, peak, exp_avg_sq, peak_sq, r, strict=True):
        rows = math.prod(m_peak.shape[:-1])
        if not x.numel():
            continue
        elements, numbers = [one.view(rows, -1) for one in (m, v, x)], [one.view(rows, -1) for one in (m_peak, v_peak)]
        for codes, codes_sq, place, top, top_sq in _pieces(elements, numbers, block):
            stored = (codes, top), (codes_sq, top_sq)
            wide, wide_sq = (
                table.index_select(0, code.flatten().int()).view(code.shape).mul_(largest)
                for (code, largest), (table, _, _) in zip(stored, maps, strict=True)
            )
            d = place.contiguous()  # of several rows the pieces have gaps
            projected_adam_(wide, wide_sq, d, beta1, beta2, eps, t, step)
            place.copy_(d)
            for (code, largest), opened, (table, low, middle) in zip(stored, (wide, wide_sq), maps, strict=True):
                fresh, peaks = torch.empty_like(opened, dtype=torch.uint8), torch.empty_like(largest)
                quantize_blockwise_(fresh, peaks, opened, table, low, middle, block, True)  # into memory without gaps
                code.copy_(fresh)
                largest.copy_(peaks)
            codes_sq.clamp_(min=1)


def _midpoints(code_map: Tensor, lower: Tensor) -> Tensor:
    """To the next entry, for each entry of `lower`."""
    beyond = torch.cat([(code_map[1:] + code_map[:-1]) / 2, torch.full_like(code_map[:1], math.inf)])
    return beyond.index_select(0, lower.int())


# -- Adafactor ---------------------------------------------------------------------------------------------------------


def scale_factored_(out: Tensor, x: Tensor, rows: Tensor, columns: Tensor, most: float) -> None:
    """Each element of x (..., m, n) times the factors of its row and its column, or times `most` if that is less."""
    for _, by_row, by_column, piece, target in _lines(x, rows, columns, out):
        torch.mul(by_row, by_column, out=target).clamp_(max=most).mul_(piece)


def factored_energy_(sums: Tensor, x: Tensor, rows: Tensor, columns: Tensor, most: float) -> None:
    """The sum of squares of the same, one number in float64 per matrix."""
    sums.zero_()
    for which, by_row, by_column, piece in _lines(x, rows, columns):
        scaled = (by_row * by_column).clamp_(max=most).mul_(piece)
        sums.view(-1)[which] += scaled.double().square_().sum((-2, -1))


def step_factored_(
    w: Tensor,
    exp_avg: Tensor | None,
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    most: float,
    beta: float,
    gain: float,
    length: float,
    keep: float,
) -> None:
    """`M <- beta M + gain Y; W <- keep W - length M`, Y being the same; without M `W <- keep W - length gain Y`."""
    others = [w] if exp_avg is None else [w, exp_avg]
    for _, by_row, by_column, piece, target, *mean in _lines(x, rows, columns, *others):
        scaled = (by_row * by_column).clamp_(max=most).mul_(piece).mul_(gain)
        if mean:
            scaled.copy_(mean[0].mul_(beta).add_(scaled))
        target.mul_(keep).sub_(scaled.mul_(length))


def _lines(x: Tensor, rows: Tensor, columns: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """(which matrix, factors of some lines, of columns, those lines of x and others); off the CPU all at once."""
    by_column, *cut = (one.view(math.prod(one.shape[:-2]), *one.shape[-2:]) for one in (columns, rows, x, *others))
    if x.device.type != "cpu":
        yield slice(None), cut[0], by_column, *cut[1:]
        return
    some = max(1, PIECE // max(1, x.shape[-1]))
    for i, line in enumerate(by_column):
        for by_row, *pieces in zip(*(torch.split(one[i], some) for one in cut), strict=True):
            yield i, by_row, line, *pieces


# -- Bases -------------------------------------------------------------------------------------------------------------


def gram_(out: Tensor, y: Tensor, across: bool = False) -> None:
    """`Y^T Y` in float64 of y (m, k), or `Y Y^T` if across."""
    out.zero_()
    lines = y if across else y.mT
    for columns in column_blocks(lines.shape, y.device.type):
        wide = columns.of(lines).double()
        out.add_(wide @ wide.mT)


def leading_entries(x: Tensor) -> Tensor:
    """Return the first entry of each column of `x (..., m, r)` that is as large as the largest one: `(..., 1, r)`.

    Entries of a singular vector whose magnitudes differ by no more than rounding errors are equally large.
    """
    sizes = x.abs()
    limit = sizes.amax(-2, keepdim=True).mul_(_NEARLY[x.dtype])
    return x.gather(-2, sizes.ge_(limit).argmax(-2, keepdim=True))


def fix_signs_(basis: Tensor) -> None:
    """The largest entry of each column becomes positive, the first of equal ones."""
    if basis.numel():
        basis.mul_(torch.where(leading_entries(basis) < 0, -1.0, 1.0).to(basis.dtype))


# -- Philox ------------------------------------------------------------------------------------------------------------

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
BLOCK = 1 << 14  # counters generated at once, so that the int64 temporaries stay in cache
DRAWING = 17  # elements of float32 held for each number of such a block that is normal

Stream = tuple[int, "int | Tensor"]
_Block = tuple[Tensor, list[Tensor], int]  # a piece of the result, the words for it, how many of their elements to skip


def philox(counter: Tensor, key: int, stream: Stream) -> list[Tensor]:
    """Four int64 tensors of 32-bit words, one word quadruple per counter."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2: Any
    c3: Any
    c2, c3 = (word & _MASK for word in stream)  # numbers, until the first round mixes them with the counters
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves right once the upper one is masked.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def blocks(out: Tensor, lanes: int, start: int, key: int, stream: Stream) -> Iterator[_Block]:
    """Cuts the flat `out` into pieces of at most `BLOCK` counters."""
    position = 0
    while position < out.numel():
        first, skip = divmod(start + position, lanes)
        size = min(out.numel() - position, BLOCK * lanes - skip)
        last = -(-(start + position + size) // lanes)
        counter = torch.arange(first, last, dtype=torch.int64, device=out.device)
        yield out[position : position + size], philox(counter, key, stream), skip
        position += size


def philox_bits16_(out: Tensor, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0) -> None:
    """Uniform 16-bit integers, elements `start` and up of the stream. `at` stands in for time, read on the device."""
    for target, words, skip in blocks(out.view(-1), 8, start, key, (purpose, time if at is None else at.view(()))):
        lanes = target.new_empty(len(words[0]), 8)
        for i, word in enumerate(words):
            lanes[:, 2 * i].copy_(word & 0xFFFF)
            lanes[:, 2 * i + 1].copy_(word >> 16)
        target.copy_(lanes.flatten()[skip : skip + target.numel()])


def philox_noise16_(out: Tensor, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0) -> None:
    """The same as the midpoints of 65536 equal cells of (0, 1)."""
    flat, size = out.view(-1), BLOCK * 8
    for position in range(0, out.numel(), size):
        piece = flat[position : position + size]
        bits = torch.empty(piece.shape, dtype=torch.int32, device=out.device)
        philox_bits16_(bits, key, purpose, time, at, start + position)
        piece.copy_(bits).add_(0.5).mul_(2.0**-16)


def philox_uniform_(out: Tensor, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0) -> None:
    """The midpoints of 2^23 equal cells of (0, 1), which are floats: none is rounded to 1."""
    for target, words, skip in blocks(out.view(-1), 4, start, key, (purpose, time if at is None else at.view(()))):
        cells = torch.stack(words, dim=-1).flatten()[skip : skip + target.numel()] >> 9
        target.copy_((cells.double() + 0.5) * 2.0**-23)


def philox_normal_(out: Tensor, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0) -> None:
    """Standard normal numbers: Box-Muller, `sqrt(-2 log u)` times the cosine and the sine of `2 pi v`.

    Logarithm, cosine and sine are polynomials, as those of libraries differ in their last bits.
    """
    for target, words, skip in blocks(out.view(-1), 4, start, key, (purpose, time if at is None else at.view(()))):
        pairs = _normal_pair(torch.stack(words[::2], dim=-1), torch.stack(words[1::2], dim=-1))
        target.copy_(torch.stack(pairs, dim=-1).flatten()[skip : skip + target.numel()])


# Minimax in double, relative errors below 2^-33: of -2 log(1 + x) / x, and of cosine and sine of quarter turns.
_LOG = (
    *(-2.000000000069894, 1.0000000066099737, -0.6666666302869585, 0.4999986696525973, -0.4000022680367106),
    *(0.3334095800110999, -0.28571005412477596, 0.24821176285110688, -0.2204231241325923, 0.21762395628763806),
    *(-0.2146772654188622, 0.1196994964197827),
)
_COSINE = (0.9999999999439587, -1.2337005395654945, 0.25366918260255533, -0.020859936041659748, 0.0009033629646812772)
_SINE = (1.5707963267877518, -0.6459640961024318, 0.07969258184293669, -0.0046812606280718936, 0.00015819507558202523)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    *lower, linear, highest = coefficients
    result = (x * highest).add_(linear)
    for one in reversed(lower):
        result.mul_(x).add_(one)
    return result


def _normal_length(word: Tensor) -> Tensor:
    """`sqrt(-2 log u)` for the midpoint u of one of 2^32 cells of (0, 1), rounded to float32 but kept in float64."""
    x, exponent = torch.frexp((word.double() + 0.5) * 2.0**-32)
    small = x < 0.5**0.5
    x, halvings = torch.where(small, x * 2, x) - 1, small.double() - exponent
    log = halvings * (2 * math.log(2)) + x * _polynomial(x, _LOG)
    return torch.sqrt(log.float().double()).float().double()  # torch's roots are rounded correctly this way only


def _normal_pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The turn is that of one of 2^32 midpoints, as at most half a quarter from the nearest of four quarters."""
    turn = (angle + (1 << 29)) & _MASK
    quarter, past = turn >> 30, (turn & 0x3FFFFFFF) - (1 << 29)
    x, length = (past.double() + 0.5) * 2.0**-30, _normal_length(radius)
    square = x * x
    along, across = length * _polynomial(square, _COSINE), length * (x * _polynomial(square, _SINE))
    odd = (quarter & 1).bool()
    first, second = torch.where(odd, across, along), torch.where(odd, along, across)
    return torch.where((quarter + 1 & 2).bool(), -first, first), torch.where((quarter & 2).bool(), -second, second)


def round_to_bfloat16_(
    out: Tensor, x: Tensor, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0
) -> None:
    """Adds 16 random bits below bfloat16's last one and cuts them off: carries with the probability of the distance."""
    bits = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    philox_bits16_(bits, key, purpose, time, at, start)
    bits.add_(x.view(torch.int32)).bitwise_and_(-65536)
    out.copy_(bits.view(torch.float32))


# -- weights in bfloat16 -----------------------------------------------------------------------------------------------


def add_nearest_(w: Tensor, x: Tensor, keep: float, factor: Tensor | None = None, first: int = 0) -> None:
    """`W <- nearest(keep W + x)` in the columns from `first` on. `factor` stands in for keep, read on the device."""
    for target, y in _row_pieces(w[:, first : first + x.shape[1]], x):
        target.copy_(_moved(target.float(), y, keep, factor))


def add_kahan_(w: Tensor, owed: Tensor, x: Tensor, keep: float, factor: Tensor | None = None, first: int = 0) -> None:
    """The same of `W + owed`, and then owed is what rounding has kept from W."""
    some = slice(first, first + x.shape[1])
    for target, rest, y in _row_pieces(w[:, some], owed[:, some], x):
        exact = _moved(target.float().add_(rest), y, keep, factor)
        target.copy_(exact)
        rest.copy_(exact.sub_(target))


def add_stochastic_(
    w: Tensor,
    x: Tensor,
    keep: float,
    key: int,
    purpose: int,
    time: int,
    at: Tensor | None = None,
    start: int = 0,
    pitch: int = 0,
    factor: Tensor | None = None,
    first: int = 0,
) -> None:
    """`round_to_bfloat16_` of the same. The element (i, j) of x has the number `start + i pitch + j` of the stream."""
    stream = purpose, time if at is None else at.view(())
    rows, run = x.shape
    wide = min(run, BLOCK * 8)
    some = max(1, BLOCK * 8 // max(1, wide))  # rows at once
    for row in range(0, rows, some):
        begins = start + pitch * torch.arange(row, min(row + some, rows), dtype=torch.int64, device=x.device)
        for column in range(0, run, max(1, wide)):
            y = x[row : row + some, column : column + wide]
            target = w[row : row + some, first + column : first + column + y.shape[1]]
            bits = _bits16_of_rows(begins + column, y.shape[1], key, stream)
            exact = _moved(target.float(), y, keep, factor)
            target.copy_(bits.add_(exact.view(torch.int32)).bitwise_and_(-65536).view(torch.float32))


def _moved(w: Tensor, x: Tensor, keep: float, factor: Tensor | None) -> Tensor:
    return w.mul_(keep if factor is None else factor.view(()).float()).add_(x)


def _row_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows, run = tensors[0].shape
    some = max(1, PIECE // max(1, run)) if tensors[0].device.type == "cpu" else max(1, rows)
    return zip(*(torch.split(x, some) for x in tensors), strict=True)


def _bits16_of_rows(begins: Tensor, run: int, key: int, stream: Stream) -> Tensor:
    """`(rows, run)`, int32: of each row `run` numbers of the stream, from the one that it begins with on."""
    counters = (begins // 8).unsqueeze(-1) + torch.arange(run // 8 + 2, dtype=torch.int64, device=begins.device)
    lanes = counters.new_empty(counters.numel(), 8, dtype=torch.int32)
    for i, word in enumerate(philox(counters.flatten(), key, stream)):
        lanes[:, 2 * i].copy_(word & 0xFFFF)
        lanes[:, 2 * i + 1].copy_(word >> 16)
    return lanes.view(len(begins), -1).gather(1, (begins % 8).unsqueeze(-1) + torch.arange(run, device=begins.device))


# -- blockwise codes ---------------------------------------------------------------------------------------------------


def quantize_blockwise_(
    codes: Tensor,
    absmax: Tensor,
    x: Tensor,
    code_map: Tensor,
    lower: Tensor,
    midpoint: Tensor,
    block: int,
    signed_peak: bool = False,
    noise: Tensor | None = None,
) -> None:
    """The nearest entries of a map; `lower`, `midpoint`: the table that `quantize.nearest_table` made of it."""
    for blocks, code, *dither, peak in _pieces([x, codes] if noise is None else [x, codes, noise], [absmax], block):
        blocks = blocks.float()
        top, bottom = blocks.amax(-1, True), blocks.amin(-1, True)
        largest = torch.maximum(top, -bottom)
        peak.copy_(torch.where(-bottom > top, bottom, top) if signed_peak else largest)
        unit = (blocks / torch.where(largest < _TINY, _TINY, peak)).flatten()
        # The upper half of a float32 leaves two candidates: a look-up instead of `bucketize`, which is 20 times slower.
        upper = (unit.view(torch.int32) >> 16).add_(1 << 15)
        higher = (unit > midpoint.index_select(0, upper)).view(torch.uint8)
        nearest = lower.index_select(0, upper).add_(higher)
        code.copy_((_dithered(unit, nearest, code_map, dither[0]) if dither else nearest).view(code.shape))


def _dithered(unit: Tensor, nearest: Tensor, code_map: Tensor, noise: Tensor) -> Tensor:
    """The entry below each number or the one above. Noise is never 0 or 1: an ulp away from an entry goes to it."""
    nearest = nearest.int()
    below = (nearest - (code_map.index_select(0, nearest) > unit).int()).clamp_(min=0)
    gaps = torch.cat([code_map.diff(), torch.ones_like(code_map[:1])])  # nothing is above the last entry
    rest = (unit - code_map.index_select(0, below)).div_(gaps.index_select(0, below))
    return below.add_(rest > noise.flatten())


def quantize_affine_(
    codes: Tensor, scale: Tensor, low: Tensor, x: Tensor, bits: int, block: int, noise: Tensor | None = None
) -> None:
    """Equal steps from the least to the largest element of each block."""
    most = 2**bits - 1
    tensors, steps = [x, codes] if noise is None else [x, codes, noise], torch.full((), most, device=x.device)
    for blocks, code, *dither, step, least in _pieces(tensors, [scale, low], block):
        blocks = blocks.float()
        least.copy_(blocks.amin(-1, True))
        # By a tensor: accelerators multiply by the inverse of a number. A constant block keeps its value.
        step.copy_((blocks.amax(-1, True) - least).div_(steps).clamp_(min=_TINY))
        places = (blocks - least).div_(step)
        if not dither:
            places.add_(0.5).floor_()
        else:  # compared and not added up: a sum would be rounded, and move what is on the grid
            rest = places.frac()
            places.floor_().add_(rest > dither[0])
        code.copy_(places.clamp_(max=most))


def quantize_sixteenths_(codes: Tensor, largest: Tensor, x: Tensor, block: int, noise: Tensor | None = None) -> None:
    """Sixteenths of the largest element of each block, from 1 to 16."""
    for blocks, code, *dither, peak in _pieces([x, codes] if noise is None else [x, codes, noise], [largest], block):
        blocks = blocks.float()
        peak.copy_(blocks.amax(-1, True))
        places = (blocks / peak.clamp(min=_TINY)).mul_(16)
        rest = places.frac()
        places.floor_().add_(rest > dither[0] if dither else rest >= 0.5)
        code.copy_(places.clamp_(1, 16).sub_(1))


def dequantize_blockwise_(x: Tensor, codes: Tensor, absmax: Tensor, code_map: Tensor, block: int) -> None:
    """The entries of the map times the number of their block."""
    for code, target, peak in _pieces([codes, x], [absmax], block):
        target.copy_(code_map.index_select(0, code.flatten().int()).view(code.shape).mul_(peak))


def dequantize_affine_(x: Tensor, codes: Tensor, scale: Tensor, low: Tensor, block: int) -> None:
    """Steps from the least element of their block."""
    for code, target, step, least in _pieces([codes, x], [scale, low], block):
        target.copy_(code.float().mul_(step).add_(least))


def pack4_(packed: Tensor, codes: Tensor) -> None:
    """Two codes below 16 to a byte, the first in the lower half."""
    pairs = codes.shape[-1] // 2
    torch.bitwise_left_shift(codes[..., 1::2], 4, out=packed[..., :pairs])
    packed[..., :pairs].bitwise_or_(codes[..., : 2 * pairs : 2])
    packed[..., pairs:] = codes[..., 2 * pairs :]


def unpack4_(codes: Tensor, packed: Tensor) -> None:
    """The codes again."""
    codes[..., ::2] = packed & 15
    codes[..., 1::2] = packed[..., : codes.shape[-1] // 2] >> 4


def _pieces(elements: list[Tensor], numbers: list[Tensor], block: int) -> Iterator[list[Tensor]]:
    """Views `(rows, blocks, width)` of `elements (..., k)`, `(rows, blocks, 1)` of `numbers`, which has one per block.

    The short block at the end is a piece of its own, so that nothing has to be padded.
    """
    elements, numbers = (
        [x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0) for x in xs] for xs in (elements, numbers)
    )
    b, k = elements[0].shape
    limit = PIECE if elements[0].device.type == "cpu" else max(1, b * k)
    for start, stop, width in ((0, k - k % block, block), (k - k % block, k, k % block)):
        if start == stop:
            continue
        views = [x[:, start:stop].view(b, (stop - start) // width, width) for x in elements]
        views += [x[:, start // block : -(-stop // block)].unsqueeze(-1) for x in numbers]
        rows, columns = max(1, limit // (stop - start)), max(1, limit // width)
        for row in range(0, b, rows):
            for column in range(0, views[0].shape[1], columns):
                yield [x[row : row + rows, column : column + columns] for x in views]


# -- selections and sparse parts ---------------------------------------------------------------------------------------

LANES = 16  # partial sums of one sampled product


def select_top_(index: Tensor, scores: Tensor) -> None:
    """The positions of the largest scores of each line, ascending; of equal scores the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    index.copy_(order[..., : index.shape[-1]].sort(dim=-1).values)


def add_at_(dense: Tensor, positions: Tensor, values: Tensor, start: int = 0) -> None:
    """Adds values at flat positions of a tensor of which dense begins with element `start`."""
    _ordered(positions, start, start + dense.numel())
    dense.view(-1).index_add_(0, positions - start if start else positions, values)


def gather_at_(out: Tensor, dense: Tensor, positions: Tensor, start: int = 0) -> None:
    """The elements at flat positions of a tensor of which dense begins with element `start`."""
    _ordered(positions, start, start + dense.numel())
    out.copy_(dense.view(-1).index_select(0, positions - start if start else positions))


def add_sampled_product_(out: Tensor, left: Tensor, right: Tensor, positions: Tensor) -> None:
    """Adds elements of `left right^T (m, n)`, from (m, k) and (n, k), in partial sums that are added in halves."""
    _ordered(positions, 0, left.shape[0] * right.shape[0])
    size = max(1, 4 * PIECE // max(1, left.shape[1]))
    for place, target in zip(torch.split(positions, size), torch.split(out, size), strict=True):
        row = place // max(1, right.shape[0])
        column = place - row * right.shape[0]
        products = left.index_select(0, row).mul_(right.index_select(0, column)).mT.contiguous()
        sums = products.new_zeros(LANES, len(place))
        for part in torch.split(products, LANES):
            sums[: len(part)].add_(part)
        while len(sums) > 1:
            first, second = sums.chunk(2)
            sums = first + second
        target.add_(sums[0])


def squares_(rows: Tensor, columns: Tensor, x: Tensor) -> None:
    """Sums of squares over rows (..., m) and columns (..., n) of x (..., m, n), in float64."""
    columns.zero_()
    for some in _some_rows(x):
        squares = x[..., some, :].to(torch.float64, copy=True).square_()
        rows[..., some] = squares.sum(-1)
        columns.add_(squares.sum(-2))


def take_scaled_(w: Tensor, x: Tensor, factors: Tensor, keep: float) -> None:
    """`W <- keep W - x factors`. Where keep is 0, w is not read."""
    if keep == 0:
        torch.mul(x, factors, out=w).neg_()
        return
    w.mul_(keep)
    for some in _some_rows(x):
        w[..., some, :].sub_(x[..., some, :] * (factors if factors.shape[-2] == 1 else factors[..., some, :]))


def _some_rows(x: Tensor) -> Iterator[slice]:
    """Of each matrix so many on CPU that they and their squares in float64 are a piece, elsewhere all."""
    m = x.shape[-2]
    size = max(1, PIECE // 4 // max(1, x.shape[-1])) if x.device.type == "cpu" else max(1, m)
    return (slice(first, min(first + size, m)) for first in range(0, m, size))


def _ordered(positions: Tensor, start: int, stop: int) -> None:
    """Looked at on the CPU only: elsewhere that would stop the host."""
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or not len(positions):
        return
    inside = start <= int(positions[0]) and int(positions[-1]) < stop
    if not (inside and bool((positions[1:] > positions[:-1]).all())):
        raise RuntimeError(f"positions must ascend from at least {start} to below {stop}, none of them twice")


def move_rows_(x: Tensor, source: Tensor) -> None:
    """Each row becomes what row `source` was, or zeros for -1. Sources ascend."""
    _check_ascent(source)
    kept = x[source.clamp(min=0)] if len(x) else x
    x.copy_(kept.masked_fill_((source < 0).view(-1, *[1] * (x.dim() - 1)), 0))


def _check_ascent(source: Tensor) -> None:
    """On a device this would stop the host."""
    if source.device.type != "cpu":
        return
    some = source[source != -1]
    if some.numel() and (int(some[0]) < 0 or int(some[-1]) >= len(source) or bool((some.diff() <= 0).any())):
        raise RuntimeError(f"source must ascend from at least 0 to below {len(source)}, none of them twice, or be -1")


# -- cosine transforms -------------------------------------------------------------------------------------------------


def cosine_scores_(sums: Tensor, x: Tensor, third: bool, power: int, across: bool) -> None:
    """Sums of `|coefficient|^power` over the columns of x, or over its lines if `across`."""
    sums.copy_(cosines.scores(third, x.mT if across else x, power))


def cosine_rows_(out: Tensor, x: Tensor, index: Tensor, third: bool, across: bool) -> None:
    """The coefficients number `index` of each column of x, or of each line if `across`."""
    _check_places(index, x.shape[1 if across else 0])
    chosen = cosines.vectors(third, x.shape[1 if across else 0], index, x.dtype)
    out.copy_(product(chosen.mT, x.mT if across else x))


def add_cosines_(
    w: Tensor, d: Tensor, index: Tensor, alpha: float, beta: float, third: bool, across: bool, first: int = 0
) -> None:
    """Vectors times d, which is `(r, k)` and begins with column `first` of it, times alpha, is added to beta W."""
    whole = w.mT if across else w
    _check_places(index, whole.shape[0])
    some = d[:, first : first + whole.shape[1]]
    add_product_(whole, cosines.vectors(third, whole.shape[0], index, w.dtype), some, alpha, beta)


def _check_places(index: Tensor, m: int) -> None:
    """That rows number `index` are there; on a device this would stop the host."""
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= m:
            raise RuntimeError(f"index must be from 0 to below {m}, got {low if low < 0 else high}")
