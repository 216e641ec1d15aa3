// Runs the kernels of posinv/softdtw/kernel.cu on the CPU, for test_cuda.py. Every lane of a warp is
// a fiber, which yields to the next lane wherever lanes exchange values. A warp yields to a random
// running warp now and then, and whenever it waits for another. Few warps run at a time, so a strip
// that waits for one that has not started is a deadlock here.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__
#define __restrict__
using std::max;
using std::min;

struct {
    int x;
} threadIdx;

constexpr int LANES = 32;
constexpr size_t SHARED = 48 << 10, STACK = 64 << 10;

struct Warp {
    ucontext_t lanes[LANES];
    std::unique_ptr<char[]> stack{new char[LANES * STACK]};
    char shared[SHARED];
    double exchanged[2][LANES];  // by lane, in the last two collective operations
    const char* operation[2][LANES];
    int parity[LANES];
    int done;
};

static Warp* warp;
static ucontext_t scheduler;
static std::mt19937 chance;
static int direction;  // of the lanes' turns
static const char* failure;

static void to_next_lane() {
    int lane = threadIdx.x;
    int next = threadIdx.x = (lane + direction + LANES) % LANES;
    swapcontext(&warp->lanes[lane], &warp->lanes[next]);
    threadIdx.x = lane;
}

// Every lane gives a value. Returns the values of all lanes.
static const double* exchange(double value, const char* operation) {
    int lane = threadIdx.x, p = warp->parity[lane] ^= 1;
    warp->exchanged[p][lane] = value;
    warp->operation[p][lane] = operation;
    to_next_lane();
    for (int l = 0; l < LANES; l++)
        if (strcmp(warp->operation[p][l], operation)) failure = "lanes diverge";
    return warp->exchanged[p];
}

static void let_other_warps_run(bool certainly) {
    static int last;
    if (threadIdx.x != 0) return;
    if (certainly || ++last % 64 == 0) swapcontext(&warp->lanes[0], &scheduler);
    threadIdx.x = 0;
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return exchange(value, "shfl")[from];
}

template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
    int from = threadIdx.x - by;
    return exchange(value, "shfl_up")[from < 0 ? threadIdx.x : from];
}

template <class T>
T __shfl_down_sync(unsigned, T value, int by) {
    int from = threadIdx.x + by;
    return exchange(value, "shfl_down")[from >= LANES ? threadIdx.x : from];
}

bool __all_sync(unsigned, bool value) {
    const double* values = exchange(value, "all");
    bool all = std::all_of(values, values + LANES, [](double v) { return v != 0; });
    let_other_warps_run(!all);
    return all;
}

void __syncwarp() { exchange(0, "syncwarp"); }

int atomicAdd(int* address, int value) {
    int before = *address;
    *address += value;
    return before;
}

#include "kernel.cu"

alignas(16) real tiles[SHARED / sizeof(real)];

template <class... Args>
struct Kernel {
    static std::tuple<Args...> args;
    static void (*function)(Args...);

    static void lane() {
        std::apply(function, args);
        warp->done++;
        while (true) {
            if (warp->done == LANES) swapcontext(&warp->lanes[threadIdx.x], &scheduler);
            to_next_lane();
        }
    }

    template <size_t... I>
    static void unpack(void** parameters, std::index_sequence<I...>) {
        args = {*static_cast<Args*>(parameters[I])...};
    }

    static void run(void (*kernel)(Args...), int blocks, int resident, void** parameters) {
        function = kernel;
        unpack(parameters, std::index_sequence_for<Args...>());
        std::vector<std::unique_ptr<Warp>> running;
        long idle = 0;
        while ((blocks || !running.empty()) && !failure) {
            if (blocks && static_cast<int>(running.size()) < resident) {
                running.push_back(std::make_unique<Warp>());
                start(*running.back());
                blocks--;
            }
            size_t index = chance() % running.size();
            warp = running[index].get();
            memcpy(tiles, warp->shared, SHARED);
            threadIdx.x = 0;
            swapcontext(&scheduler, &warp->lanes[0]);
            memcpy(warp->shared, tiles, SHARED);
            if (warp->done == LANES) {
                running.erase(running.begin() + index);
                idle = 0;
            } else if (++idle > 300000) {
                failure = "deadlock";
            }
        }
    }

    static void start(Warp& fresh) {
        fresh.done = 0;
        for (int l = 0; l < LANES; l++) {
            fresh.parity[l] = 0;
            getcontext(&fresh.lanes[l]);
            fresh.lanes[l].uc_stack = {&fresh.stack[l * STACK], 0, STACK};
            fresh.lanes[l].uc_link = nullptr;
            makecontext(&fresh.lanes[l], lane, 0);
        }
        memset(fresh.shared, 0xff, SHARED);
    }
};

template <class... Args>
std::tuple<Args...> Kernel<Args...>::args;
template <class... Args>
void (*Kernel<Args...>::function)(Args...);

template <class... Args>
static void run(void (*kernel)(Args...), int blocks, int resident, void** parameters) {
    Kernel<Args...>::run(kernel, blocks, resident, parameters);
}

// Returns what went wrong, or null.
extern "C" const char* launch(const char* name, int blocks, int resident, unsigned seed,
                              void** parameters) {
    chance.seed(seed);
    direction = seed % 2 ? 1 : -1;
    failure = nullptr;
    if (!strcmp(name, "forward")) run(forward, blocks, resident, parameters);
    if (!strcmp(name, "backward")) run(backward, blocks, resident, parameters);
    return failure;
}
