"""torchrun, ended by the exit code of the process that failed first: its own is 1 whatever happened, and its
traceback buries the message of that process.
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

try:
    run(parse_args(sys.argv[1:]))
except ChildFailedError as error:
    _, failure = error.get_first_failure()
    # A process that a signal ended has the signal's negative number.
    sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
except SignalException as error:
    sys.exit(128 + error.sigval)
