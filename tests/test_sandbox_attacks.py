"""Attacks on the sandbox: each script tries one thing that must end safely.

    python -m pytest tests/test_sandbox_attacks.py       # as whoever you are; root tests others too
    python tests/test_sandbox_attacks.py [--layers seccomp] [NAME ...]       # what each achieves

An attack prints `BREACH ...` when it got what it must not get. After every attack the harness also
checks that the public and private data are untouched, that the secret is in no output, that the
owner (this process) kept its priority, affinity and limits and received no signal. An attack that
one layer alone stops names it: with that layer switched off it must breach, so that a silently
missing layer is noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sandbox import Competition, Sandbox  # noqa: E402

MARK = (
    "S3CRET" + "-MARK"
)  # stands in the answers and in the owner's environment, and must never come out

PRELUDE = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
def call(x86, arm, *args):
    "A raw system call; raises OSError."
    number = x86 if X86 else arm
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
def attempt(what, *args, **named):
    "Do it; whatever does not raise is a breach."
    try:
        result = what(*args, **named)
    except (OSError, ImportError) as error:
        print("denied", repr(error))
        return None
    print("BREACH", getattr(what, "__name__", what), args, repr(result)[:200])
    return result
"""


@dataclass(frozen=True)
class Attack:
    name: str
    code: str
    status: tuple[str, ...] = ()  # allowed statuses; () = any but ok
    layer: str = ""  # "landlock" or "seccomp": without this layer the attack must breach
    reason: str = ""  # must stand in Execution.reason
    timeout: float = 120.0  # a busy machine must not fail an attack
    machine: str = ""  # only on this machine


ATTACKS: list[Attack] = []


def attack(name: str, code: str, status: str = "", **more) -> None:
    ATTACKS.append(Attack(name, code, tuple(status.split()), **more))


NOTHING = "no_submission"  # exit code 0, nothing submitted: all that a failed attempt leaves

# ---- reading the answers
attack(
    "answers by absolute path", "attempt(lambda: open(ANSWERS).read())", NOTHING, layer="landlock"
)
attack(
    "answers by relative path",
    "attempt(lambda: open('input/../private/test.csv').read())",
    NOTHING,
    layer="landlock",
)
attack(
    "answers through pandas",
    "import pandas\nattempt(pandas.read_csv, ANSWERS)",
    NOTHING,
    layer="landlock",
)
attack(
    "answers as a memory map",
    "import numpy\nattempt(numpy.memmap, ANSWERS, mode='r')",
    NOTHING,
    layer="landlock",
)
attack(
    "answers through C",
    """
libc.fopen.restype = ctypes.c_void_p
def fopen():
    if not libc.fopen(ANSWERS.encode(), b"r"):
        raise OSError(ctypes.get_errno(), "fopen")
attempt(fopen)""",
    NOTHING,
    layer="landlock",
)
attack(
    "answers as a module",
    """
import importlib.machinery
loader = importlib.machinery.SourceFileLoader("answers", ANSWERS)
attempt(loader.get_data, ANSWERS)""",
    NOTHING,
    layer="landlock",
)
attack(
    "answers by O_PATH and /proc/self/fd",
    """
def reopen():
    fd = os.open(ANSWERS, os.O_PATH)
    return open(f"/proc/self/fd/{fd}").read()
attempt(reopen)""",
    NOTHING,
    layer="landlock",
)
attack("list the private directory", "attempt(os.listdir, PRIVATE)", NOTHING, layer="landlock")
attack(
    "list the parent of the public data",
    "attempt(os.listdir, 'input/..')",
    NOTHING,
    layer="landlock",
)
attack(
    "walk the whole machine",
    """
known = '/usr', '/lib', sys.prefix, sys.base_prefix
seen = [d for d, _, files in os.walk('/') if files and not d.startswith(known)]
seen = [d for d in seen if not d.startswith(('/sys/devices/system', '/etc/fonts', *sys.path))]
if seen: print("BREACH", seen[:5])""",
    NOTHING,
    layer="landlock",
)
attack(
    "answers below /proc/self/root",
    "attempt(lambda: open('/proc/self/root' + ANSWERS).read())",
    NOTHING,
    layer="landlock",
)
attack(
    "answers below /proc/self/cwd",
    "attempt(lambda: open('/proc/self/cwd/input/../private/test.csv').read())",
    NOTHING,
    layer="landlock",
)
attack("owner's environment", "attempt(lambda: open(f'/proc/{OWNER}/environ').read())", NOTHING)
attack(
    "owner's memory",
    "attempt(lambda: open(f'/proc/{OWNER}/mem', 'rb').read(1))\n"
    "attempt(lambda: open(f'/proc/{OWNER}/maps').read())",
    NOTHING,
)
attack(
    "owner's descriptors",
    "attempt(os.listdir, f'/proc/{OWNER}/fd')\nattempt(os.readlink, f'/proc/{OWNER}/fd/0')",
    NOTHING,
)
attack(
    "owner's working directory and root",
    """
attempt(os.listdir, f'/proc/{OWNER}/cwd'); attempt(os.listdir, f'/proc/{OWNER}/root')
attempt(os.readlink, f'/proc/{OWNER}/cwd'); attempt(os.readlink, f'/proc/{OWNER}/exe')""",
    NOTHING,
)
attack(
    "owner's command line",
    "attempt(lambda: open(f'/proc/{OWNER}/cmdline').read())",
    NOTHING,
    layer="landlock",
)
attack(
    "nanny's and server's secrets",
    """
for pid in (os.getppid(),):
    for name in ('environ', 'mem', 'maps', 'auxv'):
        attempt(lambda: open(f'/proc/{pid}/{name}', 'rb').read(1))
    attempt(os.listdir, f'/proc/{pid}/fd'); attempt(os.listdir, f'/proc/{pid}/cwd')""",
    NOTHING,
)
attack("list the processes", "attempt(os.listdir, '/proc')", NOTHING, layer="landlock")
attack(
    "inherited descriptors",
    """
for fd in range(3, 1024):
    try:
        facts = os.fstat(fd)
    except OSError:
        continue
    print("BREACH", fd, facts)
attempt(os.write, 0, b'x')""",
    NOTHING,
)
attack(
    "submission as a symbolic link to the answers",
    "attempt(os.symlink, ANSWERS, 'submission.csv')",
    NOTHING,
    layer="landlock",
)
attack(
    "submission as a hard link to the answers",
    "attempt(os.link, ANSWERS, 'submission.csv')",
    NOTHING,
)
attack(
    "answers renamed to the submission", "attempt(os.rename, ANSWERS, 'submission.csv')", NOTHING
)
attack(
    "exchange the answers",
    "attempt(call, 316, 276, -100, ANSWERS.encode(), -100, b'script.py', 2)",
    NOTHING,
)
attack(
    "file handles",
    """
buffer = ctypes.create_string_buffer(b'\\x80\\0\\0\\0' + bytes(132)); mount = ctypes.c_int()
attempt(call, 303, 264, -100, PUBLIC.encode(), buffer, ctypes.byref(mount), 0)
attempt(call, 304, 265, -100, buffer, 0)""",
    NOTHING,
)
attack(
    "user and mount namespaces",
    """
for flags in (0x10000000 | 0x20000, 0x20000, 0x10000000, 0x40000000):
    attempt(call, 272, 97, flags)
attempt(call, 308, 268, 0, 0)""",
    NOTHING,
)
attack(
    "mount",
    """
attempt(call, 165, 40, PRIVATE.encode(), b'tmp', 0, 4096, 0)
attempt(call, 428, 428, -100, PRIVATE.encode(), 0)
attempt(call, 430, 430, b'tmpfs', 0); attempt(call, 166, 39, b'/', 0)
attempt(call, 155, 41, b'.', b'.')""",
    NOTHING,
)
attack("chroot", "attempt(os.chroot, '.'); attempt(os.chroot, '/')", NOTHING)
attack(
    "ptrace",
    """
for pid in (OWNER, os.getppid()):
    attempt(call, 101, 117, 16, pid, 0, 0); attempt(call, 101, 117, 0x4206, pid, 0, 0)
attempt(call, 101, 117, 0, 0, 0, 0)""",
    NOTHING,
)
attack(
    "another process's memory",
    """
buffer = ctypes.create_string_buffer(8)
vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
for pid in (OWNER, os.getppid()):
    attempt(call, 310, 270, pid, vector, 1, vector, 1, 0)
    attempt(call, 311, 271, pid, vector, 1, vector, 1, 0)
attempt(call, 312, 272, OWNER, os.getpid(), 0, 0, 0)""",
    NOTHING,
)
attack(
    "another process's descriptors",
    """
for pid in (OWNER, os.getppid()):
    fd = attempt(call, 434, 434, pid, 0)
    attempt(call, 438, 438, fd or 3, 0, 0)""",
    NOTHING,
    layer="seccomp",
)
attack(
    "secrets in the heap",
    """
import re
needle = re.compile(b'S3CRE[T]-MARK|prepared/privat[e]')  # spelt so that it does not find itself
for line in open('/proc/self/maps'):
    span, mode, _, _, inode, *path = line.split()
    if mode.startswith('rw') and path[:1] not in (['[vvar]'], ['[vsyscall]']):
        low, high = (int(x, 16) for x in span.split('-'))
        for start in range(low, high, 1 << 20):
            found = needle.search(ctypes.string_at(start, min(1 << 20, high - start)))
            if found and found[0] != ANSWERS_PART: print('BREACH', span, path)""",
    NOTHING,
)
attack(
    "secrets in the environment",
    """
known = set('''PATH LANG USER LOGNAME MPLBACKEND PYTHONHASHSEED PYTHONWARNINGS
JOBLIB_MULTIPROCESSING LOKY_MAX_CPU_COUNT TOKENIZERS_PARALLELISM CUDA_VISIBLE_DEVICES
OMP_NUM_THREADS OPENBLAS_NUM_THREADS
MKL_NUM_THREADS NUMEXPR_NUM_THREADS NUMBA_NUM_THREADS LD_LIBRARY_PATH HOME TMPDIR NUMBA_CACHE_DIR
MPLCONFIGDIR XDG_CACHE_HOME LC_CTYPE KMP_INIT_AT_FORK KMP_DUPLICATE_LIB_OK'''.split())
if set(os.environ) - known: print('BREACH', set(os.environ) - known)""",
    NOTHING,
)
attack(
    "secrets in the frames",
    """
frame = sys._getframe(1)
while frame:
    for name, value in list(frame.f_locals.items()):
        if isinstance(value, dict):  # the code is ours and holds the path
            value = {k: v for k, v in value.items() if k != 'code'}
        if name not in ('code', '__doc__') and 'private' in repr(value):
            print('BREACH', name, repr(value)[:100])
    frame = frame.f_back""",
    NOTHING,
)
attack("execute cat", "attempt(os.execv, '/bin/cat', ['cat', ANSWERS])", NOTHING)
attack(
    "open through io_uring", "attempt(call, 425, 425, 8, ctypes.create_string_buffer(120))", NOTHING
)
attack(
    "openat2",
    """
how = ctypes.create_string_buffer(24)
attempt(call, 437, 437, -100, ANSWERS.encode(), how, 24)""",
    NOTHING,
)
attack(
    "watch the private directory",
    """
fd = attempt(call, 294, 26, 0)
attempt(call, 254, 27, fd or 3, PRIVATE.encode(), 0xfff); attempt(call, 300, 262, 0, 0)""",
    NOTHING,
    layer="seccomp",
)
attack(
    "home directories and keys",
    """
for path in ('/root', '/home', '/root/.ssh', '/root/.bashrc', '/root/.cache/huggingface/token',
             '/etc/shadow', '/etc/passwd', '/var/log'):
    attempt(os.listdir if os.path.isdir(path) else lambda p: open(p).read(), path)""",
    NOTHING,
    layer="landlock",
)

# ---- poisoning
attack(
    "write into the public data",
    """
attempt(open, 'input/train.csv', 'a'); attempt(open, 'input/new', 'w')
attempt(open, 'input/train.csv', 'r+')
attempt(os.mkdir, 'input/d'); attempt(os.unlink, 'input/train.csv')
attempt(os.rename, 'input/train.csv', 'input/x'); attempt(os.rename, 'input/train.csv', 'x')
attempt(os.rename, 'script.py', 'input/s')
attempt(os.link, 'script.py', 'input/l'); attempt(os.symlink, 'x', 'input/y')""",
    NOTHING,
)
attack(
    "mode of the public data",
    "os.chmod('input/train.csv', 0o777); os.chmod('input', 0o777)\n"
    "fd = os.open('input/train.csv', 0)\n"
    "os.fchmod(fd, 0o777)\nimport stat\n"
    "if stat.S_IMODE(os.stat('input/train.csv').st_mode) == 0o777: print('BREACH')",
    NOTHING,
    layer="seccomp",
)
attack(
    "times of the public data",
    "os.utime('input/train.csv', (0, 0)); os.utime('input', (0, 0))\n"
    "if os.stat('input/train.csv').st_mtime == 0: print('BREACH')",
    NOTHING,
    layer="seccomp",
)
attack(
    "owner of the public data",
    "attempt(os.chown, 'input/train.csv', 1, 1); attempt(os.lchown, 'input', 1, 1)",
    NOTHING,
)
attack(
    "attributes of the public data",
    "attempt(os.setxattr, 'input/train.csv', 'user.x', b'1'); "
    "attempt(os.setxattr, 'input', 'user.x', b'1')",
    NOTHING,
    layer="seccomp",
)
attack(
    "truncate the public data",
    """
attempt(os.truncate, 'input/train.csv', 0)
attempt(os.open, 'input/train.csv', os.O_RDONLY | os.O_TRUNC)
attempt(os.open, 'input/train.csv', os.O_WRONLY | os.O_TRUNC)
attempt(call, 85, 56, b'input/train.csv', 0o600) if X86 else None""",
    NOTHING,
)
attack(
    "write into the private data",
    "attempt(open, ANSWERS, 'a'); attempt(open, PRIVATE + '/x', 'w'); "
    "attempt(os.truncate, ANSWERS, 0)\n"
    "os.chmod(PRIVATE, 0o755); attempt(os.unlink, ANSWERS); "
    "attempt(os.rename, PRIVATE, PRIVATE + '2')",
    NOTHING,
)
attack(
    "poison the Python installation",
    """
import json, sysconfig
site = sysconfig.get_paths()['purelib']
for path in (site + '/evil.pth', site + '/sitecustomize.py', json.__file__,
             json.__cached__ or site + '/x.pyc', sys.prefix + '/pyvenv.cfg'):
    attempt(open, path, 'a')
attempt(os.unlink, json.__file__); attempt(os.rename, site, site + '2')""",
    NOTHING,
)
attack(
    "shared temporary directories",
    """
for path in ('/tmp', '/dev/shm', '/var/tmp', '/run', '/dev/mqueue', '/run/lock'):
    attempt(open, path + '/poison-x', 'w'); attempt(os.listdir, path)""",
    NOTHING,
    layer="landlock",
)
attack(
    "sibling work directories",
    """
attempt(os.listdir, '..'); attempt(open, '../canary', 'a'); attempt(open, '../new', 'w')
attempt(os.mkdir, '../dir')
attempt(os.rename, '../canary', 'c'); attempt(os.rename, '.', '../moved')
for pid in range(os.getpid() - 50, os.getpid() + 50):
    if pid != os.getppid() and os.path.exists(f'../{pid}'):
        attempt(os.listdir, f'../{pid}'); attempt(open, f'../{pid}/submission.csv', 'w')""",
    NOTHING,
)
attack(
    "monkeypatch for the next run",
    """
import builtins, json, pandas
builtins.open = json.dumps = pandas.read_csv = pandas.DataFrame.to_csv = lambda *a, **k: 1 / 0
os._exit = sys.exit = lambda *a: None""",
    NOTHING,
)
attack(
    "System V shared memory, semaphores, queues",
    "attempt(call, 29, 194, 4242, 4096, 0o1777)\nattempt(call, 64, 190, 4242, 1, 0o1777)\n"
    "attempt(call, 68, 186, 4242, 0o1777)",
    NOTHING,
    layer="seccomp",
)
attack(
    "POSIX message queues", "attempt(call, 240, 180, b'acegrpo-poison', 0o102, 0o600, 0)", NOTHING
)
attack(
    "keyrings",
    "attempt(call, 248, 217, b'user', b'acegrpo', b'x', 1, -3); attempt(call, 250, 219, 0, -3, 1)",
    NOTHING,
    layer="seccomp",
)
attack(
    "POSIX shared memory",
    "import multiprocessing.shared_memory as m\n"
    "attempt(m.SharedMemory, 'acegrpo-poison', True, 4096)",
    NOTHING,
)
attack(
    "poison start-up files",
    "for p in ('/root/.bashrc', '/etc/ld.so.preload', '/etc/profile'): attempt(open, p, 'a')",
    NOTHING,
)
attack(
    "poison the sandbox itself", "attempt(open, SANDBOX, 'a'); attempt(os.unlink, SANDBOX)", NOTHING
)

# ---- the submission file
attack("submission is a FIFO", "attempt(os.mkfifo, 'submission.csv')", NOTHING)
attack("submission is a device", "attempt(os.mknod, 'submission.csv', 0o020666, 0x105)", NOTHING)
attack(
    "submission is a directory",
    "os.makedirs('submission.csv/a/b')",
    NOTHING,
    reason="not a regular file",
)
attack(
    "submission is a unix socket",
    "import socket\nattempt(lambda: socket.socket(1).bind('submission.csv'))",
    NOTHING,
)
attack(
    "submission with a second link",
    "GOOD(); os.link('submission.csv', 'b')",
    NOTHING,
    reason="not a regular file",
)
attack(
    "submission swapped after the exit",
    """
import threading, time
GOOD()
def swap():
    time.sleep(0.2)
    open('submission.csv', 'w').write('id,y\\n')
threading.Thread(target=swap, daemon=True).start()""",
    "ok",
)
attack(
    "sparse terabyte",
    "f = open('submission.csv', 'w')\nattempt(f.truncate, 1 << 40); "
    "attempt(os.posix_fallocate, f.fileno(), 0, 1 << 40)",
    "no_submission invalid",
)
attack(
    "submission too large",
    "open('submission.csv', 'w').write('id,y\\n' + '1,0.00\\n' * 100000)",
    "invalid",
    reason="too large",
)
attack("submission empty", "open('submission.csv', 'w')", "invalid", reason="empty")
for name, body, reason in (
    ("quote storm", "b'id,y\\n' + b'\"' * 3001", "CSV"),
    ("unclosed quote", "b'id,y\\nr0,\"1\\n'", "CSV"),
    ("NUL bytes", "b'id,y\\nr0,\\0\\n'", "NUL"),
    ("not UTF-8", "b'id,y\\nr0,\\xff\\n'", "UTF-8"),
    ("UTF-16", "'id,y\\nr0,1\\n'.encode('utf-16')", ""),
    ("million columns", "b'x,' * 2000", "columns"),
    ("million fields", "b'id,y\\n' + b'x,' * 2000", "fields in row 1"),
    ("duplicate columns", "b'id,y,y\\n' + b'r0,1,1\\n'", "columns must be"),
    ("ragged rows", "b'id,y\\nr0,1\\nr1,1,2\\n'", "CSV"),
    ("bare carriage returns", "b'id,y\\rr0,1\\r'", "ids must be"),
    ("header only", "b'id,y\\n'", "no rows"),
    ("too many rows", "b'id,y\\n' + b'1,1\\n' * 100", "rows"),
):
    attack(
        f"submission: {name}",
        f"open('submission.csv', 'wb').write({body})",
        "invalid",
        reason=reason,
    )
for name, change, reason in (
    ("NaN", "rows[3][1] = 'nan'", "finite"),
    ("infinity", "rows[3][1] = 'inf'", "finite"),
    ("overflow", "rows[3][1] = '1e400'", "finite"),
    ("empty value", "rows[3][1] = ''", "finite"),
    ("underscore number", "rows[3][1] = '1_5'", "finite"),
    ("Arabic digits", "rows[3][1] = '\\u0661'", "finite"),
    ("hexadecimal", "rows[3][1] = '0x10'", "finite"),
    ("text for a number", "rows[3][1] = 'yes'", "finite"),
    ("duplicate id", "rows[3][0] = rows[2][0]", "ids"),
    ("missing id", "rows.pop()", "ids"),
    ("unknown id", "rows[3][0] = 'r999'", "ids"),
    ("wrong columns", "rows[0][1] = 'z'", "columns"),
    ("no header", "rows.pop(0)", ""),
):
    attack(f"submission: {name}", f"rows = ROWS()\n{change}\nSAVE(rows)", "invalid", reason=reason)

# ---- processes
attack("signals to the owner", "for s in (0, 15, 9, 19, 10): attempt(os.kill, OWNER, s)", NOTHING)
attack(
    "signals to everyone",
    "for p in (0, -1, -OWNER, os.getppid(), 1): attempt(os.kill, p, 0)\n"
    "attempt(os.killpg, OWNER_GROUP, 0)",
    NOTHING,
)
attack(
    "signals by other calls",
    """
attempt(call, 234, 131, OWNER, OWNER, 0); attempt(call, 200, 130, OWNER, 0)
attempt(call, 129, 138, OWNER, 0, ctypes.create_string_buffer(128))
attempt(call, 297, 240, OWNER, OWNER, 0, ctypes.create_string_buffer(128))
attempt(call, 424, 424, 3, 0, 0, 0)""",
    NOTHING,
)
attack(
    "SIGIO ownership",
    """
import fcntl
r, w = os.pipe()
attempt(fcntl.fcntl, r, fcntl.F_SETOWN, OWNER); attempt(fcntl.fcntl, r, 10, 9)
attempt(fcntl.ioctl, r, 0x8901, OWNER.to_bytes(4, 'little'))
attempt(fcntl.fcntl, r, 15, b'\\2\\0\\0\\0' + OWNER.to_bytes(4, 'little'))""",
    NOTHING,
    layer="seccomp",
)
attack(
    "owner's limits",
    "import resource\nattempt(resource.prlimit, OWNER, resource.RLIMIT_NOFILE, (64, "
    "64)) if OFF != 'seccomp' else "
    "attempt(resource.prlimit, OWNER, resource.RLIMIT_NOFILE)",
    NOTHING,
)
attack("owner's affinity", "attempt(os.sched_setaffinity, OWNER, {0})", NOTHING)
attack(
    "owner's priority",
    "attempt(os.setpriority, os.PRIO_PROCESS, OWNER, 5); "
    "attempt(os.setpriority, os.PRIO_USER, 0, 5)\n"
    "attempt(call, 251, 30, 1, OWNER, 0x6000); "
    "attempt(call, 144, 119, OWNER, 5, ctypes.create_string_buffer(4))",
    NOTHING,
)
attack("fork", "attempt(os.fork)", NOTHING, layer="seccomp")
attack(
    "other ways to a process",
    """
attempt(call, 58, 435, 0, 0) ; attempt(call, 57, 435, 0, 0)
attempt(call, 56, 220, 17, 0, 0, 0, 0); attempt(call, 56, 220, 0x4000 | 0x100 | 17, 0, 0, 0, 0)
attempt(call, 435, 435, ctypes.create_string_buffer(88), 88)
attempt(os.posix_spawn, '/bin/true', ['true'], {})""",
    NOTHING,
)
attack(
    "processes by the library",
    """
import subprocess, multiprocessing
attempt(subprocess.run, ['/bin/true'])
attempt(os.system, 'true') if os.system('true') == 0 else None
attempt(multiprocessing.get_context('fork').Process(target=print).start)
attempt(os.popen, 'id')""",
    NOTHING,
)
attack(
    "fork bomb",
    """
import time
end = time.time() + 1
while time.time() < end:
    try:
        os.fork()
        print("BREACH")
        break
    except OSError:
        pass""",
    NOTHING,
)
attack(
    "thread bomb",
    """
import threading, time
threading.stack_size(1 << 16)
try:
    for i in range(100000):
        threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
except RuntimeError:
    time.sleep(5)""",
    "error",
    reason="threads",
)
attack(
    "thread bomb with large stacks",
    """
import threading, time
started = []
try:
    for i in range(100000):
        started.append(threading.Thread(target=time.sleep, args=(99,), daemon=True).start())
except RuntimeError:
    assert len(started) < 1000""",
    "error no_submission",
)
attack(
    "double-forked daemon",
    """
import subprocess
try:
    subprocess.Popen(['/bin/sh', '-c', 'sleep 60 &'], start_new_session=True)
    print("BREACH")
except OSError:
    pass""",
    NOTHING,
)
attack(
    "threads that wait for another cannot be stopped",
    "attempt(call, 56, 220, 0x3D4F00, 0, 0, 0, 0)",
    NOTHING,
)
attack(
    "signals and timers that undo a stop",
    """
import signal
attempt(os.kill, os.getpid(), signal.SIGCONT); attempt(signal.raise_signal, signal.SIGCONT)
event = ctypes.create_string_buffer(64)
attempt(call, 222, 107, 0, event, ctypes.create_string_buffer(8))""",
    NOTHING,
    layer="seccomp",
)
attack(
    "ignore signals and spin",
    """
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "timeout",
    timeout=1.0,
    reason="wall-clock",
)
attack(
    "spin in many threads past the CPU limit",
    """
import signal, hashlib, threading
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
data = bytes(1 << 24)
def spin():
    while True: hashlib.sha256(data)
for _ in range(4): threading.Thread(target=spin).start()""",
    "timeout",
    reason="CPU",
)
attack(
    "stop oneself", "import signal; os.kill(os.getpid(), signal.SIGSTOP)", "timeout", timeout=1.0
)
attack("signal without a name", "os.kill(os.getpid(), 40)", "error", reason="killed by signal 40")
attack("sleep forever", "import time\nwhile True: time.sleep(1000)", "timeout", timeout=1.0)
attack(
    "hang at exit",
    "import atexit, time\natexit.register(time.sleep, 1000)\nGOOD()",
    "timeout",
    timeout=1.0,
)
attack(
    "hang in a thread",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nGOOD()",
    "timeout",
    timeout=1.0,
)
attack(
    "hang in C with the interpreter locked",
    "import re\nre.match('(a+)+b', 'a' * 64)",
    "timeout",
    timeout=1.0,
)
attack(
    "setuid binaries",
    "import glob\nfor p in ('/bin/su', '/usr/bin/sudo', '/bin/mount', '/usr/bin/passwd'): "
    "attempt(os.execv, p, [p])",
    NOTHING,
)
attack(
    "leave the session",
    "attempt(os.setsid); attempt(os.setpgid, 0, 0); attempt(os.setpgrp)",
    NOTHING,
)
attack(
    "refuse to die with the nanny",
    """
for option, value in ((1, 0), (36, 1), (4, 0), (4, 1), (38, 0), (8, 1), (28, 0), (22, 0), (23, 0),
                      (24, 0), (0x59616d61, -1)):
    attempt(call, 157, 167, option, value, 0, 0, 0)""",
    NOTHING,
    layer="seccomp",
)
attack(
    "become root",
    """
attempt(os.setuid, 0); attempt(os.setgid, 0); attempt(os.setresuid, 0, 0, 0)
attempt(os.setgroups, [0]); attempt(os.setreuid, 0, 0)
header = ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20' + bytes(4))
attempt(call, 126, 91, header, ctypes.create_string_buffer(b'\\xff' * 24))""",
    NOTHING,
)
attack(
    "capabilities left",
    "lines = open('/proc/self/status').read().splitlines()\n"
    "facts = dict(line.split(':\\t') for line in lines if ':\\t' in line)\n"
    "if int(facts['CapEff'], 16) or int(facts['CapPrm'], 16) or facts['NoNewPrivs'] != '1': "
    "print('BREACH', facts)",
    NOTHING,
)
attack(
    "own score of the out-of-memory killer",
    "attempt(open, '/proc/self/oom_score_adj', 'w')",
    NOTHING,
)

# ---- resources
attack("memory, anonymous", "x = [bytearray(64 << 20) for _ in range(200)]", "memory")
attack("memory, one block", "x = bytearray(1 << 40)", "memory")
attack("memory, numpy", "import numpy\nx = numpy.ones(1 << 38)", "memory")
attack(
    "memory, caught",
    """
import time
keep = []
try:
    while True:
        keep.append(bytearray(16 << 20))
except MemoryError:
    time.sleep(60)""",
    "memory",
)
attack(
    "memory after the first thread's end",
    """
import threading, time
def fill():
    keep = [bytearray(b'x') * (16 << 20) for _ in range(40)]
    time.sleep(5)
threading.Thread(target=fill).start()
call(60, 93, 0)""",
    "memory",
)
attack(
    "memory, maps",
    "import mmap, time\nkeep, flags = [], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS\nwhile True:\n"
    "    m = mmap.mmap(-1, 32 << 20, flags=flags); m.write(b'x' * (32 << 20)); keep.append(m)",
    "memory error",
)
attack(
    "memory, shared and anonymous",
    "import mmap\nattempt(mmap.mmap, -1, 4096)",
    NOTHING,
    layer="seccomp",
)
attack(
    "memory, memfd",
    "fd = attempt(os.memfd_create, 'x')\nif fd:\n"
    "    for _ in range(8): os.write(fd, bytes(1 << 20))",
    NOTHING,
    layer="seccomp",
)
attack(
    "disk, many files",
    """
for i in range(1000):
    with open(f'f{i}', 'wb') as f: f.write(bytes(16 << 20))
import time; time.sleep(5)""",
    "error",
    reason="disk",
)
attack(
    "disk, unlinked files",
    """
keep = []
for i in range(200):
    f = open('x', 'wb'); f.write(bytes(8 << 20)); f.flush(); os.unlink('x'); keep.append(f)
import time; time.sleep(5)""",
    "error",
    reason="disk",
)
attack(
    "disk, unlinked files that are only mapped",
    """
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
for i in range(200):
    fd = os.open('x', os.O_RDWR | os.O_CREAT); os.write(fd, bytes(8 << 20))
    libc.mmap(None, 4096, 1, 1, fd, 0); os.close(fd); os.unlink('x')
import time; time.sleep(5)""",
    "error",
    reason="disk",
)
attack(
    "disk, directory that cannot be listed",
    """
os.mkdir('d', 0o300)
for i in range(200):
    with open(f'd/f{i}', 'wb') as f: f.write(bytes(8 << 20))
import time; time.sleep(5)""",
    "error",
    reason="stopped at the limit of",
)
attack(
    "disk, below names too long for a path",
    """
for i in range(17): os.mkdir('d' * 250); os.chdir('d' * 250)
for i in range(200):
    with open(f'f{i}', 'wb') as f: f.write(bytes(8 << 20))
import time; time.sleep(5)""",
    "error",
    reason="disk",
)
attack(
    "disk, directory that is renamed again and again",
    """
import threading, time
os.mkdir('0')
here = os.open('0', os.O_RDONLY)
def rename():
    for i in range(1 << 40): os.rename(str(i % 50), str((i + 1) % 50))
threading.Thread(target=rename, daemon=True).start()
for i in range(200):
    with open(os.open(f'f{i}', os.O_CREAT | os.O_WRONLY, dir_fd=here), 'wb') as f:
        f.write(bytes(8 << 20))
time.sleep(5)""",
    "error",
    reason="disk",
)
attack(
    "disk, unlinked files after the first thread's end",
    """
import threading, time
def fill():
    keep = []
    for i in range(200):
        f = open('x', 'wb'); f.write(bytes(8 << 20)); f.flush(); os.unlink('x'); keep.append(f)
    time.sleep(5)
threading.Thread(target=fill).start()
call(60, 93, 0)""",
    "error",
    reason="disk",
)
attack(
    "disk, threads that are always in the kernel",
    """
import threading, time
data, files, end = bytes(60 << 20), [open(n, 'wb') for n in 'ab'], time.time() + 20
def fill(file):
    while time.time() < end: os.pwrite(file.fileno(), data, 0)
for i in range(40): threading.Thread(target=fill, args=(files[i % 2],)).start()""",
    "error",
    reason="disk",
)
attack(
    "disk, space without writing",
    "f = open('x', 'wb'); attempt(call, 285, 47, f.fileno(), 1, 0, 1 << 20)",
    NOTHING,
    layer="seccomp",
)
attack(
    "disk, O_TMPFILE", "attempt(os.open, '.', os.O_TMPFILE | os.O_RDWR)", NOTHING, layer="seccomp"
)
attack(
    "disk, one large file",
    "f = open('x', 'wb')\nf.write(bytes(1 << 28)); f.flush()",
    "error",
    reason="File too large",
)
attack(
    "inodes",
    "import os, time\nfor i in range(10_500): os.mkdir(f'd{i}')\ntime.sleep(5)",
    "error",
    reason="files",
)
attack(
    "deep directories",
    "for i in range(5000):\n    os.mkdir('d'); os.chdir('d')\nimport time; time.sleep(5)",
    "error",
    reason="files",
)
attack(
    "directories without permissions",
    "os.makedirs('a/b'); os.mkdir('a/b/c', 0); os.umask(0o777); os.mkdir('z'); open('y', 'w')",
    "no_submission error",  # error where the nanny looks before the script ends, and is not root
)
attack(
    "odd file names", r"for n in ('\udcff', 'a\nb', '-rf', '*', 'x' * 255): open(n, 'w')", NOTHING
)
attack(
    "output flood",
    "while True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)",
    "timeout",
    timeout=1.0,
)
attack("output closed", "os.close(1); os.close(2); GOOD()", "ok")
attack(
    "descriptors",
    "keep = []\ntry:\n    while True: keep.append(os.dup(0))\nexcept OSError: print(len(keep))\n"
    "assert len(keep) < 256",
    NOTHING,
)
attack(
    "raise the limits",
    """
import resource
for name in ('CPU', 'AS', 'FSIZE', 'NOFILE', 'CORE', 'MEMLOCK'):
    kind = getattr(resource, 'RLIMIT_' + name)
    hard = resource.getrlimit(kind)[1]
    try:
        resource.setrlimit(kind, (hard + 1, hard + 1))
        print('BREACH', name)
    except (OSError, ValueError):
        pass""",
    NOTHING,
)
attack("core dump", "os.abort()", "error", reason="SIGABRT")
attack("crash in C", "ctypes.string_at(0)", "error", reason="SIGSEGV")
attack(
    "endless recursion",
    "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(): return f()\nf()",
    "error memory timeout",
    timeout=5.0,
)

# ---- network and odd kernel interfaces
attack(
    "TCP",
    "import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', PORT), 1))",
    NOTHING,
)
attack(
    "UDP",
    "import socket\nattempt(lambda: socket.socket(2, 2).sendto(b'x', ('127.0.0.1', PORT)))",
    NOTHING,
    layer="seccomp",
)
attack("DNS", "import socket\nattempt(socket.getaddrinfo, 'example.com', 80)", NOTHING)
attack(
    "HTTP",
    "import urllib.request\nattempt(urllib.request.urlopen, f'http://127.0.0.1:{PORT}/', "
    "timeout=1)",
    NOTHING,
)
for number, name in (
    (16, "netlink"),
    (40, "vsock"),
    (38, "kernel crypto"),
    (17, "packet"),
    (10, "IPv6"),
    (1, "unix"),
):
    attack(
        f"socket: {name}",
        f"import socket\nattempt(socket.socket, {number}, 3 if {number} in (16, "
        f"17) else 5 if {number} == 38 else 1)",
        NOTHING,
    )
attack(
    "abstract unix socket",
    "import socket\nattempt(lambda: socket.socket(1, 2).sendto(b'x', ABSTRACT))",
    NOTHING,
)
attack(
    "unix socket by path",
    "import socket\nattempt(lambda: socket.socket(1, 2).sendto(b'x', UNIX))",
    NOTHING,
    layer="seccomp",
)
attack(
    "socketpair and sendto",
    """
import socket
attempt(lambda: socket.socketpair(1, 2)[0].sendto(b'x', UNIX))
attempt(lambda: socket.socketpair(1, 1)[0].sendto(b'x', UNIX))
attempt(lambda: socket.socketpair(1, 5)[0].sendto(b'x', UNIX))""",
    NOTHING,
    layer="seccomp",
)
attack(
    "io_uring",
    "attempt(call, 425, 425, 4, ctypes.create_string_buffer(120)); "
    "attempt(call, 426, 426, 3, 0, 0, 0, 0, 0)",
    NOTHING,
)
attack(
    "x32 calls",
    "libc.syscall(ctypes.c_long(0x40000000 | 39))\nprint('BREACH')",
    "error",
    reason="SIGSYS",
    layer="seccomp",
    machine="x86_64",
)
attack(
    "32-bit calls",
    """
import mmap
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
page.write(bytes.fromhex('b814000000cd80c3'))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print('BREACH')""",
    "error",
    reason="SIGSYS",
    layer="seccomp",
    machine="x86_64",
)
for name, x86, arm, arguments in (
    ("bpf", 321, 280, "0, ctypes.create_string_buffer(64), 48"),
    (
        "perf",
        298,
        241,
        "ctypes.create_string_buffer(b'\\1\\0\\0\\0\\x70' + bytes(123)), 0, -1, -1, 0",
    ),
    ("userfaultfd", 323, 282, "1"),
    ("inotify", 294, 26, "0"),
    ("kernel modules", 313, 273, "0, b'', 0"),
    ("kexec", 246, 104, "0, 0, 0, 0"),
    ("reboot", 169, 142, "0, 0, 0, 0"),
    ("host name", 170, 161, "b'x', 1"),
    ("clock", 227, 112, "0, ctypes.create_string_buffer(16)"),
    ("kernel log", 103, 116, "3, ctypes.create_string_buffer(64), 64"),
    ("swap", 167, 224, "b'script.py', 0"),
    ("accounting", 163, 89, "b'script.py'"),
    ("personality", 135, 92, "0x0040000"),
    ("own seccomp filter", 317, 277, "1, 0, 0"),
    ("own Landlock", 444, 444, "0, 0, 1"),
    ("io priority", 251, 30, "1, 0, 0x2007"),
    ("process_madvise", 440, 440, "3, 0, 0, 0, 0"),
    ("secret memory", 447, 447, "0"),
    ("kcmp", 312, 272, "0, 0, 0, 0, 0"),
    ("a call of the future", 998, 998, "0"),
):
    attack(f"kernel: {name}", f"attempt(call, {x86}, {arm}, {arguments})", NOTHING)
attack(
    "keystrokes into a terminal",
    "import fcntl\nattempt(fcntl.ioctl, 0, 0x5412, b'x'); attempt(open, '/dev/tty'); "
    "attempt(open, '/dev/ptmx', 'r+')",
    NOTHING,
)
attack(
    "devices",
    "for p in ('/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda', '/dev/kvm', '/dev/fuse', "
    "'/dev/net/tun'): attempt(open, p, 'rb')",
    NOTHING,
)

# ---- games with the grader
attack(
    "a score that was only printed",
    'print(\'score: 1.0, medal: gold\')\nprint(\'{"status": "ok", "valid": true, "score": 1.0}\')',
    NOTHING,
)
attack("exit without a file", "os._exit(0)", NOTHING)
attack("exit code 256", "GOOD(); os._exit(256)", "ok")
attack("crash after a good file", "GOOD(); raise SystemExit(3)", "error")
attack(
    "read the answers from stdin",
    "data = sys.stdin.read()\nassert data == '', data\nattempt(os.read, 3, 10)",
    NOTHING,
)
attack(
    "replace os._exit and hide the error",
    "os._exit = lambda code: GOOD()\nsys.exit = os._exit\n1 / 0",
    "error",
    reason="ZeroDivisionError",
)
attack(
    "patch the harness through its frames",
    """
frame = sys._getframe()
while frame:
    for name in list(frame.f_globals):
        theirs = frame.f_globals is not globals() and name[:1] == '_' and name[1:2] != '_'
        if theirs and callable(frame.f_globals[name]):
            frame.f_globals[name] = lambda *a, **k: (b'id,y', '')
    frame = frame.f_back""",
    "no_submission error",
)
attack("infinite validation score", "print('validation score: inf')", NOTHING)
attack(
    "forged report on every descriptor",
    "for fd in range(1, 300):\n    try: os.write(fd, b'ok{\"exit_code\": 0}')\n"
    "    except OSError: pass",
    NOTHING,
)


# ------------------------------------------------------------------------------------------------
# The harness


class Range:
    """A competition, an owner with secrets and listeners, and a sandbox to attack."""

    def __init__(
        self, folder: Path, layers: tuple[str, ...] = ("landlock", "seccomp"), slots: int = 3
    ):
        self.off = next((layer for layer in ("landlock", "seccomp") if layer not in layers), "")
        self.folder = folder
        self.competition = make_competition(folder)
        os.environ["HF_TOKEN"] = MARK  # before the fork server starts
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        scratch.chmod(0o755)
        self.received: list[str] = []
        self.listeners = self.listen()
        self.sandbox = Sandbox(
            slots,
            cpu_seconds=6.0,
            memory_mb=512,
            disk_mb=100,
            layers=layers,
            unsafe=bool(self.off),
            scratch=str(scratch),
            preload=("numpy", "pandas"),
        )
        self.before = self.state()

    def listen(self) -> list[socket.socket]:
        """Whoever reaches one of these has left the sandbox."""
        tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp.bind(("127.0.0.1", 0))
        self.port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", self.port))
        tcp.listen()
        path, abstract = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        self.unix, self.abstract = (
            str(self.folder / "listener"),
            f"\0acegrpo-{os.getpid()}-{id(self)}",
        )
        path.bind(self.unix)
        os.chmod(self.unix, 0o777)
        abstract.bind(self.abstract)
        return [tcp, udp, path, abstract]

    def prelude(self) -> str:
        facts = {
            "ANSWERS": str(self.competition.answers),
            "PRIVATE": str(self.competition.answers.parent),
            "PUBLIC": str(self.competition.public_dir), "OWNER": os.getpid(), "PORT": self.port,
            "OWNER_GROUP": os.getpgrp(), "UNIX": self.unix, "ABSTRACT": self.abstract,
            "OFF": self.off, "SANDBOX": sys.modules[Sandbox.__module__].__file__,
        }  # fmt: skip
        return (
            PRELUDE
            + "\n".join(f"{name} = {value!r}" for name, value in facts.items())
            + (
                "\n"
                "ANSWERS_PART = b'prepared/priv' + b'ate'  # the attack itself was told the path\n"
                "def ROWS(): "
                "return [line.split(',') for line in "
                "open('input/sample_submission.csv').read().split()]\n"
                "def SAVE(rows): open('submission.csv', 'w').write('\\n'.join(map(','.join, "
                "rows)) + '\\n')\n"
                "def GOOD(): SAVE(ROWS())\n"
            )
        )

    def state(self) -> dict:
        """What no script may change."""
        files = {}
        for path in sorted((self.folder / "toy").rglob("*")):
            facts = path.lstat()
            data = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            files[str(path)] = [
                facts.st_mode,
                facts.st_uid,
                facts.st_mtime_ns,
                facts.st_size,
                data,
                str(os.listxattr(path)),
            ]
        return {
            "files": files, "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "affinity": sorted(os.sched_getaffinity(0)),
            "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE),
            "poison": [str(path) for folder in ("/tmp", "/dev/shm", "/var/tmp")
                       for path in Path(folder).glob("*poison*")],
        }  # fmt: skip

    def strike(self, attack: Attack) -> list[str]:
        """Run one attack; returns what went wrong, [] when it ended safely."""
        run = self.sandbox.run(
            self.competition, self.prelude() + attack.code, timeout=attack.timeout
        )
        output = run.stdout_tail + run.stderr_tail
        wrong = [line[:300] for line in output.splitlines() if line.startswith("BREACH")]
        allowed = attack.status or ("error", "timeout", "memory", "no_submission", "invalid")
        if run.status not in allowed:
            wrong.append(f"status {run.status} ({run.reason}), expected {allowed}: {output[-500:]}")
        if attack.reason not in run.reason:
            wrong.append(f"reason {run.reason!r} lacks {attack.reason!r}")
        if MARK in output or MARK.encode() in (run.submission or b"") or MARK in run.reason:
            wrong.append("the secret came out")
        if run.validation_score is not None:
            wrong.append(f"validation score {run.validation_score}")
        if not self.off and run.isolation != "landlock+seccomp":
            wrong.append(f"isolation {run.isolation}")
        now = self.state()
        if now != self.before:
            wrong.append(
                "changed: " + "; ".join(f"{key}" for key in now if now[key] != self.before[key])
            )
        return wrong

    def aftermath(self) -> list[str]:
        """After all attacks: a good script still works, nothing is left, nobody called."""
        wrong = []
        run = self.sandbox.run(
            self.competition, self.prelude() + "GOOD(); import json; print(json.dumps([1]))"
        )
        if run.status != "ok" or run.stdout_tail != "[1]\n" or run.score != 0.5:
            wrong.append(f"a good script fails afterwards: {run}")
        for listener in self.listeners:
            listener.setblocking(False)
            try:
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()
                else:
                    listener.recv(10)
                wrong.append(f"a script reached {listener}")
            except BlockingIOError:
                pass
            listener.close()
        root = Path(self.sandbox.hello["root"])
        self.sandbox.close()
        if root.exists():
            wrong.append(f"left behind: {root}")
        return wrong


def make_competition(folder: Path, rows: int = 20) -> Competition:
    """A competition whose answers hold the secret; file modes let anybody read it."""
    home = folder / "toy"
    public, private = home / "prepared" / "public", home / "prepared" / "private"
    public.mkdir(parents=True)
    private.mkdir()
    (home / "config.yaml").write_text(
        "id: toy\nname: Toy\ndescription: toy/description.md\n"
        "grader: {name: accuracy, grade_fn: 'file:grade.py:grade'}\n"
        "dataset: {answers: toy/prepared/private/test.csv, sample_submission: "
        "toy/prepared/public/sample_submission.csv}\n"
    )
    (home / "description.md").write_text("Predict y.")
    (home / "grade.py").write_text(
        "import numpy as np\nimport pandas as pd\n"
        "def grade(submission, answers):\n"
        "    if list(submission.columns) != ['id', 'y']:\n"
        "        raise ValueError('the columns must be id,y')\n"
        "    if sorted(submission.id.astype(str)) != sorted(answers.id):\n"
        "        raise ValueError('the ids must be those of the sample submission')\n"
        "    submission['y'] = pd.to_numeric(submission.y, errors='coerce')\n"
        "    if not np.isfinite(submission.y).all():\n"
        "        raise ValueError('y must hold finite numbers')\n"
        "    both = submission.merge(answers, on='id')\n"
        "    return float((both.y_x == both.y_y).mean())\n"
    )
    (home / "leaderboard.csv").write_text(
        "score\n" + "\n".join(str(1 - i / 1000) for i in range(1000))
    )
    ids = [f"r{i}" for i in range(rows)]
    (public / "train.csv").write_text(
        "id,x,y\n" + "".join(f"t{i},{i},{i % 2}\n" for i in range(50))
    )
    (public / "sample_submission.csv").write_text("id,y\n" + "".join(f"{i},0\n" for i in ids))
    (private / "test.csv").write_text(
        "id,y,secret\n" + "".join(f"{name},{i % 2},{MARK}\n" for i, name in enumerate(ids))
    )
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return Competition.load(home)


def strike_all(
    layers: tuple[str, ...] = ("landlock", "seccomp"), attacks: list[Attack] | None = None
) -> dict:
    """Every attack, three at a time: {"mode": facts, "results": {name: what went wrong}}."""
    received = []
    previous = {
        s: signal.signal(s, lambda number, _: received.append(number))
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGIO)
    }
    folder = Path(tempfile.mkdtemp(prefix="attacks-"))
    try:
        field = Range(folder, layers)
        if field.sandbox.problem:
            return {"mode": {"problem": field.sandbox.problem}, "results": {}}
        attacks = [a for a in (attacks or ATTACKS) if a.machine in ("", platform.machine())]
        attacks.sort(
            key=lambda a: a.timeout == 120.0 and "CPU" not in a.reason
        )  # the slow ones first
        with ThreadPoolExecutor(3) as pool:
            results = dict(zip([a.name for a in attacks], pool.map(field.strike, attacks)))
        mode = {
            name: field.sandbox.hello.get(name) for name in ("layers", "uid_base", "landlock_abi")
        }
        results["(afterwards)"] = field.aftermath() + [
            f"signal {number} reached the owner" for number in received
        ]
        return {
            "mode": mode | {"uid": os.geteuid(), "capabilities": capabilities()},
            "results": results,
        }
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        shutil.rmtree(folder, ignore_errors=True)


def capabilities() -> str:
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff"))


# ------------------------------------------------------------------------------------------------
# The tests: as whoever runs them, then (as root) as others

DOCKER = (
    "chown,dac_override,fowner,fsetid,kill,setgid,setuid,setpcap,net_bind_service,net_raw,"
    "sys_chroot,mknod,audit_write,setfcap"
)
WHO = {  # command before python, and what the fork server must then have found
    "root with uids to drop to": ["env"],
    "a normal user": ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"],
    "root in Docker": ["setpriv", "--bounding-set", "-all,+" + DOCKER.replace(",", ",+")],
    "root without capabilities": ["setpriv", "--bounding-set", "-all"],
}


def as_someone(command: list[str]) -> list[str]:
    """Wrap `command`: a mount namespace where closed directories on the way to Python are open.

    (Nobody else can read a Python below /root; the namespace ends with the command.)
    """
    needed = {
        os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, Path(__file__).parent.parent)
    }
    closed: dict[str, list[str]] = {}
    for path in needed:
        for parent in reversed(Path(path).parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(str(parent), []).append(path)
                break
    script = ["set -e", "T=$(mktemp -d)", "mount -t tmpfs -o mode=755 none $T"]
    for parent, paths in closed.items():
        for i, path in enumerate(paths):
            script += [f"mkdir $T/{i}", f"mount --bind '{path}' $T/{i}"]
        script += [f"mount -t tmpfs -o mode=755 none '{parent}'"]
        for i, path in enumerate(paths):
            script += [f"mkdir -p '{path}'", f"mount --bind $T/{i} '{path}'"]
    script += ["umount -l $T", "rmdir $T", 'exec "$@"']
    return [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        "\n".join(script),
        "sh",
        *command,
    ]


def strike_as(who: str, *arguments: str) -> dict:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    command = as_someone([*WHO[who], sys.executable, "-B", __file__, *arguments])
    if subprocess.run(as_someone(["true"]), capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted here")
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def broken(report: dict) -> dict:
    if report["mode"].get("problem"):
        pytest.skip(report["mode"]["problem"])
    return {name: wrong for name, wrong in report["results"].items() if wrong}


@pytest.fixture(scope="module")
def report():
    result = strike_all()
    if result["mode"].get("problem"):
        pytest.skip(result["mode"]["problem"])
    return result["results"]


@pytest.mark.parametrize(
    "name", [a.name for a in ATTACKS if a.machine in ("", platform.machine())] + ["(afterwards)"]
)
def test_attack_ends_safely(report, name):
    assert report[name] == []


EXPECTED = {  # are uids dropped, and the capabilities that the owner has
    "root with uids to drop to": (True, None),
    "a normal user": (False, "0000000000000000"),
    "root in Docker": (True, "00000000a80425fb"),
    "root without capabilities": (False, "0000000000000000"),
}


def check(who: str, *arguments: str) -> None:
    report = strike_as(who, *arguments)
    drops, owned = EXPECTED[who]
    assert broken(report) == {}
    assert (report["mode"]["uid_base"] > 0) == drops
    assert owned in (None, report["mode"]["capabilities"])
    assert (report["mode"]["uid"] == 0) == (who != "a normal user")


@pytest.mark.parametrize("who", ["a normal user", "root in Docker"])
def test_attacks_as(who):
    check(who, "--quick")


@pytest.mark.long
@pytest.mark.parametrize("who", WHO)
def test_every_attack_as(who):
    check(who)


@pytest.mark.parametrize("off", ["landlock", "seccomp"])
def test_attacks_succeed_without_their_layer(off):
    """Proof that the attacks are real and that each layer is needed."""
    chosen = [a for a in ATTACKS if a.layer == off and a.machine in ("", platform.machine())]
    assert len(chosen) >= 15
    results = strike_all(tuple({"landlock", "seccomp"} - {off}), chosen)["results"]
    for folder in ("/tmp", "/dev/shm", "/var/tmp", "/run", "/dev/mqueue", "/run/lock"):
        Path(folder, "poison-x").unlink(missing_ok=True)  # what an attack has left
    stopped = [
        a.name
        for a in chosen
        if not any("BREACH" in line or "expected" in line for line in results[a.name])
    ]
    assert stopped == []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run the attacks and print what each achieved.")
    parser.add_argument("names", nargs="*", help="attacks to run (default all)")
    parser.add_argument(
        "--layers", default="landlock,seccomp", help="layers in force, comma-separated"
    )
    parser.add_argument("--quick", action="store_true", help="without those that wait for a limit")
    options = parser.parse_args()
    chosen = [a for a in ATTACKS if a.name in options.names] if options.names else ATTACKS
    if options.quick:
        chosen = [a for a in chosen if a.timeout == 120.0 and "CPU" not in a.reason]
    print(json.dumps(strike_all(tuple(options.layers.split(",")), chosen), indent=1))
