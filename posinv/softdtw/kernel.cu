// Soft-DTW on NVIDIA GPUs: the kernels that cuda.py launches. Compiled for float costs or, with
// DOUBLE defined, for double costs.
//
// A block is one warp. It computes a strip: 32 rows of one utterance's cost, one row a lane. At
// step t, lane l is at column t - l, so the warp walks along the anti-diagonals. Steps by cell:
//
//                 column  0   1   2   3  ...
//       strip s   lane 0  0   1   2   3          (i, j) needs (i, j-1), its own result of the step
//                      1  1   2   3   4          before, and (i-1, j) and (i-1, j-1), which lane
//                      2  2   3   4   5          l - 1 computed one and two steps before: a shuffle
//                     ..                         passes them on.
//                     31  31  32  33  34
//     - - - - - - - - - - | - | - | - | - -      the row above a strip: through global memory, cell
//     strip s+1   lane 0  v   v   v   v          by cell, while both strips run
//
// Each block takes the next strip from a counter, from the top to the bottom. The strip that it
// waits for is therefore running or done: there is no deadlock, however few blocks fit on the GPU.
// backward is the same walk in reverse, from the last strip and step to the first.
//
// Costs and weights pass through tiles in shared memory: 32 rows of 64 columns, which are two
// chunks of 32. Column j is at j % 64. While one chunk is computed, the next one is loaded:
//
//                 chunk c (even)   chunk c+1 (odd)
//       lane 0   | . . . . x . . | . . . . . . . |    from and to global memory: along rows
//            1   | . . . x . . . | . . . . . . . |    x: the cells of a step, along a diagonal;
//            2   | . . x . . . . | . . . . . . . |    each is in another bank
//
// In global memory, rows have `width` of the cost's M columns. The rows of a block of 64, and the
// row above the block as far as the block needs it, begin with the same column, which is in
// first_columns (see band.py): strips 2 k and 2 k + 1 have that of block k. A pointer to a strip's
// row is moved back by it, so that column j is at [j]. Which columns of a row are inside the lengths
// and the band is computed once for each row, from the utterance's line, and kept behind the tiles.
//
// The accumulated cost is double, as its rounding error in float would change the weights (see
// cpu.py). Exponentials and logarithms are of differences of costs: their type is real.

#ifdef DOUBLE
typedef double real;
typedef long long word;
constexpr int RESIDENT = 8;  // blocks on a multiprocessor: limits the registers of a thread
#else
typedef float real;
typedef int word;
constexpr int RESIDENT = 12;
#endif
typedef long long int64;

constexpr int WARP = 32;
constexpr int RING = 2 * WARP;  // columns in shared memory
constexpr int STRIPS = 2;       // in a block of rows that begin with the same column
constexpr int GROUP = 8;        // steps between two reads of the neighbouring strip's row
constexpr unsigned ALL = 0xffffffffu;
constexpr double UNREACHABLE = 1e300;  // outside the band; finite, as inf - inf is not a number
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
constexpr word EMPTY = -1;  // not written yet

extern __shared__ real tiles[];

// Running blocks pass values through global memory. A word other than EMPTY has arrived. Reads and
// writes bypass the first-level cache, so no fence is needed.
__device__ word peek(const real* address) {
    return *reinterpret_cast<const volatile word*>(address);
}

__device__ void post(real* address, word bits) {
    *reinterpret_cast<volatile word*>(address) = bits;
}

template <class To, class From>
__device__ To same_bits(From from) {
    union {
        From from;
        To to;
    } both;
    both.from = from;
    return both.to;
}

__device__ word not_empty(word bits) { return bits == EMPTY ? EMPTY - 1 : bits; }

// A double in two words, neither of which is EMPTY: for that, a last bit may change.
struct Halves {
    word first, second;

    __device__ Halves(word first, word second) : first(first), second(second) {}

#ifdef DOUBLE
    __device__ explicit Halves(double value)
        : first(not_empty(same_bits<word>(value))), second(0) {}

    __device__ double joined() const { return same_bits<double>(first); }
#else
    __device__ explicit Halves(double value)
        : first(not_empty(static_cast<word>(same_bits<int64>(value)))),
          second(not_empty(static_cast<word>(same_bits<int64>(value) >> 32))) {}

    __device__ double joined() const {
        return same_bits<double>(static_cast<int64>(second) << 32 | static_cast<unsigned>(first));
    }
#endif
};

#ifdef DOUBLE
__device__ real fast_exp2(real x) { return exp2(x); }
__device__ real fast_log2(real x) { return log2(x); }
__device__ real fast_inverse(real x) { return 1 / x; }
#elif defined(__CUDA_ARCH__)  // one instruction each, with a relative error (log2: absolute) of 2^-22
__device__ real fast_exp2(real x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ real fast_log2(real x) {
    asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ real fast_inverse(real x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
#else
__device__ real fast_exp2(real x) { return exp2f(x); }
__device__ real fast_log2(real x) { return log2f(x); }
__device__ real fast_inverse(real x) { return 1 / x; }
#endif

// The columns of a row inside the lengths and the band: begin to before end.
struct Range {
    int begin, end;

    __device__ bool has(int j) const { return j >= begin && j < end; }
};

// Which cells are inside: 2 |i q - j p| <= reach.
struct Line {
    int64 p, q, reach;

    __device__ explicit Line(const int64* numbers)
        : p(numbers[0]), q(numbers[1]), reach(numbers[2]) {}

    __device__ bool has(int64 i, int64 j) const {
        const int64 distance = 2 * (i * q - j * p);
        return distance <= reach && -distance <= reach;
    }

    __device__ Range row(int64 i, int m) const {
        const int64 past = 2 * i * q - reach;
        const int64 begin = past > 0 ? (past + 2 * p - 1) / (2 * p) : 0;
        const int64 end = (2 * i * q + reach) / (2 * p) + 1;
        return {static_cast<int>(min(begin, static_cast<int64>(m))),
                static_cast<int>(min(end, static_cast<int64>(m)))};
    }
};

// What the kernels are told of the batch: see cuda.py.
struct Batch {
    int64 B, N, M, width;
    const int64 *x_lengths, *y_lengths, *lines, *first_columns;
};

struct Strip {
    int lane, b, index, n, m, top, row;
    int64 width;
    int shift, shift_below;  // the first stored column of this strip and of the next one
    Range own, above;        // the columns of the lane's row, and of the row above the strip
    Range* ranges;           // the columns of each row of the strip
    bool fits;               // whether the lengths fit the cost and the band

    // Takes the next strip: first comes strip `start` of every utterance, then their next ones.
    __device__ Strip(int* counter, const Batch& batch, int start, int direction)
        : width(batch.width), own{0, 0}, above{0, 0} {
        lane = threadIdx.x;
        int ticket = 0;
        if (lane == 0) ticket = atomicAdd(counter, 1);
        ticket = __shfl_sync(ALL, ticket, 0);
        b = ticket % static_cast<int>(batch.B);
        index = start + direction * (ticket / static_cast<int>(batch.B));
        const int64 x = batch.x_lengths[b], y = batch.y_lengths[b];
        const Line line(batch.lines + 3 * b);
        fits = x >= 1 && x <= batch.N && y >= 1 && y <= batch.M && line.has(x - 1, y - 1);
        n = static_cast<int>(x);
        m = static_cast<int>(y);
        top = index * WARP;
        row = top + lane;
        const int blocks = static_cast<int>((batch.N + STRIPS * WARP - 1) / (STRIPS * WARP));
        const int64* first = batch.first_columns + static_cast<int64>(b) * blocks;
        shift = static_cast<int>(first[index / STRIPS]);
        shift_below = static_cast<int>(first[min((index + 1) / STRIPS, blocks - 1)]);
        ranges = reinterpret_cast<Range*>(tiles + 2 * WARP * RING);
        if (fits && top < n) {
            if (row < n) own = line.row(row, m);
            if (top > 0) above = line.row(top - 1, m);
        }
        ranges[lane] = own;
        __syncwarp();
    }

    // Whether column j of row top + r is inside the lengths and the band.
    __device__ bool inside(int r, int j) const { return ranges[r].has(j); }

    // The chunk of the first column of this strip or of the row above it.
    __device__ int first_chunk() const { return (top > 0 ? above.begin : 0) / WARP; }

    __device__ int last_step() const {
        const int bottom = min(n - top, WARP) - 1;
        return ranges[bottom].end - 1 + bottom;
    }

    // Where a tile has column j of the lane's row.
    __device__ int cell(int j) const { return lane * RING + (j & (RING - 1)); }

    // Loads chunk c of the strip, whose first row is at rows: a lane gets one column of it.
    __device__ void load(real (&chunk)[WARP], const real* rows, int c) const {
        int j = c * WARP + lane;
#pragma unroll
        for (int r = 0; r < WARP; r++) chunk[r] = inside(r, j) ? rows[r * width + j] : real(0);
    }

    __device__ void put(const real (&chunk)[WARP], real* tile, int c) const {
        int slot = (c * WARP + lane) & (RING - 1);
#pragma unroll
        for (int r = 0; r < WARP; r++) tile[r * RING + slot] = chunk[r];
    }

    __device__ void flush(const real* tile, real* rows, int c) const {
        int j = c * WARP + lane, slot = j & (RING - 1);
        for (int r = 0; r < WARP; r++)
            if (inside(r, j)) rows[r * width + j] = tile[r * RING + slot];
    }
};

// Gives a cell's accumulated cost and the softmin weights of (i-1, j) and (i, j-1).
struct Soft {
    real scale;
    double unscale;

    __device__ explicit Soft(double gamma)
        : scale(static_cast<real>(fmin(LOG2_E / gamma, 1e30))), unscale(gamma * LN_2) {}

    __device__ double operator()(double cost, double diagonal, double above, double left,
                                 real& above_weight, real& left_weight) const {
        double low = diagonal < left ? diagonal : left;  // above comes last: it arrives last
        low = above < low ? above : low;
        const real e_diagonal = fast_exp2(static_cast<real>(low - diagonal) * scale);
        const real e_above = fast_exp2(static_cast<real>(low - above) * scale);
        const real e_left = fast_exp2(static_cast<real>(low - left) * scale);
        const real sum = e_diagonal + e_left + e_above;
        const real share = fast_inverse(sum);
        above_weight = e_above * share;
        left_weight = e_left * share;
        return cost + low - unscale * fast_log2(sum);
    }
};

// The same for gamma = 0; of equal predecessors, the diagonal is taken, then the one above.
struct Hard {
    __device__ explicit Hard(double) {}

    __device__ double operator()(double cost, double diagonal, double above, double left,
                                 real& above_weight, real& left_weight) const {
        double low = diagonal <= above ? diagonal : above;
        above_weight = above < diagonal && above <= left;
        left_weight = left < low;
        low = low <= left ? low : left;
        return cost + low + 0 * (diagonal + above + left);  // the minimum may have missed a NaN
    }
};

template <class Step>
__device__ void walk_down(const Strip& strip, const Step& step, const real* cost_rows,
                          real* first, real* second, int64 to_next_border, real* up_rows,
                          real* left_rows, real* value) {
    const int lane = strip.lane;
    real* tile = tiles;
    real* left_tile = tiles + WARP * RING;
    const bool passes_on = lane == WARP - 1 && strip.row + 1 < strip.n;

    const int start = strip.first_chunk() * WARP, last = strip.last_step();
    real chunk[WARP];
    strip.load(chunk, cost_rows, start / WARP);
    int border_column = start + lane % GROUP;
    bool from_above = strip.above.has(border_column);
    word first_bits = from_above ? peek(first + border_column) : EMPTY;
    word second_bits = from_above ? peek(second + border_column) : EMPTY;
    double row_end = 0;
    double left = UNREACHABLE;
    double above = strip.row == 0 ? 0.0 : UNREACHABLE;  // the diagonal predecessor of (0, 0)

    for (int t0 = start; t0 <= last; t0 += GROUP) {
        if (t0 % WARP == 0) {
            const int c = t0 / WARP;
            __syncwarp();
            if (up_rows) {
                strip.flush(tile, up_rows, c - 2);
                strip.flush(left_tile, left_rows, c - 2);
            }
            strip.put(chunk, tile, c);
            strip.load(chunk, cost_rows, c + 1);
            __syncwarp();
        }

        while (!__all_sync(ALL, !from_above || (first_bits != EMPTY && second_bits != EMPTY))) {
            if (from_above) {
                first_bits = peek(first + border_column);
                second_bits = peek(second + border_column);
            }
        }
        const double edge = from_above ? Halves(first_bits, second_bits).joined() : UNREACHABLE;
        border_column += GROUP;
        from_above = strip.above.has(border_column);
        first_bits = from_above ? peek(first + border_column) : EMPTY;
        second_bits = from_above ? peek(second + border_column) : EMPTY;

        double costs[GROUP];
#pragma unroll
        for (int q = 0; q < GROUP; q++) {
            const real cost = tile[strip.cell(t0 + q - lane)];
            costs[q] = cost - cost == 0 ? cost : nan("");
        }
        __syncwarp();  // the compiler must load them here, not in each step
#pragma unroll
        for (int q = 0; q < GROUP; q++) {
            const int j = t0 + q - lane;
            const double diagonal = above;
            above = __shfl_up_sync(ALL, left, 1);
            const double edge_here = __shfl_sync(ALL, edge, q);
            if (lane == 0) above = edge_here;
            real above_weight, left_weight;
            const double total = step(costs[q], diagonal, above, left, above_weight, left_weight);
            tile[strip.cell(j)] = above_weight;
            left_tile[strip.cell(j)] = -left_weight;
            const bool here = strip.own.has(j);
            left = here ? total : UNREACHABLE;
            const Halves halves(total);
            if (here && passes_on) {
                post(first + to_next_border + j, halves.first);
                post(second + to_next_border + j, halves.second);
            }
            if (j == strip.m - 1) row_end = total;
        }
    }
    if (strip.row == strip.n - 1) *value = static_cast<real>(row_end);
    __syncwarp();
    for (int c = last / WARP - 1; up_rows && c <= last / WARP; c++) {
        strip.flush(tile, up_rows, c);
        strip.flush(left_tile, left_rows, c);
    }
}

// Computes the accumulated cost of each utterance's last cell. Unless up is null, it also fills up
// and left with the softmin weights of (i-1, j) and (i, j-1); the three weights of a cell sum to
// one. Those in left are negative (see backward).
//
// Strip s gets the row above it through first and second, which hold half of each double: row
// b * border_rows + s * border_step, stored as the rows of strip s. They are EMPTY at first.
extern "C" __global__ void __launch_bounds__(WARP, RESIDENT)
    forward(const real* __restrict__ cost, int64 B, int64 N, int64 M, int64 width,
            const int64* x_lengths, const int64* y_lengths, const int64* lines,
            const int64* first_columns, double gamma, int* counter, int64 first_strip, real* first,
            real* second, int64 border_rows, int64 border_step, real* up, real* left,
            int64 left_rows, real* value) {
    const Batch batch = {B, N, M, width, x_lengths, y_lengths, lines, first_columns};
    const Strip strip(counter, batch, static_cast<int>(first_strip), 1);
    value += strip.b;
    if (!strip.fits && strip.index == 0 && strip.lane == 0) *value = static_cast<real>(nan(""));
    if (!strip.fits || strip.top >= strip.n) return;

    const int64 cell = (strip.b * N + strip.top) * width - strip.shift;
    const int64 border = (strip.b * border_rows + strip.index * border_step) * width - strip.shift;
    const int64 to_next_border = border_step * width + strip.shift - strip.shift_below;
    if (up) {
        up += cell;
        left += (strip.b * left_rows + strip.top - first_strip * WARP) * width - strip.shift;
    }
    if (gamma > 0)
        walk_down(strip, Soft(gamma), cost + cell, first + border, second + border, to_next_border,
                  up, left, value);
    else
        walk_down(strip, Hard(gamma), cost + cell, first + border, second + border, to_next_border,
                  up, left, value);
}

// Replaces the weights in up by the alignment; cells outside the lengths and the band get zero.
//
// A strip writes what it passes to the strip above it over its own first row of left, whose weights
// it has read by then. Weights in left are negative, as EMPTY is; what is passed on is not.
extern "C" __global__ void __launch_bounds__(WARP, RESIDENT)
    backward(const real* value, int64 B, int64 N, int64 M, int64 width, const int64* x_lengths,
             const int64* y_lengths, const int64* lines, const int64* first_columns, int* counter,
             int64 first_strip, int64 strips, real* up, real* left, int64 left_rows) {
    const Batch batch = {B, N, M, width, x_lengths, y_lengths, lines, first_columns};
    const Strip strip(counter, batch, static_cast<int>(first_strip + strips - 1), -1);
    const int lane = strip.lane, top = strip.top, row = strip.row;
    real* up_rows = up + (strip.b * N + top) * width - strip.shift;
    real* left_rows_here =
        left + (strip.b * left_rows + top - first_strip * WARP) * width - strip.shift;

    const bool is_nan = value[strip.b] != value[strip.b];
    const int stored_end = strip.shift + static_cast<int>(width);
    for (int r = 0; r < WARP && top + r < N; r++) {
        const Range range = strip.ranges[r];  // empty beyond the lengths, and if they don't fit
        const bool valid = range.begin < range.end;
        const int begin = valid ? range.begin : stored_end, end = valid ? range.end : stored_end;
        const real outside = strip.fits ? real(0) : static_cast<real>(nan(""));
        for (int j = strip.shift + lane; j < begin; j += WARP) up_rows[r * width + j] = outside;
        for (int j = end + lane; j < stored_end; j += WARP) up_rows[r * width + j] = outside;
        if (is_nan)
            for (int j = begin + lane; j < end; j += WARP)
                up_rows[r * width + j] = static_cast<real>(nan(""));
    }
    if (is_nan || !strip.fits || top >= strip.n) return;

    real* tile = tiles;
    real* left_tile = tiles + WARP * RING;
    const int start = strip.first_chunk() * WARP, last = strip.last_step() / WARP;
    real up_chunk[WARP], left_chunk[WARP];
    strip.load(up_chunk, up_rows, last);
    strip.load(left_chunk, left_rows_here, last);
    strip.put(up_chunk, tile, last);
    strip.put(left_chunk, left_tile, last);
    strip.load(up_chunk, up_rows, last - 1);
    strip.load(left_chunk, left_rows_here, last - 1);
    const real* passed = left_rows_here + WARP * width + strip.shift - strip.shift_below;
    const bool more_below = top + WARP < strip.n;
    const bool passes_on = lane == 0 && top > 0;
    int border_column = (last + 1) * WARP - GROUP - (WARP - 1) + lane % GROUP;
    bool from_below = more_below && strip.inside(WARP - 1, border_column);
    word bits = from_below ? peek(passed + border_column) : EMPTY;
    real to_above = 0;  // what this lane's row passes to the cell above it
    real to_left = 0;
    real to_diagonal = 0;

    for (int t0 = (last + 1) * WARP - GROUP; t0 >= start; t0 -= GROUP) {
        if (t0 % WARP == WARP - GROUP) {
            const int c = t0 / WARP;
            __syncwarp();
            strip.flush(tile, up_rows, c + 1);
            strip.put(up_chunk, tile, c - 1);
            strip.put(left_chunk, left_tile, c - 1);
            strip.load(up_chunk, up_rows, c - 2);
            strip.load(left_chunk, left_rows_here, c - 2);
            __syncwarp();
        }

        while (!__all_sync(ALL, !from_below || bits >= 0))
            if (from_below) bits = peek(passed + border_column);
        const real edge = from_below ? same_bits<real>(bits) : real(0);
        border_column -= GROUP;
        from_below = more_below && strip.inside(WARP - 1, border_column);
        bits = from_below ? peek(passed + border_column) : EMPTY;

        real up_weights[GROUP], left_weights[GROUP];
#pragma unroll
        for (int q = 0; q < GROUP; q++) {
            up_weights[q] = tile[strip.cell(t0 + q - lane)];
            left_weights[q] = -left_tile[strip.cell(t0 + q - lane)];
        }
        __syncwarp();  // as in walk_down
#pragma unroll
        for (int q = GROUP - 1; q >= 0; q--) {
            const int j = t0 + q - lane;
            real below = __shfl_down_sync(ALL, to_above, 1);
            const real edge_here = __shfl_sync(ALL, edge, q);
            if (lane == WARP - 1) below = edge_here;
            real here = below + to_left;
            if (row == strip.n - 1 && j == strip.m - 1) here = 1;
            if (!strip.own.has(j)) here = 0;
            tile[strip.cell(j)] = here;
            const real straight_up = here * up_weights[q];
            to_above = straight_up + to_diagonal;  // the latter from (i, j+1)
            to_left = here * left_weights[q];
            const real rest = here - straight_up - to_left;
            to_diagonal = rest > 0 ? rest : real(0);
            if (passes_on && strip.above.has(j))
                post(left_rows_here + j, same_bits<word>(to_above));
        }
    }
    __syncwarp();
    strip.flush(tile, up_rows, start / WARP);
}
