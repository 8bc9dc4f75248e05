// The step of a sparse autoencoder on a CPU, in three passes: selection of the active latents; decode and pre-activation
// gradients of each token; weight updates of each latent. The code is a list of P (token, latent, value) pairs: the k
// largest of each token (Gao et al., arXiv 2406.04093) or of a group of tokens (Bussmann et al., arXiv 2412.06410), or
// those above a trained threshold per latent (Rajamanoharan et al., arXiv 2407.14435).
//
// N tokens, D width, F latents. Encoder and decoder are stored as (F, D) rows in fp32, with
// optional bf16 copies for the products. The same inputs give the same bits: there are no atomics, and sums over tokens
// run in token order within a latent.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

extern "C" {

// Inputs and outputs of the passes. A pointer is not null unless its comment allows it. Mirrored in bindings.py.
struct SaetrainStep {
    int64_t N, D, F, L;         // L: levels of nested reconstructions, 1 without nesting
    int32_t threads, use_bf16;  // use_bf16: products read the bf16 copies, else fp32
    float loss_scale;           // 2 / (data variance * tokens of the optimizer step)
    // inputs of a micro-batch
    const float* x;        // (N, D)
    const void* x_enc;     // (N, D) x - b_dec, in the dtype of the products
    const float* x_norms;  // (N,) of x - b_dec
    const int64_t* offsets;      // (N + 1,) first pair of each token
    const int64_t* level_stops;  // (L,) level l decodes the latents below level_stops[l]; the last is F
    float* values;               // (P,)
    int32_t* indices;            // (P,) with several levels in ascending order within a token
    // thresholds, null without; then the active pairs of a token come first, and the others have the value 0
    float* threshold;            // (F,)
    const int64_t* active_stops;  // (N,) end of the active pairs of each token
    const float* l0_grad;        // (N,) gradient of the loss with respect to the L0 of each token
    // results of the token pass
    float* residual;        // (L, N, D) level l: sum of the residuals of the levels from l on
    void* residual_copy;    // (L, N, D) bf16, null if use_bf16 is 0
    float* grad_pre;        // (P,) gradient of the loss with respect to the values
    double* g_threshold;    // (F,) sum of the gradients of the thresholds over micro-batches; null without
    float* residual_norms;  // (L, N)
    double* residual_sum;   // (L, D) of each level's own residual
    double* residual_square;  // (L,)
    // active (token, latent) pairs, sorted by latent
    int64_t* starts;  // (F + 1,)
    int32_t* pair_token;
    float* pair_value;
    float* pair_grad_pre;
    // parameters and their copies
    float *W_enc, *W_dec;  // (F, D)
    float *b_enc, *b_dec;  // (F,), (D,)
    uint16_t *W_enc_bf16, *W_dec_bf16;  // (F, D), null if use_bf16 is 0
    // Adam's moments
    float *m_enc, *v_enc, *m_dec, *v_dec;  // (F, D)
    float *m_b, *v_b;                      // (F,)
    float *m_threshold, *v_threshold;      // (F,)
    // gradients, null if the update uses them without storing them
    float *g_enc, *g_dec;  // (F, D)
    float* g_b;            // (F,)
    // additional gradient rows of some latents (AuxK), or null
    const int32_t* extra_row;  // (F,) row of each latent, or -1
    const float *extra_enc, *extra_dec, *extra_b;
    float lr, encoder_lr, beta1, beta2, eps, correction1, correction2, decay, clip;
    float bandwidth;  // width of the window around a threshold in which pre-activations train it
    double* g_b_dec;  // (D,) part of b_dec's gradient that flows through the encoder
    double* square;   // squared norm of the gradients of W_enc, W_dec and b_enc
};

// Selection of the largest pre-activations of a group of tokens. Mirrored in bindings.py.
struct GroupSelection {
    int64_t F, wanted;    // wanted: number of pairs to keep
    int64_t block;        // tokens after which superfluous candidates are dropped; 2 wanted + block F candidates fit
    int64_t rows, total;  // tokens and candidates so far
    int32_t threads, has_nan;
    float bound;       // only pre-activations that reach it are candidates
    float* values;     // (2 wanted + block F,) candidates in the order of the tokens, then of the latents
    int32_t* indices;  // the same size
    int64_t* counts;   // candidates of each token
    int32_t* keys;     // as values, for the search
};
}

namespace {

// Treats subnormal numbers as zero during its lifetime, because arithmetic on decayed moments would otherwise be slow.
struct FlushToZero {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    FlushToZero() { _mm_setcsr(before | 0x8040); }
    ~FlushToZero() { _mm_setcsr(before); }
#endif
};

inline float widen(uint16_t b) {
    uint32_t u = static_cast<uint32_t>(b) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float widen(float f) { return f; }

inline uint16_t narrow(float f) {  // round to nearest even, as torch does
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// Convert between floats and integers of the same order.
inline int32_t float_to_key(float f) {
    int32_t i;
    std::memcpy(&i, &f, 4);
    return i ^ ((i >> 31) & 0x7FFFFFFF);
}
inline float key_to_float(int32_t key) {
    const int32_t i = key ^ ((key >> 31) & 0x7FFFFFFF);
    float f;
    std::memcpy(&f, &i, 4);
    return f;
}

// Return a float that exactly k of v[0..n) reach or, if ties rule that out, the k-th largest. The search sets the bits
// from the top by counting. Unlike a partial sort, it has no branch per element.
float kth_largest(const float* v, int64_t n, int64_t k, int32_t* keys) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) keys[j] = float_to_key(v[j]);
    int64_t least = INT32_MIN;
    for (int bit = 31; bit >= 0; bit--) {
        const int64_t higher = least + (static_cast<int64_t>(1) << bit);
        const int32_t wanted = static_cast<int32_t>(higher);
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t j = 0; j < n; j++) count += keys[j] >= wanted;
        if (count < k) continue;
        least = higher;
        if (count == k) break;
    }
    return key_to_float(static_cast<int32_t>(least));
}

// Values and indices of the entries that reach a bound, in the order of the indices.
struct Candidates {
    std::vector<float> value;
    std::vector<int32_t> index;
    std::vector<int32_t> keys;
    explicit Candidates(int64_t F) : value(F + 16), index(F + 16), keys(F + 16) {}

    void add(const float* z, int64_t f, float bound, int64_t& n) {
        value[n] = z[f];
        index[n] = static_cast<int32_t>(f);
        n += z[f] >= bound;
    }

    // Collect the entries that reach their bound: bounds[f] or, if there is only one, bounds[0].
    template <bool PER_LATENT>
    int64_t collect(const float* z, int64_t F, const float* bounds) {
        int64_t n = 0, f = 0;
        const auto bound = [&](int64_t at) { return bounds[PER_LATENT ? at : 0]; };
#if defined(__AVX512F__)
        __m512 least = _mm512_set1_ps(bounds[0]);
        __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i sixteen = _mm512_set1_epi32(16);
        for (; f + 16 <= F; f += 16, at = _mm512_add_epi32(at, sixteen)) {
            const __m512 row = _mm512_loadu_ps(z + f);
            if (PER_LATENT) least = _mm512_loadu_ps(bounds + f);
            const __mmask16 mask = _mm512_cmp_ps_mask(row, least, _CMP_GE_OQ);
            if (mask == 0) continue;
            _mm512_mask_compressstoreu_ps(value.data() + n, mask, row);
            _mm512_mask_compressstoreu_epi32(index.data() + n, mask, at);
            n += __builtin_popcount(mask);
        }
#else
        // Most blocks contain no candidate.
        for (; f + 16 <= F; f += 16) {
            int32_t any = 0;
#pragma omp simd reduction(| : any)
            for (int64_t j = 0; j < 16; j++) any |= z[f + j] >= bound(f + j);
            if (any)
                for (int64_t j = f; j < f + 16; j++) add(z, j, bound(j), n);
        }
#endif
        for (; f < F; f++) add(z, f, bound(f), n);
        return n;
    }
};

// Select the k largest of z[0..F). The k-th largest of G group maxima is a lower bound of the k-th largest of all, so
// only the entries that reach it are searched again. Group g contains z[g], z[g + G], ..., so that its maximum needs no
// reduction across a register.
void select(const float* z, int64_t F, int64_t k, int64_t G, std::vector<float>& maxima, Candidates& candidates,
            float* values, int32_t* indices) {
    float bound = -INFINITY;
    if (G < F && G >= k) {
        float* m = maxima.data();
        std::copy(z, z + G, m);
        int64_t at = G;
        for (; at + G <= F; at += G) {
            const float* row = z + at;
#pragma omp simd
            for (int64_t g = 0; g < G; g++) m[g] = row[g] > m[g] ? row[g] : m[g];
        }
        for (int64_t g = 0; at + g < F; g++) m[g] = z[at + g] > m[g] ? z[at + g] : m[g];
        bound = kth_largest(m, G, k, candidates.keys.data());
    }
    int64_t n = candidates.collect<false>(z, F, &bound);
    if (n > k) {  // of the entries that equal the k-th largest, the first are chosen, so that ties are deterministic
        const float least = kth_largest(candidates.value.data(), n, k, candidates.keys.data());
        int64_t equals = k, at = 0;
        for (int64_t j = 0; j < n; j++) equals -= candidates.value[j] > least;
        // Compact in place without a branch: an entry that is not selected is overwritten by the next one.
        for (int64_t j = 0; j < n; j++) {
            const float v = candidates.value[j];
            const bool equal = v == least;
            candidates.value[at] = v;
            candidates.index[at] = candidates.index[j];
            at += (v > least) | (equal & (equals > 0));
            equals -= equal;
        }
        for (int64_t j = 0; j < k; j++) {
            values[j] = std::max(candidates.value[j], 0.0f);
            indices[j] = candidates.index[j];
        }
        return;
    }
    for (int64_t j = 0; j < k; j++) {  // NaN never reaches the bound, so a row may have fewer candidates
        values[j] = j < n ? std::max(candidates.value[j], 0.0f) : 0.0f;
        indices[j] = j < n ? candidates.index[j] : 0;
    }
}

// Write p + bias to z[0..F), and return whether an entry is NaN.
template <typename T>
inline bool add_bias(float* z, const T* p, const float* bias, int64_t F) {
    int32_t has_nan = 0;
#pragma omp simd reduction(| : has_nan)
    for (int64_t f = 0; f < F; f++) {
        z[f] = widen(p[f]) + bias[f];
        has_nan |= z[f] != z[f];
    }
    return has_nan;
}

template <typename T>
void topk(const T* pre, const float* bias, int64_t n, int64_t F, int64_t k, float* values, int32_t* indices,
          int threads) {
    int64_t G = 16;
    while (G < 4 * k) G *= 2;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> z(F), maxima(G);
        Candidates candidates(F);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; row++) {
            const bool has_nan = add_bias(z.data(), pre + row * F, bias, F);
            select(z.data(), F, k, G, maxima, candidates, values + row * k, indices + row * k);
            // The comparisons drop NaN, so store one in the code, where it makes the loss NaN.
            if (has_nan) values[row * k] = NAN;
        }
    }
}

// Keep the candidates above `least` and the first `equals` of those that equal it, in their order.
void prune_group(GroupSelection* g, float least, int64_t equals) {
    int64_t from = 0, to = 0;
    for (int64_t row = 0; row < g->rows; row++) {
        const int64_t stop = from + g->counts[row], first = to;
        for (; from < stop; from++) {
            const float v = g->values[from];
            const bool equal = v == least;
            g->values[to] = v;
            g->indices[to] = g->indices[from];
            to += (v > least) | (equal & (equals > 0));
            equals -= equal;
        }
        g->counts[row] = to - first;
    }
    g->total = to;
}

int64_t count_above(const GroupSelection* g, float least) {
    int64_t count = 0;
    for (int64_t p = 0; p < g->total; p++) count += g->values[p] > least;
    return count;
}

// Add the pre-activations of n more tokens that reach the bound. If there are many more than wanted, the bound rises to
// the smallest of the wanted largest so far, which is at most the smallest of the wanted largest of the whole group.
template <typename T>
void collect_group(GroupSelection* g, const T* pre, const float* bias, int64_t n) {
    const int64_t F = g->F;
    const int threads = g->threads;
    std::vector<std::vector<float>> values(threads), rows(threads);
    std::vector<std::vector<int32_t>> indices(threads);
    std::vector<int32_t> has_nan(threads, 0);
    std::vector<Candidates> candidates(threads, Candidates(F));
    for (int64_t first = 0; first < n; first += g->block) {
        const int64_t count = std::min(g->block, n - first);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            rows[t].resize(F);
            values[t].clear();
            indices[t].clear();
            float* z = rows[t].data();
            for (int64_t row = first + count * t / threads; row < first + count * (t + 1) / threads; row++) {
                has_nan[t] |= add_bias(z, pre + row * F, bias, F);
                const int64_t found = candidates[t].collect<false>(z, F, &g->bound);
                const float* v = candidates[t].value.data();
                const int32_t* i = candidates[t].index.data();
                values[t].insert(values[t].end(), v, v + found);
                indices[t].insert(indices[t].end(), i, i + found);
                g->counts[g->rows + row - first] = found;
            }
        }
        for (int t = 0; t < threads; t++) {
            std::copy(values[t].begin(), values[t].end(), g->values + g->total);
            std::copy(indices[t].begin(), indices[t].end(), g->indices + g->total);
            g->total += values[t].size();
            g->has_nan |= has_nan[t];
        }
        g->rows += count;
        if (g->total > 2 * g->wanted) {
            g->bound = kth_largest(g->values, g->total, g->wanted, g->keys);
            prune_group(g, g->bound, g->wanted - count_above(g, g->bound));
        }
    }
}

// Append the pre-activations of n more tokens that reach floors (F,) to the pairs: first those above their threshold,
// then the others with the value 0. Returns the number of pairs after them; if it exceeds the capacity, no pair is
// written.
template <typename T>
int64_t collect_above(const T* pre, const float* bias, const float* floors, const float* threshold, int64_t n, int64_t F,
                      int64_t used, int64_t capacity, int64_t* stops, int64_t* active_stops, float* values,
                      int32_t* indices, int threads) {
    std::vector<std::vector<float>> found_values(threads);
    std::vector<std::vector<int32_t>> found_indices(threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        std::vector<float> z(F);
        Candidates candidates(F);
        std::vector<float>& v = found_values[t];
        std::vector<int32_t>& i = found_indices[t];
        for (int64_t row = n * t / threads; row < n * (t + 1) / threads; row++) {
            const bool has_nan = add_bias(z.data(), pre + row * F, bias, F);
            const int64_t found = candidates.collect<true>(z.data(), F, floors);
            for (int64_t j = 0; j < found; j++) {
                const int32_t f = candidates.index[j];
                if (!(candidates.value[j] > threshold[f])) continue;
                v.push_back(candidates.value[j]);
                i.push_back(f);
            }
            // The comparisons drop NaN, so store one in the code, where it makes the loss NaN.
            if (has_nan) {
                v.push_back(NAN);
                i.push_back(0);
            }
            active_stops[row] = v.size();
            for (int64_t j = 0; j < found; j++) {
                const int32_t f = candidates.index[j];
                if (candidates.value[j] > threshold[f]) continue;
                v.push_back(0.0f);
                i.push_back(f);
            }
            stops[row] = v.size();
        }
    }
    int64_t total = used;
    for (const auto& v : found_values) total += v.size();
    if (total > capacity) return total;
    for (int t = 0; t < threads; t++) {
        for (int64_t row = n * t / threads; row < n * (t + 1) / threads; row++) {
            active_stops[row] += used;
            stops[row] += used;
        }
        std::copy(found_values[t].begin(), found_values[t].end(), values + used);
        std::copy(found_indices[t].begin(), found_indices[t].end(), indices + used);
        used += found_values[t].size();
    }
    return total;
}

template <typename A, typename B>
inline float dot(const A* a, const B* b, int64_t D) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t d = 0; d < D; d++) s += widen(a[d]) * widen(b[d]);
    return s;
}

inline void narrow_row(uint16_t* out, const float* row, int64_t D) {
#pragma omp simd
    for (int64_t d = 0; d < D; d++) out[d] = narrow(row[d]);
}
inline void narrow_row(float* out, const float* row, int64_t D) { std::copy(row, row + D, out); }

// Prefetch a row, because the hardware cannot predict the order in which rows are read.
template <typename T>
inline void prefetch_row(const T* row, int64_t D) {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t d = 0; d < D; d += LINE) __builtin_prefetch(row + d);
}

// Compute out[0..D) = sum over pairs p of c[p] * rows[token[p]], four rows at a time.
template <typename T>
inline void gather(float* __restrict out, const T* rows, const int32_t* token, const float* c, int64_t pairs,
                   int64_t D) {
    const auto row = [&](int64_t p) { return rows + static_cast<int64_t>(token[p]) * D; };
    std::fill(out, out + D, 0.0f);
    int64_t p = 0;
    for (; p + 4 <= pairs; p += 4) {
        for (int64_t next = p + 4; next < std::min(p + 8, pairs); next++) prefetch_row(row(next), D);
        const T *r0 = row(p), *r1 = row(p + 1), *r2 = row(p + 2), *r3 = row(p + 3);
        const float c0 = c[p], c1 = c[p + 1], c2 = c[p + 2], c3 = c[p + 3];
#pragma omp simd
        for (int64_t d = 0; d < D; d++)
            out[d] += (c0 * widen(r0[d]) + c1 * widen(r1[d])) + (c2 * widen(r2[d]) + c3 * widen(r3[d]));
    }
    for (; p < pairs; p++) {
        const T* r = row(p);
        const float w = c[p];
#pragma omp simd
        for (int64_t d = 0; d < D; d++) out[d] += w * widen(r[d]);
    }
}

// Compute r = x - decoded - b_dec, add it to the sums, and return its squared norm.
template <typename T>
inline float subtract_reconstruction(float* r, const float* x, const T* decoded, const float* b_dec, double* sums,
                                     int64_t D) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t d = 0; d < D; d++) {
        const float v = x[d] - widen(decoded[d]) - b_dec[d];
        r[d] = v;
        sums[d] += v;
        s += v * v;
    }
    return s;
}

// Compute reconstruction, residual and pre-activation gradients of each token. The gradient of a latent comes from all
// levels that decode it, so each level stores the sum of its own residual and those of the later levels.
template <typename T>
void tokens(const SaetrainStep* s, const T* W_dec, T* residual_copy) {
    const int64_t N = s->N, D = s->D, L = s->L;
    const bool has_thresholds = s->threshold != nullptr;
    std::vector<std::vector<double>> sum(s->threads, std::vector<double>(L * D, 0.0));
    std::vector<std::vector<double>> square(s->threads, std::vector<double>(L, 0.0));
#pragma omp parallel num_threads(s->threads)
    {
        const int thread = omp_get_thread_num();
        std::vector<float> total(D);
        const std::vector<float> zeros(L > 1 ? D : 0, 0.0f);
        std::vector<int64_t> stops(L);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const int64_t first = s->offsets[n], stop = s->offsets[n + 1];
            int64_t at = first;
            for (int64_t level = 0; level < L; level++) {
                int64_t end = has_thresholds ? s->active_stops[n] : stop;
                if (level + 1 < L) end = std::lower_bound(s->indices + at, s->indices + stop, s->level_stops[level]) - s->indices;
                gather(total.data(), W_dec, s->indices + at, s->values + at, end - at, D);
                float* r = s->residual + (level * N + n) * D;
                const float* from = level == 0 ? s->x + n * D : r - N * D;
                const float own = subtract_reconstruction(r, from, total.data(), level == 0 ? s->b_dec : zeros.data(),
                                                          sum[thread].data() + level * D, D);
                square[thread][level] += own;
                s->residual_norms[level * N + n] = std::sqrt(own);
                stops[level] = at = has_thresholds ? stop : end;
            }
            if (n + 1 < N)
                for (int64_t p = stop; p < std::min(stop + 4, s->offsets[n + 2]); p++)
                    prefetch_row(W_dec + static_cast<int64_t>(s->indices[p]) * D, D);
            for (int64_t level = L - 1; level >= 0; level--) {
                float* r = s->residual + (level * N + n) * D;
                if (level + 1 < L) {
                    const float* later = r + N * D;
#pragma omp simd
                    for (int64_t d = 0; d < D; d++) r[d] += later[d];
                    s->residual_norms[level * N + n] = std::sqrt(dot(r, r, D));
                }
                if (residual_copy != nullptr) narrow_row(residual_copy + (level * N + n) * D, r, D);
                for (int64_t p = level == 0 ? first : stops[level - 1]; p < stops[level]; p++) {
                    const T* row = W_dec + static_cast<int64_t>(s->indices[p]) * D;
                    s->grad_pre[p] = has_thresholds || s->values[p] > 0 ? -s->loss_scale * dot(r, row, D) : 0.0f;
                }
            }
        }
    }
    std::fill(s->residual_sum, s->residual_sum + L * D, 0.0);
    std::fill(s->residual_square, s->residual_square + L, 0.0);
    for (int t = 0; t < s->threads; t++) {
        for (int64_t d = 0; d < L * D; d++) s->residual_sum[d] += sum[t][d];
        for (int64_t level = 0; level < L; level++) s->residual_square[level] += square[t][level];
    }
}

// Compute the encoder input x - b_dec in the dtype of the products, and the norms of its rows.
template <typename T>
void center(const float* x, const float* b_dec, int64_t N, int64_t D, T* out, float* norms, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float* row = x + n * D;
        T* to = out + n * D;
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t d = 0; d < D; d++) {
            const float v = row[d] - b_dec[d];
            s += v * v;
            if constexpr (sizeof(T) == 2)
                to[d] = narrow(v);
            else
                to[d] = v;
        }
        norms[n] = std::sqrt(s);
    }
}

// Write the codes of tokens first..stop as dense (stop - first, F) rows.
void code_rows(const SaetrainStep* s, int64_t first, int64_t stop, uint16_t* out) {
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t n = first; n < stop; n++) {
        uint16_t* row = out + (n - first) * s->F;
        std::memset(row, 0, s->F * sizeof(uint16_t));
        for (int64_t p = s->offsets[n]; p < s->offsets[n + 1]; p++)
            if (!(s->values[p] <= 0)) row[s->indices[p]] = narrow(s->values[p]);
    }
}

// Compute the residuals of tokens first..stop from their reconstructions without b_dec, (stop - first, D), and add them
// to the sums.
void residuals(const float* x, const uint16_t* decoded, const float* b_dec, int64_t first, int64_t stop, int64_t D,
               float* residual, uint16_t* copy, float* norms, double* sums, double* squares, int threads) {
    std::vector<std::vector<double>> sum(threads, std::vector<double>(D, 0.0));
    std::vector<double> square(threads, 0.0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = first; n < stop; n++) {
        const int thread = omp_get_thread_num();
        float* r = residual + n * D;
        const float s = subtract_reconstruction(r, x + n * D, decoded + (n - first) * D, b_dec, sum[thread].data(), D);
        narrow_row(copy + n * D, r, D);
        norms[n] = std::sqrt(s);
        square[thread] += s;
    }
    for (int t = 0; t < threads; t++) {
        for (int64_t d = 0; d < D; d++) sums[d] += sum[t][d];
        *squares += square[t];
    }
}

// Return the first level that decodes latent f.
inline int64_t level_of(const SaetrainStep* s, int64_t f) {
    int64_t level = 0;
    while (f >= s->level_stops[level]) level++;
    return level;
}

struct Adam {
    float lr, beta1, beta2, eps, correction1, correction2;  // corrections: 1 - beta1^step, sqrt(1 - beta2^step)
    inline float operator()(float& m, float& v, float g) const {
        m += (1 - beta1) * (g - m);
        v = beta2 * v + (1 - beta2) * g * g;
        return lr / correction1 * m / (std::sqrt(v) / correction2 + eps);
    }
};

}  // namespace

extern "C" {

void saetrain_tokens(const SaetrainStep* s) {
    if (s->use_bf16)
        tokens(s, static_cast<const uint16_t*>(s->W_dec_bf16), static_cast<uint16_t*>(s->residual_copy));
    else
        tokens(s, static_cast<const float*>(s->W_dec), static_cast<float*>(nullptr));
}

void saetrain_code_rows(const SaetrainStep* s, int64_t first, int64_t stop, uint16_t* out) {
    code_rows(s, first, stop, out);
}

void saetrain_residuals(const SaetrainStep* s, int64_t first, int64_t stop, const uint16_t* decoded) {
    if (first == 0) {
        std::fill(s->residual_sum, s->residual_sum + s->D, 0.0);
        *s->residual_square = 0;
    }
    residuals(s->x, decoded, s->b_dec, first, stop, s->D, s->residual, static_cast<uint16_t*>(s->residual_copy),
              s->residual_norms, s->residual_sum, s->residual_square, s->threads);
}

// Read the pre-activation gradients of tokens first..stop from the products (stop - first, F) of residual and W_dec.
void saetrain_pick(const SaetrainStep* s, int64_t first, int64_t stop, const uint16_t* products) {
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t n = first; n < stop; n++) {
        const uint16_t* row = products + (n - first) * s->F;
        for (int64_t p = s->offsets[n]; p < s->offsets[n + 1]; p++)
            s->grad_pre[p] =
                s->threshold != nullptr || s->values[p] > 0 ? -s->loss_scale * widen(row[s->indices[p]]) : 0.0f;
    }
}

// Add the gradient of the thresholds, -(threshold * grad_pre + l0_grad) / bandwidth of each pair in the window.
void saetrain_threshold_gradients(const SaetrainStep* s) {
    std::vector<std::vector<double>> sums(s->threads, std::vector<double>(s->F, 0.0));
#pragma omp parallel for num_threads(s->threads) schedule(static, 1)
    for (int t = 0; t < s->threads; t++)
        for (int64_t n = s->N * t / s->threads; n < s->N * (t + 1) / s->threads; n++)
            for (int64_t p = s->offsets[n]; p < s->offsets[n + 1]; p++) {
                const int32_t f = s->indices[p];
                // A pair that is not active is in the window, because only those were collected.
                if (p < s->active_stops[n] && !(s->values[p] - s->threshold[f] < s->bandwidth / 2)) continue;
                sums[t][f] -= (s->threshold[f] * s->grad_pre[p] + s->l0_grad[n]) / s->bandwidth;
            }
    for (int64_t f = 0; f < s->F; f++) {
        for (int t = 0; t < s->threads; t++) s->g_threshold[f] += sums[t][f];
    }
}

// Sort the active (token, latent) pairs by latent, then by token, with a counting sort.
void saetrain_sort(const SaetrainStep* s) {
    const int64_t N = s->N, F = s->F;
    const int T = s->threads;
    std::vector<std::vector<int64_t>> at(T, std::vector<int64_t>(F, 0));
    // The loop runs over slices instead of threads, because OpenMP may start fewer threads than requested.
#pragma omp parallel for num_threads(T) schedule(static, 1)
    for (int t = 0; t < T; t++)
        for (int64_t p = s->offsets[N * t / T]; p < s->offsets[N * (t + 1) / T]; p++)
            if (s->values[p] > 0) at[t][s->indices[p]]++;
    int64_t running = 0;
    for (int64_t f = 0; f < F; f++) {
        s->starts[f] = running;
        for (int t = 0; t < T; t++) {
            const int64_t count = at[t][f];
            at[t][f] = running;
            running += count;
        }
    }
    s->starts[F] = running;
#pragma omp parallel for num_threads(T) schedule(static, 1)
    for (int t = 0; t < T; t++)
        for (int64_t n = N * t / T; n < N * (t + 1) / T; n++)
            for (int64_t p = s->offsets[n]; p < s->offsets[n + 1]; p++)
                if (s->values[p] > 0) {
                    const int64_t to = at[t][s->indices[p]]++;
                    s->pair_token[to] = static_cast<int32_t>(n);
                    s->pair_value[to] = s->values[p];
                    s->pair_grad_pre[to] = s->grad_pre[p];
                }
}

// Return an upper bound of the squared norm of the gradients of both weights and b_enc, from the norms of the rows that
// they sum. For most steps the bound is enough to rule out clipping. enc_eigenvalue and dec_eigenvalue are upper bounds
// of the largest eigenvalues of the Gram matrices of x and of the residual, or infinity. The gradient of b_enc is
// written to bias (F,).
double saetrain_norm_bound(const SaetrainStep* s, double enc_eigenvalue, double dec_eigenvalue, float* bias) {
    std::vector<double> parts(s->threads, 0.0);
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t f = 0; f < s->F; f++) {
        double dec = 0, enc = 0, b = 0, dec_square = 0, enc_square = 0;
        const float* residual_norms = s->residual_norms + level_of(s, f) * s->N;
        for (int64_t p = s->starts[f]; p < s->starts[f + 1]; p++) {
            const int32_t n = s->pair_token[p];
            const double value = s->pair_value[p], grad_pre = s->pair_grad_pre[p];
            dec += value * residual_norms[n];
            enc += std::fabs(grad_pre) * s->x_norms[n];
            dec_square += value * value;
            enc_square += grad_pre * grad_pre;
            b += grad_pre;
        }
        const double squared_scale = static_cast<double>(s->loss_scale) * s->loss_scale;
        parts[omp_get_thread_num()] += squared_scale * std::min(dec * dec, dec_square * dec_eigenvalue) +
                                       std::min(enc * enc, enc_square * enc_eigenvalue) + b * b;
        bias[f] = static_cast<float>(b);
    }
    double total = 0;
    for (const double part : parts) total += part;
    return total;
}
}

namespace {

enum Mode { MEASURE = 0, STORE = 1, UPDATE = 2, ADD = 3 };
enum Origin { PAIRS = 0, MEMORY = 1, ROWS = 2 };

// Source of the two gradient rows of latents first..stop: their pairs, memory, or the result of a dense product.
struct Gradients {
    int32_t origin;
    int64_t first, stop;        // latents
    const uint16_t *enc, *dec;  // (stop - first, D) for ROWS
};

// Compute both gradient rows of each latent, then do what the mode asks for. MEASURE computes the squared norm. STORE
// writes the rows to g_enc, g_dec and g_b, and ADD adds to them. UPDATE projects and clips the gradient, applies Adam
// and renormalizes the decoder row, for latents whose bias has a gradient. The pass adds to s->square and s->g_b_dec.
template <typename T>
void latents(const SaetrainStep* s, const T* x, const T* residual, int mode, const Gradients& from, float* enc_norms) {
    const int64_t D = s->D;
    const bool stored = from.origin == MEMORY;
    std::vector<std::vector<double>> through_encoder(s->threads, std::vector<double>(D, 0.0));
    std::vector<double> square(s->threads, 0.0);
    const Adam adam{s->encoder_lr, s->beta1, s->beta2, s->eps, s->correction1, s->correction2};
#pragma omp parallel num_threads(s->threads)
    {
        const FlushToZero flush;
        const int thread = omp_get_thread_num();
        std::vector<float> own_e(D), own_d(D), scaled;
        // The split over threads is fixed, so that the same number of threads gives the same sums.
#pragma omp for schedule(static)
        for (int64_t f = from.first; f < from.stop; f++) {
            const int64_t row = f * D, start = s->starts[f], pairs = s->starts[f + 1] - start;
            float* const ge = mode == STORE ? s->g_enc + row : own_e.data();
            float* const gd = mode == STORE ? s->g_dec + row : own_d.data();
            float gb = 0;
            const float gt = s->threshold != nullptr ? static_cast<float>(s->g_threshold[f]) : 0.0f;
            bool has_gradient = true;
            if (stored) {
                std::copy(s->g_enc + row, s->g_enc + row + D, ge);
                std::copy(s->g_dec + row, s->g_dec + row + D, gd);
                gb = s->g_b[f];
            } else {
                has_gradient = pairs > 0;
                if (has_gradient) {
                    for (int64_t p = 0; p < pairs; p++) gb += s->pair_grad_pre[start + p];
                    if (from.origin == ROWS) {
                        const int64_t at = (f - from.first) * D;
#pragma omp simd
                        for (int64_t d = 0; d < D; d++) {
                            ge[d] = widen(from.enc[at + d]);
                            gd[d] = widen(from.dec[at + d]);
                        }
                    } else {
                        scaled.resize(pairs);
                        for (int64_t p = 0; p < pairs; p++) scaled[p] = -s->loss_scale * s->pair_value[start + p];
                        gather(gd, residual + level_of(s, f) * s->N * D, s->pair_token + start, scaled.data(), pairs, D);
                        gather(ge, x, s->pair_token + start, s->pair_grad_pre + start, pairs, D);
                    }
                    const float* w = s->W_enc + row;
                    double* to = through_encoder[thread].data();
#pragma omp simd
                    for (int64_t d = 0; d < D; d++) to[d] -= gb * w[d];
                } else {
                    std::fill(ge, ge + D, 0.0f);
                    std::fill(gd, gd + D, 0.0f);
                }
                const int32_t extra = s->extra_row != nullptr ? s->extra_row[f] : -1;
                if (extra >= 0) {  // added after the sum through the encoder, because AuxK has no gradient for b_dec
                    has_gradient = true;
                    const float *xe = s->extra_enc + extra * D, *xd = s->extra_dec + extra * D;
                    for (int64_t d = 0; d < D; d++) {
                        ge[d] += xe[d];
                        gd[d] += xd[d];
                    }
                    gb += s->extra_b[extra];
                }
            }
            if (mode == STORE) {
                s->g_b[f] = gb;
                continue;
            }
            if (mode == ADD) {
                if (!has_gradient) continue;
                for (int64_t d = 0; d < D; d++) {
                    s->g_enc[row + d] += ge[d];
                    s->g_dec[row + d] += gd[d];
                }
                s->g_b[f] += gb;
                continue;
            }
            float* wd = s->W_dec + row;
            float* we = s->W_enc + row;
            if (has_gradient) {
                const float along = dot(gd, wd, D);
#pragma omp simd
                for (int64_t d = 0; d < D; d++) gd[d] -= along * wd[d];
                square[thread] += dot(ge, ge, D) + dot(gd, gd, D) + gb * gb;
            }
            square[thread] += gt * gt;
            if (mode == MEASURE) continue;
            if (gb == 0 && gt == 0) continue;  // an idle latent keeps its weights and moments
            float *m_e = s->m_enc + row, *ve = s->v_enc + row, *md = s->m_dec + row, *vd = s->v_dec + row;
            const float clip = s->clip, decay_factor = 1 - s->encoder_lr * s->decay;
            float norm = 0, length = 0;
            const float rate = s->lr / s->correction1, encoder_rate = s->encoder_lr / s->correction1;
            const float b1 = 1 - s->beta1, b2 = 1 - s->beta2;
            const float root = 1 / s->correction2, eps = s->eps, beta2 = s->beta2;
#pragma omp simd reduction(+ : norm, length)
            for (int64_t d = 0; d < D; d++) {
                const float g = clip * gd[d], h = clip * ge[d];
                md[d] += b1 * (g - md[d]);
                vd[d] = beta2 * vd[d] + b2 * g * g;
                wd[d] -= rate * md[d] / (std::sqrt(vd[d]) * root + eps);
                norm += wd[d] * wd[d];
                m_e[d] += b1 * (h - m_e[d]);
                ve[d] = beta2 * ve[d] + b2 * h * h;
                we[d] = decay_factor * we[d] - encoder_rate * m_e[d] / (std::sqrt(ve[d]) * root + eps);
                length += we[d] * we[d];
            }
            const float inverse = 1 / std::max(std::sqrt(norm), 1.17549435e-38f);
#pragma omp simd
            for (int64_t d = 0; d < D; d++) wd[d] *= inverse;
            enc_norms[f] = std::sqrt(length);
            s->b_enc[f] -= adam(s->m_b[f], s->v_b[f], clip * gb);
            if (s->threshold != nullptr)
                s->threshold[f] -= adam(s->m_threshold[f], s->v_threshold[f], clip * gt);
            if (s->use_bf16) {
                narrow_row(s->W_dec_bf16 + row, wd, D);
                narrow_row(s->W_enc_bf16 + row, we, D);
            }
        }
    }
    for (int t = 0; t < s->threads; t++) {
        *s->square += square[t];
        if (!stored)
            for (int64_t d = 0; d < D; d++) s->g_b_dec[d] += through_encoder[t][d];
    }
}

}  // namespace

extern "C" {

void saetrain_latents(const SaetrainStep* s, int mode, const Gradients* from, float* enc_norms) {
    if (s->use_bf16)
        latents(s, static_cast<const uint16_t*>(s->x_enc), static_cast<const uint16_t*>(s->residual_copy), mode, *from,
                enc_norms);
    else
        latents(s, static_cast<const float*>(s->x_enc), static_cast<const float*>(s->residual), mode, *from, enc_norms);
}

// Write the codes of some latents as dense (stop - first, N) rows, whose products are the gradient rows.
void saetrain_codes(const SaetrainStep* s, int64_t first, int64_t stop, uint16_t* enc, uint16_t* dec) {
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t f = first; f < stop; f++) {
        uint16_t *e = enc + (f - first) * s->N, *d = dec + (f - first) * s->N;
        std::memset(e, 0, s->N * sizeof(uint16_t));
        std::memset(d, 0, s->N * sizeof(uint16_t));
        for (int64_t p = s->starts[f]; p < s->starts[f + 1]; p++) {
            e[s->pair_token[p]] = narrow(s->pair_grad_pre[p]);
            d[s->pair_token[p]] = narrow(-s->loss_scale * s->pair_value[p]);
        }
    }
}

void saetrain_center(const SaetrainStep* s, void* out, float* norms) {
    if (s->use_bf16)
        center(s->x, s->b_dec, s->N, s->D, static_cast<uint16_t*>(out), norms, s->threads);
    else
        center(s->x, s->b_dec, s->N, s->D, static_cast<float*>(out), norms, s->threads);
}

void saetrain_topk_bf16(const uint16_t* pre, const float* bias, int64_t n, int64_t F, int64_t k, float* values,
                        int32_t* indices, int threads) {
    topk(pre, bias, n, F, k, values, indices, threads);
}
void saetrain_topk_f32(const float* pre, const float* bias, int64_t n, int64_t F, int64_t k, float* values,
                       int32_t* indices, int threads) {
    topk(pre, bias, n, F, k, values, indices, threads);
}

int64_t saetrain_collect_above_bf16(const uint16_t* pre, const float* bias, const float* floors, const float* threshold,
                                    int64_t n, int64_t F, int64_t used, int64_t capacity, int64_t* stops,
                                    int64_t* active_stops, float* values, int32_t* indices, int threads) {
    return collect_above(pre, bias, floors, threshold, n, F, used, capacity, stops, active_stops, values, indices,
                         threads);
}
int64_t saetrain_collect_above_f32(const float* pre, const float* bias, const float* floors, const float* threshold,
                                   int64_t n, int64_t F, int64_t used, int64_t capacity, int64_t* stops,
                                   int64_t* active_stops, float* values, int32_t* indices, int threads) {
    return collect_above(pre, bias, floors, threshold, n, F, used, capacity, stops, active_stops, values, indices,
                         threads);
}

void saetrain_collect_bf16(GroupSelection* g, const uint16_t* pre, const float* bias, int64_t n) {
    collect_group(g, pre, bias, n);
}
void saetrain_collect_f32(GroupSelection* g, const float* pre, const float* bias, int64_t n) {
    collect_group(g, pre, bias, n);
}
// Return the smallest of the wanted largest candidates, of which there must be enough.
float saetrain_smallest_wanted(GroupSelection* g) { return kth_largest(g->values, g->total, g->wanted, g->keys); }
// Return the number of candidates above a value.
int64_t saetrain_count_above(const GroupSelection* g, float least) { return count_above(g, least); }
void saetrain_prune_group(GroupSelection* g, float least, int64_t equals) { prune_group(g, least, equals); }
}
