# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""BatchNorm kernels: threads and blocking over the spans of span.h; compiled once per instruction set.

Every entry takes canonical arrays from layout.py, already checked; their number of dimensions says the layout:
3-D is ncs (batch, channel, contiguous run), 2-D is rc (rows, contiguous channels). Other strides are free.

Blocks are fixed by the shape alone and merged in their order, so the number of threads never changes a bit.
Nothing here raises; inside a parallel region nothing allocates or takes the GIL.
"""

import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport sqrt

from .caches import L2, L3

cnp.import_array()

cdef extern from "spans.h" nogil:
    enum: PARAMETERS, LANES

    ctypedef struct span_table:
        Py_ssize_t itemsize
        Py_ssize_t real_size
        void (*prepare)(Py_ssize_t c, const double* mean, const double* rstd, const double* gamma,
                        const double* beta, const double* dbeta_mean, const double* dgamma_mean,
                        void* parameters, Py_ssize_t pitch) noexcept nogil
        void (*repeat)(void* parameters, Py_ssize_t pitch, Py_ssize_t filled, Py_ssize_t total) noexcept nogil
        void (*moments_ncs)(const char* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t len, Py_ssize_t ahead,
                            double* mean, double* m2) noexcept nogil
        void (*moments_rc)(const char* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t c, Py_ssize_t k,
                           double* work, Py_ssize_t wide, double* mean, double* m2) noexcept nogil
        void (*normalize)(const char* x, const char* residual, char* y, Py_ssize_t n, const void* parameters,
                          Py_ssize_t pitch, int varying, int relu, int stream) noexcept nogil
        void (*reduce_ncs)(const char* dy, const char* x, Py_ssize_t rows, Py_ssize_t dy_stride,
                           Py_ssize_t x_stride, Py_ssize_t len, Py_ssize_t dy_ahead, Py_ssize_t x_ahead,
                           double mean, const void* parameters, double* sums, int relu) noexcept nogil
        void (*reduce_rc)(const char* dy, const char* x, Py_ssize_t rows, Py_ssize_t dy_stride,
                          Py_ssize_t x_stride, Py_ssize_t c, Py_ssize_t k, const double* mean,
                          const void* parameters, Py_ssize_t pitch, double* work, Py_ssize_t wide,
                          double* sum, double* product, int relu) noexcept nogil
        void (*backward)(const char* dy, const char* x, char* dx, Py_ssize_t n, const void* parameters,
                         Py_ssize_t pitch, int varying, int relu, int frozen, int stream) noexcept nogil

    const span_table* spans_of(Py_ssize_t itemsize, int is_numpy_half)
    void merge_moments(Py_ssize_t c, double n_a, double* mean_a, double* m2_a, double n_b, const double* mean_b,
                       const double* m2_b)
    void finish_moments(Py_ssize_t c, double count, double eps, const double* m2, double* var, double* rstd)
    void stream_fence()
    void copy_span(const char* source, char* target, Py_ssize_t size, int stream)

# Part of the numerical contract, for they fix the order of the sums: elements of a block …
cdef enum:
    BLOCK_NCS = 16384
    BLOCK_RC = 131072
# … and short rows are summed side by side until they are this wide
    SIDE_BY_SIDE = 256

# Not part of it: columns of layout rc that one task takes, so that their sums and parameters stay in L1
cdef enum:
    COLUMNS = 1024

cdef Py_ssize_t L2_BYTES = L2
cdef Py_ssize_t L3_BYTES = L3


# ---- arrays and geometry -----------------------------------------------------------------------------------------

cdef struct View:
    # ncs: (n, c, s) · rc: (n, c), s = 1 · strides in bytes · data NULL: there is no such array
    char* data
    Py_ssize_t n, c, s, n_stride, c_stride


cdef View view_of(object array) noexcept:
    cdef View v
    cdef cnp.ndarray a
    v.data = NULL
    v.n = v.c = v.s = v.n_stride = v.c_stride = 0
    if array is None:
        return v
    a = array
    v.data = <char*> cnp.PyArray_DATA(a)
    v.n = cnp.PyArray_DIM(a, 0)
    v.c = cnp.PyArray_DIM(a, 1)
    v.s = cnp.PyArray_DIM(a, 2) if cnp.PyArray_NDIM(a) == 3 else 1
    v.n_stride = cnp.PyArray_STRIDE(a, 0)
    v.c_stride = cnp.PyArray_STRIDE(a, 1)
    return v


cdef double* vector(object array) noexcept:
    # float64 (C,), or None
    return NULL if array is None else <double*> cnp.PyArray_DATA(<cnp.ndarray> array)


cdef struct Job:
    # one call: its arrays, how they are cut, its vectors and its scratch
    const span_table* spans
    View x, residual, dy, out    # out: y or dx
    int ncs                      # the layout: ncs or rc
    Py_ssize_t block_rows        # runs (ncs) or rows (rc) of a block
    Py_ssize_t pieces, piece     # ncs: a run longer than a block is cut into pieces of this length
    Py_ssize_t blocks            # of a channel
    Py_ssize_t side              # rc: rows summed side by side
    Py_ssize_t tiles, tile       # rc: column tiles, their width
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
    double* second               # (blocks, c): M2, or Σdy·(x - mean)
    double* dbeta_mean           # (c,)
    double* dgamma_mean          # (c,)
    double* work                 # rc: (threads, 3, wide)
    Py_ssize_t wide
    char* parameters             # ncs: (c, PARAMETERS), pitch 1 · rc: (PARAMETERS, pitch)
    Py_ssize_t pitch
    # how
    int relu, frozen, stream, prefetch, threads


cdef struct Block:
    Py_ssize_t row, rows, start, len


cdef inline Block block_of(const Job* job, Py_ssize_t b) noexcept nogil:
    cdef Block block
    block.row = b // job.pieces * job.block_rows
    block.rows = min(job.block_rows, job.x.n - block.row)
    block.start = b % job.pieces * job.piece
    block.len = min(job.piece, job.x.s - block.start)
    return block


cdef inline char* element(const Job* job, const View* v, Py_ssize_t i, Py_ssize_t ch,
                          Py_ssize_t j) noexcept nogil:
    # address of element (i, ch, j); NULL where there is no such array
    return NULL if v.data == NULL else v.data + i * v.n_stride + ch * v.c_stride + j * job.spans.itemsize


cdef inline char* parameters_of(const Job* job, Py_ssize_t ch) noexcept nogil:
    # where the spans read the parameters of channel ch (ncs), or of the channels from ch on (rc)
    return job.parameters + ch * job.spans.real_size * (PARAMETERS if job.ncs else 1)


cdef inline Py_ssize_t ahead_of(const Job* job, Py_ssize_t ch) noexcept nogil:
    # bytes to the next channel if it is to be fetched into L2 while this one is summed, else 0
    return job.x.c_stride if job.prefetch and ch + 1 < job.x.c else 0


cdef Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef object lay_out(Job* job, object x, int threads):
    # Fill in x, its geometry and the scratch; returns the owner of the scratch. Blocks depend on the shape alone.
    cdef cnp.ndarray array = x
    cdef cnp.ndarray memory
    cdef Py_ssize_t c, doubles
    job.spans = spans_of(cnp.PyArray_ITEMSIZE(array), cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT16)
    job.x = view_of(x)
    job.ncs = cnp.PyArray_NDIM(array) == 3
    job.threads = threads
    c = job.x.c
    job.pieces = 1
    job.piece = job.x.s
    job.side = job.tiles = 1
    job.tile = c
    job.wide = 0
    if job.ncs:
        if job.x.s > BLOCK_NCS:
            job.pieces = ceil_div(job.x.s, BLOCK_NCS)
            job.piece = ceil_div(ceil_div(job.x.s, job.pieces), LANES) * LANES
            job.pieces = ceil_div(job.x.s, job.piece)
        job.block_rows = max(1, BLOCK_NCS // job.x.s)
        job.pitch = 1
        doubles = PARAMETERS * c
    else:
        job.side = max(1, min(SIDE_BY_SIDE // c, job.x.n))
        job.tiles = ceil_div(c, COLUMNS)
        job.tile = ceil_div(ceil_div(c, job.tiles), LANES) * LANES
        job.tiles = ceil_div(c, job.tile)
        job.block_rows = max(8, BLOCK_RC // (job.side * c)) * job.side
        job.wide = ceil_div(job.side * min(c, job.tile), LANES) * LANES + LANES
        job.pitch = ceil_div(job.side * c, LANES) * LANES + 4 * LANES
        doubles = PARAMETERS * job.pitch
    job.blocks = ceil_div(job.x.n, job.block_rows) * job.pieces
    memory = np.empty(2 * job.blocks * c + 2 * c + 3 * job.wide * threads + doubles)
    job.first = <double*> cnp.PyArray_DATA(memory)
    job.second = job.first + job.blocks * c
    job.dbeta_mean = job.second + job.blocks * c
    job.dgamma_mean = job.dbeta_mean + c
    job.work = job.dgamma_mean + c
    job.parameters = <char*> (job.work + 3 * job.wide * threads)
    return memory


cdef void choose_paths(Job* job) noexcept nogil:
    # Write past the cache what would not stay in it anyway, never where input and output are one array. Fetch the next
    # channel while one is summed: that pass is bound by arithmetic, the writing one by memory (measured: 1.3× faster
    # than fetching while writing, 1.5× than not at all).
    cdef Py_ssize_t size = job.x.n * job.x.c * job.x.s * job.spans.itemsize
    cdef Py_ssize_t run = job.x.s * job.spans.itemsize
    cdef Py_ssize_t channel = job.x.n * job.x.s * job.spans.itemsize * (2 if job.dy.data != NULL else 1)
    job.stream = (2 * size > L3_BYTES and job.out.data != job.x.data and job.out.data != job.dy.data
                  and (not job.ncs or run >= 4096 or run % 64 == 0))  # a line shared by two runs streams badly
    job.prefetch = job.ncs and channel <= L2_BYTES


cdef void prepare(const Job* job, Py_ssize_t ch, Py_ssize_t channels, int backward) noexcept nogil:
    # Parameters of the element-wise spans: side by side for all channels (rc), or apart for each (ncs)
    cdef Py_ssize_t i
    if not job.ncs:
        prepare_together(job, 0, channels, backward)
        job.spans.repeat(job.parameters, job.pitch, channels, job.pitch)
        return
    for i in range(ch, ch + channels):
        prepare_together(job, i, 1, backward)


cdef void prepare_together(const Job* job, Py_ssize_t ch, Py_ssize_t channels, int backward) noexcept nogil:
    job.spans.prepare(channels, job.mean + ch, job.rstd + ch, NULL if job.gamma == NULL else job.gamma + ch,
                      NULL if job.beta == NULL else job.beta + ch, job.dbeta_mean + ch if backward else NULL,
                      job.dgamma_mean + ch if backward else NULL, parameters_of(job, ch), job.pitch)


# ---- moments -----------------------------------------------------------------------------------------------------

cdef void moments_block_ncs(const Job* job, Py_ssize_t b, Py_ssize_t ch, double* mean, double* m2) noexcept nogil:
    cdef Block block = block_of(job, b)
    job.spans.moments_ncs(element(job, &job.x, block.row, ch, block.start), block.rows, job.x.n_stride, block.len,
                          ahead_of(job, ch), mean, m2)


cdef void moments_block_rc(const Job* job, Py_ssize_t b, Py_ssize_t tile, int thread) noexcept nogil:
    cdef Block block = block_of(job, b)
    cdef Py_ssize_t ch = tile * job.tile
    job.spans.moments_rc(element(job, &job.x, block.row, ch, 0), block.rows, job.x.n_stride,
                         min(job.tile, job.x.c - ch), job.side, job.work + 3 * job.wide * thread, job.wide,
                         job.first + b * job.x.c + ch, job.second + b * job.x.c + ch)


cdef void merge_blocks(const Job* job, Py_ssize_t ch, Py_ssize_t channels, const double* mean, const double* m2,
                       Py_ssize_t pitch) noexcept nogil:
    # job.mean and job.var (as M2) of some channels from the moments of the blocks, in the order of the blocks
    cdef Py_ssize_t b
    cdef Block block
    cdef double count = 0
    for b in range(job.blocks):
        block = block_of(job, b)
        merge_moments(channels, count, job.mean + ch, job.var + ch, <double> block.rows * block.len,
                      mean + b * pitch, m2 + b * pitch)
        count += <double> block.rows * block.len


cdef void moments_blockwise(const Job* job) noexcept nogil:
    # Every (block, channel) or (block, tile) is a task of its own.
    cdef Py_ssize_t t
    cdef Py_ssize_t c = job.x.c
    if job.ncs:
        for t in prange(job.blocks * c, num_threads=job.threads, schedule="static"):
            moments_block_ncs(job, t % job.blocks, t // job.blocks,
                              job.first + t % job.blocks * c + t // job.blocks,
                              job.second + t % job.blocks * c + t // job.blocks)
    else:
        for t in prange(job.blocks * job.tiles, num_threads=job.threads, schedule="static"):
            moments_block_rc(job, t // job.tiles, t % job.tiles, threadid())
    merge_blocks(job, 0, c, job.first, job.second, c)


cdef void moments_channel(const Job* job, Py_ssize_t ch) noexcept nogil:
    cdef Py_ssize_t b
    cdef double* mean = job.first + ch * job.blocks
    cdef double* m2 = job.second + ch * job.blocks
    for b in range(job.blocks):
        moments_block_ncs(job, b, ch, mean + b, m2 + b)
    merge_blocks(job, ch, 1, mean, m2, 1)


cdef int by_channel(const Job* job) noexcept nogil:
    # Layout ncs with channels enough for the threads: one thread takes a channel through all its passes, in cache.
    return job.ncs and (job.x.c % job.threads == 0 or job.x.c >= 8 * job.threads)


# ---- forward -----------------------------------------------------------------------------------------------------

cdef void output_run(const Job* job, Py_ssize_t i, Py_ssize_t ch, Py_ssize_t j, Py_ssize_t len) noexcept nogil:
    job.spans.normalize(element(job, &job.x, i, ch, j), element(job, &job.residual, i, ch, j),
                        element(job, &job.out, i, ch, j), len, parameters_of(job, ch), job.pitch,
                        not job.ncs, job.relu, job.stream)


cdef void gradient_run(const Job* job, Py_ssize_t i, Py_ssize_t ch, Py_ssize_t j, Py_ssize_t len) noexcept nogil:
    job.spans.backward(element(job, &job.dy, i, ch, j), element(job, &job.x, i, ch, j),
                       element(job, &job.out, i, ch, j), len, parameters_of(job, ch), job.pitch,
                       not job.ncs, job.relu, job.frozen, job.stream)


ctypedef void (*run_function)(const Job*, Py_ssize_t i, Py_ssize_t ch, Py_ssize_t j, Py_ssize_t len) noexcept nogil


cdef void write_channel(const Job* job, run_function run, Py_ssize_t ch) noexcept nogil:
    # All of a channel (ncs); the end, read last, is written first.
    cdef Py_ssize_t b, i
    cdef Block block
    for b in range(job.blocks):
        block = block_of(job, job.blocks - 1 - b)
        for i in range(block.row, block.row + block.rows):
            run(job, i, ch, block.start, block.len)


cdef void write_block_rc(const Job* job, run_function run, Py_ssize_t b, Py_ssize_t tile) noexcept nogil:
    # A block of rows of one tile; contiguous rows are written side by side.
    cdef Block block = block_of(job, b)
    cdef Py_ssize_t c = job.x.c, ch = tile * job.tile
    cdef Py_ssize_t row = c * job.spans.itemsize
    cdef Py_ssize_t i = block.row, end = block.row + block.rows
    if (job.x.n_stride == row and job.out.n_stride == row
            and (job.residual.data == NULL or job.residual.n_stride == row)
            and (job.dy.data == NULL or job.dy.n_stride == row)):
        while i + job.side <= end and job.side > 1:
            run(job, i, 0, 0, job.side * c)
            i += job.side
    while i < end:
        run(job, i, ch, 0, min(job.tile, c - ch))
        i += 1


cdef void write_all(const Job* job, run_function run) noexcept nogil:
    # Everything, in the order of memory where nothing is cached yet (ncs), backwards where the end is (rc).
    cdef Py_ssize_t t
    cdef Py_ssize_t c = job.x.c
    cdef Py_ssize_t tasks = (job.x.n * c * job.pieces) if job.ncs else job.blocks * job.tiles
    cdef Py_ssize_t left
    with parallel(num_threads=job.threads):
        if job.ncs:
            for t in prange(tasks, schedule="static"):
                run(job, t // (c * job.pieces), t // job.pieces % c, t % job.pieces * job.piece,
                    min(job.piece, job.x.s - t % job.pieces * job.piece))
        else:
            for t in prange(tasks, schedule="static"):
                left = tasks - 1 - t
                write_block_rc(job, run, left // job.tiles, left % job.tiles)
        stream_fence()


cdef void forward_channel(const Job* job, Py_ssize_t ch) noexcept nogil:
    moments_channel(job, ch)
    finish_moments(1, <double> job.x.n * job.x.s, job.eps, job.var + ch, job.var + ch, job.rstd + ch)
    prepare(job, ch, 1, False)
    write_channel(job, output_run, ch)


# ---- backward ----------------------------------------------------------------------------------------------------

cdef void reduce_block_ncs(const Job* job, Py_ssize_t b, Py_ssize_t ch, double* first, double* second) noexcept nogil:
    cdef Block block = block_of(job, b)
    cdef double sums[2]
    cdef Py_ssize_t ahead = ahead_of(job, ch)
    job.spans.reduce_ncs(element(job, &job.dy, block.row, ch, block.start),
                         element(job, &job.x, block.row, ch, block.start), block.rows, job.dy.n_stride,
                         job.x.n_stride, block.len, job.dy.c_stride if ahead else 0, ahead, job.mean[ch],
                         parameters_of(job, ch), sums, job.relu)
    first[0] = sums[0]
    second[0] = sums[1]


cdef void reduce_block_rc(const Job* job, Py_ssize_t b, Py_ssize_t tile, int thread) noexcept nogil:
    cdef Block block = block_of(job, b)
    cdef Py_ssize_t ch = tile * job.tile
    job.spans.reduce_rc(element(job, &job.dy, block.row, ch, 0), element(job, &job.x, block.row, ch, 0), block.rows,
                        job.dy.n_stride, job.x.n_stride, min(job.tile, job.x.c - ch), job.side, job.mean + ch,
                        parameters_of(job, ch), job.pitch, job.work + 3 * job.wide * thread, job.wide,
                        job.first + b * job.x.c + ch, job.second + b * job.x.c + ch, job.relu)


cdef void add_blocks(const Job* job, Py_ssize_t ch, Py_ssize_t channels, const double* first, const double* second,
                     Py_ssize_t pitch) noexcept nogil:
    # dbeta, dgamma and their means for some channels, in the order of the blocks
    cdef Py_ssize_t b, i
    cdef double count = <double> job.x.n * job.x.s
    for i in range(channels):
        job.dbeta[ch + i] = 0
        job.dgamma[ch + i] = 0
    for b in range(job.blocks):
        for i in range(channels):
            job.dbeta[ch + i] += first[b * pitch + i]
            job.dgamma[ch + i] += second[b * pitch + i]
    for i in range(ch, ch + channels):
        job.dgamma[i] *= job.rstd[i]
        job.dbeta_mean[i] = job.dbeta[i] / count
        job.dgamma_mean[i] = job.dgamma[i] / count


cdef void backward_channel(const Job* job, Py_ssize_t ch) noexcept nogil:
    cdef Py_ssize_t b
    cdef double* first = job.first + ch * job.blocks
    cdef double* second = job.second + ch * job.blocks
    for b in range(job.blocks):
        reduce_block_ncs(job, b, ch, first + b, second + b)
    add_blocks(job, ch, 1, first, second, 1)
    prepare(job, ch, 1, True)
    write_channel(job, gradient_run, ch)


cdef void reduce_blockwise(const Job* job) noexcept nogil:
    cdef Py_ssize_t t
    cdef Py_ssize_t c = job.x.c
    if job.ncs:
        for t in prange(job.blocks * c, num_threads=job.threads, schedule="static"):
            reduce_block_ncs(job, t % job.blocks, t // job.blocks, job.first + t % job.blocks * c + t // job.blocks,
                             job.second + t % job.blocks * c + t // job.blocks)
    else:
        for t in prange(job.blocks * job.tiles, num_threads=job.threads, schedule="static"):
            reduce_block_rc(job, t // job.tiles, t % job.tiles, threadid())
    add_blocks(job, 0, c, job.first, job.second, c)


# ---- entries -----------------------------------------------------------------------------------------------------

def first_not_positive(var, double eps):
    """Return the first channel with var + eps <= 0, or -1. NaN passes: it stays in its channel."""
    cdef const double* v = vector(var)
    cdef Py_ssize_t ch
    for ch in range(cnp.PyArray_DIM(<cnp.ndarray> var, 0)):
        if v[ch] + eps <= 0:
            return ch
    return -1


def moments(x, mean, m2, int threads):
    """IN x · OUT mean, m2: float64 (c,)."""
    cdef Job job
    cdef Py_ssize_t ch
    _scratch = lay_out(&job, x, threads)  # owns what job points to
    job.dy = view_of(None)
    job.out = view_of(None)
    job.mean = vector(mean)
    job.var = vector(m2)
    with nogil:
        choose_paths(&job)
        if by_channel(&job):
            for ch in prange(job.x.c, num_threads=threads, schedule="static"):
                moments_channel(&job, ch)
        else:
            moments_blockwise(&job)


def normalize(x, residual, y, gamma, beta, double eps, mean, var, bint relu, int threads):
    """IN x, residual or None; gamma, beta or None, mean, var: float64 (c,) · OUT y, may be x."""
    cdef Job job
    cdef Py_ssize_t ch
    _scratch = lay_out(&job, x, threads)
    job.residual = view_of(residual)
    job.dy = view_of(None)
    job.out = view_of(y)
    job.gamma = vector(gamma)
    job.beta = vector(beta)
    job.mean = vector(mean)
    job.var = vector(var)
    job.rstd = job.dbeta_mean
    job.relu = relu
    with nogil:
        choose_paths(&job)
        for ch in range(job.x.c):
            job.rstd[ch] = 1 / sqrt(job.var[ch] + eps)
        prepare(&job, 0, job.x.c, False)
        write_all(&job, output_run)


def forward(x, residual, y, gamma, beta, double eps, mean, var, rstd, bint relu, int threads):
    """IN x, residual or None, gamma, beta or None · OUT y, may be x; mean, var, rstd: float64 (c,)."""
    cdef Job job
    cdef Py_ssize_t ch
    _scratch = lay_out(&job, x, threads)
    job.residual = view_of(residual)
    job.dy = view_of(None)
    job.out = view_of(y)
    job.gamma = vector(gamma)
    job.beta = vector(beta)
    job.eps = eps
    job.mean = vector(mean)
    job.var = vector(var)
    job.rstd = vector(rstd)
    job.relu = relu
    with nogil:
        choose_paths(&job)
        if by_channel(&job):
            with parallel(num_threads=threads):
                for ch in prange(job.x.c, schedule="static"):
                    forward_channel(&job, ch)
                stream_fence()
        else:
            moments_blockwise(&job)
            finish_moments(job.x.c, <double> job.x.n * job.x.s, eps, job.var, job.var, job.rstd)
            prepare(&job, 0, job.x.c, False)
            write_all(&job, output_run)


def backward(dy, x, dx, gamma, beta, mean, rstd, dgamma, dbeta, bint relu, bint frozen, int threads):
    """IN dy, x; gamma, beta or None, mean, rstd: float64 (c,) · OUT dx, may be dy; dgamma, dbeta: float64 (c,)."""
    cdef Job job
    cdef Py_ssize_t ch
    _scratch = lay_out(&job, x, threads)
    job.residual = view_of(None)
    job.dy = view_of(dy)
    job.out = view_of(dx)
    job.gamma = vector(gamma)
    job.beta = vector(beta)
    job.mean = vector(mean)
    job.rstd = vector(rstd)
    job.dgamma = vector(dgamma)
    job.dbeta = vector(dbeta)
    job.relu = relu
    job.frozen = frozen
    with nogil:
        choose_paths(&job)
        if relu:
            prepare(&job, 0, job.x.c, False)  # the reduction computes the forward's sign again
        if by_channel(&job):
            with parallel(num_threads=threads):
                for ch in prange(job.x.c, schedule="static"):
                    backward_channel(&job, ch)
                stream_fence()
        else:
            reduce_blockwise(&job)
            prepare(&job, 0, job.x.c, True)
            write_all(&job, gradient_run)


def copy(x, y, int threads):
    """IN x, contiguous bytes · OUT y, as many: a streaming copy, the yardstick of the benchmarks."""
    cdef const char* source = <const char*> cnp.PyArray_DATA(<cnp.ndarray> x)
    cdef char* target = <char*> cnp.PyArray_DATA(<cnp.ndarray> y)
    cdef Py_ssize_t size = cnp.PyArray_NBYTES(<cnp.ndarray> y)
    cdef Py_ssize_t piece = BLOCK_NCS * 4
    cdef Py_ssize_t i
    with nogil, parallel(num_threads=threads):
        for i in prange(ceil_div(size, piece), schedule="static"):
            copy_span(source + i * piece, target + i * piece, min(piece, size - i * piece), 2 * size > L3_BYTES)
        stream_fence()
