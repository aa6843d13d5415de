"""A filter of system calls for model-written code: one process, no way out.

`RLIMIT_NPROC` does not bind root, and namespaces leave the whole kernel within
reach. This filter (seccomp, which an unprivileged process may put on itself) makes
every system call that starts a process or thread, opens a socket, touches another
process or administers the machine fail with EPERM, so Python raises
`PermissionError`. Everything else is left to namespaces and rlimits.
"""

import errno
import struct

from rllib_arpo.tools.python_worker.messages import OWN_PID

# Audit number of the machine's own system calls; others (32 bit) kill the process.
_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_FIRST_X32_CALL = 0x40000000

# name: number on x86_64, on aarch64 (None: not there).
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # processes and threads
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "execve": (59, 221),
    "execveat": (322, 281),
    # network
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "setrlimit": (160, 164),
    # memory that neither rlimits nor the end of the process take back
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "mount_setattr": (442, 442),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # the machine
    "acct": (163, 89),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "modify_ldt": (154, None),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
# Allowed when the first argument is the process itself.
_ON_ITSELF = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
_CLONE3 = 435  # the same on every machine
_PRLIMIT64 = (302, 261)

# Instructions of the classic Berkeley packet filter, and offsets in seccomp_data.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_REFUSE = _ERRNO | errno.EPERM


def refusal_program(machine: str) -> bytes:
    """The filter as `prctl(PR_SET_SECCOMP)` takes it, in 8-byte instructions.

    `OWN_PID` stands in it for the process's own id.

    Args:
        machine: as `platform.machine()` names it.

    Returns:
        Empty for a machine whose system calls are not in the tables.
    """
    if machine not in _ARCHES:
        return b""
    column = list(_ARCHES).index(machine)
    program = [
        _op(_LOAD, _ARCH),
        _op(_IF_EQUAL, _ARCHES[machine], if_not=0, if_so=1),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
        *_refuse(_FIRST_X32_CALL, _IF_AT_LEAST),
        # glibc then falls back on clone, which it could not do after EPERM.
        *_answer(_CLONE3, _ERRNO | errno.ENOSYS),
    ]
    for numbers in _REFUSED.values():
        number = numbers[column]
        if number is not None:
            program += _refuse(number)
    for numbers in _ON_ITSELF.values():
        program += _only_on_itself(numbers[column])
    program += _only_reading_limits(_PRLIMIT64[column])
    program.append(_op(_RETURN, _ALLOW))
    return b"".join(program)


def _op(code: int, operand: int, *, if_so: int = 0, if_not: int = 0) -> bytes:
    """One instruction; the jumps say how many instructions to skip."""
    return struct.pack("=HBBI", code, if_so, if_not, operand)


def _answer(number: int, answer: int, test: int = _IF_EQUAL) -> list[bytes]:
    return [_op(test, number, if_not=1), _op(_RETURN, answer)]


def _refuse(number: int, test: int = _IF_EQUAL) -> list[bytes]:
    return _answer(number, _REFUSE, test)


def _only_on_itself(number: int) -> list[bytes]:
    return [
        _op(_IF_EQUAL, number, if_not=4),
        _op(_LOAD, _ARGUMENT),
        _op(_IF_EQUAL, OWN_PID, if_so=1),
        _op(_RETURN, _REFUSE),
        _op(_RETURN, _ALLOW),
    ]


def _only_reading_limits(number: int) -> list[bytes]:
    """`prlimit64` whose third argument, the pointer to new limits, is null."""
    return [
        _op(_IF_EQUAL, number, if_not=6),
        _op(_LOAD, _ARGUMENT + 16),
        _op(_IF_EQUAL, 0, if_not=2),
        _op(_LOAD, _ARGUMENT + 20),
        _op(_IF_EQUAL, 0, if_so=1),
        _op(_RETURN, _REFUSE),
        _op(_RETURN, _ALLOW),
    ]
