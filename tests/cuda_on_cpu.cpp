// CUDA on the CPU: an Nvidia driver, compiler and BLAS, small enough for a test, which execute the CUDA C that Theano
// and libgpuarray generate. It is one library with the names libcuda, libnvrtc, libcublas (card.py makes it). By hand:
//
//   g++ -std=gnu++17 -O3 -shared -fPIC -U_FORTIFY_SOURCE -Wl,-soname,libcuda.so.1 -o libcuda.so.1 cuda_on_cpu.cpp -ldl
//   for name in cuda nvrtc cublas; do ln -s libcuda.so.1 lib$name.so; done
//   LD_LIBRARY_PATH=$PWD python3 doodle.py .. --device=gpu0
//
// A kernel becomes C++, which g++ compiles. Its threads run one after the other: as fibers, from barrier to barrier,
// where there are barriers. The card is a strict one:
//   - a kernel that reads or writes outside a buffer, and a host that touches device memory, die by SIGSEGV; a line
//     says which. For a guard at each buffer Theano needs gpuarray.preallocate=-1, else it shares buffers
//   - fresh memory, and shared memory when a block begins, is full of NaN
//   - refused are launches and BLAS calls out of range, barriers that some threads never reach, code for newer cards
//   - threads and blocks run from the first to the last, or reversed: results that differ tell of a race
// Not covered: that a real card goes on while the host does, the real cuBLAS, CUDA's rounding of exp, pow and the like,
// and half precision.
//
// Switches, in the environment:
//   EMU_CARDS    compute capability of each card, 8.6 without it; 9.0,12.0: two cards; empty: none
//   EMU_DRIVER   the version of CUDA that the driver is for, 12.4
//   EMU_MEMORY   of a card, in bytes, 8e9
//   EMU_DIR      a folder that keeps compiled kernels, as libraries, and their sources, as .cu files with all headers
//   EMU_NVRTC    path of the real libnvrtc.so.12: it compiles each kernel as well, and what it makes, unchanged, is
//                what Theano gets and keeps; what a kernel does is still what g++ made of it
//   EMU_REVERSE  1: threads and blocks run from the last to the first, and guards lie close before buffers, not behind
//   EMU_RUN      0: no BLAS, and no launch of more than one block; for the memory and the counts of large pictures
//   EMU_HOLLOW   1: nothing is executed, so that g++ compiles no kernel, and all numbers are 0
//   EMU_LOG      a file that gets a line for each call that matters
//   EMU_COUNTS   a file that gets `emu_counts()` at the end
//
// Functions for a process that has the card, by ctypes.CDLL('libcuda.so.1'):
//   const char *emu_counts()        JSON, {kind: [calls, bytes], ..} so far, of the kinds `launch`, `blas`, `to card`,
//                                   `from card` (for which a host waits, too), `within card`, `fill`, `synchronise`,
//                                   `allocate` and `compile`, each only if there was one; and `memory`: [used, peak]
//   void emu_reset()                makes all counts 0, and the peak what is in use
//   void emu_reverse(int reverse)   as EMU_REVERSE, from now on
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <fstream>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <vector>
using std::string;
using std::to_string;

typedef int Result;                                 // CUresult, nvrtcResult and cublasStatus_t: 0 is success
typedef uint64_t Address;                           // in device memory
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_PTX = 218,
       NOT_FOUND = 500, LAUNCH_FAILED = 719 };
enum { NVRTC_INVALID_OPTION = 5, NVRTC_COMPILATION = 6, CUBLAS_INVALID_VALUE = 7 };

// ---- switches -------------------------------------------------------------------------------------------------------

static string setting(const char *name, const string &otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

// "8.6,12.0" -> {86, 120}
static std::vector<int> versions(const string &text) {
    std::vector<int> found;
    int major, minor, length;
    for (const char *rest = text.c_str(); sscanf(rest, "%d.%d%n", &major, &minor, &length) == 2;) {
        found.push_back(10 * major + minor);
        rest += length + (rest[length] == ',');
    }
    return found;
}

static const std::vector<int> CARDS = versions(setting("EMU_CARDS", "8.6"));
static const int DRIVER = versions(setting("EMU_DRIVER", "12.4")).at(0);
static const size_t MEMORY = stod(setting("EMU_MEMORY", "8e9"));
static const string FOLDER = setting("EMU_DIR", "/tmp/cuda-on-cpu-" + to_string(getuid()));
static const string NVRTC = setting("EMU_NVRTC", "");
static const bool HOLLOW = setting("EMU_HOLLOW", "0") != "0", EXECUTES = !HOLLOW && setting("EMU_RUN", "1") != "0";
static bool reversed = setting("EMU_REVERSE", "0") != "0";

// ---- counts ---------------------------------------------------------------------------------------------------------

struct Count { long calls, bytes; };
static std::map<string, Count> counts;
static size_t used, peak;                           // bytes of device memory
static FILE *log_file = getenv("EMU_LOG") ? fopen(getenv("EMU_LOG"), "a") : nullptr;

static void count(const string &kind, size_t bytes, const string &what = "") {
    counts[kind].calls++, counts[kind].bytes += bytes;
    if (log_file) fprintf(log_file, "%s: %s %zu bytes\n", kind.c_str(), what.c_str(), bytes), fflush(log_file);
}

extern "C" const char *emu_counts() {
    static string text;
    text = "{";
    for (auto &[kind, sum] : counts)
        text += "\"" + kind + "\": [" + to_string(sum.calls) + ", " + to_string(sum.bytes) + "], ";
    text += "\"memory\": [" + to_string(used) + ", " + to_string(peak) + "]}";
    return text.c_str();
}
extern "C" void emu_reset() { counts.clear(), peak = used; }
extern "C" void emu_reverse(int reverse) { reversed = reverse; }

static struct AtEnd {
    ~AtEnd() {
        if (getenv("EMU_COUNTS")) std::ofstream(getenv("EMU_COUNTS")) << emu_counts() << "\n";
    }
} at_end;

static Result refused(Result error, const string &what) {
    fprintf(stderr, "The card refuses: %s\n", what.c_str());
    return error;
}

// ---- device memory --------------------------------------------------------------------------------------------------

// A buffer lies in pages of its own, close to the end of them, or reversed at the beginning; the pages before and after
// them belong to nobody. Its pages are closed until something touches them: then they are opened for the rest of the
// kernel, BLAS call or copy that did, and if it was none of these, the process dies.
static const size_t PAGE = 4096;
struct Buffer {
    char *pages;
    size_t length, size;                            // of all pages but the guards, and of the buffer
    void protect(int how) const { mprotect(pages, length, how); }
};
static std::map<Address, Buffer> buffers;
static std::vector<const Buffer *> opened;
static const char *at_work;                         // the kernel, BLAS call or copy, or nullptr

struct Work {
    Work(const char *name) { at_work = name; }
    ~Work() {
        for (auto buffer : opened) buffer->protect(PROT_NONE);
        opened.clear(), at_work = nullptr;
    }
};

static void handle_fault(int number, siginfo_t *info, void *) {
    Address at = (Address)info->si_addr;
    const char *who = at_work ? at_work : "the host";
    bool known = false;
    for (auto &[address, buffer] : buffers) {
        Address begin = (Address)buffer.pages, end = begin + buffer.length;
        if (at_work && begin <= at && at < end) {
            opened.push_back(&buffer);
            return buffer.protect(PROT_READ | PROT_WRITE);
        }
        if (begin - PAGE <= at && at < end + PAGE)
            known = fprintf(stderr, "The card stops: %s touches byte %ld of a buffer of %zu bytes\n", who,
                            (long)(at - address), buffer.size);
    }
    if (!known) fprintf(stderr, "The card stops: %s touches what belongs to no buffer\n", who);
    signal(number, SIG_DFL);                        // when this returns, the same is touched again
}
static void watch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = handle_fault, action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
}

static Result allocate(Address *address, size_t size) {
    size_t length = (size + PAGE - 1) / PAGE * PAGE, aligned = (size + 7) / 8 * 8;
    if (!size) return INVALID_VALUE;
    if (used + length > MEMORY) return OUT_OF_MEMORY;
    static char *next = (char *)0x100000000000;     // far from the host's memory, and never used again
    char *p = (char *)mmap(next, length + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return OUT_OF_MEMORY;
    next = p + length + 2 * PAGE;
    Buffer buffer = {p + PAGE, length, size};
    if (EXECUTES) {
        buffer.protect(PROT_READ | PROT_WRITE);
        memset(buffer.pages, 0xff, length);         // as floats NaN, as integers -1
        buffer.protect(PROT_NONE);
    }
    *address = (Address)(buffer.pages + (reversed ? 0 : length - aligned));
    buffers[*address] = buffer;
    used += length, peak = std::max(peak, used);
    count("allocate", size);
    return SUCCESS;
}

static Result release(Address address) {
    auto found = buffers.find(address);
    if (found == buffers.end()) return INVALID_VALUE;
    const Buffer &buffer = found->second;
    munmap(buffer.pages - PAGE, buffer.length + 2 * PAGE);
    used -= buffer.length;
    buffers.erase(found);
    return SUCCESS;
}

static Result copy(const char *kind, Address to, Address from, size_t size) {
    Work work(kind);
    memmove((void *)to, (void *)from, size);
    count(kind, size);
    return SUCCESS;
}

// ---- execution ------------------------------------------------------------------------------------------------------

struct Dim { unsigned x, y, z; };
struct State { Dim thread, block, threads, blocks; void *shared; void (*barrier)(); };      // as in PRELUDE below
struct Module { void *library; State *state; void (*forget)(); bool has_barriers; };         // forget shared memory
struct Function { Module *module; void (*call)(void **); string name; };

static const unsigned MOST_THREADS = 1024, MOST_SHARED = 49152;
static const Function *running;
static void **arguments;

// A thread of a block with barriers has its own stack. A thread that comes to a barrier goes back to `scheduler`, which
// lets the next one run, and comes back to `place` when all others have come there, too.
struct Fiber {
    jmp_buf place;
    bool begun, ended;
};
static Fiber fibers[MOST_THREADS], *fiber;          // the current one
static jmp_buf scheduler;

static void wait_at_barrier() {
    if (!_setjmp(fiber->place)) _longjmp(scheduler, 1);
}
static void run_fiber() {
    running->call(arguments);
    fiber->ended = true;
    _longjmp(scheduler, 1);
}
static void begin_fiber(size_t number) {
    static const size_t SIZE = 1 << 16;
    static char *stacks = (char *)mmap(nullptr, MOST_THREADS * SIZE, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    static ucontext_t context;
    fiber->begun = true;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + number * SIZE, context.uc_stack.ss_size = SIZE, context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
}

static unsigned nth(unsigned k, unsigned n) { return reversed ? n - 1 - k : k; }
static Dim place(uint64_t i, Dim size) {
    return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

// Whether all threads come to all barriers. What is volatile keeps its value over a longjmp.
static bool run_with_barriers(unsigned threads, State *state) {
    for (unsigned i = 0; i < threads; i++) fibers[i].begun = fibers[i].ended = false;
    for (volatile unsigned ended = 0; ended < threads;) {
        if (ended) return false;
        for (volatile unsigned k = 0; k < threads; k++) {
            unsigned i = nth(k, threads);
            fiber = &fibers[i];
            state->thread = place(i, state->threads);
            if (!_setjmp(scheduler)) {
                if (fiber->begun) _longjmp(fiber->place, 1);
                begin_fiber(i);
            }
            ended = ended + fiber->ended;
        }
    }
    return true;
}

// Dynamic shared memory of so many bytes, which end where it is forbidden to read on.
static char *shared_memory(unsigned size) {
    static char *pages = nullptr;
    if (!pages) {
        pages = (char *)mmap(nullptr, MOST_SHARED + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(pages + MOST_SHARED, PAGE, PROT_NONE);
    }
    memset(pages, 0xff, MOST_SHARED);
    return pages + MOST_SHARED - (size + 7) / 8 * 8;
}

static Result launch(const Function *function, Dim blocks, Dim threads, unsigned shared, void **parameters) {
    char text[512];
    snprintf(text, sizeof text, "%s, %ux%ux%u blocks of %ux%ux%u threads, %u bytes shared", function->name.c_str(),
             blocks.x, blocks.y, blocks.z, threads.x, threads.y, threads.z, shared);
    count("launch", 0, text);
    uint64_t block_count = (uint64_t)blocks.x * blocks.y * blocks.z, n = (uint64_t)threads.x * threads.y * threads.z;
    if (!block_count || blocks.x > 0x7fffffff || blocks.y > 65535 || blocks.z > 65535 || !n || n > MOST_THREADS ||
        threads.z > 64 || shared > MOST_SHARED) return refused(INVALID_VALUE, text);
    if (HOLLOW || (!EXECUTES && block_count > 1)) return SUCCESS;
    Work work(function->name.c_str());
    State *state = function->module->state;
    state->threads = threads, state->blocks = blocks, state->barrier = wait_at_barrier;
    running = function, arguments = parameters;
    bool sound = true;
    for (uint64_t k = 0; k < block_count && sound; k++) {
        state->block = place(reversed ? block_count - 1 - k : k, blocks);
        if (shared) state->shared = shared_memory(shared);
        function->module->forget();
        if (function->module->has_barriers)
            sound = run_with_barriers(n, state);
        else
            for (unsigned i = 0; i < n; i++) {
                state->thread = place(nth(i, n), threads);
                function->call(parameters);
            }
    }
    return sound ? SUCCESS : refused(LAUNCH_FAILED, string(text) + ": some threads end before a barrier");
}

// ---- compilation ----------------------------------------------------------------------------------------------------

// What stands before a kernel: the part of CUDA C that kernels use. All threads of all blocks run in one thread of the
// host, so that an atomic function is an ordinary one, and shared memory is static, in a section of its own whose ends
// the linker names. The function `emu_barrier` is in the library only if a kernel has a barrier.
static const char *PRELUDE = R"(
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
struct emu_dim { unsigned x, y, z; };
struct emu_state { emu_dim thread, block, threads, blocks; void *shared; void (*barrier)(); };
extern "C" {
    emu_state emu;
    extern char __start_emu_shared[] __attribute__((weak)), __stop_emu_shared[] __attribute__((weak));
    void emu_forget() { memset(__start_emu_shared, 0xff, __stop_emu_shared - __start_emu_shared); }
    __attribute__((noinline)) inline void emu_barrier() { emu.barrier(); }
}
#define threadIdx emu.thread
#define blockIdx emu.block
#define blockDim emu.threads
#define gridDim emu.blocks
#define warpSize 32
#define __syncthreads() emu_barrier()

#define __global__
#define __device__ __attribute__((unused))
#define __host__
#define __shared__ static __attribute__((section("emu_shared")))
#define __constant__ static const
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 600
#define asm(...) __builtin_trap()                   /* half precision, which nobody uses */

#define EMU_PAIR(T) \
    static inline T min(T a, T b) { return b < a ? b : a; } \
    static inline T max(T a, T b) { return a < b ? b : a; }
EMU_PAIR(int) EMU_PAIR(unsigned) EMU_PAIR(long) EMU_PAIR(unsigned long) EMU_PAIR(long long) EMU_PAIR(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
template <class T> T __ldg(const T *p) { return *p; }

template <class T, class F> T emu_bits(F from) {
    T to;
    static_assert(sizeof to == sizeof from, "");
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline float __int_as_float(int x) { return emu_bits<float>(x); }
static inline int __float_as_int(float x) { return emu_bits<int>(x); }
static inline double __longlong_as_double(long long x) { return emu_bits<double>(x); }
static inline long long __double_as_longlong(double x) { return emu_bits<long long>(x); }
static inline unsigned __byte_perm(unsigned, unsigned, unsigned) { __builtin_trap(); }

template <class T, class U> T atomicAdd(T *p, U x) { T old = *p; *p += x; return old; }
template <class T, class U> T atomicExch(T *p, U x) { T old = *p; *p = x; return old; }
template <class T, class U, class V> T atomicCAS(T *p, U a, V x) { T old = *p; if (old == (T)a) *p = x; return old; }

template <class... A> struct emu_ordered { emu_ordered(void (*f)(A...), A... a) { f(a...); } };
template <class... A> void emu_apply(void (*f)(A...), void **p) { emu_ordered<A...>{f, *(A *)*p++...}; }
#line 1 "kernel"
)";

struct Program { string source, ptx, log; };        // source with its headers

static string hash(const string &text) {
    char name[17];
    snprintf(name, sizeof name, "%016zx", std::hash<string>()(text));
    return name;
}

static string replaced(const string &text, const string &pattern, const string &by) {
    return std::regex_replace(text, std::regex(pattern), by);
}

// The C++ of a program, with a function emu_call_NAME for each kernel that takes arguments as cuLaunchKernel has them.
static string as_cpp(const string &source) {
    std::ostringstream text;
    text << PRELUDE << replaced(source, "extern\\s+__shared__\\s+(\\w+)\\s+(\\w+)\\[\\]", "$1 *$2 = ($1 *)emu.shared")
         << "\nextern \"C\" {\n";
    std::regex kernel("(?:KERNEL|__global__)\\s+void\\s+(\\w+)\\s*\\(");
    for (std::sregex_iterator found(source.begin(), source.end(), kernel), end; found != end; ++found) {
        string name = (*found)[1];
        text << "void emu_call_" << name << "(void **p) { emu_apply(" << name << ", p); }\n";
    }
    text << "}\n";
    return text.str();
}

// Compiles to the library at `path` if it is not there yet. Others may do the same at the same time.
static bool compile(Program *program, const string &path) {
    if (!access(path.c_str(), R_OK)) return true;
    string base = path + to_string(getpid()), cpp = base + ".cpp";
    std::ofstream(cpp) << as_cpp(program->source);
    FILE *pipe = popen(("g++ -std=gnu++14 -w -O1 -shared -fPIC -o " + base + " " + cpp + " 2>&1").c_str(), "r");
    char buffer[4096];
    while (fgets(buffer, sizeof buffer, pipe)) program->log += buffer;
    bool done = !pclose(pipe) && !rename(base.c_str(), path.c_str());
    unlink(cpp.c_str());
    return done;
}

// The same by Nvidia's own compiler.
static Result compile_by_nvrtc(Program *program, int n, const char **options) {
    static void *nvrtc = dlopen(NVRTC.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!nvrtc) return refused(NVRTC_COMPILATION, dlerror());
    auto call = [](const char *name, auto... arguments) {
        return ((Result(*)(decltype(arguments)...))dlsym(nvrtc, name))(arguments...);
    };
    auto text = [&](const char *what, void *handle) {
        size_t size = 0;
        call((string(what) + "Size").c_str(), handle, &size);
        string text(size, 0);
        call(what, handle, &text[0]);
        return string(text.c_str());
    };
    void *handle;
    call("nvrtcCreateProgram", &handle, program->source.c_str(), (char *)0, 0, (char **)0, (char **)0);
    Result result = call("nvrtcCompileProgram", handle, n, options);
    program->log += text("nvrtcGetProgramLog", handle);
    if (!result) program->ptx = text("nvrtcGetPTX", handle);
    call("nvrtcDestroyProgram", &handle);
    return result;
}

// A card gets a text, PTX: nvrtc's, or one that no real card would take. Its hash names the library to load.
static Result compile_program(Program *program, int n, const char **options) {
    string arch = n > 1 ? options[1] : "";
    mkdir(FOLDER.c_str(), 0700);
    string name = hash(program->source + PRELUDE), base = FOLDER + "/" + name;
    std::ofstream(base + ".cu") << program->source;
    if (!NVRTC.empty()) {
        if (Result error = compile_by_nvrtc(program, n, options)) return error;
    } else if (std::regex_match(arch, std::regex("compute_(50|52|53|60|61|62|70|72|75|80|86|87|89|90)"))) {
        program->ptx = "// for cuda_on_cpu.cpp alone: " + name + "\n.target " + replaced(arch, "compute", "sm");
    } else {
        program->log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
        return NVRTC_INVALID_OPTION;
    }
    if (!HOLLOW && !compile(program, base + ".so")) return NVRTC_COMPILATION;
    if (symlink((name + ".so").c_str(), (FOLDER + "/" + hash(program->ptx) + ".ptx").c_str()) && errno != EEXIST)
        return NVRTC_COMPILATION;
    count("compile", 0, name + " for " + arch);
    return SUCCESS;
}

static Result load(Module **module, const string &ptx, int card) {
    std::smatch target;
    std::regex_search(ptx, target, std::regex("\\.target sm_(\\d+)"));
    if (target.empty() || stoi(target[1]) > card) return refused(INVALID_PTX, "code that is not for this card");
    if (HOLLOW) return *module = new Module{}, SUCCESS;
    void *library = dlopen((FOLDER + "/" + hash(ptx) + ".ptx").c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) return refused(INVALID_PTX, dlerror());
    *module = new Module{library, (State *)dlsym(library, "emu"), (void (*)())dlsym(library, "emu_forget"),
                         dlsym(library, "emu_barrier") != nullptr};
    return SUCCESS;
}

// ---- BLAS: matrices by columns --------------------------------------------------------------------------------------

template <class T>
static Result gemm(bool ta, bool tb, int m, int n, int k, T alpha, const T *A, int lda, const T *B, int ldb, T beta,
                   T *C, int ldc) {
    if (m < 0 || n < 0 || k < 0 || lda < std::max(1, ta ? k : m) || ldb < std::max(1, tb ? n : k) ||
        ldc < std::max(1, m)) return refused(CUBLAS_INVALID_VALUE, "gemm");
    count("blas", 0, "gemm " + to_string(m) + "x" + to_string(n) + "x" + to_string(k));
    if (!EXECUTES) return SUCCESS;
    Work work("gemm");
    std::vector<T> turned;
    if (ta) {                                       // then columns of A are neighbours
        turned.resize((size_t)m * k);
        for (int i = 0; i < m; i++)
            for (int l = 0; l < k; l++) turned[i + (size_t)l * m] = A[l + (size_t)i * lda];
        A = turned.data(), lda = m;
    }
    for (int j = 0; j < n; j++) {
        T *c = C + (size_t)j * ldc;
        for (int i = 0; i < m; i++) c[i] = beta ? c[i] * beta : 0;              // beta 0: C may be NaN
        for (int l = 0; l < k; l++) {
            T b = alpha * (tb ? B[j + (size_t)l * ldb] : B[l + (size_t)j * ldb]);
            const T *a = A + (size_t)l * lda;
            for (int i = 0; i < m; i++) c[i] += a[i] * b;
        }
    }
    return SUCCESS;
}

// The first element of a vector with a step, which may be negative.
template <class T> static T *first(T *x, int n, int step) { return step < 0 ? x - (ptrdiff_t)(n - 1) * step : x; }

template <class T>
static Result gemv(bool turned, int m, int n, T alpha, const T *A, int lda, const T *x, int incx, T beta, T *y,
                   int incy) {
    if (m < 0 || n < 0 || lda < std::max(1, m) || !incx || !incy) return refused(CUBLAS_INVALID_VALUE, "gemv");
    count("blas", 0, "gemv " + to_string(m) + "x" + to_string(n));
    if (!EXECUTES) return SUCCESS;
    Work work("gemv");
    int rows = turned ? n : m, columns = turned ? m : n;
    x = first(x, columns, incx), y = first(y, rows, incy);
    for (int i = 0; i < rows; i++) {
        double sum = 0;
        for (int j = 0; j < columns; j++)
            sum += (double)(turned ? A[j + (size_t)i * lda] : A[i + (size_t)j * lda]) * x[(ptrdiff_t)j * incx];
        T &to = y[(ptrdiff_t)i * incy];
        to = (beta ? beta * to : 0) + alpha * sum;
    }
    return SUCCESS;
}

template <class T>
static Result ger(int m, int n, T alpha, const T *x, int incx, const T *y, int incy, T *A, int lda) {
    if (m < 0 || n < 0 || lda < std::max(1, m) || !incx || !incy) return refused(CUBLAS_INVALID_VALUE, "ger");
    count("blas", 0, "ger " + to_string(m) + "x" + to_string(n));
    if (!EXECUTES) return SUCCESS;
    Work work("ger");
    x = first(x, m, incx), y = first(y, n, incy);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) A[i + (size_t)j * lda] += alpha * x[(ptrdiff_t)i * incx] * y[(ptrdiff_t)j * incy];
    return SUCCESS;
}

template <class T> static Result dot(int n, const T *x, int incx, const T *y, int incy, T *result) {
    count("blas", 0, "dot " + to_string(n));
    if (!EXECUTES) return SUCCESS;
    Work work("dot");
    x = first(x, n, incx), y = first(y, n, incy);
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[(ptrdiff_t)i * incx] * y[(ptrdiff_t)i * incy];
    *result = sum;
    return SUCCESS;
}

// ---- the functions of libcuda ---------------------------------------------------------------------------------------

static std::vector<long> contexts;                  // a stack of contexts, each the number of a card + 1

extern "C" {

Result cuInit(unsigned) {
    watch_faults();
    return CARDS.empty() ? NO_DEVICE : SUCCESS;
}
Result cuDriverGetVersion(int *version) { *version = DRIVER / 10 * 1000 + DRIVER % 10 * 10; return SUCCESS; }
Result cuGetErrorName(Result error, const char **text) {
    static std::map<int, const char *> names = {
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"}, {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {INVALID_PTX, "CUDA_ERROR_INVALID_PTX"}, {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"}};
    *text = names.count(error) ? names[error] : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}
Result cuGetErrorString(Result error, const char **text) {
    if (error == NO_DEVICE) return *text = "no CUDA-capable device is detected", SUCCESS;
    return error == OUT_OF_MEMORY ? (*text = "out of memory", SUCCESS) : cuGetErrorName(error, text);
}

Result cuDeviceGetCount(int *n) { *n = CARDS.size(); return SUCCESS; }
Result cuDeviceGet(int *card, int n) {
    *card = n;
    return 0 <= n && n < (int)CARDS.size() ? SUCCESS : INVALID_DEVICE;
}
Result cuDeviceGetName(char *name, int length, int) { snprintf(name, length, "CUDA on the CPU"); return SUCCESS; }
Result cuDeviceGetPCIBusId(char *id, int length, int card) {
    snprintf(id, length, "0000:%02x:00.0", card);
    return SUCCESS;
}
Result cuDeviceTotalMem_v2(size_t *size, int) { *size = MEMORY; return SUCCESS; }
Result cuDeviceGetAttribute(int *value, int which, int card) {
    enum { THREADS = 1, BLOCK_X, BLOCK_Y, BLOCK_Z, GRID_X, GRID_Y, GRID_Z, SHARED, WARP = 10, PROCESSORS = 16,
           UNIFIED_ADDRESSES = 41, MAJOR = 75, MINOR };
    std::map<int, int> known = {
        {THREADS, MOST_THREADS}, {BLOCK_X, MOST_THREADS}, {BLOCK_Y, MOST_THREADS}, {BLOCK_Z, 64}, {GRID_X, 0x7fffffff},
        {GRID_Y, 65535}, {GRID_Z, 65535}, {SHARED, MOST_SHARED}, {WARP, 32}, {PROCESSORS, 4}, {UNIFIED_ADDRESSES, 1},
        {MAJOR, CARDS.at(card) / 10}, {MINOR, CARDS.at(card) % 10}};
    *value = known[which];
    return known.count(which) ? SUCCESS : refused(INVALID_VALUE, "attribute " + to_string(which));
}
Result cuDeviceComputeCapability(int *major, int *minor, int card) {
    *major = CARDS.at(card) / 10, *minor = CARDS.at(card) % 10;
    return SUCCESS;
}

Result cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { *flags = *active = 0; return SUCCESS; }
Result cuDevicePrimaryCtxSetFlags(int, unsigned) { return SUCCESS; }
Result cuDevicePrimaryCtxRetain(long *context, int card) { *context = card + 1; return SUCCESS; }
Result cuDevicePrimaryCtxRelease(int) { return SUCCESS; }
Result cuCtxPushCurrent_v2(long context) { contexts.push_back(context); return SUCCESS; }
Result cuCtxPopCurrent_v2(long *) { contexts.pop_back(); return SUCCESS; }
Result cuCtxGetDevice(int *card) { *card = contexts.back() - 1; return SUCCESS; }

// What the linker makes is the text that it got.
Result cuLinkCreate_v2(unsigned, int *, void **, string **link) { *link = new string; return SUCCESS; }
Result cuLinkAddData_v2(string *link, int, void *data, size_t size, const char *, unsigned, int *, void **) {
    *link = string((char *)data, strnlen((char *)data, size));
    return SUCCESS;
}
Result cuLinkComplete(string *link, const void **image, size_t *size) {
    *image = link->c_str(), *size = link->size() + 1;
    return SUCCESS;
}
Result cuLinkDestroy(string *link) { delete link; return SUCCESS; }
Result cuLinkCreate(unsigned n, int *options, void **values, string **link) {
    return cuLinkCreate_v2(n, options, values, link);
}
Result cuLinkAddData(string *link, int kind, void *data, size_t size, const char *name, unsigned n, int *options,
                     void **values) {
    return cuLinkAddData_v2(link, kind, data, size, name, n, options, values);
}

Result cuModuleLoadData(Module **module, const char *image) {
    return load(module, image, CARDS.at(contexts.back() - 1));
}
Result cuModuleLoadDataEx(Module **module, const char *image, unsigned, int *, void **) {
    return cuModuleLoadData(module, image);
}
Result cuModuleUnload(Module *) { return SUCCESS; } // another module may be the same library
Result cuModuleGetFunction(Function **function, Module *module, const char *name) {
    void *call = HOLLOW ? nullptr : dlsym(module->library, (string("emu_call_") + name).c_str());
    if (!call && !HOLLOW) return NOT_FOUND;
    *function = new Function{module, (void (*)(void **))call, name};
    return SUCCESS;
}
Result cuFuncGetAttribute(int *value, int which, Function *) { *value = which ? 0 : MOST_THREADS; return SUCCESS; }
Result cuLaunchKernel(Function *function, unsigned X, unsigned Y, unsigned Z, unsigned x, unsigned y, unsigned z,
                      unsigned shared, void *, void **parameters, void **) {
    return launch(function, {X, Y, Z}, {x, y, z}, shared, parameters);
}

Result cuMemGetInfo_v2(size_t *free, size_t *total) { *free = MEMORY - used, *total = MEMORY; return SUCCESS; }
Result cuMemAlloc_v2(Address *address, size_t size) { return allocate(address, size); }
Result cuMemFree_v2(Address address) { return release(address); }
Result cuMemAllocHost_v2(void **p, size_t size) { *p = malloc(size); return SUCCESS; }
Result cuMemFreeHost(void *p) { free(p); return SUCCESS; }
Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t size, void *) {
    return copy("to card", to, (Address)from, size);
}
Result cuMemcpyHtoD_v2(Address to, const void *from, size_t size) { return copy("to card", to, (Address)from, size); }
Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t size, void *) {
    return copy("from card", (Address)to, from, size);
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t size, void *) {
    return copy("within card", to, from, size);
}
Result cuMemcpyPeerAsync(Address to, void *, Address from, void *, size_t size, void *) {
    return copy("within card", to, from, size);
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t size, void *) {
    Work work("fill");
    memset((void *)to, value, size);
    count("fill", size);
    return SUCCESS;
}

// All is done at once, so that there is nothing to wait for.
static Result synchronise() { count("synchronise", 0); return SUCCESS; }
Result cuEventCreate(void **event, unsigned) { *event = (void *)1; return SUCCESS; }
Result cuEventRecord(void *, void *) { return SUCCESS; }
Result cuEventSynchronize(void *) { return synchronise(); }
Result cuEventDestroy_v2(void *) { return SUCCESS; }
Result cuStreamCreate(void **stream, unsigned) { *stream = (void *)1; return SUCCESS; }
Result cuStreamWaitEvent(void *, void *, unsigned) { return SUCCESS; }
Result cuStreamSynchronize(void *) { return synchronise(); }
Result cuStreamDestroy_v2(void *) { return SUCCESS; }
Result cuIpcGetMemHandle(void *, Address) { return INVALID_VALUE; }
Result cuIpcOpenMemHandle(Address *, ...) { return INVALID_VALUE; }
Result cuIpcCloseMemHandle(Address) { return INVALID_VALUE; }

// ---- the functions of libnvrtc --------------------------------------------------------------------------------------

const char *nvrtcGetErrorString(Result error) { return error ? "NVRTC_ERROR" : "NVRTC_SUCCESS"; }
Result nvrtcVersion(int *major, int *minor) { *major = 12, *minor = 4; return SUCCESS; }
Result nvrtcCreateProgram(Program **program, const char *source, const char *, int n, const char **texts,
                          const char **names) {
    *program = new Program{source, "", ""};
    for (int i = 0; i < n; i++) {
        string header = "#\\s*include\\s+\"" + string(names[i]) + "\"";
        std::smatch found;
        if (std::regex_search((*program)->source, found, std::regex(header)))
            (*program)->source.replace(found.position(), found.length(), texts[i]);
    }
    return SUCCESS;
}
Result nvrtcDestroyProgram(Program **program) { delete *program; return SUCCESS; }
Result nvrtcCompileProgram(Program *program, int n, const char **options) {
    return compile_program(program, n, options);
}
Result nvrtcGetProgramLogSize(Program *program, size_t *size) { *size = program->log.size() + 1; return SUCCESS; }
Result nvrtcGetProgramLog(Program *program, char *log) { strcpy(log, program->log.c_str()); return SUCCESS; }
Result nvrtcGetPTXSize(Program *program, size_t *size) { *size = program->ptx.size() + 1; return SUCCESS; }
Result nvrtcGetPTX(Program *program, char *ptx) { strcpy(ptx, program->ptx.c_str()); return SUCCESS; }

// ---- the functions of libcublas -------------------------------------------------------------------------------------

Result cublasCreate_v2(void **handle) { *handle = (void *)1; return SUCCESS; }
Result cublasDestroy_v2(void *) { return SUCCESS; }
Result cublasSetStream_v2(void *, void *) { return SUCCESS; }
Result cublasSetPointerMode_v2(void *, int) { return SUCCESS; }
Result cublasGetPointerMode_v2(void *, int *mode) { *mode = 0; return SUCCESS; }
Result cublasSetAtomicsMode(void *, int) { return SUCCESS; }

#define BLAS(S, T) \
    Result cublas##S##gemm_v2(void *, int ta, int tb, int m, int n, int k, const T *alpha, const T *A, int lda, \
                              const T *B, int ldb, const T *beta, T *C, int ldc) { \
        return gemm<T>(ta, tb, m, n, k, *alpha, A, lda, B, ldb, *beta, C, ldc); \
    } \
    Result cublas##S##gemv_v2(void *, int turned, int m, int n, const T *alpha, const T *A, int lda, const T *x, \
                              int incx, const T *beta, T *y, int incy) { \
        return gemv<T>(turned, m, n, *alpha, A, lda, x, incx, *beta, y, incy); \
    } \
    Result cublas##S##ger_v2(void *, int m, int n, const T *alpha, const T *x, int incx, const T *y, int incy, T *A, \
                             int lda) { \
        return ger<T>(m, n, *alpha, x, incx, y, incy, A, lda); \
    } \
    Result cublas##S##dot_v2(void *, int n, const T *x, int incx, const T *y, int incy, T *result) { \
        return dot<T>(n, x, incx, y, incy, result); \
    } \
    Result cublas##S##gemmBatched(void *, ...) { return refused(CUBLAS_INVALID_VALUE, "gemmBatched"); }
BLAS(S, float)
BLAS(D, double)
}
