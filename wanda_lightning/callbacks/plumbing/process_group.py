"""The end of a run of many processes."""

import atexit
from functools import cache

from torch import distributed


@cache
def leave_gloo_at_exit() -> None:
    """Leave gloo's process group when this process ends.

    Lightning leaves NCCL's only, and the process that holds gloo's store may then abort after everything is done
    (Lightning's issue 20620).
    """
    atexit.register(_leave_gloo)


def _leave_gloo() -> None:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
