"""``python -m provenn`` is the command ``provenn``."""

from provenn.cli import main

if __name__ == "__main__":
    main()
