// Kernels for a processor, float32: one pass over memory where PyTorch's functions take several.
//
// reference.py specifies them, processor.py calls them. Vectors are GCC's, as wide as the processor's.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined __FMA__ && !defined __aarch64__
#error "this processor has no fused multiply-add, which the exponential needs"
#endif

#if defined __AVX512F__
enum { LANES = 16, ROWS = 8 };
#elif defined __AVX__
enum { LANES = 8, ROWS = 2 };
#else
enum { LANES = 4, ROWS = 2 };
#endif

enum {
    WIDTH = 32,               // of a head of linear attention
    COLUMNS = WIDTH / LANES,  // ROWS * COLUMNS sums fit the registers
    PART = 32,                // tokens whose sum is formed apart, so that rounding stays small
};

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

static inline lanes load(const float *from) {
    lanes x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float *to, lanes x) { memcpy(to, &x, sizeof x); }

// Asks for what will be read next; where it is far away, the processor does not guess.
static inline void fetch(const float *from) { __builtin_prefetch(from, 0, 1); }

static inline long least(long a, long b) { return a < b ? a : b; }

static inline lanes choose(integers condition, lanes yes, lanes no) {
    return (lanes)(((integers)yes & condition) | ((integers)no & ~condition));
}

// What is not a number stays so in both.
static inline lanes at_least(lanes x, float bound) { return choose(x < bound, (lanes){} + bound, x); }
static inline lanes at_most(lanes x, float bound) { return choose(x > bound, (lanes){} + bound, x); }

static inline float sum(lanes x) {
    float part[LANES];
    store(part, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

// ---------------------------------------------------------------------------------------------------- adaptive norm

// x and out [batch, tokens, channels]; shift and scale [batch, channels], `step` between rows.
void modulate(float *out, const float *x, const float *shift, const float *scale, long step, long batch, long tokens,
              long channels, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long token = 0; token < batch * tokens; token++) {
        const float *from = x + token * channels, *shifts = shift + token / tokens * step;
        const float *scales = scale + token / tokens * step;
        lanes total = {}, squares = {};
        for (long at = 0; at < channels; at += LANES) total += load(from + at);
        float mean = sum(total) / channels;
        for (long at = 0; at < channels; at += LANES) {
            lanes centred = load(from + at) - mean;
            squares += centred * centred;
        }
        float inverse = 1.0f / sqrtf(sum(squares) / channels + eps);
        for (long at = 0; at < channels; at += LANES) {
            lanes normed = (load(from + at) - mean) * inverse;
            store(out + token * channels + at, normed * (1.0f + load(scales + at)) + load(shifts + at));
        }
    }
}

// ---------------------------------------------------------------------------------------------- linear attention

static inline lanes relu(lanes x) { return at_least(x, 0); }

// Adds K^T V of up to PART tokens to the state [WIDTH, WIDTH], and their keys to the total [WIDTH].
static void add_to_state(float *state, float *total, const float *k, long k_step, const float *v, long v_step,
                         long count) {
    float keys[PART * WIDTH];
    for (int at = 0; at < WIDTH; at += LANES) {
        lanes added = {};
        for (long n = 0; n < count; n++) {
            lanes key = relu(load(k + n * k_step + at));
            store(keys + n * WIDTH + at, key);
            added += key;
        }
        store(total + at, load(total + at) + added);
    }
    for (int first = 0; first < WIDTH; first += ROWS) {
        lanes added[ROWS][COLUMNS] = {};
        for (long n = 0; n < count; n++)
            for (int column = 0; column < COLUMNS; column++) {
                lanes value = load(v + n * v_step + column * LANES);
                for (int row = 0; row < ROWS; row++) added[row][column] += keys[n * WIDTH + first + row] * value;
            }
        for (int row = 0; row < ROWS; row++)
            for (int column = 0; column < COLUMNS; column++) {
                float *sums = state + (first + row) * WIDTH + column * LANES;
                store(sums, load(sums) + added[row][column]);
            }
    }
}

// What ROWS queries read from a state; of fewer than ROWS the last one counts for the rest.
static void read_state(float *out, long out_step, const float *q, long q_step, long count, const float *state,
                       const float *total, float eps) {
    float queries[ROWS][WIDTH], weight[ROWS];
    lanes sums[ROWS][COLUMNS] = {};
    for (int row = 0; row < ROWS; row++) {
        lanes products = {};
        for (int at = 0; at < WIDTH; at += LANES) {
            lanes query = relu(load(q + (row < count ? row : count - 1) * q_step + at));
            store(queries[row] + at, query);
            products += query * load(total + at);
        }
        weight[row] = 1.0f / (sum(products) + eps);
    }
    for (int i = 0; i < WIDTH; i++)
        for (int column = 0; column < COLUMNS; column++) {
            lanes part = load(state + i * WIDTH + column * LANES);
            for (int row = 0; row < ROWS; row++) sums[row][column] += queries[row][i] * part;
        }
    for (int row = 0; row < ROWS && row < count; row++)
        for (int column = 0; column < COLUMNS; column++)
            store(out + row * out_step + column * LANES, sums[row][column] * weight[row]);
}

// q, k, v [batch, tokens, heads, WIDTH], with the steps of rows and tokens; out is contiguous.
void linear_attention(float *out, const float *q, long q_row, long q_step, const float *k, long k_row, long k_step,
                      const float *v, long v_row, long v_step, long batch, long tokens, long heads, float eps,
                      int threads) {
    long out_step = heads * WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long part = 0; part < batch * threads; part++) {
        long row = part / threads, thread = part % threads;
        long first = heads * thread / threads, count = heads * (thread + 1) / threads - first;
        float states[count + 1][WIDTH * WIDTH], totals[count + 1][WIDTH];
        memset(states, 0, sizeof states);
        memset(totals, 0, sizeof totals);
        // A few tokens of all heads, then the next: what lies together in memory is read together.
        for (long n = 0; n < tokens; n += PART)
            for (long head = 0; head < count; head++) {
                long at = (first + head) * WIDTH;
                add_to_state(states[head], totals[head], k + row * k_row + n * k_step + at, k_step,
                             v + row * v_row + n * v_step + at, v_step, least(PART, tokens - n));
            }
        for (long n = 0; n < tokens; n += PART)
            for (long head = 0; head < count; head++)
                for (long m = n; m < least(n + PART, tokens); m += ROWS) {
                    long at = (first + head) * WIDTH;
                    read_state(out + (row * tokens + m) * out_step + at, out_step, q + row * q_row + m * q_step + at,
                               q_step, tokens - m, states[head], totals[head], eps);
                }
    }
}

// ------------------------------------------------------------------------------------------------ gated depthwise

#define FAR 43.0f  // so far out SiLU is x, or 0 but for 1e-17; and two exponentials of it can be multiplied

// e^x for |x| <= FAR: a power of two, and the polynomial of least relative error for the rest. Relative error: at most
// 2e-7 for |x| < 1, 3e-7 for |x| < 8, 8e-7.
static inline lanes exponential(lanes x) {
    const float log2_e = 1.44269504f, to_integer = 12582912.0f;  // 1.5 * 2^23: the last bit of a sum with it is a 1
    lanes n = x * log2_e + to_integer;
    integers exponent = (integers)n << 23;
    n -= to_integer;
    lanes rest = x * log2_e - n;  // one rounding: a fused multiply-add
    lanes power = 1.3264727e-3f * rest + 9.6715128e-3f;
    power = power * rest + 5.5507337e-2f;
    power = power * rest + 2.4022242e-1f;
    power = power * rest + 6.9314698e-1f;
    power = power * rest + 1.0f;
    return (lanes)((integers)power + exponent);
}

// SiLU is near(x) / divisor(near(x)).
static inline lanes near(lanes x) { return at_least(x, -FAR); }
static inline lanes divisor(lanes x) { return 1.0f + exponential(-at_most(x, FAR)); }

// How many numbers of scratch memory a picture's channel takes: what `group` has for LANES of them.
long scratch_per_channel(long width) { return 7 * (width + 2) + 2 * 9; }

// A few channels of a picture, group by group of LANES, so that all that a result needs lies together: for each group
// three activated lines of values and of gates, a zero on the left and on the right; a line of zeros; and the filters.
struct group {
    float *lines, *zeros, *filters;
    long line;  // its length
};

static inline struct group group_at(float *scratch, long channel, long width) {
    long line = (width + 2) * LANES;
    float *lines = scratch + channel * scratch_per_channel(width);
    return (struct group){lines, lines + 6 * line, lines + 7 * line, line};
}

static void prepare(struct group group, const float *value_filters, const float *gate_filters) {
    memset(group.lines, 0, 7 * group.line * sizeof(float));
    for (int tap = 0; tap < 9; tap++)
        for (int lane = 0; lane < LANES; lane++) {
            group.filters[tap * LANES + lane] = value_filters[lane * 9 + tap];
            group.filters[(9 + tap) * LANES + lane] = gate_filters[lane * 9 + tap];
        }
}

// SiLU of a line of the picture; one division serves value and gate.
static void activate(float *scratch, long y, const float *x, long hidden, const float *bias, long width,
                     long channels) {
    for (long i = 0; i < width; i++, x += 2 * hidden)
        for (long at = 0; at < channels; at += LANES) {
            lanes value = load(x + at), gate = load(x + hidden + at);
            fetch(x + 2 * hidden + at);
            fetch(x + 3 * hidden + at);
            if (bias) value += load(bias + at), gate += load(bias + hidden + at);
            value = near(value), gate = near(gate);
            lanes p = divisor(value), q = divisor(gate), inverse = 1.0f / (p * q);
            struct group group = group_at(scratch, at, width);
            float *to = group.lines + y % 3 * group.line + (i + 1) * LANES;
            store(to, value * (q * inverse));
            store(to + 3 * group.line, gate * (p * inverse));
        }
}

static inline lanes convolve(const float *const lines[3], long x, const lanes filter[9], lanes sum) {
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) sum += load(lines[i] + (x + j) * LANES) * filter[3 * i + j];
    return sum;
}

// A group's line of results, value * silu(gate), after the convolutions.
static void mix(float *out, long out_step, struct group group, long y, const float *value_bias, const float *gate_bias,
                long height, long width) {
    const float *values[3], *gates[3];
    for (int i = 0; i < 3; i++) {
        int outside = y + i - 1 < 0 || y + i - 1 >= height;
        values[i] = outside ? group.zeros : group.lines + (y + i - 1) % 3 * group.line;
        gates[i] = outside ? group.zeros : values[i] + 3 * group.line;
    }
    lanes value_filter[9], gate_filter[9];
    for (int tap = 0; tap < 9; tap++) {
        value_filter[tap] = load(group.filters + tap * LANES);
        gate_filter[tap] = load(group.filters + (9 + tap) * LANES);
    }
    for (long x = 0; x < width; x++) {
        lanes value = convolve(values, x, value_filter, load(value_bias));
        lanes gate = near(convolve(gates, x, gate_filter, load(gate_bias)));
        store(out + x * out_step, value * gate / divisor(gate));
    }
}

// A few channels of a picture. Line y has been read when the results of line y - 1 are written: results may take the
// place of the values.
static void mix_picture(float *out, long out_step, const float *x, long hidden, const float *x_bias,
                        const float *filters, const float *bias, long height, long width, long channels,
                        float *scratch) {
    for (long at = 0; at < channels; at += LANES)
        prepare(group_at(scratch, at, width), filters + at * 9, filters + (hidden + at) * 9);
    for (long y = 0; y <= height; y++) {
        if (y < height) activate(scratch, y, x + y * width * 2 * hidden, hidden, x_bias, width, channels);
        for (long at = 0; y > 0 && at < channels; at += LANES)
            mix(out + (y - 1) * width * out_step + at, out_step, group_at(scratch, at, width), y - 1, bias + at,
                bias + hidden + at, height, width);
    }
}

// x [batch, height, width, 2 * hidden]; out [batch, height, width, hidden], out_step between positions, may begin where
// x does. x_bias may be null. `block` channels at a time, with scratch memory for each thread.
void gated_depthwise(float *out, long out_step, const float *x, const float *x_bias, const float *filters,
                     const float *bias, long batch, long height, long width, long hidden, long block, float *scratch,
                     int threads) {
    long blocks = (hidden + block - 1) / block, size = block * scratch_per_channel(width), positions = height * width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long thread = 0; thread < threads; thread++)
        for (long part = thread; part < batch * blocks; part += threads) {
            long row = part / blocks, at = part % blocks * block;
            mix_picture(out + row * positions * out_step + at, out_step, x + row * positions * 2 * hidden + at, hidden,
                        x_bias ? x_bias + at : 0, filters + at * 9, bias + at, height, width,
                        least(block, hidden - at), scratch + thread * size);
        }
}
