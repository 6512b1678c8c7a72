// 32-bit programs that check themselves, built by `gcc -m32 -pthread`: program TEST DIRECTORY.
//
// Each sets up its state, makes DIRECTORY/ready, waits for SIGTERM, looks at its state again, and
// writes its verdict to DIRECTORY/result.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static const char *directory;
static volatile sig_atomic_t stopped;

static void put(const char *name, const char *text)
{
    char whole[4000], partial[4096];
    snprintf(whole, sizeof whole, "%s/%s", directory, name);
    snprintf(partial, sizeof partial, "%s.partial", whole);
    int fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_LARGEFILE, 0600);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        _exit(3);
    close(fd);
    rename(partial, whole);
}

static void fail(const char *format, ...)
{
    char text[1000] = "FAIL: ";
    va_list args;
    va_start(args, format);
    vsnprintf(text + 6, sizeof text - 6, format, args);
    va_end(args);
    put("result", text);
    _exit(1);
}

#define CHECK(condition, ...)     \
    do {                          \
        if (!(condition))         \
            fail(__VA_ARGS__);    \
    } while (0)

static void on_term(int signal)
{
    (void)signal;
    stopped = 1;
}

// Lets SIGTERM through in this call only, so that it can't be missed.
static void wait_for_term(void)
{
    sigset_t others;
    sigprocmask(SIG_BLOCK, NULL, &others);
    sigdelset(&others, SIGTERM);
    while (!stopped)
        sigsuspend(&others);
}

static void ready_and_wait(void)
{
    put("ready", "");
    wait_for_term();
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

// --- registers: everything that 32-bit code can see, while it spins without a call.

static struct {
    uint32_t ebx, esi, edi, ebp, eax, edx, ecx;
    uint16_t ds, es, fs, gs, cs, ss, fpu_control;
    uint32_t mxcsr;
    double st0;
    uint8_t xmm7[16];
} seen;

__attribute__((noinline)) static void spin(volatile sig_atomic_t *stop)
{
    static const uint8_t pattern[16] = "sixteen pattern";
    static const uint16_t control = 0x0e7f;
    static const uint32_t mxcsr = 0x7fa0;
    static uint32_t stack;
    static volatile sig_atomic_t *word;
    word = stop;
    __asm__ volatile(
        "pushal\n\t"
        "movl %%esp, %[stack]\n\t"
        "fninit\n\t"
        "fldcw %[control]\n\t"
        "fldpi\n\t"
        "ldmxcsr %[mxcsr]\n\t"
        "movups %[pattern], %%xmm7\n\t"
        "movl $0x11111111, %%ebx\n\t"
        "movl $0x22222222, %%esi\n\t"
        "movl $0x33333333, %%edi\n\t"
        "movl $0x44444444, %%ebp\n\t"
        "movl $0xffffffff, %%eax\n\t"
        "movl $0x80000001, %%edx\n\t"
        "movl %[word], %%ecx\n"
        "1: cmpl $0, (%%ecx)\n\t"
        "je 1b\n\t"
        "movl %%ebx, %[ebx]\n\t"
        "movl %%esi, %[esi]\n\t"
        "movl %%edi, %[edi]\n\t"
        "movl %%ebp, %[ebp]\n\t"
        "movl %%eax, %[eax]\n\t"
        "movl %%edx, %[edx]\n\t"
        "movl %%ecx, %[ecx]\n\t"
        "movw %%ds, %[ds]\n\t"
        "movw %%es, %[es]\n\t"
        "movw %%fs, %[fs]\n\t"
        "movw %%gs, %[gs]\n\t"
        "movw %%cs, %[cs]\n\t"
        "movw %%ss, %[ss]\n\t"
        "fnstcw %[seen_control]\n\t"
        "fstpl %[st0]\n\t"
        "fninit\n\t"
        "stmxcsr %[seen_mxcsr]\n\t"
        "movups %%xmm7, %[xmm7]\n\t"
        "movl %[stack], %%esp\n\t"
        "popal\n\t"
        : [ebx] "=m"(seen.ebx), [esi] "=m"(seen.esi), [edi] "=m"(seen.edi), [ebp] "=m"(seen.ebp),
          [eax] "=m"(seen.eax), [edx] "=m"(seen.edx), [ecx] "=m"(seen.ecx), [ds] "=m"(seen.ds),
          [es] "=m"(seen.es), [fs] "=m"(seen.fs), [gs] "=m"(seen.gs), [cs] "=m"(seen.cs),
          [ss] "=m"(seen.ss), [seen_control] "=m"(seen.fpu_control), [st0] "=m"(seen.st0),
          [seen_mxcsr] "=m"(seen.mxcsr), [xmm7] "=m"(seen.xmm7), [stack] "=m"(stack)
        : [control] "m"(control), [mxcsr] "m"(mxcsr), [pattern] "m"(pattern), [word] "m"(word)
        : "memory", "cc");
    CHECK(seen.ebx == 0x11111111 && seen.esi == 0x22222222 && seen.edi == 0x33333333,
          "ebx %x esi %x edi %x", seen.ebx, seen.esi, seen.edi);
    CHECK(seen.ebp == 0x44444444 && seen.eax == 0xffffffff && seen.edx == 0x80000001,
          "ebp %x eax %x edx %x", seen.ebp, seen.eax, seen.edx);
    CHECK(seen.ecx == (uint32_t)stop, "ecx %x", seen.ecx);
    CHECK(seen.fpu_control == control && seen.st0 > 3.14159 && seen.st0 < 3.1416,
          "x87 control %x, st0 %f", seen.fpu_control, seen.st0);
    CHECK(seen.mxcsr == mxcsr, "mxcsr %x", seen.mxcsr);
    CHECK(!memcmp(seen.xmm7, pattern, 16), "xmm7 differs");
}

static void segments(uint16_t *out)
{
    __asm__("movw %%cs, %0; movw %%ss, %1; movw %%ds, %2; movw %%es, %3; movw %%fs, %4; movw %%gs, %5"
            : "=m"(out[0]), "=m"(out[1]), "=m"(out[2]), "=m"(out[3]), "=m"(out[4]), "=m"(out[5]));
}

static void test_registers(void)
{
    uint16_t before[6], after[6];
    segments(before);
    sigset_t none;
    sigemptyset(&none);
    put("ready", "");
    // The handler's frame is pushed and taken down in the middle of the loop.
    sigprocmask(SIG_SETMASK, &none, NULL);
    spin(&stopped);
    segments(after);
    CHECK(!memcmp(before, after, sizeof before), "segments differ");
    CHECK(seen.gs == before[5] && seen.cs == before[0], "gs %x cs %x", seen.gs, seen.cs);
}

// --- threads: a thread pointer each, blocked in different calls, and a robust mutex that is left locked.

static __thread int own = 7;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t robust;
static pthread_barrier_t begun;
static int go_on, pipe_fds[2];

static void check_own(int value, const char *where)
{
    CHECK(own == value, "thread-local value of the thread in %s is %d", where, own);
    CHECK(errno == value, "errno of the thread in %s is %d", where, errno);
}

static void begin(int value)
{
    own = value;
    pthread_barrier_wait(&begun);
    errno = value;
}

static void *in_futex(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    begin(101);
    while (!go_on)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    check_own(101, "futex");
    return NULL;
}

static void *in_read(void *unused)
{
    (void)unused;
    char byte = 0;
    begin(102);
    CHECK(read(pipe_fds[0], &byte, 1) == 1 && byte == 'x', "read gave %x: %m", byte);
    check_own(102, "read");
    return NULL;
}

static void *in_poll(void *unused)
{
    (void)unused;
    struct pollfd fd = {.fd = pipe_fds[0], .events = POLLPRI};
    begin(103);
    double from = now();
    CHECK(poll(&fd, 1, 1500) == 0, "poll: %m");
    CHECK(now() - from > 1.4, "poll took %f s", now() - from);
    check_own(103, "poll");
    // Whoever looks at the threads meanwhile is to find all of them.
    pthread_mutex_lock(&lock);
    while (!go_on)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void *in_lock(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&robust);
    begin(104);
    pthread_mutex_lock(&lock);
    while (!go_on)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    check_own(104, "cond_wait");
    // Dies with the lock: the kernel finds it in the robust list and marks it.
    return NULL;
}

static void test_threads(void)
{
    void *(*bodies[])(void *) = {in_futex, in_read, in_poll, in_lock};
    pthread_t threads[4];
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&robust, &attributes);
    pthread_barrier_init(&begun, NULL, 5);
    CHECK(!pipe(pipe_fds), "pipe: %m");
    for (int i = 0; i < 4; i++)
        CHECK(!pthread_create(&threads[i], NULL, bodies[i], NULL), "no thread");
    begin(100);
    ready_and_wait();
    CHECK(own == 100, "thread-local value of the main thread is %d", own);
    pthread_mutex_lock(&lock);
    go_on = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    CHECK(write(pipe_fds[1], "x", 1) == 1, "write: %m");
    for (int i = 0; i < 4; i++)
        CHECK(!pthread_join(threads[i], NULL), "join");
    int locked = pthread_mutex_lock(&robust);
    CHECK(locked == EOWNERDEAD, "the dead thread's lock: %d", locked);
    // The stack of a new thread and its segment come from the restored process.
    pthread_barrier_init(&begun, NULL, 1);
    go_on = 1;
    CHECK(!pthread_create(&threads[0], NULL, in_futex, NULL), "no new thread");
    pthread_join(threads[0], NULL);
    CHECK(own == 100, "thread-local value of the main thread became %d", own);
}

// --- signals: frames of both shapes, on the stack and beside it, before and after.

static volatile int handled, value_seen, nested;

static void plain(int signal)
{
    uint16_t now[6];
    segments(now);
    CHECK(signal == SIGUSR1 && now[0] == 0x23, "plain handler: signal %d, cs %x", signal, now[0]);
    CHECK(own == 7, "thread-local value in a handler is %d", own);
    handled++;
}

static void with_info(int signal, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    CHECK(signal == SIGRTMIN + 1 && info->si_code == SI_QUEUE && info->si_pid == getpid(),
          "handler with info: signal %d, code %d, pid %d", signal, info->si_code, info->si_pid);
    CHECK(uc->uc_mcontext.gregs[REG_CS] == 0x23, "cs in the context is %x",
          uc->uc_mcontext.gregs[REG_CS]);
    value_seen = value_seen * 10 + info->si_value.sival_int;
    handled++;
}

static char beside[65536];

// Stays in its frame on the alternate stack while the process is dumped.
static void in_frame(int signal)
{
    char here;
    CHECK(&here > beside && &here < beside + sizeof beside, "not on the alternate stack");
    nested = signal;
    ready_and_wait();
    CHECK(&here > beside && &here < beside + sizeof beside, "not on the alternate stack any more");
    nested = -1;
}

static void set(int signal, void *handler, int flags)
{
    struct sigaction action = {.sa_flags = flags};
    action.sa_handler = handler;
    CHECK(!sigaction(signal, &action, NULL), "sigaction: %m");
}

static void test_signals(void)
{
    stack_t stack = {.ss_sp = beside, .ss_size = sizeof beside};
    sigset_t blocked, old, is;
    CHECK(!sigaltstack(&stack, NULL), "sigaltstack: %m");
    set(SIGUSR1, plain, 0);
    set(SIGRTMIN + 1, with_info, SA_SIGINFO);
    set(SIGUSR2, in_frame, SA_ONSTACK);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigaddset(&blocked, SIGRTMIN + 1);
    sigprocmask(SIG_BLOCK, &blocked, &old);
    for (int value = 1; value < 4; value++)
        sigqueue(getpid(), SIGRTMIN + 1, (union sigval){.sival_int = value});
    kill(getpid(), SIGUSR1);
    volatile uint32_t kept = 0xabcdef01;
    raise(SIGUSR2);
    CHECK(nested == -1 && kept == 0xabcdef01, "the frame was left wrongly");
    CHECK(handled == 0, "blocked signals were taken");
    sigprocmask(SIG_BLOCK, NULL, &is);
    CHECK(sigismember(&is, SIGUSR1) && sigismember(&is, SIGTERM), "the mask differs");
    sigprocmask(SIG_UNBLOCK, &blocked, NULL);
    CHECK(handled == 4 && value_seen == 123, "%d handled, values %d", handled, value_seen);
    struct sigaction action;
    sigaction(SIGRTMIN + 1, NULL, &action);
    CHECK(action.sa_sigaction == with_info && action.sa_flags & SA_SIGINFO, "the action differs");
    sigaltstack(NULL, &stack);
    CHECK(stack.ss_sp == beside && stack.ss_size == sizeof beside, "the alternate stack differs");
}

// --- sleeps: they go on and come to their end, not early. One that was restarted before it was dumped may
// return EINTR, with what is left.

static void *sleeper(void *length)
{
    long ms = (long)length;
    pthread_barrier_wait(&begun);
    while (!stopped) {
        struct timespec rest = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
        double from = now();
        int result, times = 0;
        do {
            struct timespec wanted = rest;
            result = ms % 2 ? syscall(SYS_nanosleep, &wanted, &rest)
                            : syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &wanted, &rest);
        } while (result && errno == EINTR && times++ < 4);
        double took = now() - from;
        CHECK(result == 0, "a sleep of %ld ms ended with %d after %f s: %m", ms, result, took);
        CHECK(took * 1000 >= ms - 1, "a sleep of %ld ms took %f s", ms, took);
    }
    return NULL;
}

static void test_sleeps(void)
{
    pthread_t threads[4];
    long lengths[] = {1801, 1400, 41, 8};
    pthread_barrier_init(&begun, NULL, 5);
    for (int i = 0; i < 4; i++)
        CHECK(!pthread_create(&threads[i], NULL, sleeper, (void *)lengths[i]), "no thread");
    pthread_barrier_wait(&begun);
    ready_and_wait();
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}

// --- memory: up to the end of the address space, new mappings where 32-bit code can reach them.

static void test_memory(void)
{
    // The last page that a 32-bit program may map.
    uint32_t *last = mmap((void *)0xffffd000, 4096, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (last == MAP_FAILED)
        CHECK(errno == EEXIST, "the last page: %m");
    else
        last[1023] = 0x1a57;
    uint32_t *low = mmap((void *)0x10000, 4096, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(low != MAP_FAILED, "a page at 64 KiB: %m");
    low[0] = 0x10;
    size_t large = 700 << 20;
    uint32_t *sparse = mmap(NULL, large, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(sparse != MAP_FAILED, "700 MiB: %m");
    for (size_t at = 0; at < large; at += 64 << 20)
        sparse[at / 4] = at;
    char *heap = sbrk(8192);
    strcpy(heap, "on the heap");
    ready_and_wait();
    CHECK(last == MAP_FAILED || last[1023] == 0x1a57, "the last page differs");
    CHECK(low[0] == 0x10, "the low page differs");
    for (size_t at = 0; at < large; at += 64 << 20)
        CHECK(sparse[at / 4] == at, "sparse memory differs at %zx", at);
    CHECK(!strcmp(heap, "on the heap"), "the heap differs");
    CHECK(sbrk(0) == heap + 8192 && sbrk(1 << 20) == heap + 8192, "the break differs");
    memset(heap + 8192, 1, 1 << 20);
    for (int i = 0; i < 50; i++) {
        char *fresh = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(fresh != MAP_FAILED, "a new mapping: %m");
        memset(fresh, i, 1 << 20);
    }
    // Through the vdso, and through its __kernel_vsyscall.
    struct timespec one, two;
    CHECK(!clock_gettime(CLOCK_REALTIME, &one), "clock_gettime: %m");
    CHECK(!syscall(SYS_clock_gettime, CLOCK_REALTIME, &two), "clock_gettime by call: %m");
    CHECK(two.tv_sec - one.tv_sec <= 60, "the clocks differ");
    pid_t child = fork();
    if (child == 0)
        _exit(low[0] == 0x10 ? 17 : 1);
    int status;
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 17, "child: %x", status);
}

// --- call: int 0x80 from the program's own code, not the vdso's, interrupted over and over.

static void test_calls(void)
{
    int fds[2];
    CHECK(!pipe(fds), "pipe: %m");
    pid_t child = fork();
    if (child == 0) {
        signal(SIGTERM, SIG_DFL);
        char byte;
        int result;
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(SYS_read), "b"(fds[0]), "c"(&byte), "d"(1)
                         : "memory");
        _exit(result == 1 ? byte : 99);
    }
    ready_and_wait();
    int status;
    CHECK(waitpid(child, &status, WNOHANG) == 0, "the child ended: %x", status);
    CHECK(write(fds[1], "*", 1) == 1, "write: %m");
    CHECK(waitpid(child, &status, 0) == child, "waitpid: %m");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == '*', "the child ended with %x", status);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"registers", test_registers}, {"threads", test_threads}, {"signals", test_signals},
        {"sleeps", test_sleeps},       {"memory", test_memory},   {"calls", test_calls},
    };
    if (argc < 3)
        return 2;
    directory = argv[2];
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    struct sigaction action = {.sa_handler = on_term, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (!strcmp(tests[i].name, argv[1])) {
            tests[i].run();
            put("result", "PASS\n");
            return 0;
        }
    return 2;
}
