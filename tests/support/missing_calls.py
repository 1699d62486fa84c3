"""System calls that fail as on file systems and systems that lack them, for programs started in a test."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int flock(int descriptor, int operation) {
    const char *folder = getenv("NO_LOCKS_IN");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path);
    if (folder && length >= (ssize_t)strlen(folder) && !strncmp(path, folder, strlen(folder))) {
        errno = atoi(getenv("NO_LOCKS_ERRNO"));
        return -1;
    }
    int (*original)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    return original(descriptor, operation);
}

int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d) {
    if (option == 1 && getenv("NO_PARENT_DEATH_SIGNAL")) {
        errno = EINVAL;
        return -1;
    }
    int (*original)(int, unsigned long, unsigned long, unsigned long, unsigned long) = dlsym(RTLD_NEXT, "prctl");
    return original(option, a, b, c, d);
}
"""


def _library(folder: Path) -> dict[str, str]:
    """Build the library that replaces the calls; return the environment that loads it."""
    library = folder / "missing_calls.so"
    if not library.exists():
        source = folder / "missing_calls.c"
        source.write_text(SOURCE)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def no_locks(build: Path, folder: Path, number: int = errno.ENOLCK) -> dict[str, str]:
    """Environment in which `flock` fails on files in a folder with this error, as on some network file systems."""
    return {**_library(build), "NO_LOCKS_IN": str(folder), "NO_LOCKS_ERRNO": str(number)}


def no_parent_death_signal(build: Path) -> dict[str, str]:
    """Environment in which a process cannot ask for a signal at the death of its parent, as on systems but Linux."""
    return {**_library(build), "NO_PARENT_DEATH_SIGNAL": "1"}
