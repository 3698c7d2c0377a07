// Normal deviates by (key, row, column), as random.py defines them: the same operations in the same order.
//
// Build with -ffp-contract=off: a product that is fused with a sum is rounded once less than elsewhere.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Columns that are taken through one stage at a time. Stages are loops of their own, so that many columns are under way
// at once: one column's operations wait for each other.
constexpr int64_t BLOCK = 256;
// Columns of one row that a thread takes.
constexpr int64_t TILE = 16 * BLOCK;
// Elements that are worth a thread.
constexpr int64_t WORTH = 1 << 15;

inline int32_t bits_of(float x)
{
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(int32_t bits)
{
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint64_t row_key(int64_t key, int64_t row)
{
    uint64_t x = uint64_t(key) + uint64_t(row) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

inline uint32_t hash(uint32_t column, uint32_t first, uint32_t second)
{
    uint32_t x = column + first;
    x = (x ^ (x >> 17)) * 0xED5AD4BBu;
    x ^= second;
    x = (x ^ (x >> 11)) * 0xAC4C1B51u;
    x = (x ^ (x >> 15)) * 0x31848BABu;
    return x ^ (x >> 14);
}

// -log2 of twice the probability beyond the deviate.
inline float rarity(uint32_t hash)
{
    const int32_t bits = bits_of(float(int32_t(hash & 0x7FFFFFFFu)) + 0.5f);
    const float s = float_of((bits & 0x007FFFFF) | 0x3F800000) - 1.0f;
    float bend = -0.0451490433f;
    bend = bend * s + 0.148426647f;
    bend = bend * s + -0.267179406f;
    bend = bend * s + 0.441917039f;
    return float(0x4F000000 - bits) * 0x1p-23f - s * (1.0f - s) * bend;
}

inline float deviate(float r, uint32_t hash)
{
    float p = 0.000881497458f;
    p = p * r + 0.0588068727f;
    p = p * r + 0.544498422f;
    p = p * r + 0.868433063f;
    float q = 2.92561466e-05f;
    q = q * r + 0.00825960539f;
    q = q * r + 0.203938698f;
    q = q * r + 0.971077420f;
    q = q * r + 1.0f;
    return float_of(bits_of(r * p / q) ^ int32_t(hash & 0x80000000u));
}

void add(float* __restrict out,
         int64_t count,
         uint64_t key,
         const int32_t* __restrict column,
         float row_factor,
         const float* __restrict column_factor)
{
    alignas(64) uint32_t hashes[BLOCK];
    alignas(64) float rarities[BLOCK];
    for (int64_t i = 0; i < count; ++i) hashes[i] = hash(column[i], uint32_t(key), uint32_t(key >> 32));
    for (int64_t i = 0; i < count; ++i) rarities[i] = rarity(hashes[i]);
    for (int64_t i = 0; i < count; ++i) out[i] += deviate(rarities[i], hashes[i]) * row_factor * column_factor[i];
}

}  // namespace

// out[r, c] += deviate(key, row[r], column[c]) * row_factor[r] * column_factor[c]
extern "C" void ds_sparkling_add_normal(float* out,
                                        int64_t stride,
                                        int64_t rows,
                                        int64_t columns,
                                        int64_t key,
                                        const int64_t* row,
                                        const int32_t* column,
                                        const float* row_factor,
                                        const float* column_factor,
                                        int threads)
{
    threads = int(std::min<int64_t>(threads, 1 + rows * columns / WORTH));
    const int64_t tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < rows * tiles; ++tile) {
        const int64_t r = tile / tiles;
        const int64_t first = tile % tiles * TILE;
        const uint64_t of_row = row_key(key, row[r]);
        for (int64_t c = first; c < std::min(first + TILE, columns); c += BLOCK) {
            const int64_t count = std::min(BLOCK, columns - c);
            add(out + r * stride + c, count, of_row, column + c, row_factor[r], column_factor + c);
        }
    }
}
