"""Composer's launcher, with the patience that a checkpoint takes; arguments as for `composer`.

    python -m rankllm_composer.launch -n 8 rankllm_composer/train.py yamls/first_mistral.yaml

Asked to stop, `composer` passes that on and kills its ranks 30 s later, which may be in the middle of a checkpoint.
This one waits until they have ended by themselves: whoever asked has the last word. After a failure it waits no longer
than `composer` does.
"""

from __future__ import annotations

import datetime
import signal
import sys

PATIENCE = datetime.timedelta(hours=1)


def main() -> int:
    """Start the ranks of this machine, and end when they have. Returns the exit code."""
    from composer.cli import launcher

    def wait_for_checkpoints(number: int, frame: object) -> None:
        del number, frame
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked again it would give up at once
        launcher.CLEANUP_TIMEOUT = PATIENCE
        raise KeyboardInterrupt  # which the launcher takes for the wish to stop

    # Composer's own handlers, set as it is imported, make the launcher print a trace of where it waited.
    signal.signal(signal.SIGTERM, wait_for_checkpoints)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return launcher.main()


if __name__ == "__main__":
    sys.exit(main())
