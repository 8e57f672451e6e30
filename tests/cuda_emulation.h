// CUDA's blocks and threads on a CPU, for the source that gluon_optim prints; included before it. Blocks run one after the other. The
// threads of a block are coroutines: each runs to the next barrier, in turn, forwards or backwards, so that what a barrier is
// missing for is read too early or too late in one of the two. Shared memory holds NaN when a block begins.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <ucontext.h>
#include <utility>

#define __global__
#define __device__
#define __shared__ static __attribute__((section("shared_memory")))
#define __launch_bounds__(threads)

extern char __start_shared_memory[] __attribute__((weak)), __stop_shared_memory[] __attribute__((weak));

struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

const unsigned MOST = 1024;
const std::size_t STACK = 1 << 16;

struct Thread {
    ucontext_t context;
    bool done;
    char stack[STACK];
};
static Thread threads[MOST];
static ucontext_t scheduler;
static unsigned current;
static void (*work)(void *);
static void *argument;

static void begin()
{
    work(argument);
    threads[current].done = true;   // and on in the scheduler, by uc_link
}

// Runs each thread to its next barrier; returns how many have ended.
static unsigned run_to_barrier(unsigned size, bool backwards)
{
    unsigned done = 0;
    for (unsigned k = 0; k < size; k++) {
        current = backwards ? size - 1 - k : k;
        threadIdx.x = current;
        swapcontext(&scheduler, &threads[current].context);
        done += threads[current].done;
    }
    return done;
}

// Returns 0, or 1 where some threads end while others wait at a barrier.
static int run(void (*kernel)(void *), void *arguments, unsigned blocks, unsigned size, bool backwards)
{
    work = kernel;
    argument = arguments;
    gridDim.x = blocks;
    blockDim.x = size;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
        for (unsigned k = 0; k < size; k++) {
            getcontext(&threads[k].context);
            threads[k].done = false;
            threads[k].context.uc_stack.ss_sp = threads[k].stack;
            threads[k].context.uc_stack.ss_size = STACK;
            threads[k].context.uc_link = &scheduler;
            makecontext(&threads[k].context, begin, 0);
        }
        unsigned done = 0;
        while (done == 0)
            done = run_to_barrier(size, backwards);
        if (done != size)
            return 1;
    }
    return 0;
}

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) { kernel(*(A *)arguments[I]...); }

template <class... A>
void call(void (*kernel)(A...), void **arguments) { call(kernel, arguments, std::index_sequence_for<A...>()); }

}

static void __syncthreads() { swapcontext(&emulation::threads[emulation::current].context, &emulation::scheduler); }

// After a kernel: a function of C that launches it, with arguments as cuLaunchKernel takes them.
#define EMULATED(kernel)                                                                                   \
    static void call_##kernel(void *arguments) { emulation::call(kernel, (void **)arguments); }            \
    extern "C" int launch_##kernel(unsigned blocks, unsigned threads, void *arguments, int backwards)      \
    {                                                                                                      \
        return emulation::run(call_##kernel, arguments, blocks, threads, backwards);                       \
    }

static float bits_to_float(unsigned bits)
{
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static unsigned float_to_bits(float x)
{
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

static float half_to_float(unsigned short bits)
{
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x = exponent == 0 ? std::ldexp((float)fraction, -24) : std::ldexp((float)(fraction + 1024), exponent - 25);
    if (exponent == 31)
        x = fraction ? NAN : INFINITY;
    return bits >> 15 ? -x : x;
}

// Rounded to nearest even, as std::nearbyint does.
static unsigned short float_to_half(float x)
{
    const unsigned sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (size != size)
        return 0x7fff;
    if (size >= 65520)
        return sign | 0x7c00;
    if (size < 1.0f / 16384)
        return sign | (unsigned)std::nearbyint(std::ldexp(size, 24));
    int exponent;
    const float fraction = std::frexp(size, &exponent);
    return sign | (((unsigned)(exponent + 14) << 10) + (unsigned)std::nearbyint(std::ldexp(fraction, 11)) - 1024);
}
