// Adam and AdamW over a flat fp32 tensor whose elements have a learning rate and an age by birth stage, in one pass.
//
// A plain C interface, so that it builds in a second and without PyTorch's headers. Operations and their order are those
// of torch.optim.AdamW, or of DeepSpeedCPUAdam, which differ in rounding. Build with -ffp-contract=off: an element's
// result must not depend on where runs and threads begin.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" {

// What one birth stage's elements get in this step.
struct Rate {
    float decay;       // torch: 1 - lr * weight_decay; DeepSpeed: -lr * weight_decay
    float step_size;   // torch: lr / (1 - beta1^t); DeepSpeed: its negative
    float correction;  // torch: sqrt(1 - beta2^t); DeepSpeed: its inverse
};

// Elements start .. stop - 1, of one birth stage, or of the stages in births.
struct Segment {
    int64_t start;
    int64_t stop;
    int64_t stage;
    const uint8_t* births;  // null if all are of stage
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

// Elements begin .. end - 1, all of one birth stage.
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

// The first index from i on (below end) whose birth isn't that of i.
inline int64_t run_end(const uint8_t* births, int64_t i, int64_t end)
{
    const uint8_t birth = births[i];
    const uint64_t same = 0x0101010101010101ull * birth;
    for (++i; i + 8 <= end; i += 8) {
        uint64_t next;
        std::memcpy(&next, births + i, 8);
        if (next != same) break;
    }
    while (i < end && births[i] == birth) ++i;
    return i;
}

template <Flavour flavour, Decay decay>
void step(const Tensors& t, const Segment* segments, int64_t count, const Rate* rates, const Constants& c, int threads)
{
    int64_t numel = 0;
    for (int64_t s = 0; s < count; ++s) numel += segments[s].stop - segments[s].start;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        int64_t skip = numel * thread / threads;
        int64_t left = numel * (thread + 1) / threads - skip;
        for (int64_t s = 0; s < count && left > 0; ++s) {
            const Segment& segment = segments[s];
            const int64_t size = segment.stop - segment.start;
            if (skip >= size) {
                skip -= size;
                continue;
            }
            int64_t i = segment.start + skip;
            const int64_t end = std::min(segment.stop, i + left);
            skip = 0;
            left -= end - i;
            if (segment.births == nullptr) {
                run<flavour, decay>(t, i, end, rates[segment.stage], c);
                continue;
            }
            while (i < end) {
                const uint8_t* births = segment.births - segment.start;
                const int64_t stop = run_end(births, i, end);
                run<flavour, decay>(t, i, stop, rates[births[i]], c);
                i = stop;
            }
        }
    }
}

}  // namespace

extern "C" void ds_sparkling_adam_step(float* param,
                                       const float* grad,
                                       float* exp_avg,
                                       float* exp_avg_sq,
                                       const Segment* segments,
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
    void (*const steps[2][3])(const Tensors&, const Segment*, int64_t, const Rate*, const Constants&, int) = {
        {step<TORCH, NONE>, step<TORCH, DECOUPLED>, step<TORCH, L2>},
        {step<DEEPSPEED, NONE>, step<DEEPSPEED, DECOUPLED>, step<DEEPSPEED, L2>}};
    steps[deepspeed ? DEEPSPEED : TORCH][decay](t, segments, count, rates, c, threads);
}
