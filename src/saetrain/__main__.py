"""``python -m saetrain``."""

from saetrain.cli import main

if __name__ == "__main__":
    main()
