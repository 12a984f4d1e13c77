# cython: language_level=3, freethreading_compatible=True
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
    #if FASTBN_OPENMP >= 201511
    static int release_threads(void) { return omp_pause_resource_all(omp_pause_soft) == 0; }
    #else
    static int release_threads(void) { return FASTBN_OPENMP == 0; }
    #endif
    """
    const int FASTBN_OPENMP
    int omp_get_max_threads() nogil
    bint release_threads() nogil


def version():
    """Return the date of the OpenMP standard this was compiled with (201511 is 4.5), 0 without OpenMP."""
    return FASTBN_OPENMP


def max_threads():
    """Return the threads OpenMP would use now: OMP_NUM_THREADS, or the limit set through threadpoolctl."""
    return omp_get_max_threads()


def release():
    """End the threads that OpenMP keeps for the calling thread, till they are wanted again; say whether it could."""
    cdef bint released
    with nogil:
        released = release_threads()
    return released
