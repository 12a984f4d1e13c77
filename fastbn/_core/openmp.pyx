# cython: language_level=3
"""What the OpenMP runtime says; without OpenMP, one thread."""

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define FASTBN_OPENMP _OPENMP
    #else
    #define FASTBN_OPENMP 0
    static int omp_get_max_threads(void) { return 1; }
    #endif
    """
    const int FASTBN_OPENMP
    int omp_get_max_threads() nogil


def version():
    """Return the date of the OpenMP standard this was compiled with (201511 is 4.5), 0 without OpenMP."""
    return FASTBN_OPENMP


def max_threads():
    """Return the threads OpenMP would use now: OMP_NUM_THREADS, or the limit set through threadpoolctl."""
    return omp_get_max_threads()
