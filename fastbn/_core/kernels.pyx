# cython: language_level=3, cdivision=True, initializedcheck=False, freethreading_compatible=True
"""BatchNorm kernels: threads and blocking over the spans of span.h; compiled once per instruction set.

Every entry takes canonical arrays from layout.py, already checked; their number of dimensions says the layout:
3-D is ncs (batch, channel, contiguous run), 2-D is rc (rows, contiguous channels). Other strides are free.
Two ways to sum: a channel's long runs one after the other (ncs), or columns side by side down the rows (rc, and ncs
short runs, where a channel has s columns).

Blocks are fixed by the shape alone and merged in their order, so the number of threads never changes a bit.
Inside a parallel region nothing allocates. Nothing here raises, but for what a signal's handler raises: the thread that
called looks for signals now and then, so that Ctrl-C ends a long call too.
"""

cimport numpy as cnp
from cython.parallel cimport prange

from . import layout
from .caches import L2, L3

cnp.import_array()

cdef extern from "spans.h" nogil:
    enum: DBETA_MEAN, PARAMETERS, LANES, TREE, LINE

    ctypedef struct span_table:
        Py_ssize_t itemsize
        Py_ssize_t real_size
        void (*prepare)(Py_ssize_t c, const double* mean, const double* rstd, const double* gamma,
                        const double* beta, const double* dbeta_mean, const double* dgamma_mean,
                        void* parameters, Py_ssize_t pitch) noexcept nogil
        void (*expand)(void* parameters, Py_ssize_t pitch, int count, Py_ssize_t c, Py_ssize_t s,
                       Py_ssize_t total) noexcept nogil
        void (*guess_columns)(const char* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t c,
                              double* work, void* shifts) noexcept nogil
        int (*improve_shifts)(Py_ssize_t c, const double* mean, const double* m2, double count,
                              void* shifts) noexcept nogil
        void (*moments_ncs)(const char* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t len, Py_ssize_t ahead,
                            double* mean, double* m2) noexcept nogil
        void (*moments_rc)(const char* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t c_stride, Py_ssize_t c,
                           Py_ssize_t s, Py_ssize_t k, const void* shifts, double* work, Py_ssize_t wide,
                           double* mean, double* m2) noexcept nogil
        void (*precise_columns)(const char* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t c,
                                double* work, void* shifts) noexcept nogil
        int (*precise_improve)(Py_ssize_t c, const double* mean, const double* m2, double count,
                               void* shifts) noexcept nogil
        void (*precise_ncs)(const char* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t len, Py_ssize_t ahead,
                            double* mean, double* m2) noexcept nogil
        void (*precise_rc)(const char* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t c_stride, Py_ssize_t c,
                           Py_ssize_t s, Py_ssize_t k, const void* shifts, double* work, Py_ssize_t wide,
                           double* mean, double* m2) noexcept nogil
        void (*normalize)(const char* x, Py_ssize_t x_stride, const char* residual, Py_ssize_t residual_stride,
                          char* y, Py_ssize_t y_stride, Py_ssize_t rows, Py_ssize_t n, const void* parameters,
                          Py_ssize_t pitch, Py_ssize_t step, Py_ssize_t ahead, int varying, int relu,
                          int stream) noexcept nogil
        void (*reduce_ncs)(const char* dy, const char* x, Py_ssize_t rows, Py_ssize_t dy_stride,
                           Py_ssize_t x_stride, Py_ssize_t len, Py_ssize_t dy_ahead, Py_ssize_t x_ahead,
                           const void* parameters, double* sum, double* product, int relu) noexcept nogil
        void (*reduce_rc)(const char* dy, const char* x, Py_ssize_t rows, Py_ssize_t dy_stride,
                          Py_ssize_t dy_c_stride, Py_ssize_t x_stride, Py_ssize_t x_c_stride, Py_ssize_t c,
                          Py_ssize_t s, Py_ssize_t k, const void* parameters, Py_ssize_t pitch, double* work,
                          Py_ssize_t wide, double* sum, double* product, int relu) noexcept nogil
        double (*dgamma)(double sum, double product, double mean, double rstd) noexcept nogil
        void (*backward)(const char* dy, Py_ssize_t dy_stride, const char* x, Py_ssize_t x_stride, char* dx,
                         Py_ssize_t dx_stride, Py_ssize_t rows, Py_ssize_t n, const void* parameters,
                         Py_ssize_t pitch, Py_ssize_t step, Py_ssize_t ahead, int varying, int relu, int frozen,
                         int stream) noexcept nogil
        void (*join)(const char* x, Py_ssize_t x_stride, const char* residual, Py_ssize_t residual_stride, char* y,
                     Py_ssize_t y_stride, cnp.uint8_t* bits, Py_ssize_t bit, Py_ssize_t bit_stride, Py_ssize_t rows,
                     Py_ssize_t n, const void* parameters, Py_ssize_t pitch, Py_ssize_t step, Py_ssize_t ahead,
                     int varying, int stream) noexcept nogil
        void (*mask)(const char* dy, Py_ssize_t dy_stride, const cnp.uint8_t* bits, Py_ssize_t bit,
                     Py_ssize_t bit_stride, char* out, Py_ssize_t out_stride, Py_ssize_t rows, Py_ssize_t n,
                     Py_ssize_t ahead) noexcept nogil

    const span_table* spans_of(Py_ssize_t itemsize, int is_numpy_half)
    void merge_moments(Py_ssize_t c, double n_a, double* mean_a, double* m2_a, double n_b, const double* mean_b,
                       const double* m2_b)
    void finish_moments(Py_ssize_t c, double count, double eps, const double* m2, double* var, double* rstd)
    void invert_deviations(Py_ssize_t c, double eps, const double* var, double* rstd)
    const int FASTBN_CHECKED
    void expect(bint within, const char* what)
    void stream_fence()
    double seconds_now()
    bint flag(const int* p)
    void set_flag(int* p)
    void copy_span(const char* source, char* target, Py_ssize_t size, int stream)

# Part of the numerical contract, for they fix the order of the sums
cdef enum:
    BLOCK_NCS = 16384   # elements of a block
    BLOCK_RC = 131072   # at most, and
    BLOCK_LEAST = 16384  # at least; between them an eighth of the array, so that there is work for several threads
    SIDE_BY_SIDE = 256  # short rows are summed side by side until they are this wide
    COLUMNS = 4096      # that one task takes, so that their sums and parameters stay in cache; with short runs
    SHORT_COLUMNS = 512  # so many, in L1

cdef Py_ssize_t SHORT_RUN = layout.SHORT_RUN

# Not part of it
cdef enum:
    AHEAD = 1024        # bytes that the writing passes fetch ahead: 512 to 4,096 were alike
    STREAM_FROM = 1024  # bytes of a row whose first and last cache lines belong to others too
    LOOK = 1 << 20      # elements between two looks at the clock: mostly 1 ms, 100 where a page is new for each row
cdef Py_ssize_t L2_BYTES = L2
cdef Py_ssize_t L3_BYTES = L3


# ---- arrays and geometry -----------------------------------------------------------------------------------------

cdef struct View:
    # ncs: (n, c, s) · rc: (n, c), s = 1 · data NULL: there is no such array
    char* data
    Py_ssize_t n, c, s, n_stride, c_stride, item  # strides and item in bytes, of `bits` in bits


cdef View view_of(object array) noexcept:
    cdef View v
    cdef cnp.ndarray a
    v.data = NULL
    v.n = v.c = v.s = v.n_stride = v.c_stride = v.item = 0
    if array is None:
        return v
    a = array
    v.data = <char*> cnp.PyArray_DATA(a)
    v.n = cnp.PyArray_DIM(a, 0)
    v.c = cnp.PyArray_DIM(a, 1)
    v.s = cnp.PyArray_DIM(a, 2) if cnp.PyArray_NDIM(a) == 3 else 1
    v.n_stride = cnp.PyArray_STRIDE(a, 0)
    v.c_stride = cnp.PyArray_STRIDE(a, 1)
    v.item = cnp.PyArray_ITEMSIZE(a)
    return v


cdef double* vector(object array) noexcept:
    # float64 (C,), or None
    return NULL if array is None else <double*> cnp.PyArray_DATA(<cnp.ndarray> array)


cdef struct Job:
    # one call: its arrays, how they are cut, its vectors and its scratch
    const span_table* spans
    View x, residual, dy, out    # out: y or dx
    View bits                    # of ReLU after a residual, and
    cnp.uint8_t* memory          # where they are
    View incoming                # with bits, what dy is made of
    int by_columns               # or by runs
    Py_ssize_t block_rows        # rows of a block
    Py_ssize_t pieces, piece     # by runs: one longer than a block is cut into pieces of this length
    Py_ssize_t blocks            # of a channel
    Py_ssize_t group             # by runs: channels of an image that one task writes
    Py_ssize_t side              # by columns: rows summed side by side
    Py_ssize_t tiles, tile       # parts of the channels and their size; by runs, each channel is one
    # float64 (c,)
    double* gamma
    double* beta
    double* mean
    double* var                  # of the forward pass; holds M2 while it is being summed
    double* rstd
    double* dgamma
    double* dbeta
    double eps
    # scratch
    double* first                # (blocks, c): mean, or Σdy, of each block
    double* second               # (blocks, c): M2, or Σdy·x̂
    double* dbeta_mean           # (c,)
    double* dgamma_mean          # (c,)
    char* shifts                 # rc: of each channel, where its sums are shifted to; then room for 2 (c + LANES)
    double* work                 # by columns: (threads, 4, wide)
    Py_ssize_t wide
    char* parameters             # (PARAMETERS, pitch) of each channel by runs, of each thread by columns
    Py_ssize_t pitch
    Py_ssize_t* prepared         # by columns: 2·tile + backward of each thread's parameters, or -1
    # how
    int relu, frozen, stream, prefetch, threads
    int stopped                  # a signal's handler has raised: nothing matters any more
    Py_ssize_t since             # elements since the last look at the clock
    double looked                # when signals were last looked for, seconds


cdef struct Block:
    Py_ssize_t row, rows, start, len


cdef inline Block block_of(const Job* job, Py_ssize_t b) noexcept nogil:
    cdef Block block
    block.row = b // job.pieces * job.block_rows
    block.rows = min(job.block_rows, job.x.n - block.row)
    block.start = b % job.pieces * job.piece
    block.len = min(job.piece, job.x.s - block.start)
    return block


cdef inline char* element(const View* v, Py_ssize_t i, Py_ssize_t ch, Py_ssize_t j) noexcept nogil:
    # address of element (i, ch, j); NULL where there is no such array
    return NULL if v.data == NULL else v.data + i * v.n_stride + ch * v.c_stride + j * v.item


cdef inline void inside(const View* v, const char* first, Py_ssize_t rows, Py_ssize_t stride,
                        Py_ssize_t len) noexcept nogil:
    # Rows of `len` elements, `stride` apart, lie within the array: checked in the build for that only
    cdef Py_ssize_t low, high, at, end
    if not FASTBN_CHECKED or v.data == NULL or rows <= 0 or len <= 0:
        return
    low = min(0, (v.n - 1) * v.n_stride) + min(0, (v.c - 1) * v.c_stride)
    high = max(0, (v.n - 1) * v.n_stride) + max(0, (v.c - 1) * v.c_stride) + (v.s - 1) * v.item
    at = first - v.data
    end = at + (rows - 1) * stride
    expect(low <= min(at, end) and max(at, end) + (len - 1) * v.item <= high, "elements of an array")


cdef inline Py_ssize_t channels_of(const Job* job, Py_ssize_t tile) noexcept nogil:
    return min(job.tile, job.x.c - tile * job.tile)


cdef inline char* parameters_of(const Job* job, Py_ssize_t tile, int thread) noexcept nogil:
    if FASTBN_CHECKED:
        expect(0 <= tile < job.tiles and 0 <= thread < max(1, job.threads), "a tile or a thread")
    return job.parameters + (thread if job.by_columns else tile) * PARAMETERS * job.pitch * job.spans.real_size


cdef inline char* shifts_of(const Job* job, Py_ssize_t ch) noexcept nogil:
    return job.shifts + ch * (sizeof(double) if job.out.data == NULL else job.spans.real_size)


cdef inline double* work_of(const Job* job, int thread) noexcept nogil:
    return job.work + 4 * job.wide * thread


cdef Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef void cut_runs(Job* job) noexcept nogil:
    job.by_columns = False
    job.side = job.tile = job.pieces = 1
    job.piece = job.x.s
    if job.x.s > BLOCK_NCS:
        job.pieces = ceil_div(job.x.s, BLOCK_NCS)
        job.piece = ceil_div(ceil_div(job.x.s, job.pieces), LANES) * LANES
        job.pieces = ceil_div(job.x.s, job.piece)
    job.block_rows = max(1, BLOCK_NCS // job.x.s)
    job.group = max(1, min(job.x.c, BLOCK_NCS // job.x.s))


cdef void cut_columns(Job* job) noexcept nogil:
    # A tile is a whole number of cache lines, or at least of bytes of bits where that would make it much too wide.
    cdef Py_ssize_t s = job.x.s, c = job.x.c
    cdef Py_ssize_t even = LANES, row, block
    while s % 2 == 0 and even > 1:  # even runs make whole cache lines
        s //= 2
        even //= 2
    s = job.x.s
    job.by_columns = True
    job.pieces = job.group = 1
    job.piece = s
    job.side = max(1, SIDE_BY_SIDE // (c * s))
    row = LANES  # as many rows side by side make whole vectors
    while c * s * row % (2 * LANES) == 0 and row > 1:
        row //= 2
    job.side = min(job.side - (job.side % row if job.side >= row else 0), job.x.n)
    if even * s > 4 * SHORT_COLUMNS:
        even = min(even, 8)
    block = min(max(job.x.n * c * s // 8, <Py_ssize_t> BLOCK_LEAST), <Py_ssize_t> BLOCK_RC)
    job.tile = ceil_div(ceil_div(c, ceil_div(c * s, COLUMNS if s == 1 else SHORT_COLUMNS)), even) * even
    job.block_rows = max(TREE, block // (job.side * min(c, job.tile) * s)) * job.side


cdef object lay_out(Job* job, object x, int threads, bint sums=True):
    # Fill in x, its geometry and the scratch; returns the owner of the scratch. Blocks depend on the shape alone.
    # Without sums, short runs are written one after the other, in the order of memory.
    cdef cnp.ndarray array = x
    cdef cnp.ndarray memory
    cdef Py_ssize_t columns = 0, partial, i
    cdef cnp.npy_intp length
    job.spans = spans_of(cnp.PyArray_ITEMSIZE(array), cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT16)
    job.x = view_of(x)
    job.residual = job.dy = job.out = job.bits = job.incoming = view_of(None)
    job.relu = job.frozen = job.stream = job.prefetch = job.stopped = False
    job.since = 0
    job.looked = 0
    if cnp.PyArray_NDIM(array) == 2 or (sums and job.x.s <= SHORT_RUN and job.x.n >= TREE and job.x.c > 1):
        cut_columns(job)
        columns = job.side * min(job.x.c, job.tile) * job.x.s
    else:
        cut_runs(job)
    job.tiles = ceil_div(job.x.c, job.tile)
    job.blocks = ceil_div(job.x.n, job.block_rows) * job.pieces
    job.threads = threads = <int> min(<Py_ssize_t> threads, job.blocks * job.tiles)  # no more than there are tasks
    job.wide = ceil_div(columns, LANES) * LANES + LANES if job.by_columns else 0
    job.pitch = job.wide + 4 * LANES if job.by_columns else 1
    partial = job.blocks * job.x.c
    length = (2 * partial + 5 * job.x.c + 2 * LANES + 4 * threads * job.wide + threads
              + (threads if job.by_columns else job.x.c) * PARAMETERS * job.pitch)
    memory = cnp.PyArray_EMPTY(1, &length, cnp.NPY_DOUBLE, 0)
    job.first = <double*> cnp.PyArray_DATA(memory)
    job.second = job.first + partial
    job.dbeta_mean = job.second + partial
    job.dgamma_mean = job.dbeta_mean + job.x.c
    job.shifts = <char*> (job.dgamma_mean + job.x.c)
    job.work = job.dgamma_mean + 4 * job.x.c + 2 * LANES
    job.prepared = <Py_ssize_t*> (job.work + threads * 4 * job.wide)
    job.parameters = <char*> (job.prepared + threads)
    for i in range(threads):
        job.prepared[i] = -1
    return memory


cdef inline int is_dense(const Job* job, const View* v) noexcept nogil:
    return v.data == NULL or v.c_stride == job.x.s * v.item


cdef inline int is_contiguous(const Job* job, const View* v) noexcept nogil:
    return v.data == NULL or (is_dense(job, v) and v.n_stride == job.x.c * job.x.s * v.item)


cdef void choose_paths(Job* job) noexcept nogil:
    # Write past the cache what would not stay in it anyway, never where input and output are one array, nor short rows
    # that share cache lines with their neighbours, for such lines are written plainly. Fetch the next channel while one
    # is summed: that pass is bound by arithmetic, the writing one by memory (measured: 1.15× faster than fetching while
    # writing).
    cdef Py_ssize_t size = job.x.n * job.x.c * job.x.s * job.spans.itemsize
    cdef Py_ssize_t row = job.x.s * job.spans.itemsize * (job.tile * job.side if job.by_columns else 1)
    cdef Py_ssize_t apart = job.out.n_stride * job.side | (0 if job.by_columns else job.out.c_stride)
    cdef Py_ssize_t channel = job.x.n * job.x.s * job.spans.itemsize * (2 if job.dy.data != NULL else 1)
    cdef Py_ssize_t tensors = 2 if job.dy.data == NULL else 3
    job.stream = (tensors * size >= L3_BYTES and job.out.data != job.x.data and job.out.data != job.dy.data
                  and job.out.data != job.incoming.data
                  and (row >= STREAM_FROM or (row | apart | <Py_ssize_t> job.out.data) % LINE == 0))
    job.prefetch = not job.by_columns and channel <= L2_BYTES


cdef void prepare(const Job* job, Py_ssize_t tile, int backward, int thread) noexcept nogil:
    # Parameters of the element-wise spans for the channels of a tile
    cdef Py_ssize_t ch = tile * job.tile, channels = channels_of(job, tile)
    cdef char* parameters = parameters_of(job, tile, thread)
    if job.by_columns:
        if job.prepared[thread] == 2 * tile + backward:
            return
        job.prepared[thread] = 2 * tile + backward
    job.spans.prepare(channels, job.mean + ch, job.rstd + ch, NULL if job.gamma == NULL else job.gamma + ch,
                      NULL if job.beta == NULL else job.beta + ch, job.dbeta_mean + ch if backward else NULL,
                      job.dgamma_mean + ch if backward else NULL, parameters, job.pitch)
    if job.by_columns:
        job.spans.expand(parameters, job.pitch, PARAMETERS if backward else DBETA_MEAN, channels, job.x.s, job.pitch)


cdef extern from "Python.h":
    int PyErr_CheckSignals() nogil  # declared so, it leaves the exception set: the entry passes it on


cdef bint going_on(const Job* job, Py_ssize_t elements, int thread) noexcept nogil:
    # Before so many elements: look for signals now and then, where this is the thread that called
    # Not at each look at the clock: where other Python threads run, the GIL takes 5 ms to get.
    cdef Job* own = <Job*> job
    cdef double now
    if thread == 0:
        own.since += elements
        if own.since >= LOOK:
            own.since = 0
            now = seconds_now()
            if own.looked == 0:
                own.looked = now
            if not 0 <= now - own.looked < 0.05:
                own.looked = now
                with gil:
                    if PyErr_CheckSignals() != 0:
                        set_flag(&own.stopped)
    return not flag(&job.stopped)


cdef int finish(const Job* job) except -1:
    # Pass on what a signal's handler has raised
    return -1 if job.stopped else 0


# ---- one block of one tile ---------------------------------------------------------------------------------------

cdef inline void inside_block(const Job* job, const View* v, Block block, Py_ssize_t ch,
                              Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t q
    if FASTBN_CHECKED:
        for q in range(channels):
            inside(v, element(v, block.row, ch + q, block.start), block.rows, v.n_stride, block.len)


cdef void moments_block(const Job* job, Py_ssize_t b, Py_ssize_t tile, int thread) noexcept nogil:
    cdef Block block = block_of(job, b)
    cdef Py_ssize_t ch = tile * job.tile
    cdef Py_ssize_t ahead = job.x.c_stride if job.prefetch and ch + 1 < job.x.c else 0
    cdef const char* x = element(&job.x, block.row, ch, block.start)
    cdef double* mean = job.first + b * job.x.c + ch
    cdef double* m2 = job.second + b * job.x.c + ch
    inside_block(job, &job.x, block, ch, channels_of(job, tile))
    if job.by_columns:
        rc = job.spans.precise_rc if job.out.data == NULL else job.spans.moments_rc
        rc(x, block.rows, job.x.n_stride, job.x.c_stride, channels_of(job, tile), job.x.s, job.side,
           shifts_of(job, ch), work_of(job, thread), job.wide, mean, m2)
    else:
        ncs = job.spans.precise_ncs if job.out.data == NULL else job.spans.moments_ncs
        ncs(x, block.rows, job.x.n_stride, block.len, ahead, mean, m2)


cdef void reduce_block(const Job* job, Py_ssize_t b, Py_ssize_t tile, int thread) noexcept nogil:
    cdef Block block = block_of(job, b)
    cdef Py_ssize_t ch = tile * job.tile
    cdef Py_ssize_t ahead = job.x.c_stride if job.prefetch and ch + 1 < job.x.c else 0
    cdef const char* x = element(&job.x, block.row, ch, block.start)
    cdef const char* dy = element(&job.dy, block.row, ch, block.start)
    cdef double* sum = job.first + b * job.x.c + ch
    cdef double* product = job.second + b * job.x.c + ch
    cdef char* parameters = parameters_of(job, tile, thread)
    inside_block(job, &job.x, block, ch, channels_of(job, tile))
    inside_block(job, &job.dy, block, ch, channels_of(job, tile))
    if job.by_columns:
        prepare(job, tile, False, thread)
        job.spans.reduce_rc(dy, x, block.rows, job.dy.n_stride, job.dy.c_stride, job.x.n_stride, job.x.c_stride,
                            channels_of(job, tile), job.x.s, job.side, parameters, job.pitch, work_of(job, thread),
                            job.wide, sum, product, job.relu)
    else:
        job.spans.reduce_ncs(dy, x, block.rows, job.dy.n_stride, job.x.n_stride, block.len,
                             job.dy.c_stride if ahead else 0, ahead, parameters, sum, product, job.relu)


cdef inline Py_ssize_t stride_of(const View* v, Py_ssize_t step) noexcept nogil:
    # between rows that are `step` apart; 0: the channels are the rows
    return step * v.n_stride if step else v.c_stride


cdef inline void inside_rows(const Job* job, const View* v, Py_ssize_t i, Py_ssize_t ch, Py_ssize_t j, Py_ssize_t rows,
                             Py_ssize_t step, Py_ssize_t len) noexcept nogil:
    inside(v, element(v, i, ch, j), rows, stride_of(v, step), len)


cdef void write_rows(const Job* job, Py_ssize_t i, Py_ssize_t ch, Py_ssize_t j, Py_ssize_t rows, Py_ssize_t step,
                     Py_ssize_t len, const char* parameters) noexcept nogil:
    # The output, y, or dx where there is a dy, in `len` elements from (i, ch, j) on, of `rows` rows `step` apart
    cdef Py_ssize_t next = 0 if step else PARAMETERS * job.pitch
    inside_rows(job, &job.x, i, ch, j, rows, step, len)
    inside_rows(job, &job.dy, i, ch, j, rows, step, len)
    inside_rows(job, &job.residual, i, ch, j, rows, step, len)
    inside_rows(job, &job.out, i, ch, j, rows, step, len)
    inside_rows(job, &job.bits, i, ch, j, rows, step, len)
    if job.dy.data != NULL:
        job.spans.backward(element(&job.dy, i, ch, j), stride_of(&job.dy, step), element(&job.x, i, ch, j),
                           stride_of(&job.x, step), element(&job.out, i, ch, j), stride_of(&job.out, step), rows, len,
                           parameters, job.pitch, next, AHEAD, job.by_columns, job.relu, job.frozen, job.stream)
    elif job.bits.data != NULL:
        job.spans.join(element(&job.x, i, ch, j), stride_of(&job.x, step), element(&job.residual, i, ch, j),
                       stride_of(&job.residual, step), element(&job.out, i, ch, j), stride_of(&job.out, step),
                       job.memory, element(&job.bits, i, ch, j) - <char*> job.memory, stride_of(&job.bits, step), rows,
                       len, parameters, job.pitch, next, AHEAD, job.by_columns, job.stream)
    else:
        job.spans.normalize(element(&job.x, i, ch, j), stride_of(&job.x, step), element(&job.residual, i, ch, j),
                            stride_of(&job.residual, step), element(&job.out, i, ch, j), stride_of(&job.out, step),
                            rows, len, parameters, job.pitch, next, AHEAD, job.by_columns, job.relu, job.stream)


cdef void mask_rows(const Job* job, Py_ssize_t i, Py_ssize_t ch, Py_ssize_t j, Py_ssize_t rows, Py_ssize_t step,
                    Py_ssize_t len, const char* parameters) noexcept nogil:
    # dy, from what came in and the bits
    inside_rows(job, &job.incoming, i, ch, j, rows, step, len)
    inside_rows(job, &job.bits, i, ch, j, rows, step, len)
    inside_rows(job, &job.dy, i, ch, j, rows, step, len)
    job.spans.mask(element(&job.incoming, i, ch, j), step * job.incoming.n_stride, job.memory,
                   element(&job.bits, i, ch, j) - <char*> job.memory, step * job.bits.n_stride,
                   element(&job.dy, i, ch, j), step * job.dy.n_stride, rows, len, AHEAD)


ctypedef void (*rows_function)(const Job* job, Py_ssize_t i, Py_ssize_t ch, Py_ssize_t j, Py_ssize_t rows,
                               Py_ssize_t step, Py_ssize_t len, const char* parameters) noexcept nogil


cdef void each_row(const Job* job, Py_ssize_t b, Py_ssize_t tile, int thread, rows_function rows) noexcept nogil:
    # A block of a tile, with the parameters of this thread, in rows as long as the arrays allow
    cdef Block block = block_of(job, b)
    cdef Py_ssize_t ch = tile * job.tile, channels = channels_of(job, tile), s = job.x.s
    cdef Py_ssize_t i = block.row, end = block.row + block.rows, q
    cdef char* parameters = parameters_of(job, tile, thread)
    if not going_on(job, block.rows * channels * block.len, thread):
        return
    if not job.by_columns:
        rows(job, i, ch, block.start, block.rows, 1, block.len, parameters)
        return
    if (job.side > 1 and is_contiguous(job, &job.x) and is_contiguous(job, &job.out)
            and is_contiguous(job, &job.residual) and is_contiguous(job, &job.dy) and is_contiguous(job, &job.bits)
            and is_contiguous(job, &job.incoming)):
        rows(job, i, 0, 0, block.rows // job.side, job.side, job.side * channels * s, parameters)
        i += block.rows // job.side * job.side
    if (is_dense(job, &job.x) and is_dense(job, &job.out) and is_dense(job, &job.residual) and is_dense(job, &job.dy)
            and is_dense(job, &job.bits) and is_dense(job, &job.incoming)):
        rows(job, i, ch, 0, end - i, 1, channels * s, parameters)
    else:
        for q in range(channels):
            rows(job, i, ch + q, 0, end - i, 1, s, parameters + q * s * job.spans.real_size)


# ---- from blocks to channels -------------------------------------------------------------------------------------

cdef Py_ssize_t values_before(const Job* job, Py_ssize_t b) noexcept nogil:
    # values of a channel in the blocks before b
    if b >= job.blocks:
        return job.x.n * job.x.s
    return b // job.pieces * job.block_rows * job.x.s + b % job.pieces * job.piece


cdef void merge_blocks(const Job* job, Py_ssize_t ch, Py_ssize_t channels, int thread) noexcept nogil:
    # mean and M2 of some channels from the moments of their blocks: neighbours first, then pairs of pairs
    cdef Py_ssize_t step = 1, b, c = job.x.c, middle
    while step < job.blocks:
        b = 0
        while b + step < job.blocks:
            if not going_on(job, channels, thread):
                return
            middle = values_before(job, b + step)
            merge_moments(channels, middle - values_before(job, b), job.first + b * c + ch, job.second + b * c + ch,
                          values_before(job, b + 2 * step) - middle, job.first + (b + step) * c + ch,
                          job.second + (b + step) * c + ch)
            b += 2 * step
        step *= 2
    for b in range(ch, ch + channels):
        job.mean[b] = job.first[b]
        job.var[b] = job.second[b]


cdef void add_blocks(const Job* job, Py_ssize_t ch, Py_ssize_t channels, int thread) noexcept nogil:
    # dbeta, dgamma and their means for some channels, blocks added as in merge_blocks
    cdef Py_ssize_t step = 1, b, i, c = job.x.c
    cdef double count = <double> job.x.n * job.x.s
    while step < job.blocks:
        b = 0
        while b + step < job.blocks:
            if not going_on(job, channels, thread):
                return
            for i in range(ch, ch + channels):
                job.first[b * c + i] += job.first[(b + step) * c + i]
                job.second[b * c + i] += job.second[(b + step) * c + i]
            b += 2 * step
        step *= 2
    for i in range(ch, ch + channels):
        job.dbeta[i] = job.first[i]
        job.dgamma[i] = job.spans.dgamma(job.first[i], job.second[i], job.mean[i], job.rstd[i])
        job.dbeta_mean[i] = job.dbeta[i] / count
        job.dgamma_mean[i] = job.dgamma[i] / count


cdef void sum_block(const Job* job, Py_ssize_t b, Py_ssize_t tile, int thread) noexcept nogil:
    cdef Block block = block_of(job, b)
    if not going_on(job, block.rows * channels_of(job, tile) * block.len, thread):
        return
    if job.dy.data == NULL:
        moments_block(job, b, tile, thread)
        return
    if job.incoming.data != NULL:
        each_row(job, b, tile, thread, mask_rows)
    reduce_block(job, b, tile, thread)


cdef int finish_channels(const Job* job, Py_ssize_t ch, Py_ssize_t channels, int thread) noexcept nogil:
    # Returns whether the blocks have to be summed again, with better shifts: at most once, for then these are the means
    cdef double count = <double> job.x.n * job.x.s
    cdef bint again = False
    if job.dy.data != NULL:
        add_blocks(job, ch, channels, thread)
        return False
    merge_blocks(job, ch, channels, thread)
    if flag(&job.stopped):
        return False
    if job.by_columns and job.x.s == 1:
        improve = job.spans.precise_improve if job.out.data == NULL else job.spans.improve_shifts
        again = improve(channels, job.mean + ch, job.var + ch, count, shifts_of(job, ch))
    if job.rstd != NULL:
        finish_moments(channels, count, job.eps, job.var + ch, job.var + ch, job.rstd + ch)
    return again


# ---- all of it ---------------------------------------------------------------------------------------------------

ctypedef void (*task_function)(const Job* job, Py_ssize_t task, int thread) noexcept nogil


cdef void take(const Job* job, task_function function, Py_ssize_t tasks, bint backwards, int thread) noexcept nogil:
    # The share of one thread in the tasks
    cdef Py_ssize_t first = tasks * thread // job.threads, end = tasks * (thread + 1) // job.threads, t
    for t in range(first, end):
        function(job, first + end - 1 - t if backwards else t, thread)
    stream_fence()


cdef void share_out(const Job* job, task_function function, Py_ssize_t tasks, bint backwards) noexcept nogil:
    # Thread k takes the k-th part, whichever pass it is, for its cache holds what it read. One thread needs no OpenMP.
    cdef int thread
    if job.threads == 1:
        take(job, function, tasks, backwards, 0)
        return
    for thread in prange(job.threads, num_threads=job.threads, schedule="static"):
        take(job, function, tasks, backwards, thread)


cdef void whole_tile(const Job* job, Py_ssize_t tile, int thread) noexcept nogil:
    # Every pass over one tile while it is in cache; what was read last is written first.
    cdef Py_ssize_t b
    if job.dy.data != NULL:
        prepare(job, tile, False, thread)
    for _ in range(2):
        for b in range(job.blocks):
            sum_block(job, b, tile, thread)
        if not finish_channels(job, tile * job.tile, channels_of(job, tile), thread):
            break
    if job.out.data == NULL:
        return
    prepare(job, tile, job.dy.data != NULL, thread)
    for b in range(job.blocks - 1, -1, -1):
        each_row(job, b, tile, thread, write_rows)


cdef int tile_by_tile(const Job* job) noexcept nogil:
    # One thread takes a tile through all its passes, where tiles are small enough to stay in cache, and enough.
    cdef Py_ssize_t tile = job.x.n * job.tile * job.x.s * job.spans.itemsize * (2 if job.dy.data != NULL else 1)
    return ((not job.by_columns or job.blocks == 1 or tile <= L2_BYTES // 2)
            and (job.tiles % job.threads == 0 or job.tiles >= 8 * job.threads))


cdef void sum_task(const Job* job, Py_ssize_t t, int thread) noexcept nogil:
    # By runs, the blocks of a channel follow each other; by columns, the tiles of a block
    if job.by_columns:
        sum_block(job, t // job.tiles, t % job.tiles, thread)
    else:
        sum_block(job, t % job.blocks, t // job.blocks, thread)


cdef void write_task(const Job* job, Py_ssize_t t, int thread) noexcept nogil:
    # By columns, a block of a tile; by runs, in the order of memory, a piece or some channels of an image
    cdef Py_ssize_t groups = ceil_div(job.x.c, job.group)
    cdef Py_ssize_t start = t % job.pieces * job.piece, ch = t // job.pieces % groups * job.group
    if job.by_columns:
        prepare(job, t % job.tiles, job.dy.data != NULL, thread)
        each_row(job, t // job.tiles, t % job.tiles, thread, write_rows)
    elif going_on(job, min(job.group, job.x.c - ch) * job.piece, thread):
        write_rows(job, t // job.pieces // groups, ch, start, min(job.group, job.x.c - ch), 0,
                   min(job.piece, job.x.s - start), parameters_of(job, ch, thread))


cdef void write_all(const Job* job) noexcept nogil:
    # By columns backwards, since the end was read last
    cdef Py_ssize_t tile
    if job.by_columns:
        share_out(job, write_task, job.blocks * job.tiles, True)
        return
    for tile in range(job.tiles):
        prepare(job, tile, job.dy.data != NULL, 0)
    share_out(job, write_task, job.x.n * ceil_div(job.x.c, job.group) * job.pieces, False)


cdef void sum_and_write(const Job* job) noexcept nogil:
    cdef Py_ssize_t tile
    if job.dy.data == NULL and job.by_columns and job.x.s == 1:
        guess = job.spans.precise_columns if job.out.data == NULL else job.spans.guess_columns
        guess(job.x.data, job.x.n, job.x.n_stride, job.x.c, <double*> job.shifts + job.x.c, job.shifts)
    if tile_by_tile(job):
        share_out(job, whole_tile, job.tiles, False)
        return
    if job.dy.data != NULL and not job.by_columns:
        for tile in range(job.tiles):
            prepare(job, tile, False, 0)
    for _ in range(2):
        share_out(job, sum_task, job.blocks * job.tiles, False)
        if not finish_channels(job, 0, job.x.c, 0):
            break
    if job.out.data != NULL:
        write_all(job)


# ---- entries -----------------------------------------------------------------------------------------------------

def moments(x, mean, m2, int threads):
    """IN x · OUT mean, m2: float64 (c,)."""
    cdef Job job
    _scratch = lay_out(&job, x, threads)  # owns what job points to
    job.mean = vector(mean)
    job.var = vector(m2)
    job.rstd = NULL
    with nogil:
        choose_paths(&job)
        sum_and_write(&job)
    finish(&job)


def normalize(x, residual, y, gamma, beta, double eps, mean, var, bint relu, bits, int threads):
    """IN x, residual or None; gamma, beta or None, mean, var: float64 (c,) · OUT y, may be x; bits or None."""
    cdef Job job
    _scratch = lay_out(&job, x, threads, False)
    job.residual = view_of(residual)
    job.out = view_of(y)
    job.gamma = vector(gamma)
    job.beta = vector(beta)
    job.mean = vector(mean)
    job.var = vector(var)
    job.rstd = job.dbeta_mean
    job.relu = relu
    if bits is not None:
        use_bits(&job, bits)
    with nogil:
        choose_paths(&job)
        invert_deviations(job.x.c, eps, job.var, job.rstd)
        write_all(&job)
    finish(&job)


cdef void use_bits(Job* job, tuple bits) noexcept:
    # bits: (memory, canonical view) of layout.Bits. One thread where tasks would share bytes: by runs where channels do
    # not begin them (a batch of fewer than TREE short runs), by columns where rows or tiles do not (odd outputs).
    cdef Py_ssize_t apart
    job.memory = <cnp.uint8_t*> cnp.PyArray_DATA(<cnp.ndarray> bits[0])
    job.bits = view_of(bits[1])
    apart = job.bits.n_stride | (job.tile * job.bits.c_stride if job.tiles > 1 else 0)
    if (apart if job.by_columns else job.bits.c_stride) % 8 != 0:
        job.threads = 1


def forward(x, residual, y, gamma, beta, double eps, mean, var, rstd, bint relu, bits, int threads):
    """IN x, residual or None, gamma, beta or None · OUT y, may be x; mean, var, rstd: float64 (c,); bits or None."""
    cdef Job job
    _scratch = lay_out(&job, x, threads)
    job.residual = view_of(residual)
    job.out = view_of(y)
    job.gamma = vector(gamma)
    job.beta = vector(beta)
    job.eps = eps
    job.mean = vector(mean)
    job.var = vector(var)
    job.rstd = vector(rstd)
    job.relu = relu
    if bits is not None:
        use_bits(&job, bits)
    with nogil:
        choose_paths(&job)
        sum_and_write(&job)
    finish(&job)


def backward(dy, x, dx, gamma, beta, mean, rstd, dgamma, dbeta, bint relu, bint frozen, bits, masked, int threads):
    """IN dy, x; gamma, beta or None, mean, rstd: float64 (c,); bits or None · OUT dx or None, may be dy; dgamma, dbeta:
    float64 (c,); with bits, masked: dy where they are set, and zeros."""
    cdef Job job
    _scratch = lay_out(&job, x, threads)
    use_gradients(&job, dy, dx, gamma, beta, mean, rstd)
    job.dgamma = vector(dgamma)
    job.dbeta = vector(dbeta)
    job.relu = relu
    job.frozen = frozen
    if bits is not None:
        use_bits(&job, bits)
        job.incoming = job.dy
        job.dy = view_of(masked)
    with nogil:
        choose_paths(&job)
        sum_and_write(&job)
    finish(&job)


def input_gradient(dy, x, dx, gamma, beta, mean, rstd, dgamma_mean, dbeta_mean, bint relu, bint frozen, int threads):
    """IN dy, x; gamma, beta or None, mean, rstd, dgamma_mean, dbeta_mean: float64 (c,) · OUT dx, may be dy."""
    cdef Job job
    _scratch = lay_out(&job, x, threads, False)
    use_gradients(&job, dy, dx, gamma, beta, mean, rstd)
    job.dgamma_mean = vector(dgamma_mean)
    job.dbeta_mean = vector(dbeta_mean)
    job.relu = relu
    job.frozen = frozen
    with nogil:
        choose_paths(&job)
        write_all(&job)
    finish(&job)


cdef void use_gradients(Job* job, object dy, object dx, object gamma, object beta, object mean, object rstd) noexcept:
    job.dy = view_of(dy)
    job.out = view_of(dx)
    job.gamma = vector(gamma)
    job.beta = vector(beta)
    job.mean = vector(mean)
    job.rstd = vector(rstd)


cdef void copy_task(const Job* job, Py_ssize_t t, int thread) noexcept nogil:
    cdef Py_ssize_t start = t * BLOCK_NCS
    copy_span(job.x.data + start, job.out.data + start, min(<Py_ssize_t> BLOCK_NCS, job.x.n - start), job.stream)


def copy(x, y, int threads, stream=None):
    """IN x, contiguous bytes · OUT y, as many: the yardstick of the benchmarks, streamed where the kernels would."""
    cdef Job job
    job.x.data = <char*> cnp.PyArray_DATA(<cnp.ndarray> x)
    job.out.data = <char*> cnp.PyArray_DATA(<cnp.ndarray> y)
    job.x.n = cnp.PyArray_NBYTES(<cnp.ndarray> y)
    job.stream = 2 * job.x.n >= L3_BYTES if stream is None else stream
    job.threads = threads
    job.stopped = False
    with nogil:
        share_out(&job, copy_task, ceil_div(job.x.n, BLOCK_NCS), False)
