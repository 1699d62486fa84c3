"""Composer's launcher with enough time to write a checkpoint; same arguments as `composer`.

    python -m rankllm_composer.launch -n 8 rankllm_composer/train.py yamls/first_mistral.yaml

On SIGTERM, `composer` forwards it to its ranks and kills them 30 s later, possibly in the middle of a checkpoint. This
launcher waits until they exit by themselves. After a failure it waits no longer than `composer` does.
"""

from __future__ import annotations

import datetime
import signal
import sys

STOP_TIMEOUT = datetime.timedelta(hours=1)


def main() -> int:
    """Start the ranks of this machine and wait for them. Returns the exit code."""
    from composer.cli import launcher

    def wait_for_checkpoints(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal would make it give up
        launcher.CLEANUP_TIMEOUT = STOP_TIMEOUT
        raise KeyboardInterrupt  # the launcher handles this as a request to stop

    # Composer sets handlers when imported that make the launcher print a traceback of where it waited.
    signal.signal(signal.SIGTERM, wait_for_checkpoints)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return launcher.main()


if __name__ == "__main__":
    sys.exit(main())
