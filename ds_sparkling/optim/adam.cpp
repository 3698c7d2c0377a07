// Adam and AdamW over a flat fp32 tensor whose elements have a learning rate and an age by birth, in one pass.
//
// A plain C interface, so that it builds in a second and without PyTorch's headers. Operations and their order are those
// of torch.optim.AdamW(fused=True), or of DeepSpeedCPUAdam, which differ in rounding. Build with -ffp-contract=off: an element's
// result must not depend on where runs and threads begin.

#include <algorithm>
#include <cmath>
#include <cstdint>

extern "C" {

// What one birth's elements get in this step.
struct Rate {
    float decay;       // torch: 1 - lr * weight_decay; DeepSpeed: -lr * weight_decay
    float step_size;   // torch: lr / (1 - beta1^t); DeepSpeed: its negative
    float correction;  // torch: sqrt(1 - beta2^t); DeepSpeed: its inverse
};

// Columns of a row up to stop, from where the run before stops, all of one birth.
struct Run {
    int64_t stop;
    int64_t birth;
};

// rows rows of row elements from start on, each cut into the same runs.
struct Block {
    int64_t start;
    int64_t rows;
    int64_t row;
    const Run* runs;
    int64_t count;
};

struct Constants {
    float beta1;
    float beta2;
    float one_minus_beta1;
    float one_minus_beta2;
    float eps;
    float weight_decay;
};
}

namespace {

enum Flavour { TORCH, DEEPSPEED };
enum Decay { NONE, DECOUPLED, L2 };

struct Tensors {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
};

// Elements begin .. end - 1, all of one birth.
template <Flavour flavour, Decay decay>
inline void run(const Tensors& t, int64_t begin, int64_t end, const Rate rate, const Constants c)
{
    float* __restrict p = t.param;
    const float* __restrict g = t.grad;
    float* __restrict m = t.exp_avg;
    float* __restrict v = t.exp_avg_sq;
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
        float param = p[i];
        float grad = g[i];
        if (flavour == DEEPSPEED) {
            if (decay == L2) grad = std::fma(param, c.weight_decay, grad);
            const float first = std::fma(grad, c.one_minus_beta1, m[i] * c.beta1);
            const float second = std::fma(grad * grad, c.one_minus_beta2, v[i] * c.beta2);
            const float update = first / std::fma(std::sqrt(second), rate.correction, c.eps);
            if (decay == DECOUPLED) param = std::fma(rate.decay, param, param);
            p[i] = std::fma(update, rate.step_size, param);
            m[i] = first;
            v[i] = second;
        } else {
            if (decay == L2) grad = std::fma(param, c.weight_decay, grad);
            if (decay == DECOUPLED) param = param * rate.decay;
            // torch.lerp starts from the nearer end.
            const bool near = c.one_minus_beta1 < 0.5f;
            const float first = std::fma(near ? c.one_minus_beta1 : c.one_minus_beta1 - 1.0f, grad - m[i], near ? m[i] : grad);
            const float second = std::fma(c.one_minus_beta2 * grad, grad, v[i] * c.beta2);
            const float denominator = std::sqrt(second) / rate.correction + c.eps;
            p[i] = param - rate.step_size * first / denominator;
            m[i] = first;
            v[i] = second;
        }
    }
}

// The elements of a block between begin and end.
template <Flavour flavour, Decay decay>
void block_step(const Tensors& t, const Block& block, int64_t begin, int64_t end, const Rate* rates, const Constants& c)
{
    if (block.count == 1) {
        run<flavour, decay>(t, begin, end, rates[block.runs[0].birth], c);
        return;
    }
    int64_t i = begin;
    for (int64_t first = begin - (begin - block.start) % block.row; first < end; first += block.row) {
        for (int64_t r = 0; r < block.count && i < end; ++r) {
            const int64_t stop = std::min(first + block.runs[r].stop, end);
            if (stop > i) {
                run<flavour, decay>(t, i, stop, rates[block.runs[r].birth], c);
                i = stop;
            }
        }
    }
}

// Blocks lie end to end; every thread takes an equal stretch of elements.
template <Flavour flavour, Decay decay>
void step(const Tensors& t, const Block* blocks, int64_t count, const Rate* rates, const Constants& c, int threads)
{
    const Block& last = blocks[count - 1];
    const int64_t numel = last.start + last.rows * last.row;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const int64_t low = numel * thread / threads;
        const int64_t high = numel * (thread + 1) / threads;
        const Block* block = std::upper_bound(
            blocks, blocks + count, low, [](int64_t i, const Block& candidate) { return i < candidate.start; });
        for (--block; block != blocks + count && block->start < high; ++block) {
            const int64_t begin = std::max(low, block->start);
            const int64_t end = std::min(high, block->start + block->rows * block->row);
            block_step<flavour, decay>(t, *block, begin, end, rates, c);
        }
    }
}

}  // namespace

extern "C" void ds_sparkling_adam_step(float* param,
                                       const float* grad,
                                       float* exp_avg,
                                       float* exp_avg_sq,
                                       const Block* blocks,
                                       int64_t count,
                                       const Rate* rates,
                                       const Constants* constants,
                                       int deepspeed,
                                       int decoupled,
                                       int threads)
{
    const Tensors t{param, grad, exp_avg, exp_avg_sq};
    const Constants& c = *constants;
    const Decay decay = c.weight_decay == 0.0f ? NONE : decoupled ? DECOUPLED : L2;
    void (*const steps[2][3])(const Tensors&, const Block*, int64_t, const Rate*, const Constants&, int) = {
        {step<TORCH, NONE>, step<TORCH, DECOUPLED>, step<TORCH, L2>},
        {step<DEEPSPEED, NONE>, step<DEEPSPEED, DECOUPLED>, step<DEEPSPEED, L2>}};
    steps[deepspeed ? DEEPSPEED : TORCH][decay](t, blocks, count, rates, c, threads);
}
