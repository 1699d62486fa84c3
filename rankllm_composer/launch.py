"""Composer's launcher with enough time to write a checkpoint; same arguments as `composer`.

    python -m rankllm_composer.launch -n 8 rankllm_composer/train.py yamls/first_mistral.yaml

On SIGTERM, `composer` forwards it to its ranks and kills them 30 s later, possibly in the middle of a checkpoint. This
launcher waits until they exit by themselves, and treats SIGHUP (a closed terminal) alike. After a failure it waits no
longer than `composer` does.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys

from rankllm_composer.processes import LAUNCHER_VARIABLE, drop_closed_outputs
from rankllm_composer.storage.scratch import temporary_files_in_scratch

STOP_TIMEOUT = datetime.timedelta(hours=1)


def main() -> int:
    """Start the ranks of this machine and wait for them. Returns the exit code."""
    from composer.cli import launcher

    def wait_for_checkpoints(number: int, frame: object) -> None:
        for stop in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(stop, signal.SIG_IGN)  # a second signal would make it give up
        drop_closed_outputs()
        launcher.CLEANUP_TIMEOUT = STOP_TIMEOUT
        raise KeyboardInterrupt  # the launcher handles this as a request to stop

    # Composer sets handlers when imported that make the launcher print a traceback of where it waited.
    signal.signal(signal.SIGTERM, wait_for_checkpoints)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGHUP, wait_for_checkpoints)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        with temporary_files_in_scratch():  # the output of the ranks, among others
            return launcher.main()
    finally:
        del os.environ[LAUNCHER_VARIABLE]


if __name__ == "__main__":
    sys.exit(main())
