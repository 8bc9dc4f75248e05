"""Run torchrun and exit with the code of the process that failed first.

torchrun itself always exits with 1, and prints a traceback that hides the message of that process.
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

try:
    run(parse_args(sys.argv[1:]))
except ChildFailedError as error:
    _, failure = error.get_first_failure()
    # If a signal ended the process, its exit code is the negative signal number.
    sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
except SignalException as error:
    sys.exit(128 + error.sigval)
