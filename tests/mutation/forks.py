"""Tasks in forked processes, several at a time: a mutant may crash, loop, or leave broken state behind."""

from __future__ import annotations

import faulthandler
import os
import resource
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:160] if lines else ""


def children_time() -> float:
    """CPU seconds of all processes that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _start(task: Callable[[], str], seconds: int) -> tuple[int, int]:
    """Process and pipe of a task with at most ``seconds`` of CPU time, and a minute more and ten times as much on the clock."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(10 * seconds + 60)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            said = task()
        except BaseException as error:
            said = f"{type(error).__name__} in {traceback.extract_tb(error.__traceback__)[-1].name}: {last_line(error)}"
        os.write(write, said.encode()[:60000])
        os._exit(0)
    os.close(write)
    return child, read


def verdicts(tasks: Sequence[Callable[[], str]], jobs: int, seconds: int) -> Iterator[tuple[int, str]]:
    """(number, text) of each task as it ends: what it returned, "" for survival, or the exception or signal that ended it."""
    selector, waiting, running = selectors.DefaultSelector(), list(enumerate(tasks))[::-1], 0
    while waiting or running:
        while waiting and running < jobs:
            number, task = waiting.pop()
            child, pipe = _start(task, seconds)
            selector.register(pipe, selectors.EVENT_READ, (number, child, []))
            running += 1
        for key, _ in selector.select():
            number, child, parts = key.data
            if part := os.read(key.fd, 65536):
                parts.append(part)
                continue
            selector.unregister(key.fileobj)
            os.close(key.fd)
            running -= 1
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status):
                yield number, b"".join(parts).decode()
            else:
                what = os.WTERMSIG(status)
                yield number, "no end" if what in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL) else f"the process died of signal {what}"
