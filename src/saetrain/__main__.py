"""Entry point of ``python -m saetrain``."""

import sys

if __name__ == "__main__":
    try:
        from saetrain.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()
